"""What a recovery after a restore answers: what was done for each video, and how the services stood."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was done for one video."""

    video_id: str
    action: str
    detail: str


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a service may act, or waits for its recovery after a restore."""

    open: bool
    incarnation_id: str
    reason: str
    since: datetime | None
    restored_to: datetime | None


@dataclass(frozen=True, slots=True)
class Service:
    """A service as it stood when the recovery began."""

    service: str
    standing: Standing


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a recovery."""

    services: tuple[Service, ...]
    videos: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """The whole of it."""

    videos: tuple[Recovered, ...]
    done: Done
