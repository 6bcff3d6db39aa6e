"""What moves credits: each call is one operation, posted with those that come at the same time.

Idempotent by the caller's id.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from kit import postgres
from services.credits import batches, holds, ledger, operations, quotes, rules
from services.credits.store import grouping, rulebooks


class LedgerStore:
    """What moves credits. `ring` is called when a commit left something to tell on the bus."""

    def __init__(
        self,
        pool: postgres.Pool,
        rules_: rulebooks.RulebookStore,
        *,
        ring: Callable[[], None],
        quote_seconds: int,
        balance_low_credits: int,
        posting_shards: int,
    ) -> None:
        self._pool = pool
        self._rulebooks = rules_
        self._quote_seconds = quote_seconds
        self._groups = grouping.Groups(
            *(pool, rules_),
            ring=ring,
            balance_low_credits=balance_low_credits,
            shards=posting_shards,
        )

    async def open_account(self, account_id: str) -> ledger.Balance:
        """Makes an account's books. Idempotent."""
        return await self._groups.post(operations.Opening(account_id))

    async def grant(self, grant: operations.Grant) -> operations.Given:
        """Gives credits as a new lot. Idempotent by (account, request_id)."""
        return await self._groups.post(grant)

    async def quote(self, item: rules.Item) -> tuple[str, quotes.Quote]:
        """Prices an item by the book in force. Raises InvalidArgument/NO_PRICE."""
        async with self._acquire() as connection:
            in_force = await self._rulebooks.in_force(connection)
            book = await self._rulebooks.price_book(connection, in_force.price_version)
            quote = quotes.Quote(
                book.version,
                ledger.fingerprint(item.fields()),
                book.price(item),
                in_force.now + timedelta(seconds=self._quote_seconds),
            )
            return quotes.sign(await self._rulebooks.quote_key(connection), quote), quote

    async def reserve(self, reservation: operations.Reservation) -> holds.Hold:
        """Prices and holds credits. Idempotent by hold_id: the first answer, also a refusal, is repeated for ever."""
        return await self._groups.post(reservation)

    async def capture(
        self, hold_id: str, credits_: int, cause: str, operator: str = ""
    ) -> holds.Hold:
        """Takes so many of the held credits and gives the rest back; 0 is a release. Idempotent by hold_id."""
        account_id = await self._account_of(hold_id)
        origin = ledger.Origin(operator=operator)
        capture = operations.Capture(hold_id, account_id, credits_, cause, origin=origin)
        return await self._groups.post(capture)

    async def release(
        self, hold_id: str, account_id: str, cause: str, operator: str = ""
    ) -> holds.Hold:
        """Gives a hold back. Idempotent. One that is not known becomes VOID: a Reserve that comes late is refused."""
        origin = ledger.Origin(operator=operator)
        release = operations.Release(hold_id, account_id, cause, origin=origin)
        return await self._groups.post(release)

    async def refund(
        self,
        hold_id: str,
        request_id: str,
        credits_: int,
        note: str,
        *,
        operator: str = "",
        taken_from: ledger.Book = ledger.Book.REVENUE,
    ) -> operations.Given:
        """Gives captured credits back as a correction lot. Idempotent by (account, request_id)."""
        account_id = await self._account_of(hold_id)
        refund = operations.Refund(
            *(hold_id, account_id, request_id, credits_, note, taken_from),
            origin=ledger.Origin(operator=operator),
        )
        return await self._groups.post(refund)

    async def settle(self, verdict: rules.Verdict) -> holds.Hold | None:
        """Captures, in part or not at all, as the policy on the hold says. Once: later calls answer the hold as it is.

        None: there is no such hold. Raises AlreadyExists/HOLD_MISMATCH when it is another account's.
        """
        return await self._groups.post(operations.Settlement(verdict))

    async def expire_due(self, account_id: str) -> int:
        """Expires an idle account's due lots; every posting does so for its own account. Answers the credits gone."""
        return await self._groups.post(operations.Expiry(account_id))

    async def _account_of(self, hold_id: str) -> str:
        """Whose hold it is, for ever. Raises NotFound/HOLD_NOT_FOUND."""
        async with self._acquire() as connection:
            account_id = await connection.fetchval(
                "SELECT account_id FROM holds WHERE hold_id = $1", hold_id
            )
        if account_id is None:
            raise batches.hold_unknown(hold_id)
        return account_id

    def _acquire(self) -> Any:
        return self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS)
