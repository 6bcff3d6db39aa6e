"""What a provider's own list says, compared with the attempts that were sent to it. Pure, as `reconciliation`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from services.gateway import reconciliation

WAITS_FOR_JOB = ("RENDERING", "UNRESOLVED")


@dataclass(frozen=True, slots=True)
class ListedJob:
    """A job of a provider's list, and whose it is."""

    provider_job_id: str
    created_at: datetime
    status: str
    video_id: str = ""
    superseded: bool = False
    marked_video_id: str = ""


@dataclass(frozen=True, slots=True)
class ProviderList:
    """A provider's list, read back to a moment. `exclusive`: the key is ours alone and the list complete."""

    provider_account: str
    as_of: datetime
    jobs: Sequence[ListedJob]
    read_back_to: datetime
    exclusive: bool

    @property
    def side(self) -> str:
        return f"provider {self.provider_account}"


@dataclass(frozen=True, slots=True)
class Awaited:
    """An attempt that a provider's job is waited for."""

    video_id: str
    account_id: str
    attempt: reconciliation.Attempt
    as_of: datetime


def awaited(subjects: Iterable[reconciliation.Subject]) -> list[Awaited]:
    """The attempts that wait for a job at a provider."""
    return [
        Awaited(subject.video_id, subject.account_id, attempt, subject.marks.generator)
        for subject in subjects
        if subject.outcome
        for attempt in subject.outcome.attempts
        if attempt.provider_job_id and attempt.state in WAITS_FOR_JOB
    ]


def compare(
    listed: ProviderList, since: datetime, waiting: Sequence[Awaited]
) -> list[reconciliation.Finding]:
    """What a provider's list has that no attempt knows, and what it lacks that one waits for."""
    found = [
        finding
        for job in listed.jobs
        if job.created_at >= since and (finding := _listed(listed, job)) is not None
    ]
    if not listed.exclusive:
        return found
    shown = {job.provider_job_id for job in listed.jobs}
    return found + [
        _lost(listed, one)
        for one in waiting
        if one.attempt.provider_account == listed.provider_account
        and one.attempt.provider_job_id not in shown
        and one.attempt.created_at is not None
        and one.attempt.created_at >= listed.read_back_to
    ]


def _listed(listed: ProviderList, job: ListedJob) -> reconciliation.Finding | None:
    says = f"{job.provider_job_id} {job.status}, made {job.created_at:%Y-%m-%d %H:%M:%S}"
    if job.video_id and not job.superseded:
        return None
    if job.video_id:
        kind, of = (
            reconciliation.Kind.PROVIDER_JOB_SUPERSEDED,
            f"it is on record with {job.video_id}",
        )
        advice = "it was paid for besides: book it as a loss, or have it cancelled there"
    elif job.marked_video_id or listed.exclusive:
        marked = job.marked_video_id
        kind, of = (
            reconciliation.Kind.PROVIDER_JOB_UNKNOWN,
            f"it bears the name of {marked}" if marked else "unknown",
        )
        advice = "see whether an undecided attempt is at this account: it may be that one's job"
    else:
        return None
    said = (
        reconciliation.Statement(listed.side, listed.as_of, says),
        reconciliation.Statement("generator", listed.as_of, of),
    )
    return reconciliation.Finding(
        kind, job.video_id or job.marked_video_id, "", said,
        advice=advice, subject=f"{listed.provider_account}/{job.provider_job_id}", subject_at=job.created_at,
    )  # fmt: skip


def _lost(listed: ProviderList, one: Awaited) -> reconciliation.Finding:
    job = one.attempt.provider_job_id
    said = (
        reconciliation.Statement("generator", one.as_of, str(one.attempt)),
        reconciliation.Statement(listed.side, listed.as_of, f"does not list {job}"),
    )
    return reconciliation.Finding(
        reconciliation.Kind.PROVIDER_JOB_LOST, one.video_id, one.account_id, said,
        advice="the generator asks for it singly, and gives it up after many definite answers",
        subject=f"{listed.provider_account}/{job}", subject_at=one.attempt.created_at,
    )  # fmt: skip
