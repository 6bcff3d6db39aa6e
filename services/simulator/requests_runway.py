"""A creation of the `runway` dialect: JSON, an image as a data URI."""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any, cast

from services.simulator import config, errors, jobs, requests

RATIOS = ("1280:720", "720:1280", "1104:832", "832:1104", "960:960", "1584:672")
_TEXT_RATIOS = ("1280:720", "720:1280")
_MODELS = ("gen4_turbo", "gen4.5")
_MAX_DATA_URI = 5 * 1024 * 1024
_MAX_PROMPT_UNITS = 1000
_MAX_SECONDS = 10


def check(fields: Mapping[str, object], settings: config.Settings, text: bool) -> requests.Creation:
    """The whole request, checked as the service does. Decodes the image: not for the event loop."""
    model = fields.get("model")
    allowed = ("gen4.5",) if text else _MODELS
    if not isinstance(model, str) or model not in allowed:
        raise errors.invalid_value("model", str(model)[:40], allowed)
    prompt = fields.get("promptText")
    if prompt is None and (text or model == "gen4.5"):
        raise errors.missing("promptText")
    if prompt is not None and len(str(prompt).encode("utf-16-le")) // 2 > _MAX_PROMPT_UNITS:
        message = f"promptText: at most {_MAX_PROMPT_UNITS} UTF-16 code units."
        raise errors.ApiError(400, message, param="promptText")
    ratio = fields.get("ratio")
    extra = tuple(size.replace("x", ":") for size in settings.extra_sizes)
    ratios = (*(_TEXT_RATIOS if text else RATIOS), *extra)
    if not isinstance(ratio, str) or ratio not in ratios:
        raise errors.invalid_value("ratio", str(ratio)[:40], ratios)
    duration = fields.get("duration", None if model == "gen4.5" else 10)
    if type(duration) is not int or not 1 <= duration <= _MAX_SECONDS:
        raise errors.ApiError(400, "duration: want an integer from 2 to 10.", param="duration")
    seed = fields.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= 4_294_967_295:
        raise errors.ApiError(400, "seed: want an integer from 0 to 4294967295.", param="seed")
    inputs, contents = (), {}
    if not text:
        image = _image(fields.get("promptImage"))
        requests.check_image(image, "promptImage", None)
        sha256 = hashlib.sha256(image).hexdigest()
        inputs, contents = (jobs.Input(sha256),), {sha256: image}
    return requests.Creation(
        dialect=jobs.RUNWAY,
        prompt=str(prompt or ""),
        model=model,
        size=ratio.replace(":", "x"),
        seconds=str(duration),
        inputs=inputs,
        contents=contents,
    )


def _image(given: object) -> bytes:
    param = "promptImage"
    if isinstance(given, list):
        if len(given) != 1 or not isinstance(given[0], dict):
            raise errors.ApiError(400, f"{param}: want one object with uri and position.")
        first = cast("dict[str, Any]", given[0])
        if first.get("position") != "first":
            raise errors.ApiError(400, f"{param}: this model takes an image at `first` only.")
        given = first.get("uri")
    if given is None:
        raise errors.missing(param)
    if not isinstance(given, str):
        raise errors.invalid_type(param, "a string or an array", given)
    head, comma, body = given.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        message = f"{param}: the simulator fetches nothing and keeps no uploads: send a data URI."
        raise errors.ApiError(400, message, param=param)
    if len(given) > _MAX_DATA_URI:
        raise errors.ApiError(400, f"{param}: a data URI is 5 MB at most.", param=param)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        raise errors.ApiError(400, f"{param}: not valid base64.", param=param) from None
