"""Events as subscribers get them: frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from framewire.types import Output


@dataclass(frozen=True, slots=True)
class Queued:
    """The generator has the job; from here it cannot be lost."""

    lane: str
    model: str
    queue_position: int
    expected_at: datetime | None
    """When it was expected to be done; None: that is not known."""


@dataclass(frozen=True, slots=True)
class Started:
    """Its turn has come; `attempt` counts from 1."""

    attempt: int
    provider_account: str


@dataclass(frozen=True, slots=True)
class Completed:
    """Terminal: every output is stored."""

    outputs: tuple[Output, ...]
    variants_requested: int
    seconds_requested: int
    cancel_requested: bool
    model: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: it ended without an output."""

    cause: str
    stage: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Terminal: the caller cancelled it."""

    cause: str
    stage: str


@dataclass(frozen=True, slots=True)
class Settled:
    """Its credits are booked: captured + released = reserved."""

    captured_credits: int
    released_credits: int
    cause: str
    policy_version: str
    available_credits: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """A render that turned up after the video had failed was kept, free of charge."""

    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Deleted:
    """The owner deleted the video."""


@dataclass(frozen=True, slots=True)
class Expired:
    """An asset of it reached the end of its retention."""

    asset_id: str


@dataclass(frozen=True, slots=True)
class BalanceLow:
    """The account's available credits fell below its threshold."""

    available_credits: int
    threshold_credits: int


@dataclass(frozen=True, slots=True)
class WebhookDisabled:
    """A webhook endpoint of the account gets no more events: it is "GONE", or "FAILING" for days."""

    endpoint_id: str
    why: str


Detail = (
    Queued
    | Started
    | Completed
    | Failed
    | Cancelled
    | Settled
    | Recovered
    | Deleted
    | Expired
    | BalanceLow
    | WebhookDisabled
)


@dataclass(frozen=True, slots=True)
class Event:
    """One fact about a video or an account. `event_id` stays the same when it is told again.

    `detail` is the class of its kind; None for a kind that this version does not know.
    """

    event_id: str
    kind: str
    video_id: str
    account_id: str
    seq: int
    occurred_at: datetime | None
    detail: Detail | None
