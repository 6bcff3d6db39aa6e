"""Group commit: operations that come while others are being posted are posted together, in one transaction.

An account always falls to the same shard of this process, and a shard posts one batch after the other: an operation
that finds its shard idle is posted at once, and what comes meanwhile is the next batch. Each operation has its own
verdict. A batch that fails is tried again one by one, so that only what made it fail fails. Replicas are kept apart by
the locks of the accounts.
"""

from __future__ import annotations

import asyncio
import contextvars
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from prometheus_client import Counter, Histogram

from kit import errors, failpoints, ids, outbox, postgres, telemetry
from services.credits import announcements, batches, ledger, operations
from services.credits.store import posting, rulebooks, writing

log = telemetry.logger(__name__)

SHARDS = 2
MOST_IN_A_BATCH = 256
MOST_WAITING = 2048
"""Of one shard; who comes then is sent away, for what waits longer than its caller is of no use."""

BATCH_SIZE = Histogram(
    "framewire_credits_batch_size",
    "Operations posted by one transaction.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
REPLAYED = Counter("framewire_credits_batches_replayed", "Batches that failed and were split.")


@dataclass(slots=True)
class _Waiting:
    """An operation and who waits for its verdict, in whose trace it is told of."""

    operation: operations.Operation
    verdict: asyncio.Future[Any]
    context: contextvars.Context
    origin: ledger.Origin


@dataclass(slots=True)
class _Shard:
    queue: deque[_Waiting] = field(default_factory=deque[_Waiting])
    posting: asyncio.Task[None] | None = None


class Groups:
    """Posts operations. `ring` is called when a commit left something to tell on the bus."""

    def __init__(
        self,
        pool: postgres.Pool,
        rules_: rulebooks.RulebookStore,
        *,
        ring: Callable[[], None],
        balance_low_credits: int,
    ) -> None:
        self._pool = pool
        self._rulebooks = rules_
        self._ring = ring
        self._balance_low_credits = balance_low_credits
        self._shards = [_Shard() for _ in range(SHARDS)]

    async def post(self, operation: operations.Operation) -> Any:
        """The operation's answer, once it is committed. Raises what it is refused with.

        Who stops waiting before the batch is begun takes the operation back; afterwards it is posted all the same.
        """
        shard = self._shards[zlib.crc32(operation.account_id.encode()) % SHARDS]
        if len(shard.queue) >= MOST_WAITING:
            raise errors.Unavailable(
                "OVERLOADED",
                "more waits than can be done in time; try again",
                retry_after_seconds=0.5,
            )
        verdict = asyncio.get_running_loop().create_future()
        asked = operation.origin
        origin = ledger.Origin(telemetry.trace_id(), asked.operator, asked.purchase)
        shard.queue.append(_Waiting(operation, verdict, contextvars.copy_context(), origin))
        if shard.posting is None:
            # A task of its own: the caller who happened to come first may leave.
            shard.posting = asyncio.create_task(self._post_all(shard))
        return await verdict

    async def _post_all(self, shard: _Shard) -> None:
        """Posts until nothing waits."""
        while shard.queue:
            try:
                async with self._pool.acquire(
                    timeout=postgres.ACQUIRE_TIMEOUT_SECONDS
                ) as connection:
                    while _is_open(connection) and (batch := _next_batch(shard.queue)):
                        await self._post_batch(connection, batch, again=False)
            except Exception as error:
                # The database is away: what waits now would only wait in vain, one batch after the other.
                for waiting in shard.queue:
                    _refuse(waiting, error)
                shard.queue.clear()
        shard.posting = None

    async def _post_batch(
        self, connection: postgres.Connection, batch: Sequence[_Waiting], *, again: bool
    ) -> None:
        """Posts a batch and delivers its verdicts."""
        try:
            verdicts = await self._commit(connection, batch)
        except Exception as error:
            away = isinstance(postgres.translate(error), errors.Unavailable)
            if away or again or (len(batch) == 1 and not isinstance(error, _RACES)):
                for waiting in batch:
                    _refuse(waiting, error)
                return
            REPLAYED.inc()
            log.warning("batch_replayed", operations=len(batch), error=repr(error))
            for waiting in batch:
                await self._post_batch(connection, [waiting], again=True)
            return
        for waiting, verdict in zip(batch, verdicts, strict=True):
            if isinstance(verdict, errors.ServiceError):
                _refuse(waiting, verdict)
            elif not waiting.verdict.done():
                waiting.verdict.set_result(verdict)

    async def _commit(
        self, connection: postgres.Connection, batch: Sequence[_Waiting]
    ) -> list[Any]:
        """The verdicts on a batch, once they are durable."""
        BATCH_SIZE.observe(len(batch))
        wanted = [waiting.operation for waiting in batch]
        accounts = {one.account_id for one in wanted}
        to_open = {one.account_id for one in wanted if one.opens_account}
        await connection.execute(posting.BEGIN)
        try:
            locked = await posting.lock(connection, accounts)
            missing = to_open - {account["account_id"] for account in locked}
            if missing:
                # Not while others are locked: whoever makes the same ones may want ours.
                await connection.execute("ROLLBACK")
                await posting.open_accounts(connection, missing)
                await connection.execute(posting.BEGIN)
                locked = await posting.lock(connection, accounts)
            verdicts, told = await self._judge_and_write(connection, locked, batch)
            await _before_commit({one.kind for one in wanted})
            await connection.execute("COMMIT")
        except BaseException:
            if _is_open(connection):
                await connection.execute("ROLLBACK")
            raise
        if told:
            self._ring()
        await _after_commit({one.kind for one in wanted})
        return verdicts

    async def _judge_and_write(
        self, connection: postgres.Connection, locked: Sequence[Any], batch: Sequence[_Waiting]
    ) -> tuple[list[Any], bool]:
        """The verdicts, and whether there is something to tell."""
        wanted = [waiting.operation for waiting in batch]
        found = await posting.read(connection, locked, wanted)
        quoted = {
            one.quote_id
            for one in wanted
            if isinstance(one, operations.Reservation) and one.quote_id
        }
        policies = {hold.policy_version or "" for hold in found.holds.values()} | {
            one.policy_version for one in wanted if isinstance(one, operations.Restoration)
        }
        open_books = batches.Batch(
            now=found.now,
            before=found.books,
            holds=found.holds,
            parts=found.parts,
            requests=found.requests,
            unsettled=found.unsettled,
            rulebooks=await self._rulebooks.for_batch(connection, found.in_force, quoted, policies),
            spending=await posting.spending(connection, found, wanted),
            balance_low_credits=self._balance_low_credits,
            new_id=ids.new_id,
        )
        verdicts: list[Any] = []
        messages = [_message(fact, open_books) for fact in open_books.facts]
        for waiting in batch:
            first, posted = len(open_books.facts), _last_seq(open_books, waiting)
            try:
                verdicts.append(waiting.operation.judge(open_books))
            except errors.ServiceError as refusal:
                verdicts.append(refusal)
            for seq in range(posted + 1, _last_seq(open_books, waiting) + 1):
                open_books.origins[waiting.operation.account_id, seq] = waiting.origin
            messages += [
                waiting.context.run(_message, fact, open_books) for fact in open_books.facts[first:]
            ]
        await writing.write(connection, open_books)
        if messages:
            await outbox.add_all(connection, sorted(messages, key=lambda row: row.ce_id))
        return verdicts, bool(messages)


_RACES = (asyncpg.IntegrityConstraintViolationError, asyncpg.TransactionRollbackError)
"""What another writer may cause between our read and our write; the second time we see what it wrote."""


def _is_open(connection: postgres.Connection) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # the pool has taken it back when it broke
        return False


def _last_seq(batch: batches.Batch, waiting: _Waiting) -> int:
    books = batch.books.get(waiting.operation.account_id)
    return books.last_seq if books is not None else 0


def _next_batch(queue: deque[_Waiting]) -> list[_Waiting]:
    """Takes as many as fit, without those whose callers have left."""
    batch: list[_Waiting] = []
    while queue and len(batch) < MOST_IN_A_BATCH:
        waiting = queue.popleft()
        if not waiting.verdict.done():
            batch.append(waiting)
    return batch


def _refuse(waiting: _Waiting, error: Exception) -> None:
    if not waiting.verdict.done():
        waiting.verdict.set_exception(error)


def _message(fact: batches.Settled | batches.RanLow, batch: batches.Batch) -> outbox.Row:
    if isinstance(fact, batches.Settled):
        return outbox.headed(announcements.settled(fact.hold, fact.available, batch.now))
    row = announcements.balance_low(fact.books, batch.balance_low_credits, batch.now)
    return outbox.headed(row)


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
