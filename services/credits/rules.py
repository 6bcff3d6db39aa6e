"""Price books and refund policies: what an item costs, and how much of that is taken for how a video ended.

Pure. Both are data, read from documents that are checked whole before they are used; a version never changes.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from kit import errors

VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_MODELS = 1000
_MOST_SIZES = 100
_MOST_OPTIONS = 16

Path = tuple[str | int, ...]


class RulesError(ValueError):
    """A document that is no price book or refund policy: what is wrong, and the keys that lead there."""

    def __init__(self, what: str, path: Path = ()) -> None:
        super().__init__(f"{_spelled(path)} {what}" if path else what)
        self.path = path


class Kind(enum.StrEnum):
    """Kinds of rulebooks."""

    PRICE_BOOK = "PRICE_BOOK"
    REFUND_POLICY = "REFUND_POLICY"


class Lane(enum.StrEnum):
    """Queue classes."""

    VIP = "VIP"
    STANDARD = "STANDARD"
    BATCH = "BATCH"


class Cause(enum.StrEnum):
    """Why a video ended as it did; the contract's names without their prefix."""

    NONE = "NONE"
    INPUT_REFUSED = "INPUT_REFUSED"
    OUTPUT_REFUSED = "OUTPUT_REFUSED"
    REQUEST_INVALID = "REQUEST_INVALID"
    PROVIDER_ERROR = "PROVIDER_ERROR"
    PROVIDER_LOST = "PROVIDER_LOST"
    TIMEOUT = "TIMEOUT"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    UNRESOLVED = "UNRESOLVED"
    OUTPUT_UNUSABLE = "OUTPUT_UNUSABLE"
    MODEL_RETIRED = "MODEL_RETIRED"
    CANCELLED_BEFORE_SUBMIT = "CANCELLED_BEFORE_SUBMIT"
    CANCELLED_AFTER_SUBMIT = "CANCELLED_AFTER_SUBMIT"
    POISON_JOB = "POISON_JOB"
    INTERNAL = "INTERNAL"


