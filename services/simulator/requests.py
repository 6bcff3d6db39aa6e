"""A creation as the wire brings it: JSON, multipart with or without a file, bracketed keys."""

import base64
import binascii
import dataclasses
import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from typing import cast

from PIL import Image
from starlette import datastructures, types
from starlette import requests as http

from services.simulator import config, errors

_IMAGE_FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
_MAX_PROMPT = 32_000
_MAX_DATA_URL = 20_971_520
_MAX_METADATA = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Creation:
    """A checked request."""

    prompt: str
    model: str
    size: str
    seconds: str
    reference: bytes | None
    metadata: Mapping[str, str]

    @property
    def reference_sha256(self) -> str | None:
        """Of the image's bytes as received."""
        return None if self.reference is None else hashlib.sha256(self.reference).hexdigest()

    def fingerprint(self) -> str:
        """Equal for equal requests: an idempotency key may not come back with another one."""
        parts = (self.prompt, self.model, self.size, self.seconds, self.reference_sha256)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


async def read(request: http.Request, max_body_bytes: int) -> dict[str, object]:
    """The body's fields; a file part comes as bytes. Raises ApiError, also on too long a body."""
    bounded = http.Request(request.scope, _bounded(request, max_body_bytes))
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_multipart(bounded, max_body_bytes)
    if kind != "application/json":
        message = f"Unsupported content type: '{kind}'. Use JSON or multipart/form-data."
        raise errors.ApiError(400, message)
    try:
        fields = json.loads(await bounded.body())
    except (ValueError, RecursionError):
        raise errors.ApiError(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(fields, dict):
        raise errors.ApiError(400, "The body of your request must be a JSON object.")
    return cast("dict[str, object]", fields)


def prompt_of(fields: Mapping[str, object]) -> str:
    """The prompt, checked before all else: the fault tokens are in it."""
    prompt = fields.get("prompt")
    if prompt is None:
        raise errors.missing("prompt")
    if not isinstance(prompt, str):
        raise errors.invalid_type("prompt", "a string", prompt)
    if not 1 <= len(prompt) <= _MAX_PROMPT:
        message = f"Invalid 'prompt': want 1 to {_MAX_PROMPT} characters, got {len(prompt)}."
        raise errors.ApiError(400, message, param="prompt", code="invalid_value")
    return _storable("prompt", prompt)


def check(fields: Mapping[str, object], settings: config.Settings) -> Creation:
    """The whole request, checked as the service does. Decodes the image: not for the event loop."""
    model = fields.get("model", "sora-2")
    if not isinstance(model, str):
        raise errors.invalid_type("model", "a string", model)
    if model not in settings.models:
        raise errors.invalid_value("model", model, tuple(settings.models))
    size = _enum(fields, "size", settings.sizes_of(model))
    if "integer_seconds" in settings.quirks and type(fields.get("seconds")) is int:
        fields = {**fields, "seconds": str(fields["seconds"])}
    seconds = _enum(fields, "seconds", settings.all_seconds())
    reference = _reference(fields)
    if reference is not None:
        _check_image(reference, size)
    return Creation(
        prompt=prompt_of(fields),
        model=model,
        size=size,
        seconds=seconds,
        reference=reference,
        metadata=_metadata(fields),
    )


def _bounded(request: http.Request, max_body_bytes: int) -> types.Receive:
    """A receive that stops at the limit, whatever Content-Length claimed."""
    seen_bytes = 0

    async def receive() -> types.Message:
        nonlocal seen_bytes
        message = await request.receive()
        seen_bytes += len(message.get("body", b""))
        if seen_bytes > max_body_bytes:
            raise errors.ApiError(413, f"The body is larger than {max_body_bytes} bytes.")
        return message

    return receive


async def _read_multipart(request: http.Request, max_body_bytes: int) -> dict[str, object]:
    fields: dict[str, object] = {}
    try:
        async with request.form(max_files=1, max_fields=64, max_part_size=max_body_bytes) as form:
            for name, value in form.multi_items():
                content = (
                    await _file_of(value) if isinstance(value, datastructures.UploadFile) else value
                )
                _put(fields, name, content)
    except errors.ApiError:
        raise
    except Exception as error:  # the parser's own, and starlette's HTTPException around it
        detail = getattr(error, "detail", None) or str(error)
        raise errors.ApiError(400, f"We could not parse the multipart body: {detail}") from None
    return fields


async def _file_of(upload: datastructures.UploadFile) -> bytes:
    kind = (upload.content_type or "").split(";")[0].strip().lower()
    if kind not in _IMAGE_FORMATS:
        message = (
            f"Invalid file '{upload.filename}': unsupported mimetype ('{kind}'). Supported file"
            f" formats are {errors.choices(tuple(_IMAGE_FORMATS), 'and')}."
        )
        raise errors.ApiError(
            400, message, param="input_reference", code="unsupported_file_mimetype"
        )
    return await upload.read()


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


def _check_image(content: bytes, size: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=tuple(_IMAGE_FORMATS.values())) as image:
                fits = f"{image.width}x{image.height}" == size
                if fits:  # only an image of the asked size is worth the decoding
                    image.load()
    except Exception:  # Pillow raises about anything on hostile bytes
        message = "Invalid image: the file could not be decoded."
        raise errors.ApiError(400, message, param="input_reference", code="invalid_image") from None
    if not fits:
        message = "Inpaint image must match the requested width and height"
        raise errors.ApiError(400, message, param="input_reference")


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
        _storable("metadata", name + content)
    return cast("Mapping[str, str]", value)


def _storable(param: str, text: str) -> str:
    """Half a surrogate pair can be written in JSON and not be sent back: refused before a job is."""
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"Invalid '{param}': not valid Unicode."
        raise errors.ApiError(400, message, param=param, code="invalid_value") from None
    return text
