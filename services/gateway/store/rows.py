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
    upload_bytes_per_day: int
    moderation_refusals_per_hour: int
    moderation_refusals_per_day: int
    created_at: datetime


_ACCOUNT = tuple(field.name for field in dataclasses.fields(Account))


def account(row: Any) -> Account:
    """A row of `accounts`."""
    values = {name: row[name] for name in _ACCOUNT}
    return Account(**{**values, "lanes": tuple(values["lanes"])})


@dataclasses.dataclass(frozen=True, slots=True)
class ApiKey:
    """A row of `api_keys`, without its hash. What is None of its limits is the account's alone."""

    key_id: str
    account_id: str | None
    role: str
    prefix: str
    display_name: str
    created_at: datetime
    revoked_at: datetime | None
    expires_at: datetime | None
    last_used_at: datetime | None
    requests_per_minute: int | None
    videos_per_hour: int | None
    max_in_flight: int | None
    upload_bytes_per_day: int | None


KEY_COLUMNS = tuple(field.name for field in dataclasses.fields(ApiKey))


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A principal that comes with tokens, in one account or in none."""

    principal_id: str
    issuer: str
    subject: str
    email: str
    role: str
    account_id: str | None
    added_at: datetime | None


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What a request_id already stands for."""

    fingerprint: bytes
    resource_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class AtLimit:
    """The limit that a request for a video met."""

    reason: str
    subject: str
    allowed: int
    wait_seconds: float


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


@dataclasses.dataclass(frozen=True, slots=True)
class NewTemplate:
    """A version of a template before it has its number."""

    account_id: str
    name: str
    definition: bytes
    scope: str
    """Whose request_ids these are, beside the account's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """A row of `templates`."""

    account_id: str
    name: str
    version: int
    definition: bytes
    created_at: datetime
    archived_at: datetime | None
