"""What a batch of operations comes to: its books read, each operation judged, its rows made ready to be written.

Mostly under the locks of its accounts. Or ahead of them, while the batch before is being written: then on what that one
leaves, as it says itself, and on rows read without a lock. What was judged ahead stands if the locked rows are still
those that it was judged on (`Judged.stands`); else it is judged again.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kit import errors, ids, outbox, postgres
from services.credits import announcements, batches, ledger, operations
from services.credits.store import posting, rulebooks, writing

Value = TypeVar("Value")

STALE_SECONDS = 1.0
"""What was judged ahead is judged again after that: its time is of when it was read."""


@dataclass(slots=True)
class Waiting:
    """An operation and who waits for its verdict, in whose trace it is told of."""

    operation: operations.Operation
    verdict: asyncio.Future[Any]
    context: contextvars.Context
    origin: ledger.Origin


@dataclass(slots=True)
class Judged:
    """A batch with its verdicts, and what is to be written and told."""

    batch: batches.Batch
    verdicts: list[Any]
    messages: list[outbox.Row]
    rows: writing.Rows | None
    versions: dict[str, str]
    """Of the accounts' rows that it was judged on."""
    read_at: float
    transaction: str = ""
    """Which wrote it: from then on the version of the rows that it wrote."""

    def stands(self, locked: Mapping[str, str], before: Judged) -> bool:
        """Whether these versions, which nobody changes any more, are those it was judged on; `before` is committed.

        Whoever changes a hold, a lot or a request of an account writes the account's row, too.
        """
        if time.monotonic() - self.read_at > STALE_SECONDS:
            return False
        expected = self.versions | {
            account_id: before.version(account_id)
            for account_id in self.versions.keys() & before.versions.keys()
        }
        self.versions = expected
        return locked == expected

    def version(self, account_id: str) -> str:
        """Of an account's row, once this is committed."""
        written = self.rows is not None and account_id in self.rows.accounts
        return self.transaction if written else self.versions[account_id]


class Judge:
    """Judges batches."""

    def __init__(self, rules_: rulebooks.RulebookStore, balance_low_credits: int) -> None:
        self._rulebooks = rules_
        self._balance_low_credits = balance_low_credits

    async def under_locks(
        self, connection: postgres.Connection, waiting: Sequence[Waiting]
    ) -> Judged:
        """Of accounts that this transaction has locked."""
        found = await posting.read(connection, [one.operation for one in waiting])
        return await self._judge(connection, found, waiting)

    async def ahead(
        self, connection: postgres.Connection, waiting: Sequence[Waiting], before: Judged
    ) -> Judged | None:
        """On what `before` will have left, outside of any transaction. None: this one must wait for it."""
        wanted = [one.operation for one in waiting]
        found = await posting.read(connection, wanted)
        if len(found.books) < len({one.account_id for one in wanted}) or posting.caps_met(
            found, wanted
        ):
            return None
        return await self._judge(connection, _left(found, before.batch), waiting)

    async def _judge(
        self, connection: postgres.Connection, found: posting.Found, waiting: Sequence[Waiting]
    ) -> Judged:
        read_at = time.monotonic()
        wanted = [one.operation for one in waiting]
        quoted = {
            one.quote_id
            for one in wanted
            if isinstance(one, operations.Reservation) and one.quote_id
        }
        policies = {hold.policy_version or "" for hold in found.holds.values()} | {
            one.policy_version for one in wanted if isinstance(one, operations.Restoration)
        }
        batch = batches.Batch(
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
        messages = [_message(fact, batch) for fact in batch.facts]
        verdicts = [_verdict(one, batch, messages) for one in waiting]
        messages.sort(key=lambda row: row.ce_id)
        return Judged(
            *(batch, verdicts, messages, writing.rows(batch), dict(found.versions), read_at)
        )


def _verdict(waiting: Waiting, batch: batches.Batch, messages: list[outbox.Row]) -> Any:
    """The operation's answer or refusal. What is to be told is told in its caller's trace."""
    operation = waiting.operation
    told, posted = len(batch.facts), _last_seq(batch, operation.account_id)
    try:
        verdict = operation.judge(batch)
    except errors.ServiceError as refusal:
        verdict = refusal
    for seq in range(posted + 1, _last_seq(batch, operation.account_id) + 1):
        batch.origins[operation.account_id, seq] = waiting.origin
    messages += [waiting.context.run(_message, fact, batch) for fact in batch.facts[told:]]
    return verdict


def _last_seq(batch: batches.Batch, account_id: str) -> int:
    books = batch.books.get(account_id)
    return books.last_seq if books is not None else 0


def _message(fact: batches.Settled | batches.RanLow, batch: batches.Batch) -> outbox.Row:
    if isinstance(fact, batches.Settled):
        return outbox.headed(announcements.settled(fact.hold, fact.available, batch.now))
    row = announcements.balance_low(fact.books, batch.balance_low_credits, batch.now)
    return outbox.headed(row)


def _left(found: posting.Found, before: batches.Batch) -> posting.Found:
    """What was found, as it is once `before` is written; whether some of it is already does not matter."""
    met = {fact.hold.hold_id for fact in before.facts if isinstance(fact, batches.Settled)}
    return replace(
        found,
        books={
            account_id: _after(books, before.books.get(account_id))
            for account_id, books in found.books.items()
        },
        holds=found.holds | _of(before.holds, found.hold_ids),
        parts=found.parts | _of(before.parts, found.hold_ids),
        requests=found.requests | before.requests,
        unsettled={
            video_id: verdict
            for video_id, verdict in found.unsettled.items()
            if video_id not in met
        },
    )


def _of(values: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    return {name: values[name] for name in names if name in values}


def _after(found: ledger.Books, left: ledger.Books | None) -> ledger.Books:
    """An account as its last batch left it, with the lots that matter to that batch or this one."""
    if left is None:
        return found
    lots = {
        lot_id: lot
        for lot_id, lot in left.lots.items()
        if lot.available or lot.held or lot_id in found.lots
    }
    return replace(left, lots={**found.lots, **lots}, transfers=(), order=None)
