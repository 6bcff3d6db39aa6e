"""The commands about templates, and how a command says that a video is made from one."""

from __future__ import annotations

import json
import re
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from framewire import client, encode, templates, types
from framewire.cli import inputs, options, output, running

made_by_name = typer.Typer(no_args_is_help=True, help="Prompts with holes, by name and version.")
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A name, or shared/NAME for one that is everyone's.")
]
Version = Annotated[
    int, typer.Option(min=0, help="Which version.", show_default="the latest in use")
]
Template = Annotated[
    str,
    typer.Option(
        metavar="NAME[@VERSION]",
        help="The template that makes the prompt, as `framewire template list` shows them.",
        show_default=False,
    ),
]
Values = Annotated[
    list[str],
    typer.Option(
        "--var",
        metavar="NAME=VALUE",
        help="A variable of the template. May be repeated.",
        show_default=False,
    ),
]
_KEYS = frozenset({"prompt", "description", "variables"}) | encode.SpecFields.__annotations__.keys()
_VARIABLE_KEYS = frozenset(field.name for field in fields_of(templates.Variable))


async def used(opened: client.Client, name: str, values: list[str]) -> types.TemplateUse | None:
    """The template with its values, numbers where it wants numbers; None where none is named."""
    if not name:
        if values:
            raise output.usage("--var is for a template: name it with --template")
        return None
    name, version = _named(name)
    kinds = {
        each.name: each.type
        for each in (await opened.get_template(name, version=version)).variables
    }
    found: dict[str, types.OptionValue] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise output.usage(f"{text!r} is no variable; give for instance animal=cat")
        found[key] = value if kinds.get(key) in (None, "STRING") else _number(value)
    return types.TemplateUse(name, found, version)


