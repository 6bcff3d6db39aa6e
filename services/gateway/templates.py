"""Templates: prompts with holes, what may go into them, and what comes out. Pure.

`{name}` is a hole, `{{` and `}}` are braces. Values go in once and as they are, so that no value can make another hole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kit import errors
from services.gateway import catalogue

SHARED = "shared/"
MAX_PROMPT = 500
MAX_IN_USE = 1000
"""Versions in use that an account may have."""
FARTHEST = 1e15
"""Numbers lie within this distance of 0: beyond it, whole ones would not be exact."""
_NUMBER_CHARACTERS = 22
_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
Fault = tuple[str, str]
"""A field, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Variable:
    """What goes into the holes of a name: the same data as an option of a model."""

    takes: catalogue.Option
    default: catalogue.OptionValue | None = None

    @property
    def name(self) -> str:
        """As the holes say it."""
        return self.takes.name

    @property
    def longest(self) -> int:
        """Most characters that it becomes."""
        if self.takes.type == "string":
            return max(map(len, self.takes.choices), default=int(self.takes.max))
        if self.takes.type == "number":
            return _NUMBER_CHARACTERS
        return max(len(_text(self.takes, bound)) for bound in (self.takes.min, self.takes.max))


@dataclass(frozen=True, slots=True)
class Template:
    """A version of a template."""

    name: str
    version: int
    prompt: str
    variables: tuple[Variable, ...]


@dataclass(frozen=True, slots=True)
class Hole:
    """A place in a prompt that a variable fills."""

    name: str


def parts(prompt: str) -> Iterator[str | Hole | None]:
    """Texts and holes in their order; None for a brace that is neither."""
    for token in _TOKEN.findall(prompt):
        if token in ("{{", "}}"):
            yield token[0]
        elif token[0] == "{" and _NAME.fullmatch(token[1:-1]):
            yield Hole(token[1:-1])
        else:
            yield None if token[0] in "{}" else token


def faults(prompt: str, variables: Sequence[Variable]) -> Iterator[Fault]:
    """Everything that is wrong with a template that is to be made."""
    found = list(parts(prompt))
    holes = {part.name for part in found if isinstance(part, Hole)}
    if not prompt.strip():
        yield "spec.prompt", "must say what is to be seen"
    if None in found:
        yield "spec.prompt", "a hole is {name}; write {{ and }} for braces"
    names = [variable.name for variable in variables]
    for hole in sorted(holes - set(names)):
        yield "spec.prompt", f"no variable is for the hole {{{hole}}}"
    sound = True
    for number, variable in enumerate(variables):
        field = f"variables[{number}]"
        if variable.name in names[:number]:
            yield f"{field}.name", f"{variable.name} is there twice"
        elif variable.name not in holes:
            yield f"{field}.name", f"the prompt has no hole {{{variable.name}}}"
        wrong = list(_faults_of(variable, field))
        sound = sound and not wrong
        yield from wrong
    longest = _longest(found, variables) if sound else 0
    if longest > MAX_PROMPT:
        rule = f"can become {longest} characters long, at most {MAX_PROMPT}: let its variables be shorter"
        yield "spec.prompt", rule


def _longest(found: Sequence[str | Hole | None], variables: Sequence[Variable]) -> int:
    lengths = {variable.name: variable.longest for variable in variables}
    return sum(
        lengths.get(part.name, 0) if isinstance(part, Hole) else len(part or "") for part in found
    )


def _faults_of(variable: Variable, field: str) -> Iterator[Fault]:
    takes = variable.takes
    if takes.type == "string":
        if not takes.choices and not max(1, takes.min) <= takes.max:
            yield f"{field}.max_length", "must be set, and not below min_length"
            return
        if takes.choices and (takes.min or takes.max):
            yield f"{field}.choices", "have no length: leave min_length and max_length out"
            return
    elif not -FARTHEST <= takes.min <= takes.max <= FARTHEST:
        yield f"{field}.min", "must be set, as max, which is not below it; both within 1e15 of 0"
        return
    elif takes.choices:
        yield f"{field}.choices", "are a text's: a number has min and max"
        return
    elif takes.type == "integer" and not (takes.min.is_integer() and takes.max.is_integer()):
        yield f"{field}.min", "must be whole, as max"
        return
    if variable.default is not None and not takes.accepts(variable.default):
        yield f"{field}.default_value", f"must be {takes.describe()}"


def fill(template: Template, values: Mapping[str, catalogue.OptionValue | None]) -> str:
    """The prompt. Raises InvalidArgument/VARIABLES_INVALID that names each wrong, unknown or missing variable."""
    wrong = sorted(_wrong(template, values))
    if wrong:
        sentence = "; ".join(f"{field}: {rule}" for field, rule in wrong)
        raise errors.InvalidArgument(
            "VARIABLES_INVALID",
            f"{template.name} version {template.version}: {sentence}",
            violations=wrong,
            template=template.name,
            version=template.version,
        )
    filled = {
        variable.name: _text(variable.takes, values.get(variable.name, variable.default))
        for variable in template.variables
    }
    return "".join(
        filled[part.name] if isinstance(part, Hole) else part or ""
        for part in parts(template.prompt)
    )


def _wrong(
    template: Template, values: Mapping[str, catalogue.OptionValue | None]
) -> Iterator[Fault]:
    variables = {variable.name: variable for variable in template.variables}
    for name in values.keys() - variables.keys():
        listed = ", ".join(variables) or "none"
        yield f"template.variables.{name}", f"is no variable of the template; there are: {listed}"
    for name, variable in variables.items():
        if name not in values:
            if variable.default is None:
                yield f"template.variables.{name}", f"must be given: {variable.takes.describe()}"
        elif not variable.takes.accepts(values[name]):
            yield f"template.variables.{name}", f"must be {variable.takes.describe()}"


def _text(takes: catalogue.Option, value: catalogue.OptionValue | None) -> str:
    if takes.type == "string":
        return str(value)
    number = float(value or 0)
    return str(int(number)) if takes.type == "integer" else f"{number + 0.0:.15g}"


def unset(number: float | None) -> float:
    """A bound that is not set is none that anything could lie within."""
    return math.nan if number is None else number
