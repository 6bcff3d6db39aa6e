"""Reconciliation: passes that compare all sides and keep what they find, and repairs of what two passes have shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from prometheus_client import Gauge

from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import attempt_pb2
from framewire.storage.v1 import storage_pb2
from kit import errors, loops, telemetry
from services.gateway import (
    config,
    messages,
    peers,
    provider_lists,
    publisher,
    reconciliation,
    sides,
    store,
    videos,
    watch,
)
from services.gateway.store import findings

log = telemetry.logger(__name__)

DEFAULT_SINCE = timedelta(hours=24)
MAX_SINCE = timedelta(days=35)
CLOCK_SKEW = timedelta(minutes=5)
"""Between a provider's clock and ours, generously."""
SERVICES = ("gateway", "credits", "generator", "storage")

RECONCILED_AT = Gauge(
    "framewire_gateway_reconciled_timestamp_seconds", "When this replica last ended a pass."
)


@dataclass(frozen=True, slots=True)
class SideRead:
    """A side of a pass: its watermark, or why it could not be read."""

    side: str
    as_of: datetime
    error: str = ""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass compared."""

    started_at: datetime
    since: datetime
    videos: int
    provider_jobs: int
    objects: int
    findings: int
    confirmed: int
    sides: tuple[SideRead, ...]
    interval: timedelta


@dataclass(slots=True)
class _Counts:
    videos: int = 0
    provider_jobs: int = 0
    objects: int = 0
    findings: int = 0
    confirmed: int = 0

    def add(self, kept: Sequence[findings.Kept]) -> None:
        self.findings += len(kept)
        self.confirmed += sum(one.confirmed for one in kept)


class Reconciler:
    """Compares, and repairs when told."""

    def __init__(
        self,
        store_: store.Store,
        peers_: peers.Peers,
        publisher_: publisher.Publisher,
        hub: watch.Hub,
        settings: config.Settings,
    ) -> None:
        self._store = store_
        self._findings = store_.findings
        self._stubs = peers_.stubs
        self._peers = peers_
        self._publisher = publisher_
        self._hub = hub
        self._interval = timedelta(seconds=settings.reconcile_interval_seconds)
        self._check_after_seconds = settings.sweep_overdue_seconds
        self._sides = sides.Sides(store_, peers_.stubs)

    async def run_pass(self, since: datetime | None) -> AsyncIterator[findings.Kept | Pass]:
        """One pass: each difference as it is found, then what was compared. Raises InvalidArgument, Unavailable."""
        started_at = await self._findings.clock()
        since = _since(since, started_at)
        counts, waiting = _Counts(), list[provider_lists.Awaited]()
        read: dict[str, SideRead] = {}
        video_ids = await self._sides.video_ids(since)
        for start in range(0, len(video_ids), sides.BATCH):
            subjects = await self._sides.subjects(video_ids[start : start + sides.BATCH])
            _note_sides(read, subjects[0].marks)
            counts.videos += len(subjects)
            counts.objects += sum(len(subject.stored) for subject in subjects)
            waiting += provider_lists.awaited(subjects)
            found = [one for subject in subjects for one in reconciliation.compare(subject)]
            kept = await self._findings.keep(found, self._interval)
            counts.add(kept)
            for one in kept:
                yield one
        for name in await self._sides.provider_accounts():
            kept = await self._provider(name, since, waiting, counts, read)
            counts.add(kept)
            for one in kept:
                yield one
        unread = [side.side for side in read.values() if side.error]
        await self._findings.clear(started_at, unread)
        RECONCILED_AT.set_to_current_time()
        yield Pass(
            started_at,
            since,
            counts.videos,
            counts.provider_jobs,
            counts.objects,
            counts.findings,
            counts.confirmed,
            tuple(read.values()),
            self._interval,
        )

    async def _provider(
        self,
        name: str,
        since: datetime,
        waiting: Sequence[provider_lists.Awaited],
        counts: _Counts,
        read: dict[str, SideRead],
    ) -> list[findings.Kept]:
        """Compares a provider's list. One that does not answer leaves what was found of it as it was."""
        side = f"provider {name}"
        oldest = await self._findings.oldest_job(side)
        since = min(since, oldest) if oldest else since
        began = [
            one.attempt.created_at
            for one in waiting
            if one.attempt.provider_account == name and one.attempt.created_at
        ]
        try:
            listed = await self._sides.provider_list(name, min([since, *began]) - CLOCK_SKEW)
        except errors.ServiceError as error:
            now = await self._findings.clock()
            read[side] = SideRead(side, now, error.message)
            return []
        read[side] = SideRead(side, listed.as_of)
        counts.provider_jobs += len(listed.jobs)
        found = provider_lists.compare(listed, since, waiting)
        return await self._findings.keep(found, self._interval, side)

    async def find(self, finding_id: str) -> findings.Kept:
        """A finding that may be repaired. Raises NotFound or FailedPrecondition where none is to be."""
        known = await self._findings.find(finding_id)
        if known is None:
            raise _gone()
        kept, now = known
        if not kept.confirmed:
            due = kept.first_seen_at + self._interval
            left = max(0, (due - now).total_seconds())
            raise errors.FailedPrecondition(
                "FINDING_NOT_CONFIRMED",
                f"only one look has shown it; reconcile again in {left:.0f} s or later",
            )
        if kept.finding.repair is reconciliation.Repair.NONE:
            raise errors.FailedPrecondition(
                "NO_REPAIR", f"an operator must look: {kept.finding.advice}"
            )
        return kept

    async def repair(self, kept: findings.Kept) -> None:
        """Applies a finding's repair, where it still stands as it was shown. Idempotent. Raises NotFound where not."""
        finding = kept.finding
        (subject,) = await self._sides.subjects([finding.video_id])
        now = {one.finding_id: one for one in reconciliation.compare(subject)}
        again = now.get(finding.finding_id)
        if again is None or again.evidence != finding.evidence:
            raise _gone()
        repairs: Mapping[
            reconciliation.Repair, Callable[[reconciliation.Subject], Awaitable[None]]
        ] = {
            reconciliation.Repair.SETTLE_HOLD: self._settle,
            reconciliation.Repair.RELEASE_HOLD: self._release,
            reconciliation.Repair.PROJECT_VIDEO: self._project_video,
            reconciliation.Repair.PROJECT_SETTLEMENT: self._project_settlement,
            reconciliation.Repair.RING_JOB: self._ring,
            reconciliation.Repair.UNPIN: self._unpin,
        }
        await repairs[finding.repair](subject)
        log.info("finding_repaired", finding_id=finding.finding_id, repair=finding.repair)

    async def _settle(self, subject: reconciliation.Subject) -> None:
        request = ledger_pb2.SettleHoldRequest(hold_id=subject.video_id)
        await self._stubs.credits.SettleHold(request, timeout=sides.TIMEOUT_SECONDS)

    async def _release(self, subject: reconciliation.Subject) -> None:
        """First a tombstone: a job of it that is still on its way is then never sent."""
        account_id = subject.account_id
        outcome = await self._stubs.generator.CancelAttempt(
            attempt_pb2.CancelAttemptRequest(video_id=subject.video_id, account_id=account_id),
            timeout=peers.TIMEOUT_SECONDS,
        )
        if outcome.state != vocabulary_pb2.VIDEO_STATE_CANCELLED:
            raise _gone()  # its job came meanwhile, and is being made
        request = ledger_pb2.ReleaseRequest(
            hold_id=subject.video_id,
            account_id=account_id,
            cause=vocabulary_pb2.CAUSE_CANCELLED_BEFORE_SUBMIT,
        )
        await self._stubs.credits.Release(request, timeout=peers.TIMEOUT_SECONDS)

    async def _project_video(self, subject: reconciliation.Subject) -> None:
        outcome = await self._stubs.generator.GetVideoOutcome(
            attempt_pb2.GetVideoOutcomeRequest(video_id=subject.video_id),
            timeout=peers.TIMEOUT_SECONDS,
        )
        await self._project(subject.video_id, messages.fact(outcome.last_event))

    async def _project_settlement(self, subject: reconciliation.Subject) -> None:
        assert subject.hold is not None
        fact = videos.Fact(
            kind=videos.Kind.SETTLED,
            seq=0,
            occurred_at=subject.marks.credits.astimezone(UTC),
            captured_credits=subject.hold.captured,
            released_credits=subject.hold.released,
        )
        await self._project(subject.video_id, fact)

    async def _project(self, video_id: str, fact: videos.Fact | None) -> None:
        changed = fact and await self._store.videos.project(
            video_id, fact, self._check_after_seconds
        )
        if changed:
            await self._hub.tell(video_id, changed.account_id)

    async def _ring(self, subject: reconciliation.Subject) -> None:
        video = await self._store.sweeping.ring_again(subject.video_id, self._check_after_seconds)
        if video is None:
            raise _gone()
        if not await self._publisher.ring(video):
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE", "the bus does not take the job now", retry_after_seconds=5
            )

    async def _unpin(self, subject: reconciliation.Subject) -> None:
        for account_id in {pin.account_id for pin in subject.pins}:
            request = storage_pb2.UnpinRequest(account_id=account_id, owner=subject.video_id)
            await self._stubs.storage.Unpin(request, timeout=peers.TIMEOUT_SECONDS)


