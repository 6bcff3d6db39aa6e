"""Group commit: operations that come while others are being posted are posted together, in one transaction.

An account always falls to the same shard of this process, and a shard posts one batch after the other: an operation
that finds its shard idle is posted at once, and what comes meanwhile is the next batch. While many wait, the next batch
is read and judged during the writing of the one before (`judging`). Each operation has its own
verdict. A batch that fails is tried again one by one, so that only what made it fail fails. Replicas are kept apart by
the locks of the accounts.
"""

from __future__ import annotations

import asyncio
import contextvars
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from prometheus_client import Counter, Histogram

from kit import errors, failpoints, outbox, postgres, telemetry
from services.credits import ledger, operations
from services.credits.store import judging, posting, rulebooks, writing

log = telemetry.logger(__name__)

MOST_IN_A_BATCH = 128
MOST_WAITING = 2048
"""Of one shard; who comes then is sent away, for what waits longer than its caller is of no use."""

AHEAD_FROM = 32
"""So many must wait for the next batch to be judged during the writing of this one: small ones would become smaller."""

GATHER_SECONDS = 0.004
"""After a batch of several, more may come so long: each batch has a cost of its own. A lone caller never waits."""

PASS_ON_SECONDS = 0.005
"""Verdicts are held back so long at the most, for the next batch to be sent."""