def create(
    prompt: Annotated[
        str,
        typer.Argument(metavar="[PROMPT]", help="What is to be seen; left out with --template."),
    ] = "",
    template: Template = "",
    values: Values = [],  # noqa: B006 (typer reads it)
    images: inputs.Images = [],  # noqa: B006
    model: options.Model = "",
    seconds: options.Seconds = 0,
    size: options.Size = "",
    variants: options.Variants = 0,
    lane: options.Lane = "",
    max_credits: Annotated[int | None, typer.Option(min=0, help="Refuse above this price.")] = None,
    request_id: Annotated[
        str, typer.Option(help="A UUID; given again, the same request is paid once.")
    ] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Ask for a video and do not wait for it: `framewire watch ID` does."""
    if bool(prompt) == bool(template):
        raise output.usage("give PROMPT or --template, one of the two")
    fields = client.VideoFields(
        **options.spec_fields(model, seconds, size, variants), lane=lane, max_credits=max_credits
    )
    request_id = request_id or client.new_request_id()
    given = inputs.given(images, None, "", "")

    async def work(opened: client.Client) -> None:
        fields["template"] = await used(opened, template, values)
        fields["inputs"] = await opened.upload_inputs(given.images or None, request_id=request_id)
        made = await opened.create_video(prompt, request_id=request_id, **fields)
        if as_json:
            output.print_json(made)
        else:
            output.print_facts(output.video_facts(made))

    def interrupted() -> str:
        return f"To go on, run the same command with --request-id {request_id}"

    running.with_client(work, address, api_key, account, interrupted=interrupted)


@made_by_name.command("create")
def create_template(
    name: Name,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help='JSON: "prompt", "variables": [{"name": ..., "max_length": ...}, ...], and as needed '
            '"description", "model", "seconds", ...',
        ),
    ],
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Make a template, or a further version of it."""
    prompt, description, variables, rest = _read(file)

    async def work(opened: client.Client) -> None:
        made = await opened.create_template(
            name, prompt, variables, description=description, **rest
        )
        _show(made, as_json)

    running.with_client(work, address, api_key, account, for_account=not _everyones(name))


@made_by_name.command("list")
def list_templates(
    name: Annotated[
        str,
        typer.Argument(metavar="[NAME]", help="All versions of this one. Default: every template."),
    ] = "",
    archived: Annotated[bool, typer.Option("--archived", help="Archived ones too.")] = False,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """List the account's templates and those that are everyone's."""

    async def work(opened: client.Client) -> None:
        found = [each async for each in opened.list_templates(name, archived=archived)]
        if as_json:
            for each in found:
                output.print_json(each)
            return
        rows = (
            (
                each.name,
                each.version,
                " ".join(variable.name for variable in each.variables),
                each.description,
                output.clock(each.created_at),
                output.clock(each.archived_at),
            )
            for each in found
        )
        columns = ("template", "version", "variables", "description", "created", "archived")
        output.print_table(columns, rows)

    running.with_client(work, address, api_key, account, for_account=not _everyones(name))


@made_by_name.command("show")
def show_template(
    name: Name,
    version: Version = 0,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show a template and what its variables take."""

    async def work(opened: client.Client) -> None:
        _show(await opened.get_template(name, version=version), as_json)

    running.with_client(work, address, api_key, account, for_account=not _everyones(name))


@made_by_name.command("archive")
def archive_template(
    name: Name,
    version: Annotated[
        int, typer.Option(min=0, help="Which version.", show_default="all that there are")
    ] = 0,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Take a template out of use; videos that were made from it stay."""

    async def work(opened: client.Client) -> None:
        _show(await opened.archive_template(name, version=version), as_json)

    running.with_client(work, address, api_key, account, for_account=not _everyones(name))


def _everyones(name: str) -> bool:
    return name.startswith("shared/")


def _named(text: str) -> tuple[str, int]:
    name, _, version = text.partition("@")
    if not re.fullmatch(r"\d{0,9}", version):
        raise output.usage(f"{text!r} is no template; give NAME or NAME@VERSION")
    return name, int(version or 0)


def _number(text: str) -> types.OptionValue:
    """A number where it is one; what is none stays a text, which the gateway refuses by name."""
    try:
        return float(text)
    except ValueError:
        return text


def _read(file: Path) -> tuple[str, str, list[templates.Variable], client.SpecFields]:
    try:
        item: Any = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise output.usage(f"cannot read {file}: {error}") from None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise output.usage(f'{file}: give an object with a "prompt"')
    _known(f"{file}", item, _KEYS)
    variables: list[templates.Variable] = []
    for number, each in enumerate(item.pop("variables", [])):
        where = f"{file}: variables[{number}]"
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            raise output.usage(f'{where}: give an object with a "name"')
        _known(where, each, _VARIABLE_KEYS)
        variables.append(templates.Variable(**{**each, "choices": tuple(each.get("choices", ()))}))
    prompt, description = item.pop("prompt"), item.pop("description", "")
    return prompt, description, variables, cast("client.SpecFields", item)


def _known(where: str, item: dict[str, Any], names: frozenset[str]) -> None:
    if unknown := sorted(item.keys() - names):
        raise output.usage(f"{where}: there is no {unknown[0]!r}; there are: {sorted(names)}")


def _show(shown: templates.Template, as_json: bool) -> None:
    if as_json:
        output.print_json(shown)
        return
    output.print_facts(
        [
            ("template", f"{shown.name} version {shown.version}"),
            ("description", shown.description),
            ("prompt", shown.spec.prompt),
            ("model", shown.spec.model),
            ("created", output.clock(shown.created_at)),
            ("archived", output.clock(shown.archived_at)),
            *((f"{{{each.name}}}", _takes(each)) for each in shown.variables),
        ]
    )


def _takes(each: templates.Variable) -> str:
    if each.choices:
        takes = "one of " + ", ".join(each.choices)
    elif each.type == "STRING":
        takes = f"{each.min_length} to {each.max_length} characters"
    else:
        takes = f"{each.type.lower()}, {each.min or 0:.15g} to {each.max or 0:.15g}"
    default = "" if each.default_value is None else f"; {each.default_value} unless told"
    return f"{takes}{default}" + (f" ({each.description})" if each.description else "")