class Routine:
    """Reconciles again and again, one replica at a time, so that what is found is an alert. Repairs nothing."""

    def __init__(
        self, reconciler: Reconciler, findings_: findings.FindingStore, seconds: float
    ) -> None:
        self._reconciler = reconciler
        self._findings = findings_
        self._seconds = seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Reconciles until told to stop."""
        if self._seconds:
            # Asks more often than it is due: the replica whose turn it was may be gone.
            await loops.every("reconciliation", self._seconds / 10, self.run_once, stopping)

    async def run_once(self) -> None:
        """A pass, where it is due and no other replica had it."""
        if not await self._findings.take_turn(self._seconds):
            return
        async for one in self._reconciler.run_pass(None):
            if isinstance(one, Pass):
                log.info("reconciled", findings=one.findings, confirmed=one.confirmed)
            elif one.confirmed:
                finding = one.finding
                log.warning("finding_confirmed", finding_id=finding.finding_id, kind=finding.kind)


def _since(asked: datetime | None, now: datetime) -> datetime:
    if asked is None:
        return now - DEFAULT_SINCE
    if not now - MAX_SINCE <= asked <= now:
        sentence = f"must be a time within the last {MAX_SINCE.days} days"
        raise errors.InvalidArgument(
            "INVALID_FIELD", f"since: {sentence}", violations=[("since", sentence)]
        )
    return asked


def _note_sides(read: dict[str, SideRead], marks: reconciliation.Watermarks) -> None:
    """Keeps the first watermark of each service: the pass compares what was so from then on."""
    for side in SERVICES:
        read.setdefault(side, SideRead(side, getattr(marks, side)))


def _gone() -> errors.NotFound:
    return errors.NotFound(
        "FINDING_NOT_FOUND", "there is no such finding, or it is no longer so; reconcile again"
    )
