"""How an account's books are read under its lock and written down again; shared by whatever moves credits.

The order of locks is the account's row, then whatever belongs to it. A transaction posts for one account only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import errors, outbox, postgres
from services.credits import announcements, holds, ledger, rules


@dataclass(frozen=True, slots=True)
class Opened:
    """An account under our lock: its books as read, the same without due lots, and the time after the lock."""

    before: ledger.Books
    books: ledger.Books
    now: datetime


async def lock(
    connection: postgres.Connection,
    account_id: str,
    *,
    create: bool = False,
    pinned_by: str | None = None,
) -> Opened | None:
    """Locks an account's row and reads its books, with the lots that a hold pins. None: there is no such account.

    With `create`, an account that is missing is opened, empty.
    """
    statement = "SELECT true FROM accounts WHERE account_id = $1 FOR NO KEY UPDATE"
    if not await connection.fetchval(statement, account_id):
        if not create:
            return None
        await connection.execute(
            "INSERT INTO accounts (account_id) VALUES ($1) ON CONFLICT DO NOTHING", account_id
        )
        await connection.fetchval(statement, account_id)
    # A statement of its own, after the lock: it sees what the one before us committed, and its clock is not from before
    # the wait.
    read = await read_books(connection, account_id, pinned_by)
    assert read is not None, "accounts are never deleted"
    books, now = read
    return Opened(books, ledger.expire_due(books, now), now)


async def read_books(
    connection: postgres.Connection, account_id: str, pinned_by: str | None = None
) -> tuple[ledger.Books, datetime] | None:
    """An account's books in one snapshot, and the database's time."""
    rows = await connection.fetch(
        """
        WITH wanted AS (
            SELECT lot_id FROM lots WHERE account_id = $1 AND available > 0
            UNION
            SELECT lot_id FROM hold_lots WHERE hold_id = $2
        )
        SELECT clock_timestamp() AS now, a.available AS account_available, a.held AS account_held,
            a.last_seq, a.frozen, l.lot_id, l.source, l.priority, l.expires_at, l.created_at,
            l.granted, l.available, l.held, l.parent_lot_id
        FROM accounts a LEFT JOIN (wanted JOIN lots l USING (lot_id)) ON l.account_id = a.account_id
        WHERE a.account_id = $1
        """,
        account_id,
        pinned_by,
    )
    if not rows:
        return None
    books = ledger.Books(
        account_id,
        rows[0]["account_available"],
        rows[0]["account_held"],
        rows[0]["last_seq"],
        rows[0]["frozen"],
        {row["lot_id"]: _lot(row) for row in rows if row["lot_id"] is not None},
    )
    return books, rows[0]["now"]


def _lot(row: Any) -> ledger.Lot:
    return ledger.Lot(
        row["lot_id"],
        ledger.LotSource(row["source"]),
        row["priority"],
        row["expires_at"],
        row["created_at"],
        row["granted"],
        row["available"],
        row["held"],
        row["parent_lot_id"],
    )


async def write(
    connection: postgres.Connection,
    opened: Opened,
    books: ledger.Books,
    balance_low_credits: int,
) -> bool:
    """Writes down what led from the books that were opened to these; true when that put a message into the outbox."""
    if not books.transfers:
        return False
    before = opened.before
    done = await connection.execute(
        """
        WITH written_lots AS (
            INSERT INTO lots (account_id, lot_id, source, priority, expires_at, created_at, granted,
                available, held, parent_lot_id)
            SELECT $1, lot.* FROM unnest($6::text[], $7::text[], $8::int[], $9::timestamptz[],
                $10::timestamptz[], $11::bigint[], $12::bigint[], $13::bigint[], $14::text[]) AS lot
            ON CONFLICT (lot_id) DO UPDATE SET available = EXCLUDED.available,
                held = EXCLUDED.held, expires_at = EXCLUDED.expires_at
        ), written_transfers AS (
            INSERT INTO transfers (account_id, created_at, seq, kind, available_change, held_change,
                hold_id, cause, note)
            SELECT $1, $15, t.* FROM unnest($16::bigint[], $17::text[], $18::bigint[], $19::bigint[],
                $20::text[], $21::text[], $22::text[]) AS t
        ), written_entries AS (
            INSERT INTO entries (account_id, seq, line, book, credits, lot_id)
            SELECT $1, e.* FROM unnest($23::bigint[], $24::smallint[], $25::text[], $26::bigint[],
                $27::text[]) AS e
        )
        UPDATE accounts SET available = $2, held = $3, last_seq = $4
        WHERE account_id = $1 AND last_seq = $5
        """,
        books.account_id,
        books.available,
        books.held,
        books.last_seq,
        before.last_seq,
        *_lot_columns(before, books),
        opened.now,
        *_transfer_columns(before, books),
        *_entry_columns(before, books),
    )
    assert done == "UPDATE 1", "an account was written without its lock"
    threshold = balance_low_credits
    if not books.available < threshold <= before.available:
        return False
    row = announcements.balance_low(books, threshold, opened.now)
    await outbox.add(connection, row)
    return True


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [[row[place] for row in rows] for place in range(width)]


def _lot_columns(before: ledger.Books, books: ledger.Books) -> list[list[Any]]:
    changed = [lot for lot in books.lots.values() if before.lots.get(lot.lot_id) != lot]
    rows = [
        (
            *(lot.lot_id, lot.source, lot.priority, lot.expires_at, lot.created_at),
            *(lot.granted, lot.available, lot.held, lot.parent_lot_id),
        )
        for lot in changed
    ]
    return _columns(rows, 9)


def _transfer_columns(before: ledger.Books, books: ledger.Books) -> list[list[Any]]:
    rows = [
        (
            *(seq, one.kind, one.change(ledger.Book.AVAILABLE), one.change(ledger.Book.HELD)),
            *(one.hold_id, one.cause, one.note),
        )
        for seq, one in enumerate(books.transfers, before.last_seq + 1)
    ]
    return _columns(rows, 7)


def _entry_columns(before: ledger.Books, books: ledger.Books) -> list[list[Any]]:
    rows = [
        (seq, place, line.book, line.credits, line.lot_id)
        for seq, one in enumerate(books.transfers, before.last_seq + 1)
        for place, line in enumerate(one.lines)
    ]
    return _columns(rows, 5)


HOLD_COLUMNS = """hold_id, account_id, state, created_at, fingerprint, item, labels, reserved, captured,
    released, refunded, price_version, policy_version, refusal, not_after, cause, verdict, settled_at"""


def hold_from(row: Any) -> holds.Hold:
    """The hold that a row with HOLD_COLUMNS is."""
    fields = dict(row)
    refusal = fields.pop("refusal")
    return holds.Hold(
        **{
            **fields,
            "state": holds.HoldState(fields["state"]),
            "refusal": holds.Refusal(**refusal) if refusal is not None else None,
        }
    )


async def find_hold(connection: postgres.Connection, hold_id: str) -> holds.Hold | None:
    """The hold of this id."""
    row = await connection.fetchrow(
        f"SELECT {HOLD_COLUMNS} FROM holds WHERE hold_id = $1",
        hold_id,
    )
    return hold_from(row) if row is not None else None


async def hold_and_account(
    connection: postgres.Connection, hold_id: str
) -> tuple[holds.Hold, Opened]:
    """A hold under its account's lock. Raises NotFound/HOLD_NOT_FOUND."""
    account_id = await connection.fetchval(
        "SELECT account_id FROM holds WHERE hold_id = $1", hold_id
    )
    opened = account_id and await lock(connection, account_id, pinned_by=hold_id)
    hold = await find_hold(connection, hold_id)
    if not opened or hold is None:
        raise errors.NotFound("HOLD_NOT_FOUND", f"there is no hold {hold_id}")
    return hold, opened


