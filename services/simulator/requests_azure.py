"""A creation of the `azure_jobs` dialect: JSON for text, multipart with `inpaint_items` and `files`."""

import collections
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from starlette import requests as http

from services.simulator import config, errors, jobs, requests, scenes

# By the shorter side: the most variants and the most seconds.
_TIERS = ((1080, 1, 10), (720, 2, 20), (0, 4, 20))
SIZES = (
    "480x480",
    "854x480",
    "480x854",
    "720x720",
    "1280x720",
    "720x1280",
    "1080x1080",
    "1920x1080",
    "1080x1920",
)
_EDGES = {
    "left_fraction": 0.0,
    "top_fraction": 0.0,
    "right_fraction": 1.0,
    "bottom_fraction": 1.0,
}
_ITEM_FIELDS = {"frame_index", "type", "file_name", "crop_bounds"}
_MAX_IMAGES = 2
_MAX_CLIP_SECONDS = 5.0
_MAX_FILE_NAME = 255


async def read(request: http.Request, max_body_bytes: int) -> dict[str, object]:
    """The body's fields, of which `files` is a list; multipart's whole numbers are made such.

    Raises ApiError.
    """
    if requests.content_type(request) != "multipart/form-data":
        fields = await requests.read_json(request, max_body_bytes)
        for name in ("inpaint_items", "files"):
            if fields.get(name) is not None:
                message = f"'{name}' is taken in multipart/form-data only."
                raise errors.ApiError(400, message, param=name)
        return fields
    fields, files = {}, []
    # One more than can be right: then the answer says what is wrong.
    for name, value in await requests.read_parts(request, max_body_bytes, _MAX_IMAGES + 1):
        if isinstance(value, requests.File) != (name == "files"):
            want = "a file part" if name == "files" else "a text part"
            raise errors.ApiError(400, f"Invalid '{name}': want {want}.", param=name)
        if isinstance(value, requests.File):
            files.append(value)
        elif name in fields:
            raise errors.ApiError(400, f"Duplicate parameter: '{name}'.", param=name)
        else:
            fields[name] = value
    for name in ("height", "width", "n_seconds", "n_variants"):
        text = fields.get(name)
        if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10:
            fields[name] = int(text)
    return {**fields, "files": files}


def check(fields: Mapping[str, object], settings: config.Settings) -> requests.Creation:
    """The whole request, checked as the service does. Decodes the inputs: not for the event loop."""
    model = fields.get("model")
    if model is None:
        raise errors.missing("model")
    if not isinstance(model, str):
        raise errors.invalid_type("model", "a string", model)
    if model not in settings.azure_deployments:
        raise errors.no_deployment(model)
    size = _size(fields, settings)
    _, max_variants, max_seconds = _tier(size)
    n_seconds = _integer(fields, "n_seconds", 5, 1, max_seconds, size)
    n_variants = _integer(fields, "n_variants", 1, 1, max_variants, size)
    inputs: tuple[jobs.Input, ...] = ()
    contents: dict[str, bytes] = {}
    if "files" in fields:
        files = cast("list[requests.File]", fields["files"])
        if not files:
            raise errors.missing("files")
        frame_count = n_seconds * settings.frames_per_second
        inputs = _inputs(_items(fields.get("inpaint_items")), files, frame_count)
        contents = {hashlib.sha256(file.content).hexdigest(): file.content for file in files}
    return requests.Creation(
        dialect=jobs.AZURE_JOBS,
        prompt=requests.prompt_of(fields),
        model=requests.storable("model", model),
        size=size,
        seconds=str(n_seconds),
        n_variants=n_variants,
        inputs=inputs,
        contents=contents,
    )


def _size(fields: Mapping[str, object], settings: config.Settings) -> str:
    sides = []
    for param in ("height", "width"):
        value = fields.get(param)
        if value is None:
            raise errors.missing(param)
        if type(value) is not int:
            raise errors.invalid_type(param, "an integer", value)
        sides.append(value)
    size, allowed = f"{sides[1]}x{sides[0]}", tuple(dict.fromkeys((*SIZES, *settings.extra_sizes)))
    if size not in allowed:
        raise errors.invalid_value("width", size[:40], allowed)
    return size


def _tier(size: str) -> tuple[int, int, int]:
    side = min(int(part) for part in size.split("x"))
    return next(tier for tier in _TIERS if side >= tier[0])


def _integer(
    fields: Mapping[str, object], param: str, default: int, least: int, most: int, size: str
) -> int:
    value = fields.get(param)
    if value is None:
        return default
    if type(value) is not int:
        raise errors.invalid_type(param, "an integer", value)
    if not least <= value <= most:
        message = f"Invalid '{param}': want {least} to {most} for {size}, got {str(value)[:20]}."
        raise errors.ApiError(400, message, param=param, code="invalid_value")
    return value


