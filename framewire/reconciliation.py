"""What a reconciliation answers: differences between the services, and what was compared."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Statement:
    """What one side says of something, and when it was read, by its own clock."""

    side: str
    as_of: datetime | None
    says: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference between services. It counts once `confirmed`: two passes, an interval apart, showed it."""

    finding_id: str
    kind: str
    video_id: str
    account_id: str
    subject: str
    statements: tuple[Statement, ...]
    repair: str
    advice: str
    first_seen_at: datetime | None
    last_seen_at: datetime | None
    confirmed: bool

    @property
    def is_repairable(self) -> bool:
        """Whether `repair` may be called for it."""
        return self.confirmed and self.repair != "NONE"


@dataclass(frozen=True, slots=True)
class Side:
    """A side of a pass; `error`: why it could not be read."""

    side: str
    as_of: datetime | None
    error: str


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass compared."""

    started_at: datetime | None
    since: datetime | None
    videos: int
    provider_jobs: int
    objects: int
    findings: int
    confirmed: int
    sides: tuple[Side, ...]
    interval_seconds: float


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """A whole pass."""

    findings: tuple[Finding, ...]
    done: Pass