BATCH_SIZE = Histogram(
    "framewire_credits_batch_size",
    "Operations posted by one transaction.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
REPLAYED = Counter("framewire_credits_batches_replayed", "Batches that failed and were split.")
JUDGED_AHEAD = Counter(
    "framewire_credits_batches_judged_ahead",
    "Batches judged while the one before was being written, by whether that stood under the locks.",
    ["stood"],
)


@dataclass(slots=True)
class _Turn:
    """A batch of a shard on its way."""

    firm: asyncio.Future[judging.Judged | None]
    """What it is judged to be, once only its writing can fail; None: it ended without."""
    ended: asyncio.Future[bool]
    """Whether what was firm is committed."""
    size: int = 0
    following: _Turn | None = None
    """The one that is judged ahead on this one."""

    def end(self, committed: bool) -> None:
        """It is; or it is not, and perhaps never was firm. Only the first time counts."""
        if not self.firm.done():
            self.firm.set_result(None)
        if not self.ended.done():
            self.ended.set_result(committed)


@dataclass(slots=True)
class _Shard:
    queue: deque[judging.Waiting] = field(default_factory=deque[judging.Waiting])
    posting: asyncio.Task[None] | None = None
    _grown: asyncio.Future[None] | None = None

    def add(self, waiting: judging.Waiting) -> None:
        """To be posted with the next batch."""
        self.queue.append(waiting)
        if len(self.queue) >= AHEAD_FROM and self._grown is not None and not self._grown.done():
            self._grown.set_result(None)

    async def gather(self, turn: _Turn) -> None:
        """While calls come together, lets some more come: a batch has costs of its own, which they share."""
        if turn.size > 1 and len(self.queue) < AHEAD_FROM:
            self._grown = turn.ended.get_loop().create_future()
            await asyncio.wait({self._grown}, timeout=GATHER_SECONDS)

    async def many(self, turn: _Turn) -> bool:
        """Whether so many come to wait, before the turn has ended, that it is worth to judge them ahead."""
        self._grown = turn.ended.get_loop().create_future()
        if len(self.queue) < AHEAD_FROM:
            await asyncio.wait({self._grown, turn.ended}, return_when=asyncio.FIRST_COMPLETED)
        return not turn.ended.done()


class Groups:
    """Posts operations. `ring` is called when a commit left something to tell on the bus."""

    def __init__(
        self,
        pool: postgres.Pool,
        rules_: rulebooks.RulebookStore,
        *,
        ring: Callable[[], None],
        balance_low_credits: int,
        shards: int,
    ) -> None:
        self._pool = pool
        self._judge = judging.Judge(rules_, balance_low_credits)
        self._ring = ring
        self._shards = [_Shard() for _ in range(shards)]

    async def post(self, operation: operations.Operation) -> Any:
        """The operation's answer, once it is committed. Raises what it is refused with.

        Who stops waiting before the batch is begun takes the operation back; afterwards it is posted all the same.
        """
        shard = self._shards[zlib.crc32(operation.account_id.encode()) % len(self._shards)]
        if len(shard.queue) >= MOST_WAITING:
            raise errors.Unavailable(
                "OVERLOADED",
                "more waits than can be done in time; try again",
                retry_after_seconds=0.5,
            )
        verdict = asyncio.get_running_loop().create_future()
        asked = operation.origin
        origin = ledger.Origin(telemetry.trace_id(), asked.operator, asked.purchase)
        context = contextvars.copy_context()
        shard.add(judging.Waiting(operation, verdict, context, origin))
        if shard.posting is None:
            # A task of its own: the caller who happened to come first may leave.
            shard.posting = asyncio.create_task(self._post_all(shard))
        return await verdict

    async def _post_all(self, shard: _Shard) -> None:
        """Posts until nothing waits: one turn after the other, two at a time while many wait."""
        async with asyncio.TaskGroup() as turns:
            before: _Turn | None = None
            while shard.queue:
                loop = asyncio.get_running_loop()
                turn = _Turn(loop.create_future(), loop.create_future())
                turns.create_task(self._take_turn(shard, turn, before))
                if before is not None:
                    before.following = turn
                judged, before = await turn.firm, turn
                if judged is None or not await shard.many(turn):
                    await turn.ended
                    await shard.gather(turn)
                    before = None
            shard.posting = None

    async def _take_turn(self, shard: _Shard, turn: _Turn, before: _Turn | None) -> None:
        """Posts what waits; judged ahead where the turn before is still being written."""
        try:
            async with self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS) as connection:
                if batch := _next_batch(shard.queue):
                    turn.size = len(batch)
                    await self._post_batch(connection, batch, turn, before)
        except Exception as error:
            # The database is away: what waits now would only wait in vain, one batch after the other.
            for waiting in shard.queue:
                _refuse(waiting, error)
            shard.queue.clear()
        finally:
            turn.end(False)

    async def _post_batch(
        self,
        connection: postgres.Connection,
        batch: Sequence[judging.Waiting],
        turn: _Turn,
        before: _Turn | None,
        *,
        again: bool = False,
    ) -> None:
        """Posts a batch and delivers its verdicts."""
        try:
            verdicts = await self._commit(connection, batch, turn, before)
        except Exception as error:
            # Who waits for this turn's end may have locked what a second try needs.
            turn.end(False)
            away = isinstance(postgres.translate(error), errors.Unavailable)
            if away or again or (len(batch) == 1 and not isinstance(error, _RACES)):
                for waiting in batch:
                    _refuse(waiting, error)
                return
            REPLAYED.inc()
            log.warning("batch_replayed", operations=len(batch), error=repr(error))
            for waiting in batch:
                await self._post_batch(connection, [waiting], turn, None, again=True)
            return
        if turn.following is not None:
            # The database first: it has nothing to do until the next batch is sent, and callers keep us busy.
            await asyncio.wait({turn.following.firm}, timeout=PASS_ON_SECONDS)
        for waiting, verdict in zip(batch, verdicts, strict=True):
            if isinstance(verdict, errors.ServiceError):
                _refuse(waiting, verdict)
            elif not waiting.verdict.done():
                waiting.verdict.set_result(verdict)

    async def _commit(
        self,
        connection: postgres.Connection,
        batch: Sequence[judging.Waiting],
        turn: _Turn,
        before: _Turn | None,
    ) -> list[Any]:
        """The verdicts on a batch, once they are durable."""
        BATCH_SIZE.observe(len(batch))
        kinds = {waiting.operation.kind for waiting in batch}
        judged = await self._judge_ahead(connection, batch, before)
        await connection.execute(posting.BEGIN)
        try:
            locked = await _lock(connection, batch)
            if judged is None or not await _stands(judged, locked, before):
                judged = await self._judge.under_locks(connection, batch)
            if not turn.firm.done():
                turn.firm.set_result(judged)
            if judged.rows is not None:
                judged.transaction = await writing.write(connection, judged.rows)
            if judged.messages:
                await outbox.add_all(connection, judged.messages)
            await _before_commit(kinds)
            await connection.execute("COMMIT")
        except BaseException:
            if _is_open(connection):
                await connection.execute("ROLLBACK")
            raise
        turn.end(True)
        if judged.messages:
            self._ring()
        await _after_commit(kinds)
        return judged.verdicts

    async def _judge_ahead(
        self,
        connection: postgres.Connection,
        batch: Sequence[judging.Waiting],
        before: _Turn | None,
    ) -> judging.Judged | None:
        """What a batch comes to if the one before is committed as it is now; None: that will be seen then."""
        left = before.firm.result() if before is not None else None
        if left is None:
            return None
        try:
            return await self._judge.ahead(connection, batch, left)
        except Exception as error:
            log.warning("not_judged_ahead", operations=len(batch), error=repr(error))
            return None


