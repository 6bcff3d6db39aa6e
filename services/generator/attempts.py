"""Attempts: the rules, without any I/O or clock. docs/state-machines.md draws the machine.

An attempt is one try to have a video made. What matters most: from SUBMITTING on the provider may have the job, so
nothing but the provider's own word, or a proof that it never got it, lets it be sent again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from kit import ids


class State(StrEnum):
    """State of an attempt."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    SUBMITTING = "SUBMITTING"
    UNKNOWN = "UNKNOWN"
    UNRESOLVED = "UNRESOLVED"
    RENDERING = "RENDERING"
    FETCHING = "FETCHING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})

NEXT: dict[State, frozenset[State]] = {
    # UNKNOWN, or UNRESOLVED beside a twin, also from QUEUED and PREPARING: after a restore nobody knows what was sent.
    State.QUEUED: frozenset(
        {State.PREPARING, State.UNKNOWN, State.UNRESOLVED, State.RENDERING}
        | {State.FAILED, State.CANCELLED}
    ),
    State.PREPARING: frozenset(
        {State.QUEUED, State.SUBMITTING, State.UNKNOWN, State.UNRESOLVED}
        | {State.FAILED, State.CANCELLED}
    ),
    State.SUBMITTING: frozenset(
        {State.QUEUED, State.UNKNOWN, State.UNRESOLVED, State.RENDERING, State.FAILED}
    ),
    State.UNKNOWN: frozenset({State.QUEUED, State.UNRESOLVED, State.RENDERING, State.FAILED}),
    State.UNRESOLVED: frozenset({State.QUEUED, State.RENDERING, State.FETCHING, State.FAILED}),
    State.RENDERING: frozenset({State.FETCHING, State.UNRESOLVED, State.FAILED, State.CANCELLED}),
    State.FETCHING: frozenset({State.COMPLETED, State.FAILED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""What may follow what; the store moves attempts along these edges only."""

STAGES: dict[State, str] = {
    State.QUEUED: "QUEUED",
    State.PREPARING: "PREPARING",
    State.SUBMITTING: "SUBMITTING",
    State.UNKNOWN: "SUBMITTING",
    State.UNRESOLVED: "UNRESOLVED",
    State.RENDERING: "RENDERING",
    State.FETCHING: "FETCHING",
    State.COMPLETED: "DONE",
    State.FAILED: "DONE",
    State.CANCELLED: "DONE",
}
"""The stage that callers see for each state."""


class Evidence(StrEnum):
    """What a provider can tell about a create whose answer was lost."""

    KEYED = "keyed"
    """The same idempotency key gives the same job again, inside key_ttl."""
    SEARCHABLE = "searchable"
    """Its list shows prompt, model, size and seconds, and is complete."""
    BLIND = "blind"
    """Nothing can be told."""


@dataclass(frozen=True, slots=True)
class ListedJob:
    """A job as a provider's list shows it."""

    provider_job_id: str
    fingerprint: str
    created_at: datetime
    marker: str = ""
    """The name that its sender gave it, where the list shows one."""


@dataclass(frozen=True, slots=True)
class Undecided:
    """An attempt of which it is not known whether the provider has it."""

    evidence: Evidence
    fingerprint: str
    submitted_at: datetime
    post_timeout: timedelta
    settle_time: timedelta
    clock_skew: timedelta
    key_ttl: timedelta
    sender_gone: bool
    """The submitting process's advisory lock is free, or it has said itself that it will not send any more."""
    claimants: int
    """Undecided attempts at this provider account with this fingerprint, this one included."""
    absent_since: datetime | None
    """When a pass first proved that the job was not there."""
    marker: str = ""
    """What the list shows of ours alone; empty where nothing was sent that it would show."""
    sent_until: datetime | None = None
    """Of one whose fate a restore forgot: it may have been sent at any time from submitted_at until then."""

    @property
    def quiet_from(self) -> datetime:
        """From then on a create of it that came through is there."""
        last = self.sent_until or self.submitted_at
        return last + self.post_timeout + self.settle_time


@dataclass(frozen=True, slots=True)
class ListPass:
    """One reading of a provider's list."""

    jobs: tuple[ListedJob, ...]
    """Jobs that are not known to be of any attempt."""
    reached_start: bool
    """Paging went back past the window's start."""
    sentinel_seen: bool
    """A job of ours that must be there was there."""
    at: datetime


@dataclass(frozen=True, slots=True)
class Adopt:
    """The provider's job is this attempt's."""

    provider_job_id: str


@dataclass(frozen=True, slots=True)
class SendAgain:
    """It is proved that the provider does not have it, or the key makes a second send harmless."""

    same_key: bool


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet. `absent` when this pass proved absence; two such passes must follow each other."""

    seconds: float
    absent: bool = False
    unresolved: bool = False
    """It could not be told in the ordinary time; go on more slowly."""


Decision = Adopt | SendAgain | Wait
_FILE_NAME = re.compile(r"framewire-(.+?)(?:\.[1-9])?\.(?:jpg|mp4)")


def visible_fingerprint(prompt: str, model: str, width: int, height: int, seconds: int) -> str:
    """What a provider's list shows of a job, as one value."""
    shown = "\x1f".join((" ".join(prompt.split()), model, f"{width}x{height}", str(seconds)))
    return hashlib.sha256(shown.encode()).hexdigest()


def attempt_id(video_id: str, number: int) -> str:
    """Always the same, so that an attempt that a restore forgot comes back with its marker, its key and its assets."""
    return ids.derived_id("attempt", video_id, number)


def marker(attempt_id: str) -> str:
    """The name under which an attempt's first image is sent: shown again by some, it says whose the job is."""
    return file_name(attempt_id, 0, "jpg")


def file_name(attempt_id: str, number: int, extension: str) -> str:
    """The name under which an attempt's input is sent, the first being number 0."""
    return f"framewire-{attempt_id}{f'.{number}' if number else ''}.{extension}"


def marker_of(shown: str) -> str:
    """The marker of the attempt that sent a file under this name; a name that is none of ours stays as it is."""
    attempt_id = marked_attempt(shown)
    return marker(attempt_id) if attempt_id else shown


def marked_attempt(shown: str) -> str:
    """The attempt that gave this name; empty where it is no name of ours."""
    found = _FILE_NAME.fullmatch(shown)
    return found[1] if found else ""


def decide(attempt: Undecided, listed: ListPass | None, now: datetime) -> Decision:
    """What is to be done with an attempt whose create is undecided. `listed` is None where the provider has no list."""
    quiet_from = attempt.quiet_from
    if attempt.evidence is Evidence.KEYED and now < attempt.submitted_at + attempt.key_ttl / 2:
        if not attempt.sender_gone and now < quiet_from:
            return Wait(_seconds(quiet_from - now))
        return SendAgain(same_key=True)
    if attempt.evidence is Evidence.BLIND or listed is None:
        return Wait(_slow(attempt), unresolved=now >= quiet_from)
    ours = [job for job in listed.jobs if attempt.marker and job.marker == attempt.marker]
    if ours:
        # Nobody else gives this name: it is adopted whatever else looks like it, and whenever it was made.
        return Adopt(min(ours, key=lambda job: job.created_at).provider_job_id)
    candidates = _candidates(attempt, listed.jobs)
    if (
        not attempt.marker
        and len(candidates) == 1
        and attempt.claimants == 1
        and _in_time(attempt, candidates[0])
    ):
        return Adopt(candidates[0].provider_job_id)
    if candidates:
        # Several jobs or several claimants: whose is whose cannot be told, and a stranger's video must never go out.
        return Wait(_slow(attempt), unresolved=now >= quiet_from)
    if now < quiet_from:
        return Wait(_seconds(quiet_from - now))
    proved = listed.reached_start and listed.sentinel_seen and attempt.sender_gone
    if not proved:
        return Wait(_slow(attempt), unresolved=True)
    if attempt.absent_since is None:
        return Wait(max(0.2, attempt.settle_time.total_seconds()), absent=True)
    if listed.at < attempt.absent_since + attempt.settle_time:
        return Wait(_seconds(attempt.absent_since + attempt.settle_time - listed.at), absent=True)
    return SendAgain(same_key=False)


def _candidates(attempt: Undecided, jobs: Sequence[ListedJob]) -> list[ListedJob]:
    """Nobody's jobs that look like it. Without an end of the window: one that was made late is no proof of absence.

    A name that we give tells another's; for an attempt that has a name, one without is none to adopt, but a doubt.
    """
    earliest = attempt.submitted_at - attempt.clock_skew
    return [
        job
        for job in jobs
        if job.fingerprint == attempt.fingerprint
        and earliest <= job.created_at
        and not marked_attempt(job.marker)
        and (attempt.marker or not job.marker)
    ]


def _in_time(attempt: Undecided, job: ListedJob) -> bool:
    """Made while our create could still come through."""
    return job.created_at <= attempt.quiet_from + attempt.clock_skew


def _seconds(span: timedelta) -> float:
    return max(0.2, span.total_seconds())


def _slow(attempt: Undecided) -> float:
    return max(1.0, 2 * attempt.settle_time.total_seconds())


def without_prompt(text: str, prompt: str) -> str:
    """A provider's words without the prompt that they may repeat: prompts go into no event and no log."""
    return text.replace(prompt, "[prompt]") if prompt else text


def worth_telling(before: int, after: int, seconds_since: float | None) -> bool:
    """Whether progress is written and told: 5 points or 15 s are worth a row's write."""
    if after == before and seconds_since is not None:
        return False
    return after - before >= 5 or seconds_since is None or seconds_since >= 15