class Stage(enum.StrEnum):
    """Where in its life a video ended; the contract's names without their prefix."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    SUBMITTING = "SUBMITTING"
    RENDERING = "RENDERING"
    FETCHING = "FETCHING"
    STORING = "STORING"
    UNRESOLVED = "UNRESOLVED"
    CANCELLING = "CANCELLING"
    DONE = "DONE"


@dataclass(frozen=True, slots=True)
class Item:
    """What is priced: a normalised video."""

    model: str
    width: int
    height: int
    seconds: int
    variants: int
    lane: Lane
    options: tuple[tuple[str, str], ...] = ()
    """Those that may be charged for, by name."""

    def fields(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        plain = {
            "model": self.model,
            "width": self.width,
            "height": self.height,
            "seconds": self.seconds,
            "variants": self.variants,
            "lane": self.lane,
        }
        # Left out where there are none: items of before are the same as ever.
        return {**plain, "options": dict(self.options)} if self.options else plain


def item_from(fields: Mapping[str, Any]) -> Item:
    """The item that `fields` gave."""
    options = tuple(sorted(fields.get("options", {}).items()))
    return Item(**{**fields, "lane": Lane(fields["lane"]), "options": options})


@dataclass(frozen=True, slots=True)
class SizeClass:
    """What a minute costs in frames of at most so many pixels."""

    max_pixels: int
    credits_per_minute: int


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """The prices of a model; size classes from small to large."""

    minimum_credits: int
    sizes: tuple[SizeClass, ...]
    option_percent: Mapping[str, Mapping[str, int]]
    """What each value of an option that is charged for makes of the price, in percent."""


@dataclass(frozen=True, slots=True)
class PriceBook:
    """What items cost."""

    version: str
    models: Mapping[str, ModelPrice]
    lane_percent: Mapping[Lane, int]

    def price(self, item: Item) -> int:
        """Whole credits, each video rounded up. Raises InvalidArgument/NO_PRICE."""
        model = self.models.get(item.model)
        pixels = item.width * item.height
        sizes = [size for size in (model.sizes if model else ()) if pixels <= size.max_pixels]
        if model is None or not sizes:
            raise errors.InvalidArgument(
                "NO_PRICE",
                f"price book {self.version} has no price for {item.model[:64]} at "
                f"{item.width}x{item.height}: choose another model or size",
            )
        numerator = sizes[0].credits_per_minute * item.seconds * self.lane_percent[item.lane]
        denominator = 60 * 100
        for name, value in item.options:
            percent = model.option_percent.get(name, {}).get(value)
            if percent is None:
                raise errors.InvalidArgument(
                    "NO_PRICE",
                    f"price book {self.version} has no price for {name} {value[:64]} of "
                    f"{item.model}: choose another value, or leave the option out",
                )
            numerator, denominator = numerator * percent, denominator * 100
        each = -(-numerator // denominator)
        return max(model.minimum_credits, each) * item.variants


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a video ended, as far as money is concerned. Durations are those measured of each output, 0: not known."""

    video_id: str
    account_id: str
    cause: Cause
    stage: Stage
    durations_ms: tuple[int, ...] = ()

    def fields(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def verdict_from(fields: Mapping[str, Any]) -> Verdict:
    """The verdict that `fields` gave."""
    return Verdict(
        video_id=fields["video_id"],
        account_id=fields["account_id"],
        cause=Cause(fields["cause"]),
        stage=Stage(fields["stage"]),
        durations_ms=tuple(fields["durations_ms"]),
    )


@dataclass(frozen=True, slots=True)
class RefundPolicy:
    """How much of a hold is taken, by cause and stage; a stage that is not named has the cause's default."""

    version: str
    percent: Mapping[Cause, int]
    stage_percent: Mapping[tuple[Cause, Stage], int]
    full_length_percent: int

    def captured(self, reserved: int, item: Item, verdict: Verdict) -> int:
        """Credits to take of `reserved`, rounded down: in the customer's favour."""
        key = (verdict.cause, verdict.stage)
        percent = self.stage_percent.get(key, self.percent[verdict.cause])
        if verdict.cause is not Cause.NONE:
            return reserved * percent // 100
        asked = item.variants * item.seconds * 1000
        return reserved * percent * min(asked, self._delivered(item, verdict)) // (100 * asked)

    def _delivered(self, item: Item, verdict: Verdict) -> int:
        """Milliseconds to pay for. Providers round a length: near enough is full."""
        full = item.seconds * 1000
        enough = full * self.full_length_percent // 100
        return sum(ms if 0 < ms < enough else full for ms in verdict.durations_ms)


def content_hash(document: Mapping[str, Any]) -> str:
    """SHA-256 of what a document says, whatever its layout."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def price_book(document: object) -> PriceBook:
    """Reads a price book: every lane must be named, and what a model costs in each size. Raises RulesError."""
    book = _mapping(document, ())
    _only(book, (), "version", "lane_percent", "models")
    lanes = _mapping(book.get("lane_percent"), ("lane_percent",))
    _only(lanes, ("lane_percent",), *Lane)
    models = _mapping(book.get("models"), ("models",))
    if not 0 < len(models) <= _MOST_MODELS:
        raise RulesError(f"must name 1 to {_MOST_MODELS} models", ("models",))
    return PriceBook(
        version=_version(book),
        models={name: _model_price(value, name) for name, value in models.items()},
        lane_percent={
            lane: _whole(lanes.get(lane), ("lane_percent", lane), 0, 10_000) for lane in Lane
        },
    )


def refund_policy(document: object) -> RefundPolicy:
    """Reads a refund policy: every cause must be named. Raises RulesError naming what is wrong."""
    policy = _mapping(document, ())
    _only(policy, (), "version", "captured_percent", "full_length_percent")
    table = _mapping(policy.get("captured_percent"), ("captured_percent",))
    _only(table, ("captured_percent",), *Cause)
    percent: dict[Cause, int] = {}
    stage_percent: dict[tuple[Cause, Stage], int] = {}
    for cause in Cause:
        path = ("captured_percent", cause.value)
        row = _mapping(table.get(cause), path)
        _only(row, path, "default", *Stage)
        percent[cause] = _whole(row.get("default"), (*path, "default"), 0, 100)
        for stage in Stage:
            if stage in row:
                stage_percent[cause, stage] = _whole(row[stage], (*path, stage.value), 0, 100)
    full = _whole(policy.get("full_length_percent"), ("full_length_percent",), 0, 100)
    return RefundPolicy(_version(policy), percent, stage_percent, full)


def _model_price(value: object, name: str) -> ModelPrice:
    path = ("models", name)
    if not _MODEL.fullmatch(name):
        raise RulesError("is no name of a model: 1 to 64 of A-Z, a-z, 0-9 and ._-", path)
    model = _mapping(value, path)
    _only(model, path, "minimum_credits", "sizes", "option_percent")
    rows = model.get("sizes")
    if not isinstance(rows, list) or not 0 < len(cast("list[object]", rows)) <= _MOST_SIZES:
        raise RulesError(f"must be a list of 1 to {_MOST_SIZES} size classes", (*path, "sizes"))
    sizes: list[SizeClass] = []
    for place, row in enumerate(cast("list[object]", rows)):
        spot = (*path, "sizes", place)
        size = _mapping(row, spot)
        _only(size, spot, "max_pixels", "credits_per_minute")
        pixels = _whole(size.get("max_pixels"), (*spot, "max_pixels"), 1, 8192 * 8192)
        if sizes and pixels <= sizes[-1].max_pixels:
            raise RulesError("must be above the size before it", (*spot, "max_pixels"))
        credits_ = size.get("credits_per_minute")
        sizes.append(
            SizeClass(pixels, _whole(credits_, (*spot, "credits_per_minute"), 0, 1_000_000))
        )
    least = _whole(model.get("minimum_credits"), (*path, "minimum_credits"), 0, 1_000_000)
    return ModelPrice(least, tuple(sizes), _option_percent(model, path))


def _option_percent(model: Mapping[str, Any], path: Path) -> dict[str, dict[str, int]]:
    """What is charged for options; none where nothing is said."""
    found: dict[str, dict[str, int]] = {}
    spot = (*path, "option_percent")
    options = _mapping(model.get("option_percent", {}), spot)
    if len(options) > _MOST_OPTIONS:
        raise RulesError(f"must name at most {_MOST_OPTIONS} options", spot)
    for name, values in options.items():
        place = (*spot, name)
        table = _mapping(values, place)
        if not 0 < len(table) <= _MOST_OPTIONS:
            raise RulesError(f"must name 1 to {_MOST_OPTIONS} values", place)
        if not all(isinstance(value, str) for value in table):
            raise RulesError('must name values as texts: "true", "24"', place)
        found[name] = {
            value: _whole(percent, (*place, value), 0, 10_000) for value, percent in table.items()
        }
    return found


def _spelled(path: Path) -> str:
    """As people write it: models.sora-2.sizes[0].max_pixels."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _version(document: Mapping[str, Any]) -> str:
    version = document.get("version")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise RulesError(
            "must be text, in quotes: 1 to 64 of A-Z, a-z, 0-9 and ._-, the first a letter or digit",
            ("version",),
        )
    return version


def _mapping(value: object, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RulesError("is missing or not a mapping" if path else "it is not a mapping", path)
    for key in cast("Mapping[object, Any]", value):
        if not isinstance(key, str):
            raise RulesError(f"has the key {key!r}, which must be text (in quotes)", path)
    return cast("Mapping[str, Any]", value)


def _only(mapping: Mapping[str, Any], path: Path, *known: str) -> None:
    for key in mapping:
        if key not in known:
            raise RulesError(f"is not known here; known are: {', '.join(known)}", (*path, key))


def _whole(value: object, path: Path, least: int, most: int) -> int:
    if value is None:
        raise RulesError(f"is missing: a whole number from {least} to {most}", path)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RulesError(f"must be a whole number from {least} to {most}", path)
    return value
