"""Rows as frozen data, and the list of columns that makes them."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any

from services.gateway import videos

VIDEO_COLUMNS = ", ".join(field.name for field in dataclasses.fields(videos.Video))


def video(row: Any) -> videos.Video:
    """A row of `videos`."""
    values = {field.name: row[field.name] for field in dataclasses.fields(videos.Video)}
    return videos.Video(**{**values, "state": videos.State(values["state"])})


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    """A row of `accounts`."""

    account_id: str
    display_name: str
    lanes: tuple[str, ...]
    weight: int
    max_in_flight: int
    requests_per_minute: int
    videos_per_hour: int
    created_at: datetime


@dataclasses.dataclass(frozen=True, slots=True)
class ApiKey:
    """A row of `api_keys`, without its hash."""

    key_id: str
    account_id: str | None
    role: str
    prefix: str
    display_name: str
    created_at: datetime
    revoked_at: datetime | None


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What a request_id already stands for."""

    fingerprint: bytes
    resource_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Duplicate:
    """Another request_id already made what is asked for, a moment ago."""

    video_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """What an admission needs to know before it begins, read at one moment."""

    account: Account
    admission_paused: bool
    paused_why: str
    now: datetime
    earlier: Request | None


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """What credits answered to Reserve."""

    credits: int
    price_version: str
    policy_version: str
