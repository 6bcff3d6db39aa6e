"""Usage: what an account paid in a month, by model, lane, API key or label. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from kit import errors

LONGEST = timedelta(days=400)


class Group(enum.StrEnum):
    """What usage is grouped by, beside the month."""

    MODEL = "MODEL"
    LANE = "LANE"
    KEY = "KEY"
    LABEL = "LABEL"


DEFAULT_GROUPS = (Group.MODEL, Group.LANE)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for. `label` names the label whose values are the groups."""

    from_: datetime | None = None
    to: datetime | None = None
    groups: tuple[Group, ...] = DEFAULT_GROUPS
    label: str = ""


@dataclass(frozen=True, slots=True)
class Period:
    """From when until before when."""

    from_: datetime
    to: datetime


@dataclass(frozen=True, slots=True)
class Line:
    """One group in one month (UTC); what it was not grouped by is empty."""

    month: str
    model: str
    lane: str
    key_id: str
    label_value: str
    videos: int
    captured: int
    refunded: int


def period(asked: Asked, now: datetime) -> Period:
    """This month until now, unless told. Raises InvalidArgument/INVALID_FIELD."""
    if (Group.LABEL in asked.groups) != bool(asked.label):
        raise _invalid("label", "is needed to group by label, and for nothing else")
    month = now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    to = asked.to or now
    from_ = asked.from_ or min(month, to)
    if not from_ < to:
        raise _invalid("to", "must be after from")
    if to - from_ > LONGEST:
        raise _invalid("to", f"must be at most {LONGEST.days} days after from")
    return Period(from_, to)


def _invalid(field: str, rule: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("INVALID_FIELD", f"{field} {rule}", violations=[(field, rule)])
