"""What a request for a video asks for: by its spec alone, or by a template that it fills."""

from __future__ import annotations

from dataclasses import dataclass

from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import template_pb2, video_pb2
from kit import errors
from services.gateway import catalogue, messages, store, templates, videos
from services.gateway.store import rows

_TYPES: dict[int, catalogue.OptionType] = {
    template_pb2.VARIABLE_TYPE_STRING: "string",
    template_pb2.VARIABLE_TYPE_INTEGER: "integer",
    template_pb2.VARIABLE_TYPE_NUMBER: "number",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, and the template that says so, where there is one."""

    spec: videos.Spec
    template_name: str = ""
    template_version: int = 0


async def asked(
    kept: store.TemplateStore,
    request: video_pb2.CreateVideoRequest | video_pb2.QuoteVideoRequest,
    account_id: str,
) -> Asked:
    """The spec, by the template that the request names. Raises NotFound, FailedPrecondition or InvalidArgument."""
    if not request.HasField("template"):
        if not request.HasField("spec"):
            raise invalid("spec", "is required, unless template says what to make")
        return Asked(messages.asked_spec(request.spec))
    if request.spec.prompt:
        raise invalid("spec.prompt", "must be empty with a template, which makes it")
    use = request.template
    owner = "" if use.name.startswith(templates.SHARED) else account_id
    found = await kept.get(owner, use.name, use.version)
    if found is None:
        raise not_found(use.name, use.version)
    if found.archived_at is not None:
        raise errors.FailedPrecondition(
            "TEMPLATE_ARCHIVED",
            f"{use.name} version {found.version} is out of use since {found.archived_at:%Y-%m-%d}: "
            "name another version or template",
        )
    definition = template_pb2.Template.FromString(found.definition)
    values = {name: messages.option(value) for name, value in use.variables.items()}
    spec = _merged(definition.spec, request.spec)
    spec.prompt = templates.fill(_template(found, definition), values)
    return Asked(messages.asked_spec(spec), found.name, found.version)


def not_found(name: str, version: int) -> errors.NotFound:
    """No such template, or not the caller's: not to be told apart."""
    which = f"template {name}" + (f" version {version}" if version else "")
    return errors.NotFound("TEMPLATE_NOT_FOUND", f"there is no {which}, or it is not yours")


def _merged(
    template: vocabulary_pb2.VideoSpec, request: vocabulary_pb2.VideoSpec
) -> vocabulary_pb2.VideoSpec:
    """The template's spec, but for what the request says: a size as a whole, options one by one."""
    made = vocabulary_pb2.VideoSpec()
    made.CopyFrom(template)
    if request.width or request.height:
        made.ClearField("width")
        made.ClearField("height")
    if request.rendition_heights:
        made.ClearField("rendition_heights")
    for name, value in request.options.items():
        made.options[name].CopyFrom(value)
    rest = vocabulary_pb2.VideoSpec()
    rest.CopyFrom(request)
    rest.ClearField("options")
    made.MergeFrom(rest)
    return made


def _template(found: rows.Template, definition: template_pb2.Template) -> templates.Template:
    variables = tuple(variable(each) for each in definition.variables)
    return templates.Template(found.name, found.version, definition.spec.prompt, variables)


def variable(given: template_pb2.TemplateVariable) -> templates.Variable:
    """A variable as it is kept."""
    text = given.type == template_pb2.VARIABLE_TYPE_STRING
    takes = catalogue.Option(
        name=given.name,
        type=_TYPES[given.type],
        min=given.min_length if text else templates.unset(_number(given, "min")),
        max=given.max_length if text else templates.unset(_number(given, "max")),
        choices=tuple(given.choices),
    )
    if not given.HasField("default_value"):
        return templates.Variable(takes)
    return templates.Variable(takes, messages.option(given.default_value))


def _number(given: template_pb2.TemplateVariable, field: str) -> float | None:
    return getattr(given, field) if given.HasField(field) else None  # pyright: ignore[reportArgumentType]


def invalid(field: str, rule: str) -> errors.InvalidArgument:
    """One field that is wrong."""
    return errors.InvalidArgument("INVALID_FIELD", f"{field}: {rule}", violations=[(field, rule)])