async def hold_parts(connection: postgres.Connection, hold_id: str) -> tuple[ledger.Part, ...]:
    """The parts of lots that a hold pins, in burning order."""
    rows = await connection.fetch(
        """
        SELECT lot_id, credits, lifetime_left, captured, released FROM hold_lots
        WHERE hold_id = $1 ORDER BY position
        """,
        hold_id,
    )
    return tuple(ledger.Part(**dict(row)) for row in rows)


async def write_new_hold(connection: postgres.Connection, hold: holds.Hold) -> None:
    """Adds a hold. Raises AlreadyExists/HOLD_MISMATCH when another account was first to use its id."""
    refusal = hold.refusal
    added = await connection.fetchval(
        """
        INSERT INTO holds (hold_id, account_id, state, created_at, fingerprint, item, labels, reserved,
            price_version, policy_version, refusal, not_after, cause, settled_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
        ON CONFLICT (hold_id) DO NOTHING RETURNING true
        """,
        hold.hold_id,
        hold.account_id,
        hold.state,
        hold.created_at,
        hold.fingerprint,
        hold.item,
        dict(hold.labels),
        hold.reserved,
        hold.price_version,
        hold.policy_version,
        holds.refusal_fields(refusal) if refusal is not None else None,
        hold.not_after,
        hold.cause,
        hold.settled_at,
    )
    if not added:
        raise errors.AlreadyExists(
            "HOLD_MISMATCH", f"hold {hold.hold_id} is another account's: use a new id"
        )


async def write_parts(
    connection: postgres.Connection, hold_id: str, parts: Sequence[ledger.Part]
) -> None:
    """Adds the parts of lots that a new hold pins."""
    if parts:
        await connection.executemany(
            """
            INSERT INTO hold_lots (hold_id, position, lot_id, credits, lifetime_left)
            VALUES ($1, $2, $3, $4, $5)
            """,
            [
                (hold_id, place, part.lot_id, part.credits, part.lifetime_left)
                for place, part in enumerate(parts)
            ],
        )


async def write_settled_hold(
    connection: postgres.Connection, hold: holds.Hold, parts: Sequence[ledger.Part]
) -> None:
    """Writes a hold's final state, and what became of each of its parts."""
    done = await connection.execute(
        """
        UPDATE holds SET state = $2, captured = $3, released = $4, cause = $5, verdict = $6,
            settled_at = $7
        WHERE hold_id = $1 AND state = 'HELD'
        """,
        hold.hold_id,
        hold.state,
        hold.captured,
        hold.released,
        hold.cause,
        hold.verdict,
        hold.settled_at,
    )
    assert done == "UPDATE 1", "a hold was settled twice"
    await connection.executemany(
        "UPDATE hold_lots SET captured = $3, released = $4 WHERE hold_id = $1 AND position = $2",
        [(hold.hold_id, place, part.captured, part.released) for place, part in enumerate(parts)],
    )


def account_unknown(account_id: str) -> errors.NotFound:
    """What is raised where an account must be there."""
    return errors.NotFound(
        "ACCOUNT_NOT_FOUND", f"there is no account {account_id}: open it first with OpenAccount"
    )


def item_of(hold: holds.Hold) -> rules.Item:
    """What a hold was priced as."""
    assert hold.item is not None, "only VOID holds have no item"
    return rules.item_from(hold.item)
