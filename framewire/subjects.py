"""Names on the bus: streams, subjects and headers, in one place for services and subscribers."""

from __future__ import annotations

from dataclasses import dataclass

JOBS_STREAM = "JOBS"
JOBS_SUBJECT = "framewire.jobs.v1"
EVENTS_STREAM = "EVENTS"
EVENTS_SUBJECTS = "framewire.events.v1.*.*"
VIDEO_HEADER = "Framewire-Video"
"""On jobs: "<video> <account>", so that bytes that cannot be read can still be answered for."""

TERMINAL_KINDS = ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Stream:
    """What a stream is to be; `kit.bus` makes it so."""

    name: str
    subjects: tuple[str, ...]
    work_queue: bool
    max_age_seconds: int = 0


STREAMS = (
    Stream(JOBS_STREAM, (JOBS_SUBJECT,), work_queue=True),
    Stream(EVENTS_STREAM, (EVENTS_SUBJECTS,), work_queue=False, max_age_seconds=30 * 86400),
)


def event_subject(account_id: str, kind: str) -> str:
    """Where an event of an account is told; `*` for either means all."""
    return f"framewire.events.v1.{account_id}.{kind}"


def progress_subject(account_id: str) -> str:
    """Where progress of an account's videos is told, by core NATS; `*` means all."""
    return f"framewire.progress.v1.{account_id}"
