"""Recovery after a restore: what each service forgot, made good from what the others know; then they open.

Every step is idempotent and no service opens before all is made good: broken off anywhere, it is run again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime, timedelta

from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import operator_pb2
from framewire.generator.v1 import attempt_pb2
from kit import errors, incarnation, telemetry
from kit.failpoints import failpoint
from services.gateway import messages, peers, store, videos

log = telemetry.logger(__name__)

BATCH = 100
TIMEOUT_SECONDS = 60.0
END_TIMEOUT_SECONDS = 300.0
CHECK_AFTER_SECONDS = 60.0
"""When the sweeper asks for a video that was made known again and of which nothing is heard."""
MARGIN = timedelta(minutes=5)
"""Between the clocks of two databases, generously."""
_CANNOT_HOLD = ("INSUFFICIENT_CREDITS", "RULEBOOK_NOT_FOUND", "HOLD_MISMATCH", "HOLD_RELEASED")

_SETTLED = (ledger_pb2.HOLD_STATE_CAPTURED, ledger_pb2.HOLD_STATE_RELEASED)

Recovered = vocabulary_pb2.RecoveredVideo


class Recoverer:
    """What `framewire recover` runs."""

    def __init__(
        self, store_: store.Store, peers_: peers.Peers, life: incarnation.Incarnation
    ) -> None:
        self._store = store_
        self._peers = peers_
        self._stubs = peers_.stubs
        self._life = life

    async def run(self, *, dry_run: bool) -> AsyncIterator[Recovered | operator_pb2.RecoverDone]:
        """What was done for each video, then how the services stood. Raises Unavailable."""
        standings = await self._standings()
        closed = {name: one for name, one in standings.items() if not one.open}
        seen = 0
        if closed:
            since = _since(closed)
            if "gateway" in closed:
                async for done in self._readmit(since, dry_run=dry_run):
                    yield done
            told: set[str] = set()
            async for known in self._known(since):
                seen += len(known)
                for done in await self._make_good(known, closed, dry_run=dry_run):
                    told.add(done.video_id)
                    yield done
            for done in await self._end(closed, told, dry_run=dry_run):
                yield done
        yield operator_pb2.RecoverDone(
            services=[
                operator_pb2.RecoveredService(service=name, standing=one)
                for name, one in standings.items()
            ],
            videos=seen,
        )

    async def _standings(self) -> dict[str, vocabulary_pb2.RecoveryStanding]:
        own = await self._life.standing()
        return {
            "gateway": vocabulary_pb2.RecoveryStanding(
                open=own.open,
                incarnation_id=own.incarnation_id,
                reason=own.reason,
                since=messages.timestamp(own.since),
                restored_to=messages.timestamp(own.restored_to),
            ),
            "credits": await self._stubs.credits.GetRecovery(
                ledger_pb2.GetRecoveryRequest(), timeout=TIMEOUT_SECONDS
            ),
            "generator": await self._stubs.generator.GetRecovery(
                attempt_pb2.GetRecoveryRequest(), timeout=TIMEOUT_SECONDS
            ),
        }

    async def _make_good(
        self, known: Sequence[videos.Video], closed: Collection[str], *, dry_run: bool
    ) -> list[Recovered]:
        done: list[Recovered] = []
        if "credits" in closed:
            done += await self._hold(known, dry_run=dry_run)
        if "generator" in closed:
            done += await self._doubt(known, dry_run=dry_run)
        if "gateway" in closed and not dry_run:
            await self._show_settlements(known)
        return done

    async def _show_settlements(self, known: Sequence[videos.Video]) -> None:
        """What the ledger took for videos whose settlement we forgot: its event was acknowledged, and comes no more."""
        ids = [video.video_id for video in known if video.settlement == "PENDING"]
        if not ids:
            return
        held = await self._stubs.credits.SurveyHolds(
            ledger_pb2.SurveyHoldsRequest(hold_ids=ids), timeout=TIMEOUT_SECONDS
        )
        for one in held.holds:
            if one.hold.state not in _SETTLED:
                continue
            fact = videos.Fact(
                kind=videos.Kind.SETTLED,
                seq=0,
                occurred_at=one.hold.settled_at.ToDatetime(tzinfo=UTC),
                captured_credits=one.hold.captured_credits,
                released_credits=one.hold.released_credits,
            )
            await self._store.videos.project(one.hold.hold_id, fact, CHECK_AFTER_SECONDS)

    async def _end(
        self, closed: Collection[str], told: Collection[str], *, dry_run: bool
    ) -> list[Recovered]:
        """What the generator has of videos that nobody else knows; then all open."""
        done: list[Recovered] = []
        if "generator" in closed:
            asked = attempt_pb2.EndRecoveryRequest(dry_run=dry_run)
            ended = await self._stubs.generator.EndRecovery(asked, timeout=END_TIMEOUT_SECONDS)
            # In a dry run none is doubted yet: those that were told of would be told of twice.
            doubted = vocabulary_pb2.RECOVERY_ACTION_DOUBTED
            done = [
                one
                for one in _changed(ended.videos)
                if one.video_id not in told or one.action != doubted
            ]
        if not dry_run:
            await self._open(closed)
        return done

    async def _open(self, closed: Collection[str]) -> None:
        """The generator has opened itself; the gateway is the last, so that nobody is let in before."""
        if "credits" in closed:
            await self._stubs.credits.EndRecovery(
                ledger_pb2.EndRecoveryRequest(), timeout=TIMEOUT_SECONDS
            )
        await failpoint("gateway.recover.before_open")
        if "gateway" in closed:
            await self._life.end_recovery()
        log.warning("recovered", services=sorted(closed))

    async def _readmit(self, since: datetime, *, dry_run: bool) -> AsyncIterator[Recovered]:
        """Videos that only the generator knows."""
        for request in (
            attempt_pb2.SurveyVideosRequest(created_since=messages.timestamp(since)),
            attempt_pb2.SurveyVideosRequest(),
        ):
            request.with_jobs, request.page_size = True, BATCH
            while True:
                page = await self._stubs.generator.SurveyVideos(request, timeout=TIMEOUT_SECONDS)
                for video in page.videos:
                    if not video.HasField("job"):
                        continue
                    done = await self._store.recovery.readmit(video.job, dry_run=dry_run)
                    if done:
                        await failpoint("gateway.recover.after_video")
                        admission = video.job.admission
                        yield Recovered(
                            video_id=video.job.video_id,
                            action=vocabulary_pb2.RECOVERY_ACTION_READMITTED
                            if done == "READMITTED"
                            else vocabulary_pb2.RECOVERY_ACTION_NOT_READMITTED,
                            detail=f"request_id {admission.request_id}"
                            if done == "READMITTED"
                            else done,
                        )
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token

    async def _known(self, since: datetime) -> AsyncIterator[list[videos.Video]]:
        """Our videos, as far as another service may have forgotten them."""
        after = ""
        while page := await self._store.recovery.page(after, since, BATCH):
            after = page[-1].video_id
            yield page

    async def _hold(self, known: Sequence[videos.Video], *, dry_run: bool) -> list[Recovered]:
        """Holds that the ledger forgot: the same ids, prices and versions."""
        held = await self._stubs.credits.SurveyHolds(
            ledger_pb2.SurveyHoldsRequest(hold_ids=[video.video_id for video in known]),
            timeout=TIMEOUT_SECONDS,
        )
        there = {one.hold.hold_id for one in held.holds}
        done: list[Recovered] = []
        for video in known:
            if video.video_id in there:
                continue
            action, detail = vocabulary_pb2.RECOVERY_ACTION_HELD, f"{video.quoted_credits} credits"
            try:
                if not dry_run:
                    await self._stubs.credits.RestoreHold(
                        _hold(video, self._peers.priced(video)), timeout=TIMEOUT_SECONDS
                    )
                    await failpoint("gateway.recover.after_hold")
            except errors.ServiceError as error:
                if error.reason not in _CANNOT_HOLD:
                    raise
                action, detail = vocabulary_pb2.RECOVERY_ACTION_NOT_HELD, error.message
            done.append(Recovered(video_id=video.video_id, action=action, detail=detail))
        return done

    async def _doubt(self, known: Sequence[videos.Video], *, dry_run: bool) -> list[Recovered]:
        """Attempts that the generator forgot, or whose fate it forgot."""
        request = attempt_pb2.RecoverVideosRequest(
            videos=[_video(video) for video in known], dry_run=dry_run
        )
        answer = await self._stubs.generator.RecoverVideos(request, timeout=TIMEOUT_SECONDS)
        return _changed(answer.videos)


def _since(closed: dict[str, vocabulary_pb2.RecoveryStanding]) -> datetime:
    """From when on something may have been forgotten."""
    moments = [
        one.restored_to.ToDatetime(tzinfo=UTC)
        for one in closed.values()
        if one.HasField("restored_to")
    ]
    if len(moments) < len(closed):
        raise errors.Unavailable(
            "DEPENDENCY_UNAVAILABLE",
            "a service has not compared its database yet: NATS must be reachable; try again",
            retry_after_seconds=5,
        )
    return min(moments) - MARGIN


def _changed(done: Sequence[Recovered]) -> list[Recovered]:
    return [one for one in done if one.action != vocabulary_pb2.RECOVERY_ACTION_NONE]


def _hold(video: videos.Video, item: ledger_pb2.Item) -> ledger_pb2.RestoreHoldRequest:
    return ledger_pb2.RestoreHoldRequest(
        reserve=ledger_pb2.ReserveRequest(
            hold_id=video.video_id,
            account_id=video.account_id,
            item=item,
            not_after=messages.timestamp(video.admit_until),
            labels=video.labels,
            key_id=video.key_id,
        ),
        credits=video.quoted_credits or 0,
        price_version=video.price_version,
        policy_version=video.policy_version,
    )


def _video(video: videos.Video) -> attempt_pb2.KnownVideo:
    return attempt_pb2.KnownVideo(
        job=messages.job(video),
        state=vocabulary_pb2.VideoState.Value(f"VIDEO_STATE_{video.state}"),
        last_event=_last_event(video),
        created_at=messages.timestamp(video.created_at),
    )


def _last_event(video: videos.Video) -> event_pb2.Event:
    """The end that was told, as far as the row keeps it; of a live video its number only."""
    event = event_pb2.Event(
        video_id=video.video_id,
        account_id=video.account_id,
        seq=video.last_seq,
        occurred_at=messages.timestamp(video.finished_at or video.updated_at),
    )
    if video.state is videos.State.COMPLETED:
        event.kind = event_pb2.EVENT_KIND_COMPLETED
        event.completed.ParseFromString(video.outputs)
        event.completed.cancel_requested = video.cancel_requested
    elif video.state is videos.State.FAILED:
        event.kind = event_pb2.EVENT_KIND_FAILED
        event.failed.cause = vocabulary_pb2.Cause.Value(f"CAUSE_{video.failure_cause}")
        event.failed.message = video.failure_message
        event.failed.retryable = video.failure_retryable
    elif video.state is videos.State.CANCELLED:
        event.kind = event_pb2.EVENT_KIND_CANCELLED
        event.cancelled.cause = vocabulary_pb2.Cause.Value(f"CAUSE_{video.failure_cause}")
    return event
