"""A creation of the `openai_videos` dialect: JSON, multipart with or without a file, bracketed keys."""

import base64
import binascii
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import cast

from starlette import requests as http

from services.simulator import config, errors, jobs, requests, scenes

_MAX_DATA_URL = 20_971_520
_MAX_METADATA = 16
_MAX_CLIP_SECONDS = 60.0
_CLIP_KINDS = ("video/mp4", "video/webm")


async def read(
    request: http.Request, max_body_bytes: int, quirks: Collection[str] = ()
) -> dict[str, object]:
    """The body's fields; a file part comes as bytes. Raises ApiError."""
    if requests.content_type(request) != "multipart/form-data":
        if "multipart_only" in quirks:
            raise errors.ApiError(422, "Field required: multipart/form-data is wanted.")
        return await requests.read_json(request, max_body_bytes)
    fields: dict[str, object] = {}
    for name, value in await requests.read_parts(request, max_body_bytes, max_files=1):
        _put(fields, name, _file_of(value, quirks) if isinstance(value, requests.File) else value)
    if "json_without_file" in quirks and "input_reference" not in fields:
        raise errors.ApiError(400, "input_reference file is required")
    return fields


def check(
    fields: Mapping[str, object], settings: config.Settings, quirks: Collection[str] = ()
) -> requests.Creation:
    """The whole request, checked as the service does. Decodes the image: not for the event loop."""
    model = fields.get("model", "sora-2")
    if not isinstance(model, str):
        raise errors.invalid_type("model", "a string", model)
    if model not in settings.models:
        raise errors.invalid_value("model", model, tuple(settings.models))
    if "sides" in quirks:
        fields = {**fields, "size": f"{fields.get('width')}x{fields.get('height')}"}
    size = _enum(fields, "size", settings.sizes_of(model))
    is_file = isinstance(fields.get("input_reference"), bytes)
    if "number_seconds" in quirks and isinstance(fields.get("seconds"), str) and not is_file:
        raise errors.ApiError(422, "Input should be a valid integer", param="seconds")
    if {"integer_seconds", "number_seconds"} & set(quirks) and type(fields.get("seconds")) is int:
        fields = {**fields, "seconds": str(fields["seconds"])}
    seconds = _enum(fields, "seconds", settings.all_seconds())
    reference = _reference(fields)
    inputs, contents = (), {}
    if reference is not None:
        is_clip = "video_reference" in quirks and scenes.clip_format(reference[:16]) is not None
        if is_clip:
            requests.check_clip(reference, "input_reference", _MAX_CLIP_SECONDS)
        else:
            requests.check_image(reference, "input_reference", size)
        sha256 = hashlib.sha256(reference).hexdigest()
        inputs = (jobs.Input(sha256, "video" if is_clip else "image"),)
        contents = {sha256: reference}
    return requests.Creation(
        dialect=jobs.OPENAI_VIDEOS,
        prompt=requests.prompt_of(fields),
        model=model,
        size=size,
        seconds=seconds,
        inputs=inputs,
        contents=contents,
        metadata=_metadata(fields),
    )


def _file_of(file: requests.File, quirks: Collection[str]) -> bytes:
    if "video_reference" in quirks and file.kind in _CLIP_KINDS:
        return file.content
    if file.kind not in requests.IMAGE_FORMATS:
        message = (
            f"Invalid file '{file.name}': unsupported mimetype ('{file.kind}'). Supported file"
            f" formats are {errors.choices(tuple(requests.IMAGE_FORMATS), 'and')}."
        )
        raise errors.ApiError(
            400, message, param="input_reference", code="unsupported_file_mimetype"
        )
    return file.content


def _put(fields: dict[str, object], name: str, value: object) -> None:
    """`a[b]=c` becomes `{"a": {"b": "c"}}`, as the official SDK flattens objects."""
    outer, bracket, rest = name.partition("[")
    if not bracket:
        fields[name] = value
        return
    nested = fields.setdefault(outer, {})
    if not rest.endswith("]") or not isinstance(nested, dict):
        raise errors.ApiError(400, f"Unknown parameter: '{name}'.", param=name)
    nested[rest[:-1]] = value


def _enum(fields: Mapping[str, object], param: str, allowed: tuple[str, ...]) -> str:
    default = {"seconds": "4", "size": "720x1280"}[param]
    value = fields.get(param, default)
    if not isinstance(value, str):
        raise errors.invalid_type(param, f"one of {errors.choices(allowed, 'or')}", value)
    if value not in allowed:
        raise errors.invalid_value(param, value, allowed)
    return value


def _reference(fields: Mapping[str, object]) -> bytes | None:
    param = "input_reference"
    value = fields.get(param)
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, dict):
        raise errors.invalid_type(param, "a file or an object", value)
    given = {name: content for name, content in value.items() if content is not None}
    if set(given) == {"file_id"}:
        raise errors.ApiError(400, "The simulator keeps no files: send the image.", param=param)
    url = given.get("image_url")
    if set(given) != {"image_url"} or not isinstance(url, str):
        message = f"Invalid '{param}': want exactly one of 'image_url' and 'file_id'."
        raise errors.ApiError(400, message, param=param, code="invalid_value")
    head, comma, body = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        message = f"Invalid '{param}.image_url': the simulator takes base64 data URLs only."
        raise errors.ApiError(400, message, param=param, code="invalid_value")
    if len(url) > _MAX_DATA_URL:
        message = f"Invalid '{param}.image_url': more than {_MAX_DATA_URL} characters."
        raise errors.ApiError(400, message, param=param, code="string_above_max_length")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        message = f"Invalid '{param}.image_url': not valid base64."
        raise errors.ApiError(400, message, param=param, code="invalid_value") from None


def _metadata(fields: Mapping[str, object]) -> Mapping[str, str]:
    value = fields.get("metadata") or {}
    if isinstance(value, str):  # one multipart field with JSON in it
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict) or len(value) > _MAX_METADATA:
        raise errors.invalid_type("metadata", f"at most {_MAX_METADATA} strings by name", value)
    for name, content in value.items():
        if not isinstance(content, str) or len(name) > 64 or len(content) > 512:
            raise errors.invalid_type(f"metadata.{name[:64]}", "a string up to 512", content)
        requests.storable("metadata", name + content)
    return cast("Mapping[str, str]", value)
