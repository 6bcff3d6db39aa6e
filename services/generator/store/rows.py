"""Rows as the domain sees them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from framewire.generator.v1 import job_pb2
from services.generator import attempts

ATTEMPT_COLUMNS = """
    a.attempt_id, a.video_id, a.number, a.account_id, a.pool, a.lane, a.weight, a.state, a.fence, a.worker,
    a.provider_account, a.provider_job_id, a.fingerprint, a.body_sha256, a.submissions, a.key_pinned,
    a.submitted_at, a.resolve_by, a.render_deadline, a.absent_since, a.content_expires_at,
    a.progress_percent, a.progress_at, a.not_found_count, a.not_found_since, a.fetch_tries,
    a.sent_until, a.suspects, a.progress_version, a.start_by, a.created_at,
    a.expected_at, v.job, v.cancel_requested, v.traceparent,
    coalesce(extract(epoch FROM clock_timestamp() - a.not_found_since), 0)::float8 AS not_found_seconds
"""
ATTEMPT_FROM = "attempts a JOIN videos v USING (video_id)"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to have a video made, with its job."""

    attempt_id: str
    video_id: str
    number: int
    account_id: str
    pool: str
    lane: str
    weight: int
    state: attempts.State
    fence: int
    worker: int | None
    provider_account: str | None
    provider_job_id: str | None
    fingerprint: str
    body_sha256: str | None
    submissions: int
    key_pinned: bool
    submitted_at: datetime | None
    resolve_by: datetime | None
    render_deadline: datetime | None
    absent_since: datetime | None
    content_expires_at: datetime | None
    progress_percent: int
    progress_at: datetime | None
    not_found_count: int
    not_found_since: datetime | None
    not_found_seconds: float
    fetch_tries: int
    progress_version: int
    sent_until: datetime | None
    """A restore forgot its fate: it may have been sent from submitted_at until then."""
    suspects: tuple[str, ...]
    """Provider accounts that it may have been sent to as well."""
    start_by: datetime
    created_at: datetime
    expected_at: datetime | None
    job: job_pb2.Job
    cancel_requested: bool
    traceparent: str


@dataclass(frozen=True, slots=True)
class LateRender:
    """An attempt that was given up, and what may turn up of it after all."""

    attempt: Attempt
    provider_job_id: str | None
    state: str
    fence: int
    look_until: datetime
    content_expires_at: datetime | None
    age_seconds: float


def attempt(row: asyncpg.Record) -> Attempt:
    """An attempt from a row of ATTEMPT_COLUMNS."""
    values: dict[str, Any] = {name: row[name] for name in Attempt.__slots__}
    values["state"] = attempts.State(values["state"])
    values["suspects"] = tuple(values["suspects"])
    values["job"] = job_pb2.Job.FromString(bytes(values["job"]))
    return Attempt(**values)
