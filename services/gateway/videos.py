"""Videos as callers see them: what a request means, and how events change a row. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from kit import errors
from services.gateway import catalogue, inputs


class State(StrEnum):
    """State of a row. The first three are never shown to callers."""

    ADMITTING = "ADMITTING"
    REJECTED = "REJECTED"
    ABANDONED = "ABANDONED"
    PENDING = "PENDING"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Kind(StrEnum):
    """Kinds of events that change a row."""

    QUEUED = "QUEUED"
    STARTED = "STARTED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    SETTLED = "SETTLED"
    RECOVERED = "RECOVERED"


HIDDEN = frozenset({State.ADMITTING, State.REJECTED, State.ABANDONED})
TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})
LANES = ("VIP", "STANDARD", "BATCH")
DEFAULT_LANE = "STANDARD"
MAX_START_BY = timedelta(days=30)
_START_WITHIN = {
    "VIP": timedelta(hours=1),
    "STANDARD": timedelta(hours=24),
    "BATCH": timedelta(days=7),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """What a video is to be. As asked, empty fields mean the model's default."""

    prompt: str
    model: str = ""
    input_image_id: str = ""
    width: int = 0
    height: int = 0
    seconds: int = 0
    variants: int = 0
    options: Mapping[str, catalogue.OptionValue | None] | None = None
    """None as a value is one that no option takes (a list, an object, null)."""
    inputs: tuple[inputs.Input, ...] = ()
    rendition_heights: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NewVideo:
    """An admission's row before it is inserted."""

    video_id: str
    account_id: str
    key_id: str
    principal: str
    request_id: str
    fingerprint: bytes
    spec: bytes
    lane: str
    weight: int
    start_by: datetime
    input_image_id: str
    has_inputs: bool
    quote_id: str
    max_credits: int | None
    labels: Mapping[str, str]
    client_reference: str
    model: str
    retry_of: str = ""
    reject_duplicates_seconds: float = 0
    template_name: str = ""
    template_version: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """Which of an account's videos are listed; what is empty filters nothing."""

    account_id: str
    state: str = ""
    created_from: datetime | None = None
    created_to: datetime | None = None
    model: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    client_reference: str = ""
    template_name: str = ""
    template_version: int = 0
    oldest_first: bool = False

    def key(self) -> tuple[object, ...]:
        """What a page token is bound to."""
        return ("videos", *(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Video:
    """A row of `videos`; the migration says what each column means."""

    video_id: str
    account_id: str
    key_id: str
    principal: str
    request_id: str
    state: State
    stage: str
    admit_epoch: int
    admit_until: datetime
    spec: bytes
    lane: str
    weight: int
    start_by: datetime
    input_image_id: str
    has_inputs: bool
    quote_id: str
    max_credits: int | None
    refusal: Mapping[str, Any] | None
    quoted_credits: int | None
    captured_credits: int
    released_credits: int
    settlement: str
    revision: int
    last_seq: int
    progress_percent: int
    queue_position: int
    expected_at: datetime | None
    outputs: bytes
    late_outputs: bytes
    failure_cause: str | None
    failure_message: str
    failure_retryable: bool
    cancel_requested: bool
    labels: Mapping[str, str]
    client_reference: str
    similar_to: str
    retry_of: str
    release_due: bool
    unpin_due: bool
    publishes: int
    accepted_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime
    deleted_at: datetime | None
    model: str
    delete_when_terminal: bool
    delete_due: bool
    revised_at: datetime
    price_version: str = ""
    policy_version: str = ""
    fingerprint: bytes = b""
    template_name: str = ""
    template_version: int = 0

    @property
    def terminal(self) -> bool:
        """Whether its state changes no more."""
        return self.state in TERMINAL

    @property
    def finished(self) -> bool:
        """Whether nothing that a watcher waits for is to come."""
        return self.terminal and self.settlement == "DONE"


@dataclass(frozen=True, slots=True)
class Fact:
    """An event, as far as it changes a row."""

    kind: Kind
    seq: int
    occurred_at: datetime
    queue_position: int = 0
    expected_at: datetime | None = None
    outputs: bytes = b""
    cause: str = ""
    message: str = ""
    retryable: bool = False
    cancel_requested: bool = False
    captured_credits: int = 0
    released_credits: int = 0


def project(video: Video, fact: Fact) -> Video | None:
    """The row after an event, or None when the event changes nothing.

    Events come at least once and not always in order: one that is not above the last seen changes nothing, except that
    a terminal one always ends a live row, and that a start which came late still says when it was.
    """
    changed = _changed(video, fact)
    if changed is None:
        return None
    seq = max(video.last_seq, fact.seq)
    return replace(changed, last_seq=seq, revision=video.revision + 1)


def _changed(video: Video, fact: Fact) -> Video | None:
    if video.state in HIDDEN:
        return None
    if fact.kind is Kind.SETTLED:
        return _settled(video, fact)
    if fact.kind in (Kind.COMPLETED, Kind.FAILED, Kind.CANCELLED):
        return None if video.terminal else _ended(video, fact)
    if fact.kind is Kind.STARTED and video.started_at is None and fact.seq <= video.last_seq:
        return replace(video, started_at=fact.occurred_at)
    if fact.seq <= video.last_seq:
        return None
    if fact.kind is Kind.RECOVERED:
        # Of a deleted video it goes the way of the others.
        gone = video.deleted_at is not None
        return replace(video, late_outputs=fact.outputs, delete_due=gone)
    if video.terminal:
        return None
    if fact.kind is Kind.QUEUED:
        return replace(video, queue_position=fact.queue_position, expected_at=fact.expected_at)
    return replace(
        video,
        state=State.PROCESSING,
        stage="PREPARING" if video.stage == "QUEUED" else video.stage,
        queue_position=0,
        started_at=video.started_at or fact.occurred_at,
    )


def _settled(video: Video, fact: Fact) -> Video | None:
    if video.settlement == "DONE":
        return None
    return replace(
        video,
        settlement="DONE",
        captured_credits=fact.captured_credits,
        released_credits=fact.released_credits,
    )


def _ended(video: Video, fact: Fact) -> Video:
    completed = fact.kind is Kind.COMPLETED
    return replace(
        video,
        state=State(fact.kind.value),
        stage="DONE",
        progress_percent=100 if completed else video.progress_percent,
        queue_position=0,
        expected_at=None,
        outputs=fact.outputs if completed else b"",
        failure_cause=None if completed else fact.cause,
        failure_message=fact.message,
        failure_retryable=fact.retryable,
        cancel_requested=video.cancel_requested or fact.cancel_requested,
        unpin_due=bool(video.input_image_id) or video.has_inputs,
        finished_at=fact.occurred_at,
        deleted_at=fact.occurred_at if video.delete_when_terminal else None,
        delete_due=video.delete_when_terminal,
    )


def fingerprint(fields: Mapping[str, Any]) -> bytes:
    """SHA-256 over the caller's own fields as canonical JSON: the same request has the same one for ever."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).digest()


def start_by(asked: datetime | None, lane: str, now: datetime) -> datetime:
    """When waiting ends. Raises InvalidArgument/START_BY_PASSED."""
    if asked is None:
        return now + _START_WITHIN[lane]
    if asked <= now:
        raise errors.InvalidArgument(
            "START_BY_PASSED", "start_by is already over; leave it out or name a later time"
        )
    if asked > now + MAX_START_BY:
        raise errors.InvalidArgument(
            "INVALID_FIELD",
            f"start_by is at most {MAX_START_BY.days} days from now",
            violations=[("start_by", f"at most {MAX_START_BY.days} days from now")],
        )
    return asked


def living(name: str, models: catalogue.Catalogue, now: datetime) -> catalogue.Model:
    """The model of that name, or the default one. Raises InvalidArgument or FailedPrecondition."""
    model = models.models.get(name) if name else models.default
    if model is None:
        raise errors.InvalidArgument(
            "MODEL_UNKNOWN", f"there is no model {name!r}; there are: {models.names}"
        )
    if model.retires_at is not None and model.retires_at <= now:
        raise errors.FailedPrecondition(
            "MODEL_RETIRING", f"{model.name} was retired on {model.retires_at:%Y-%m-%d}"
        )
    return model


def normalise(asked: Spec, models: catalogue.Catalogue, now: datetime) -> Spec:
    """The video as it will be made, every field filled in. Raises InvalidArgument that lists what the model has."""
    model = living(asked.model, models, now)
    width, height = size(asked.width, asked.height, model)
    seconds = _seconds(asked, model)
    given = inputs.asked(asked.input_image_id, asked.inputs)
    first, others = inputs.short(inputs.check(given, model, seconds * model.frames_per_second))
    return Spec(
        prompt=_prompt(asked.prompt),
        model=model.name,
        input_image_id=first,
        width=width,
        height=height,
        seconds=seconds,
        variants=_variants(asked, model, (width, height)),
        options=_options(asked, model),
        inputs=others,
        rendition_heights=_rendition_heights(asked, height),
    )


def check_defaults(asked: Spec, models: catalogue.Catalogue, now: datetime) -> None:
    """What a template sets, as far as its own model can tell. Raises InvalidArgument that lists what the model has."""
    if not asked.model:
        return  # each request may name another one
    model = living(asked.model, models, now)
    wanted = size(asked.width, asked.height, model)
    _seconds(asked, model)
    _variants(asked, model, wanted)
    _options(asked, model)
    _rendition_heights(asked, wanted[1])


def _prompt(prompt: str) -> str:
    if not prompt.strip():
        raise errors.InvalidArgument(
            "INVALID_FIELD",
            "spec.prompt: must say what is to be seen, in 1 to 500 characters",
            violations=[("spec.prompt", "must not be blank")],
        )
    return prompt


def size(width: int, height: int, model: catalogue.Model) -> tuple[int, int]:
    """The size that is asked for, 0 x 0 being the default. Raises InvalidArgument that lists what there is."""
    if (width, height) == (0, 0):
        return model.sizes[0]
    if (width, height) not in model.sizes:
        listed = ", ".join(f"{across}x{down}" for across, down in model.sizes)
        raise errors.InvalidArgument(
            "SIZE_NOT_SUPPORTED",
            f"{model.name} does not make {width}x{height}; it makes: {listed}",
        )
    return width, height


def _seconds(asked: Spec, model: catalogue.Model) -> int:
    if asked.seconds and asked.seconds not in model.seconds:
        listed = ", ".join(str(seconds) for seconds in sorted(model.seconds))
        raise errors.InvalidArgument(
            "SECONDS_NOT_SUPPORTED",
            f"{model.name} does not make {asked.seconds} s; it makes (seconds): {listed}",
        )
    return asked.seconds or model.seconds[0]


def _variants(asked: Spec, model: catalogue.Model, size: tuple[int, int]) -> int:
    most = model.variants_at(size)
    if asked.variants > most:
        raise errors.InvalidArgument(
            "VARIANTS_NOT_SUPPORTED",
            f"{model.name} makes at most {most} variants of one request at {size[0]}x{size[1]}",
        )
    return asked.variants or 1


def _rendition_heights(asked: Spec, height: int) -> tuple[int, ...]:
    """The tallest first."""
    for number, wanted in enumerate(asked.rendition_heights):
        if wanted % 2 or wanted >= height:
            field, rule = (
                f"spec.rendition_heights[{number}]",
                f"must be even and below the video's height, {height}",
            )
            raise errors.InvalidArgument(
                "INVALID_FIELD", f"{field}: {rule}", violations=[(field, rule)]
            )
    return tuple(sorted(asked.rendition_heights, reverse=True))


def _options(asked: Spec, model: catalogue.Model) -> dict[str, catalogue.OptionValue | None]:
    options = dict(asked.options or {})
    for name, value in options.items():
        option = model.options.get(name)
        if option is None or not option.accepts(value):
            listed = ", ".join(item.describe() for item in model.options.values()) or "none"
            problem = "has no option" if option is None else "does not take this value of"
            raise errors.InvalidArgument(
                "OPTION_NOT_SUPPORTED", f"{model.name} {problem} {name!r}; its options: {listed}"
            )
    return options
