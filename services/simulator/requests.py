"""What the dialects' requests have in common: reading a bounded body, the prompt, a checked creation."""

import dataclasses
import hashlib
import io
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import av
from PIL import Image
from starlette import datastructures, types
from starlette import requests as http

from services.simulator import errors, jobs, scenes

IMAGE_FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
MAX_PIXELS = 4096 * 4096  # of an input of any size
_MAX_PROMPT = 32_000
_CLIP_TOLERANCE_SECONDS = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """One file part of a multipart body."""

    name: str
    kind: str  # the media type, in lower case, without parameters
    content: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Creation:
    """A checked request, of either dialect."""

    dialect: str
    prompt: str
    model: str
    size: str
    seconds: str
    n_variants: int = 1
    inputs: tuple[jobs.Input, ...] = ()
    contents: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # of inputs, by hash
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def fingerprint(self) -> str:
        """Equal for equal requests: an idempotency key may not come back with another one."""
        parts: list[Any] = [self.dialect, self.prompt, self.model, self.size, self.seconds]
        parts += [self.n_variants, [dataclasses.astuple(item) for item in self.inputs]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


async def read_json(request: http.Request, max_body_bytes: int) -> dict[str, object]:
    """The body's fields. Raises ApiError, also on too long a body or another content type."""
    kind = content_type(request)
    if kind != "application/json":
        message = f"Unsupported content type: '{kind}'. Use JSON or multipart/form-data."
        raise errors.ApiError(400, message)
    try:
        fields = json.loads(await _bounded(request, max_body_bytes).body())
    except (ValueError, RecursionError):
        raise errors.ApiError(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(fields, dict):
        raise errors.ApiError(400, "The body of your request must be a JSON object.")
    return cast("dict[str, object]", fields)


async def read_parts(
    request: http.Request, max_body_bytes: int, max_files: int
) -> list[tuple[str, str | File]]:
    """The parts of a multipart body in order, by name. Raises ApiError."""
    parts: list[tuple[str, str | File]] = []
    bounded = _bounded(request, max_body_bytes)
    try:
        async with bounded.form(
            max_files=max_files, max_fields=64, max_part_size=max_body_bytes
        ) as form:
            for name, value in form.multi_items():
                is_file = isinstance(value, datastructures.UploadFile)
                parts.append((name, await _file_of(value) if is_file else value))
    except errors.ApiError:
        raise
    except Exception as error:  # the parser's own, and starlette's HTTPException around it
        detail = getattr(error, "detail", None) or str(error)
        raise errors.ApiError(400, f"We could not parse the multipart body: {detail}") from None
    return parts


def content_type(request: http.Request) -> str:
    """Of the body, without parameters."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


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
    return storable("prompt", prompt)


def storable(param: str, text: str) -> str:
    """Half a surrogate pair can be written in JSON and not be sent back: refused before a job is."""
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"Invalid '{param}': not valid Unicode."
        raise errors.ApiError(400, message, param=param, code="invalid_value") from None
    return text


def check_image(content: bytes, param: str, size: str | None) -> None:
    """Decodes the image; not for the event loop. Raises ApiError if it is none, or not of `size`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=tuple(IMAGE_FORMATS.values())) as image:
                fits = size in (None, f"{image.width}x{image.height}")
                if size is None and image.width * image.height > MAX_PIXELS:
                    raise ValueError("too many pixels")
                if fits:  # only an image of the asked size is worth the decoding
                    image.load()
    except Exception:  # Pillow raises about anything on hostile bytes
        message = "Invalid image: the file could not be decoded."
        raise errors.ApiError(400, message, param=param, code="invalid_image") from None
    if not fits:
        message = "Inpaint image must match the requested width and height"
        raise errors.ApiError(400, message, param=param)


def check_clip(content: bytes, param: str, most_seconds: float) -> None:
    """Raises ApiError unless it is a film of at most so long; its first frame is decoded."""
    try:
        seconds = _clip_seconds(content)
    except Exception:  # FFmpeg raises about anything on hostile bytes, as Pillow does
        message = "Invalid video: the file could not be decoded."
        raise errors.ApiError(400, message, param=param, code="invalid_video") from None
    if seconds > most_seconds + _CLIP_TOLERANCE_SECONDS:
        message = f"Invalid video: want at most {most_seconds:g} seconds, got {seconds:.2f}."
        raise errors.ApiError(400, message, param=param, code="invalid_value")


def _clip_seconds(content: bytes) -> float:
    """From the packets' own times: the header may say anything."""
    container_format = scenes.clip_format(content[:16])
    if container_format is None:
        raise ValueError("neither MP4 nor Matroska")
    with av.open(io.BytesIO(content), "r", format=container_format) as container:
        stream = container.streams.video[0]
        if not 0 < stream.width * stream.height <= MAX_PIXELS:
            raise ValueError("too many pixels")
        next(container.decode(stream))
    begin, end = math.inf, -math.inf
    with av.open(io.BytesIO(content), "r", format=container_format) as container:
        for packet in container.demux(container.streams.video[0]):
            if packet.pts is not None and packet.time_base is not None:
                begin = min(begin, float(packet.pts * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end - begin


async def _file_of(upload: datastructures.UploadFile) -> File:
    kind = (upload.content_type or "").split(";")[0].strip().lower()
    return File(upload.filename or "", kind, await upload.read())


def _bounded(request: http.Request, max_body_bytes: int) -> http.Request:
    """The request with a body that stops at the limit, whatever Content-Length claimed."""
    seen_bytes = 0

    async def receive() -> types.Message:
        nonlocal seen_bytes
        message = await request.receive()
        seen_bytes += len(message.get("body", b""))
        if seen_bytes > max_body_bytes:
            raise errors.ApiError(413, f"The body is larger than {max_body_bytes} bytes.")
        return message

    return http.Request(request.scope, receive)
