"""Templates: what may be made, and what filling one gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import errors
from services.gateway import catalogue, templates


def text(name: str, longest: int = 20, **rest: Any) -> templates.Variable:
    fields: dict[str, Any] = {"min": 0, "max": longest, "choices": (), **rest}
    default = fields.pop("default", None)
    return templates.Variable(catalogue.Option(name=name, type="string", **fields), default)


def number(name: str, low: float, high: float, kind: Any = "integer") -> templates.Variable:
    return templates.Variable(catalogue.Option(name=name, type=kind, min=low, max=high))


MOOD = text("mood", 0, choices=("calm", "wild"), default="calm")
CAT = templates.Template(
    "cat", 3, "A {{big}} {animal}, {mood}, {count} times, {animal}", (
        text("animal"), MOOD, number("count", 1, 9),
    ),
)  # fmt: skip


def test_holes_are_filled_and_braces_stay() -> None:
    filled = templates.fill(CAT, {"animal": "cat", "count": 3})
    assert filled == "A {big} cat, calm, 3 times, cat"
    # A value is text, whatever it looks like.
    filled = templates.fill(CAT, {"animal": "{mood} {{x}} }{", "count": 3.0, "mood": "wild"})
    assert filled == "A {big} {mood} {{x}} }{, wild, 3 times, {mood} {{x}} }{"


def test_each_wrong_variable_is_named() -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        templates.fill(CAT, {"mood": "sad", "count": 3.5, "colour": "red"})
    told = dict(refused.value.violations)
    assert refused.value.reason == "VARIABLES_INVALID"
    assert told == {
        "template.variables.animal": "must be given: animal (string, 0 to 20 characters)",
        "template.variables.mood": "must be mood (one of calm, wild)",
        "template.variables.count": "must be count (integer, 1 to 9)",
        "template.variables.colour": "is no variable of the template; there are: animal, mood, count",
    }
    assert all(rule in refused.value.message for rule in told.values())


BAD_VALUES = [None, True, "4", 0, 10, math.nan, math.inf]


@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_number_is_a_number_within_its_bounds(value: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="count"):
        templates.fill(CAT, {"animal": "x", "count": value})


BRACE = "a hole is {name}; write {{ and }} for braces"
BOUNDS = "must be set, as max, which is not below it; both within 1e15 of 0"
LENGTH = "must be set, and not below min_length"
CHOICES = "have no length: leave min_length and max_length out"
TOO_LONG = "can become 501 characters long, at most 500: let its variables be shorter"
FAULTS: list[tuple[str, list[templates.Variable], str, str]] = [
    ("a {b", [], "spec.prompt", BRACE),
    ("a } b", [], "spec.prompt", BRACE),
    ("{a.b} {0} {A}", [], "spec.prompt", BRACE),
    ("{}", [], "spec.prompt", BRACE),
    (" \n", [], "spec.prompt", "must say what is to be seen"),
    ("a {b}", [], "spec.prompt", "no variable is for the hole {b}"),
    ("a {{b}}", [text("b")], "variables[0].name", "the prompt has no hole {b}"),
    ("{b}", [text("b"), text("b")], "variables[1].name", "b is there twice"),
    ("{b}", [text("b", 0)], "variables[0].max_length", LENGTH),
    ("{b}", [text("b", 3, min=4)], "variables[0].max_length", LENGTH),
    ("{b}", [text("b", 3, choices=("x",))], "variables[0].choices", CHOICES),
    ("{b}", [number("b", 3, 2)], "variables[0].min", BOUNDS),
    ("{b}", [number("b", math.nan, 2)], "variables[0].min", BOUNDS),
    ("{b}", [number("b", 0, 2e15)], "variables[0].min", BOUNDS),
    ("{b}", [number("b", 0.5, 2)], "variables[0].min", "must be whole, as max"),
    ("{b}", [text("b", 3, default="four")], "variables[0].default_value", "must be b (string, 0 to 3 characters)"),
    ("{b} {b}", [text("b", 250)], "spec.prompt", TOO_LONG),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "variables", "field", "rule"), FAULTS)
def test_what_is_wrong_with_a_template_is_named(
    prompt: str, variables: list[templates.Variable], field: str, rule: str
) -> None:
    assert list(templates.faults(prompt, variables)) == [(field, rule)]


def test_a_number_with_choices_is_none() -> None:
    takes = catalogue.Option(name="b", type="integer", min=0, max=1, choices=("x",))
    (fault,) = templates.faults("{b}", [templates.Variable(takes)])
    assert fault == ("variables[0].choices", "are a text's: a number has min and max")


def test_every_fault_is_told_at_once() -> None:
    found = list(templates.faults("{a} {", [text("b", 0), number("c", 2, 1)]))
    assert len(found) == 6


def variables() -> st.SearchStrategy[templates.Variable]:
    names = st.from_regex(r"[a-z][a-z0-9_]{0,4}", fullmatch=True)
    bounds = st.tuples(*[st.floats(-1e15, 1e15)] * 2).map(sorted)
    whole = st.tuples(*[st.integers(-(10**15), 10**15)] * 2).map(sorted)
    return st.one_of(
        st.builds(text, names, st.integers(1, 40)),
        st.builds(
            lambda n, some: text(n, 0, choices=tuple(some)),
            names,
            st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3),
        ),
        st.builds(lambda n, b: number(n, b[0], b[1], "number"), names, bounds),
        st.builds(lambda n, b: number(n, float(b[0]), float(b[1])), names, whole),
    )


def value(variable: templates.Variable) -> st.SearchStrategy[Any]:
    takes = variable.takes
    if takes.type == "string":
        if takes.choices:
            return st.sampled_from(takes.choices)
        return st.text(max_size=int(takes.max)) | st.sampled_from(["{a}", "}}", "{{"]).filter(
            lambda one: len(one) <= takes.max
        )
    if takes.type == "number":
        return st.floats(takes.min, takes.max)
    return st.integers(int(takes.min), int(takes.max))


@given(st.data())
def test_whatever_a_sound_template_is_filled_with_fits_and_stays_as_it_is(data: Any) -> None:
    given_ = data.draw(st.lists(variables(), max_size=4, unique_by=lambda one: one.name))
    literals = data.draw(
        st.lists(st.text(max_size=20), min_size=len(given_) + 1, max_size=len(given_) + 1)
    )
    prompt, expected = "", ""
    values: dict[str, Any] = {}
    for literal, variable in zip(literals, [*given_, None], strict=True):
        prompt += literal.replace("{", "{{").replace("}", "}}")
        expected += literal
        if variable is not None:
            prompt += f"{{{variable.name}}}"
            values[variable.name] = data.draw(value(variable))
            shown = values[variable.name]
            if variable.takes.type == "number":
                shown = f"{shown + 0.0:.15g}"
            expected += str(shown)
    found = list(templates.faults(prompt, given_))
    assert all(field == "spec.prompt" for field, _ in found)
    if not found:
        filled = templates.fill(templates.Template("t", 1, prompt, tuple(given_)), values)
        assert filled == expected
        assert len(filled) <= templates.MAX_PROMPT


@given(st.text(alphabet="{}ab_ 0", max_size=30))
def test_any_text_is_read(prompt: str) -> None:
    found = list(templates.parts(prompt))
    if None not in found:
        back = "".join(
            f"{{{part.name}}}"
            if isinstance(part, templates.Hole)
            else (part or "").replace("{", "{{").replace("}", "}}")
            for part in found
        )
        assert back == prompt