def _items(text: object) -> list[dict[str, Any]]:
    """The items of the JSON string, each with its types checked and its defaults filled in."""
    param = "inpaint_items"
    if text is None:
        raise errors.missing(param)
    try:
        items = json.loads(str(text))
    except (ValueError, RecursionError):
        message = f"Invalid '{param}': want one field with a JSON array in it."
        raise errors.ApiError(400, message, param=param, code="invalid_value") from None
    if not isinstance(items, list) or not items:
        raise errors.invalid_type(param, "an array of at least one object", items)
    for number, item in enumerate(items):
        _check_item(item, f"{param}[{number}]")
    kinds = collections.Counter(item["type"] for item in items)
    if kinds["image"] > _MAX_IMAGES or kinds["video"] > 1 or len(kinds) > 1:
        message = f"Invalid '{param}': want at most {_MAX_IMAGES} images, or one video."
        raise errors.ApiError(400, message, param=param, code="invalid_value")
    return items


def _check_item(item: object, where: str) -> None:
    if not isinstance(item, dict):
        raise errors.invalid_type(where, "an object", item)
    if strange := sorted(set(item) - _ITEM_FIELDS):
        name = f"{where}.{strange[0][:40]}"
        raise errors.ApiError(400, f"Unknown parameter: '{name}'.", param=name)
    for field in ("type", "file_name"):
        if field not in item:
            raise errors.missing(f"{where}.{field}")
    if item["type"] not in ("image", "video"):
        raise errors.invalid_value(f"{where}.type", str(item["type"])[:40], ("image", "video"))
    if not isinstance(item["file_name"], str):
        raise errors.invalid_type(f"{where}.file_name", "a string", item["file_name"])
    if type(item.setdefault("frame_index", 0)) is not int:
        raise errors.invalid_type(f"{where}.frame_index", "an integer", item["frame_index"])


def _inputs(
    items: Sequence[Mapping[str, Any]], files: Sequence[requests.File], frame_count: int
) -> tuple[jobs.Input, ...]:
    """One input an item, its file found by name and checked for being what the item says."""
    by_name = {file.name: file for file in files}
    if len(by_name) != len(files):
        raise errors.ApiError(400, "Invalid 'files': two have one name.", param="files")
    if left_over := sorted(set(by_name) - {item["file_name"] for item in items}):
        message = f"Invalid 'files': no inpaint item names '{left_over[0][:_MAX_FILE_NAME]}'."
        raise errors.ApiError(400, message, param="files")
    inputs = []
    for number, item in enumerate(items):
        where, name, frame_index = (
            f"inpaint_items[{number}]",
            item["file_name"],
            item["frame_index"],
        )
        requests.storable(f"{where}.file_name", name)
        file = by_name.get(name)
        if file is None or not name or len(name) > _MAX_FILE_NAME:
            message = f"Invalid '{where}.file_name': no file is named '{name[:_MAX_FILE_NAME]}'."
            raise errors.ApiError(400, message, param=f"{where}.file_name")
        if not 0 <= frame_index < frame_count:
            message = f"Invalid '{where}.frame_index': want 0 to {frame_count - 1}."
            raise errors.ApiError(400, message, param=f"{where}.frame_index")
        crop = _crop(item.get("crop_bounds"), f"{where}.crop_bounds")
        if item["type"] == "image":
            requests.check_image(file.content, "files", None)
        else:
            requests.check_clip(file.content, "files", _MAX_CLIP_SECONDS)
        sha256 = hashlib.sha256(file.content).hexdigest()
        inputs.append(jobs.Input(sha256, item["type"], frame_index, name, crop))
    return tuple(inputs)


def _crop(bounds: object, where: str) -> scenes.Crop:
    if bounds is None:
        bounds = {}
    if not isinstance(bounds, dict):
        raise errors.invalid_type(where, "an object", bounds)
    if strange := sorted(set(bounds) - set(_EDGES)):
        raise errors.ApiError(400, f"Unknown parameter: '{where}.{strange[0][:40]}'.", param=where)
    fractions = []
    for name, default in _EDGES.items():
        value = bounds.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise errors.invalid_type(f"{where}.{name}", "a number", value)
        if not 0 <= value <= 1 or not math.isfinite(value):
            message = f"Invalid '{where}.{name}': want a number from 0 to 1."
            raise errors.ApiError(400, message, param=f"{where}.{name}", code="invalid_value")
        fractions.append(float(value))
    left, top, right, bottom = fractions
    if left >= right or top >= bottom:
        message = f"Invalid '{where}': want left less than right and top less than bottom."
        raise errors.ApiError(400, message, param=where, code="invalid_value")
    return left, top, right, bottom