async def _stands(judged: judging.Judged, locked: Mapping[str, str], before: _Turn | None) -> bool:
    """Whether what was judged ahead of these locks is right under them."""
    left = before.firm.result() if before is not None and await before.ended else None
    stood = left is not None and judged.stands(locked, left)
    JUDGED_AHEAD.labels("yes" if stood else "no").inc()
    return stood


async def _lock(
    connection: postgres.Connection, batch: Sequence[judging.Waiting]
) -> Mapping[str, str]:
    """Locks the accounts of a batch, and makes those first that it opens."""
    wanted = [waiting.operation for waiting in batch]
    accounts = {one.account_id for one in wanted}
    locked = await posting.lock(connection, accounts)
    missing = {one.account_id for one in wanted if one.opens_account}
    missing -= locked.keys()
    if missing:
        # Not while others are locked: whoever makes the same ones may want ours.
        await connection.execute("ROLLBACK")
        await posting.open_accounts(connection, missing)
        await connection.execute(posting.BEGIN)
        locked = await posting.lock(connection, accounts)
    return locked


_RACES = (asyncpg.IntegrityConstraintViolationError, asyncpg.TransactionRollbackError)
"""What another writer may cause between our read and our write; the second time we see what it wrote."""


def _is_open(connection: postgres.Connection) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # the pool has taken it back when it broke
        return False


def _next_batch(queue: deque[judging.Waiting]) -> list[judging.Waiting]:
    """Takes as many as fit, without those whose callers have left."""
    batch: list[judging.Waiting] = []
    while queue and len(batch) < MOST_IN_A_BATCH:
        waiting = queue.popleft()
        if not waiting.verdict.done():
            batch.append(waiting)
    return batch


def _refuse(waiting: judging.Waiting, error: Exception) -> None:
    if not waiting.verdict.done():
        waiting.verdict.set_exception(error)


async def _before_commit(kinds: set[str]) -> None:
    # Each name is spelled out: a test looks for them, and demands that each is in the crash matrix.
    if "reserve" in kinds:
        await failpoints.failpoint("credits.reserve.before_commit")
    if "settle" in kinds:
        await failpoints.failpoint("credits.settle.before_commit")
    if "grant" in kinds:
        await failpoints.failpoint("credits.grant.before_commit")
    if "capture" in kinds:
        await failpoints.failpoint("credits.capture.before_commit")
    if "release" in kinds:
        await failpoints.failpoint("credits.release.before_commit")
    if "refund" in kinds:
        await failpoints.failpoint("credits.refund.before_commit")


async def _after_commit(kinds: set[str]) -> None:
    if "reserve" in kinds:
        await failpoints.failpoint("credits.reserve.after_commit")
    if "settle" in kinds:
        await failpoints.failpoint("credits.settle.after_commit")
    if "grant" in kinds:
        await failpoints.failpoint("credits.grant.after_commit")
