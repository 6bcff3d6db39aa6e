"""What moves credits: each call is one transaction under its account's lock, idempotent by the caller's id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from kit import errors, failpoints, ids, outbox, postgres
from services.credits import announcements, holds, ledger, quotes, rules
from services.credits.store import posting, rulebooks


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits to be given."""

    account_id: str
    request_id: str
    credits: int
    source: ledger.LotSource
    priority: int = 0
    expires_at: datetime | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Credits to be set aside for a video."""

    hold_id: str
    account_id: str
    item: rules.Item
    not_after: datetime
    quote_id: str = ""
    max_credits: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])

    def fingerprint(self) -> str:
        """What another Reserve of the same hold must agree with."""
        return ledger.fingerprint({"account_id": self.account_id, "item": self.item.fields()})


@dataclass(frozen=True, slots=True)
class Given:
    """A lot that a grant or refund made, and the balance now."""

    lot_id: str
    balance: ledger.Balance


@dataclass(frozen=True, slots=True)
class _Request:
    """A call that is remembered by its request id."""

    method: str
    account_id: str
    request_id: str
    fingerprint: str


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
    ) -> None:
        self._pool = pool
        self._rulebooks = rules_
        self._ring = ring
        self._quote_seconds = quote_seconds
        self._balance_low_credits = balance_low_credits

    async def open_account(self, account_id: str) -> ledger.Balance:
        """Makes an account's books. Idempotent."""
        async with self._acquire() as connection, connection.transaction():
            opened = await posting.lock(connection, account_id, create=True)
            assert opened is not None
        return ledger.balance(opened.books)

    async def grant(self, grant: Grant) -> Given:
        """Gives credits as a new lot. Idempotent by (account, request_id)."""
        request = _Request(
            "GRANT", grant.account_id, grant.request_id, ledger.fingerprint(_grant_fields(grant))
        )
        async with self._acquire() as connection, connection.transaction():
            opened = await posting.lock(connection, grant.account_id)
            if opened is None:
                raise posting.account_unknown(grant.account_id)
            lot_id, books = await self._known_lot(connection, request), opened.books
            told = False
            if lot_id is None:
                lot = ledger.Lot(
                    lot_id=ids.new_id(),
                    source=grant.source,
                    priority=grant.priority or ledger.DEFAULT_PRIORITY,
                    expires_at=grant.expires_at,
                    created_at=opened.now,
                    granted=grant.credits,
                )
                lot_id, books = lot.lot_id, ledger.grant(books, lot, grant.note, opened.now)
                told = await self._write(connection, opened, books)
                await self._remember(connection, request, lot_id, opened.now)
            await failpoints.failpoint("credits.grant.before_commit")
        self._tell(told)
        await failpoints.failpoint("credits.grant.after_commit")
        return Given(lot_id, ledger.balance(books))

    async def quote(self, item: rules.Item) -> tuple[str, quotes.Quote]:
        """Prices an item by the book in force. Raises InvalidArgument/NO_PRICE."""
        async with self._acquire() as connection:
            in_force = await self._rulebooks.in_force(connection)
            book = await self._rulebooks.price_book(connection, in_force.price_version)
            assert book is not None
            quote = quotes.Quote(
                book.version,
                ledger.fingerprint(item.fields()),
                book.price(item),
                in_force.now + timedelta(seconds=self._quote_seconds),
            )
            return quotes.sign(await self._rulebooks.quote_key(connection), quote), quote

    async def reserve(self, reservation: Reservation) -> holds.Hold:
        """Prices and holds credits. Idempotent by hold_id: the first answer, also a refusal, is repeated for ever."""
        async with self._acquire() as connection, connection.transaction():
            opened = await posting.lock(connection, reservation.account_id, create=True)
            assert opened is not None
            hold = await posting.find_hold(connection, reservation.hold_id)
            if hold is not None:
                return holds.check_replay(hold, reservation.account_id, reservation.fingerprint())
            hold, told = await self._reserve_first(connection, opened, reservation)
            await failpoints.failpoint("credits.reserve.before_commit")
        self._tell(told)
        await failpoints.failpoint("credits.reserve.after_commit")
        if hold.refusal is not None:
            raise hold.refusal.error()
        return hold

    async def capture(self, hold_id: str, credits_: int, cause: str) -> holds.Hold:
        """Takes so many of the held credits and gives the rest back; 0 is a release. Idempotent by hold_id."""
        async with self._acquire() as connection, connection.transaction():
            hold, opened = await posting.hold_and_account(connection, hold_id)
            if not holds.check_capture(hold, credits_):
                return hold
            hold = await self._settle(connection, opened, hold, credits_, cause, None)
            await failpoints.failpoint("credits.capture.before_commit")
        self._tell(True)
        return hold

    async def release(self, hold_id: str, account_id: str, cause: str) -> holds.Hold:
        """Gives a hold back. Idempotent. One that is not known becomes VOID: a Reserve that comes late is refused."""
        async with self._acquire() as connection, connection.transaction():
            opened = await posting.lock(connection, account_id, create=True, pinned_by=hold_id)
            assert opened is not None
            hold = await posting.find_hold(connection, hold_id)
            if hold is None:
                hold = holds.Hold(
                    hold_id,
                    account_id,
                    holds.HoldState.VOID,
                    opened.now,
                    cause=cause,
                    settled_at=opened.now,
                )
                await posting.write_new_hold(connection, hold)
                return hold
            if not holds.check_release(hold, account_id):
                return hold
            hold = await self._settle(connection, opened, hold, 0, cause, None)
            await failpoints.failpoint("credits.release.before_commit")
        self._tell(True)
        return hold

    async def refund(self, hold_id: str, request_id: str, credits_: int, note: str) -> Given:
        """Gives captured credits back as a correction lot. Idempotent by (account, request_id)."""
        async with self._acquire() as connection, connection.transaction():
            hold, opened = await posting.hold_and_account(connection, hold_id)
            fields = {"hold_id": hold_id, "credits": credits_, "note": note}
            request = _Request("REFUND", hold.account_id, request_id, ledger.fingerprint(fields))
            lot_id, books = await self._known_lot(connection, request), opened.books
            told = False
            if lot_id is None:
                holds.check_refund(hold, credits_)
                parts = await posting.hold_parts(connection, hold_id)
                lot_id = ids.new_id()
                books = ledger.refund(books, hold_id, parts, credits_, note, opened.now, lot_id)
                told = await self._write(connection, opened, books)
                await connection.execute(
                    "UPDATE holds SET refunded = refunded + $2 WHERE hold_id = $1",
                    hold_id,
                    credits_,
                )
                await self._remember(connection, request, lot_id, opened.now)
            await failpoints.failpoint("credits.refund.before_commit")
        self._tell(told)
        return Given(lot_id, ledger.balance(books))

    async def settle(self, verdict: rules.Verdict) -> holds.Hold | None:
        """Captures, in part or not at all, as the policy on the hold says. Once: later calls answer the hold as it is.

        None: there is no such hold. Raises AlreadyExists/HOLD_MISMATCH when it is another account's.
        """
        async with self._acquire() as connection, connection.transaction():
            opened = await posting.lock(connection, verdict.account_id, pinned_by=verdict.video_id)
            hold = await posting.find_hold(connection, verdict.video_id)
            if hold is None:
                return None
            if not holds.check_settle(hold, verdict.account_id) or opened is None:
                return hold
            hold = await self._settle_by_policy(connection, opened, hold, verdict)
            await failpoints.failpoint("credits.settle.before_commit")
        self._tell(True)
        await failpoints.failpoint("credits.settle.after_commit")
        return hold

    async def expire_due(self, account_id: str) -> int:
        """Expires an idle account's due lots; every posting does so for its own account. Answers the credits gone."""
        async with self._acquire() as connection, connection.transaction():
            opened = await posting.lock(connection, account_id)
            if opened is None:
                return 0
            told = await self._write(connection, opened, opened.books)
        self._tell(told)
        return opened.before.available - opened.books.available

    def _acquire(self) -> Any:
        return self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS)

    def _tell(self, told: bool) -> None:
        if told:
            self._ring()

    async def _write(
        self, connection: postgres.Connection, opened: posting.Opened, books: ledger.Books
    ) -> bool:
        return await posting.write(connection, opened, books, self._balance_low_credits)

    async def _reserve_first(
        self,
        connection: postgres.Connection,
        opened: posting.Opened,
        reservation: Reservation,
    ) -> tuple[holds.Hold, bool]:
        in_force = await self._rulebooks.in_force(connection)
        hold = holds.Hold(
            hold_id=reservation.hold_id,
            account_id=reservation.account_id,
            state=holds.HoldState.HELD,
            created_at=opened.now,
            fingerprint=reservation.fingerprint(),
            item=reservation.item.fields(),
            labels=reservation.labels,
            price_version=in_force.price_version,
            policy_version=in_force.policy_version,
            not_after=reservation.not_after,
        )
        books, parts = opened.books, ()
        try:
            version, price = await self._price(connection, opened, reservation, hold)
            books, parts = ledger.reserve(books, hold.hold_id, price, opened.now)
            hold = replace(hold, reserved=price, price_version=version)
        except errors.ServiceError as error:
            hold = holds.refuse(hold, error, opened.now)
        # The hold comes before its transfers: a refusal of its id then costs no work.
        await posting.write_new_hold(connection, hold)
        told = await self._write(connection, opened, books)
        await posting.write_parts(connection, hold.hold_id, parts)
        if hold.state is holds.HoldState.HELD:
            early = await self._settle_early(connection, hold)
            return early or hold, told or early is not None
        return hold, told

    async def _price(
        self,
        connection: postgres.Connection,
        opened: posting.Opened,
        reservation: Reservation,
        hold: holds.Hold,
    ) -> tuple[str, int]:
        """The price, and the version of the book that it is from. Raises what the reservation is refused with."""
        holds.check_admission(opened.books.frozen, opened.now, reservation.not_after)
        version = hold.price_version or ""
        if reservation.quote_id:
            key = await self._rulebooks.quote_key(connection)
            item = ledger.fingerprint(reservation.item.fields())
            version = quotes.check(key, reservation.quote_id, item, opened.now).price_version
        book = await self._rulebooks.price_book(connection, version)
        assert book is not None, "quotes are signed: their version was in force"
        price = book.price(reservation.item)
        holds.check_price(price, reservation.max_credits)
        return version, price

    async def _settle_early(
        self, connection: postgres.Connection, hold: holds.Hold
    ) -> holds.Hold | None:
        """Settles a new hold whose terminal event was here before it."""
        fields = await connection.fetchval(
            "SELECT verdict FROM unsettled WHERE video_id = $1 AND account_id = $2",
            hold.hold_id,
            hold.account_id,
        )
        if fields is None:
            return None
        opened = await posting.lock(connection, hold.account_id, pinned_by=hold.hold_id)
        assert opened is not None
        return await self._settle_by_policy(connection, opened, hold, rules.verdict_from(fields))

    async def _settle_by_policy(
        self,
        connection: postgres.Connection,
        opened: posting.Opened,
        hold: holds.Hold,
        verdict: rules.Verdict,
    ) -> holds.Hold:
        policy = await self._rulebooks.refund_policy(connection, hold.policy_version or "")
        captured = policy.captured(hold.reserved, posting.item_of(hold), verdict)
        return await self._settle(connection, opened, hold, captured, verdict.cause, verdict)

    async def _settle(
        self,
        connection: postgres.Connection,
        opened: posting.Opened,
        hold: holds.Hold,
        captured: int,
        cause: str,
        verdict: rules.Verdict | None,
    ) -> holds.Hold:
        parts = await posting.hold_parts(connection, hold.hold_id)
        books, settled_parts = ledger.settle(
            opened.books, hold.hold_id, parts, captured, cause, opened.now, ids.new_id
        )
        fields = verdict.fields() if verdict is not None else None
        hold = holds.settled(hold, captured, cause, fields, opened.now)
        await posting.write_settled_hold(connection, hold, settled_parts)
        await self._write(connection, opened, books)
        await connection.execute("DELETE FROM unsettled WHERE video_id = $1", hold.hold_id)
        await outbox.add(connection, announcements.settled(hold, books.available, opened.now))
        return hold

    async def _known_lot(self, connection: postgres.Connection, request: _Request) -> str | None:
        """The lot that this request made before. Raises AlreadyExists when another request had its id."""
        row = await connection.fetchrow(
            """
            SELECT fingerprint, lot_id FROM requests
            WHERE account_id = $1 AND method = $2 AND request_id = $3
            """,
            request.account_id,
            request.method,
            request.request_id,
        )
        if row is None:
            return None
        if row["fingerprint"] != request.fingerprint:
            raise errors.AlreadyExists(
                "REQUEST_ID_REUSED",
                "this request_id was used with another request: use a new one for a new request",
            )
        return row["lot_id"]

    async def _remember(
        self, connection: postgres.Connection, request: _Request, lot_id: str, now: datetime
    ) -> None:
        await connection.execute(
            """
            INSERT INTO requests (account_id, method, request_id, fingerprint, lot_id, created_at)
            VALUES ($1, $2, $3, $4, $5, $6)
            """,
            request.account_id,
            request.method,
            request.request_id,
            request.fingerprint,
            lot_id,
            now,
        )


def _grant_fields(grant: Grant) -> dict[str, object]:
    return {
        "credits": grant.credits,
        "source": grant.source,
        "priority": grant.priority,
        "expires_at": grant.expires_at.isoformat() if grant.expires_at else None,
        "note": grant.note,
    }
