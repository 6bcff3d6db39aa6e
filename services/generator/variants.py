"""How the living servers of a dialect differ, as data: what `variants` of `providers.yaml` says, checked. Pure.

What servers answer is read generously by the dialect's client, whoever they are; a variant is what has to be *sent*
differently, and the few answers that one server means otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "body": ("multipart", "json", "json_for_text"),
    "image": ("file", "object"),
    "seconds": ("text", "integer"),
    "size": ("size", "sides"),
    "key_header": ("authorization", "api-key", "none"),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of server. The defaults are what the official SDK sends."""

    body: str = "multipart"
    """Of a create: `multipart`, `json`, or `json_for_text` (multipart where there is an image)."""
    image: str = "file"
    """In multipart a file; in JSON always the object with a data URL, which `object` sends in multipart too."""
    input_video: bool = False
    """Whether the file may be a video. Of those that take multipart."""
    seconds: str = "text"
    """In JSON: `text` or `integer`. A form knows text only."""
    size: str = "size"
    """`size` as `WxH`, or the `sides`, `width` and `height`."""
    key_header: str = "authorization"
    api_version: str = ""
    """The query's `api-version`, where one is wanted."""
    has_list: bool = True
    """Whether there is a list whose ids are those that a create answers."""
    not_ready_statuses: tuple[int, ...] = (404, 409, 410, 425)
    """How content that is not there yet is answered."""


def parse(data: Mapping[str, Any]) -> Variant:
    """A variant from its entry. Raises ValueError with what is wrong."""
    values = dict(data)
    known = {field.name for field in fields(Variant)}
    if strange := sorted(set(values) - known):
        raise ValueError(f"no difference is called {strange[0]}; want some of {sorted(known)}")
    for name, allowed in _CHOICES.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is none of {allowed}")
    for name in ("has_list", "input_video"):
        if not isinstance(values.get(name, True), bool):
            raise ValueError(f"{name} is neither true nor false")
    if values.get("input_video") and values.get("body", "multipart") == "json":
        raise ValueError("input_video: a video goes in a form only, and body is json")
    statuses = values.get("not_ready_statuses", Variant().not_ready_statuses)
    if not all(isinstance(status, int) and 400 <= status < 500 for status in statuses):
        raise ValueError("not_ready_statuses is not a list of statuses from 400 to 499")
    return Variant(**{**values, "not_ready_statuses": tuple(statuses)})
