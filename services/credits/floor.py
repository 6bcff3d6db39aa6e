"""The floor under settlement: what no event settled in time is asked for. And lots of idle accounts expire here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from prometheus_client import Gauge

from framewire.events.v1 import event_pb2
from framewire.generator.v1 import attempt_pb2
from kit import errors, loops, telemetry
from services.credits import settlement, store

log = telemetry.logger(__name__)

BATCH = 100
ASKED_AT_ONCE = 8
ASK_SECONDS = 5.0
_TERMINAL = (
    event_pb2.EVENT_KIND_COMPLETED,
    event_pb2.EVENT_KIND_FAILED,
    event_pb2.EVENT_KIND_CANCELLED,
)

OPEN_HOLDS = Gauge("framewire_credits_open_holds", "Holds that are not settled.")
OLDEST_HOLD = Gauge("framewire_credits_oldest_hold_seconds", "Age of the oldest open hold.")
UNSETTLED = Gauge("framewire_credits_unsettled", "Terminal events whose hold is not known.")
OLDEST_UNSETTLED = Gauge(
    "framewire_credits_oldest_unsettled_seconds", "Age of the oldest event whose hold is not known."
)
PARKED_WAITING = Gauge(
    "framewire_credits_parked_events", "Events laid aside as unreadable, in all."
)


class Generator(Protocol):
    """The one call of generator.v1.AttemptService that is needed here."""

    def GetVideoOutcome(  # noqa: N802 (gRPC's name)
        self, request: attempt_pb2.GetVideoOutcomeRequest, /, *, timeout: float | None = None
    ) -> Awaitable[attempt_pb2.VideoOutcome]:
        """The verdict on a video."""
        ...


class Floor:
    """Settles holds that are overdue by asking the generator, and those that came after their event."""

    def __init__(
        self,
        settling: settlement.Settlement,
        books: store.Store,
        generator: Generator,
        *,
        overdue_seconds: float,
        seconds: float,
    ) -> None:
        self._settling = settling
        self._waiting = books.waiting
        self._generator = generator
        self._overdue_seconds = overdue_seconds
        self._seconds = seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Looks until told to stop."""
        await loops.every("credits_floor", self._seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One pass; true when there were more holds than it takes, and the generator answered."""
        late = await self._waiting.late_holds(BATCH)
        for verdict in late:
            await self._settling.settle(verdict)
        overdue = await self._waiting.claim_overdue(self._overdue_seconds, BATCH)
        limit = asyncio.Semaphore(ASKED_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._ask(video_id, limit)) for video_id in overdue]
        failures = {
            video_id: error
            for video_id, task in zip(overdue, asked, strict=True)
            if (error := task.result()) is not None
        }
        if failures:
            # Their turn comes with the next pass, not after another whole wait.
            await self._waiting.unclaim(list(failures))
            first = next(iter(failures.values()))
            log.warning("overdue_holds_not_asked", holds=len(failures), error=repr(first))
        backlog = await self._waiting.backlog()
        OPEN_HOLDS.set(backlog.open_holds)
        OLDEST_HOLD.set(backlog.oldest_hold_seconds)
        UNSETTLED.set(backlog.unsettled)
        OLDEST_UNSETTLED.set(backlog.oldest_unsettled_seconds)
        PARKED_WAITING.set(backlog.parked)
        return not failures and max(len(late), len(overdue)) >= BATCH

    async def _ask(self, video_id: str, limit: asyncio.Semaphore) -> Exception | None:
        """Settles by what the generator says; answers why it could not be asked."""
        request = attempt_pb2.GetVideoOutcomeRequest(video_id=video_id)
        async with limit:
            try:
                outcome = await self._generator.GetVideoOutcome(request, timeout=ASK_SECONDS)
                event = outcome.last_event
                if event.kind in _TERMINAL and event.video_id == video_id:
                    await self._settling.settle(settlement.verdict(event))
                    log.info("settled_by_floor", video_id=video_id)
            except errors.NotFound:
                # Its job never arrived; the gateway sends it again or releases the hold.
                log.info("overdue_hold_unknown_to_generator", video_id=video_id)
            except (errors.AlreadyExists, settlement.UnreadableError) as error:
                # Asking again soon would bring the same answer.
                log.error("overdue_hold_not_settled", video_id=video_id, error=repr(error))
            except errors.ServiceError as error:
                return error
        return None


class Expiry:
    """Expires the due lots of accounts in which nothing moves."""

    def __init__(self, books: store.Store, seconds: float) -> None:
        self._books = books
        self._seconds = seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Expires until told to stop."""
        await loops.every("credits_expiry", self._seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One pass; true when there were more accounts than it takes."""
        accounts = await self._books.waiting.due_accounts(BATCH)
        for account_id in accounts:
            expired = await self._books.ledger.expire_due(account_id)
            log.info("lots_expired", account_id=account_id, credits=expired)
        return len(accounts) >= BATCH
