"""How the books of some accounts are read under their locks and written down again, in a constant number of statements.

Accounts are locked in the order of their ids, all by one statement, before anything else: no two postings can deadlock.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import postgres
from services.credits import caps, holds, ledger, operations, rules
from services.credits.store import rulebooks

BEGIN = "BEGIN; SET LOCAL enable_seqscan = off; SET LOCAL plan_cache_mode = force_generic_plan"
"""A posting's transaction, in one round trip. Its statements look up rows by key, with plans that are made once,
perhaps while the tables are still small: the planner must not count on that."""


_NO_ORIGIN = ledger.Origin()


@dataclass(frozen=True, slots=True)
class Found:
    """What there is, beside the accounts themselves, of what some operations are about."""

    now: datetime
    in_force: tuple[str, str]
    books: dict[str, ledger.Books]
    holds: dict[str, holds.Hold]
    parts: dict[str, tuple[ledger.Part, ...]]
    requests: dict[operations.Request, tuple[str, str]]
    unsettled: dict[str, rules.Verdict]


async def lock(connection: postgres.Connection, account_ids: Collection[str]) -> list[Any]:
    """Locks accounts, those that there are, until the transaction ends, and answers their rows as they are then."""
    return await connection.fetch(
        """
        SELECT account_id, available, held, last_seq, frozen, daily_caps FROM accounts
        WHERE account_id = ANY($1::text[]) ORDER BY account_id FOR NO KEY UPDATE
        """,
        sorted(account_ids),
    )


async def open_accounts(connection: postgres.Connection, account_ids: Collection[str]) -> None:
    """Makes accounts that are missing, empty. Outside of any posting: who waits here has nothing locked."""
    await connection.execute(
        """
        INSERT INTO accounts (account_id) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING
        """,
        sorted(account_ids),
    )


_READ = f"""
SELECT clock_timestamp() AS now, {rulebooks.IN_FORCE_NOW},
    (
        SELECT array_agg(ROW(l.account_id, l.lot_id, l.source, l.priority, l.expires_at, l.created_at,
            l.granted, l.available, l.held, l.parent_lot_id))
        FROM (
            SELECT lot_id FROM lots WHERE account_id = ANY($1::text[]) AND open
            UNION SELECT lot_id FROM hold_lots WHERE hold_id = ANY($2::text[])
        ) wanted JOIN lots l USING (lot_id)
    ) AS lots,
    (
        SELECT array_agg(ROW(hold_id, account_id, state, created_at, fingerprint, item::text,
            labels::text, reserved, captured, released, refunded, price_version, policy_version,
            refusal::text, not_after, cause, verdict::text, settled_at, key_id))
        FROM holds WHERE hold_id = ANY($2::text[])
    ) AS holds,
    (
        SELECT array_agg(ROW(hold_id, lot_id, credits, lifetime_left, captured, released)
            ORDER BY hold_id, position)
        FROM hold_lots WHERE hold_id = ANY($2::text[])
    ) AS parts,
    (
        SELECT array_agg(ROW(r.account_id, r.method, r.request_id, r.fingerprint, r.lot_id))
        FROM unnest($3::text[], $4::text[], $5::uuid[]) AS wanted (account_id, method, request_id)
        JOIN requests r USING (account_id, method, request_id)
    ) AS requests,
    (
        SELECT array_agg(verdict::text) FROM unsettled WHERE video_id = ANY($2::text[])
    ) AS unsettled
"""


async def read(
    connection: postgres.Connection, accounts: Sequence[Any], wanted: Sequence[operations.Operation]
) -> Found:
    """What operations need, of accounts that are locked.

    A statement of its own, after the lock: it sees what those before us committed, and its clock is not from before
    the wait.
    """
    requests = [one.request for one in wanted if one.request is not None]
    row = await connection.fetchrow(
        _READ,
        [account["account_id"] for account in accounts],
        [one.hold_id for one in wanted if one.hold_id is not None],
        [one.account_id for one in requests],
        [one.method for one in requests],
        [one.request_id for one in requests],
    )
    assert row is not None
    lots: dict[str, dict[str, ledger.Lot]] = {one["account_id"]: {} for one in accounts}
    for account_id, *fields in row["lots"] or ():
        if account_id in lots:
            lots[account_id][fields[0]] = _lot(fields)
    parts: dict[str, tuple[ledger.Part, ...]] = {}
    for hold_id, *fields in row["parts"] or ():
        parts[hold_id] = (*parts.get(hold_id, ()), ledger.Part(*fields))
    verdicts = [rules.verdict_from(json.loads(text)) for text in row["unsettled"] or ()]
    return Found(
        now=row["now"],
        in_force=(row["price_version"] or "", row["policy_version"] or ""),
        books={
            account["account_id"]: ledger.Books(
                *(account["account_id"], account["available"], account["held"]),
                *(account["last_seq"], account["frozen"], lots[account["account_id"]]),
                daily_caps=account["daily_caps"],
            )
            for account in accounts
        },
        holds={fields[0]: _hold(fields) for fields in row["holds"] or ()},
        parts=parts,
        requests={
            operations.Request(account_id, method, request_id): (fingerprint, lot_id)
            for account_id, method, request_id, fingerprint, lot_id in row["requests"] or ()
        },
        unsettled={verdict.video_id: verdict for verdict in verdicts},
    )


async def spending(
    connection: postgres.Connection, found: Found, wanted: Sequence[operations.Operation]
) -> caps.Spending:
    """What was spent today of the caps that reservations meet; most meet none, and cost no statement."""
    met = {
        (one.account_id, name)
        for one in wanted
        if isinstance(one, operations.Reservation) and one.account_id in found.books
        for name in caps.met(found.books[one.account_id].daily_caps, one.key_id)
    }
    spent = caps.Spending(caps.day(found.now), {})
    if met:
        rows = await connection.fetch(
            """
            SELECT w.account_id, w.key_id, (
                SELECT coalesce(sum(h.reserved - h.released), 0)::bigint FROM holds h
                WHERE h.account_id = w.account_id AND h.created_at >= $3
                    AND (w.key_id = '' OR h.key_id = w.key_id)
            ) AS credits
            FROM unnest($1::text[], $2::text[]) AS w (account_id, key_id)
            """,
            *_columns(2, met),
            spent.began,
        )
        spent.credits = {(row["account_id"], row["key_id"]): row["credits"] for row in rows}
    return spent


async def read_books(
    connection: postgres.Connection, account_id: str
) -> tuple[ledger.Books, datetime] | None:
    """An account's books in one snapshot, without a lock, and the database's time."""
    rows = await connection.fetch(
        """
        SELECT clock_timestamp() AS now, a.available AS account_available, a.held AS account_held,
            a.last_seq, a.frozen, l.lot_id, l.source, l.priority, l.expires_at, l.created_at,
            l.granted, l.available, l.held, l.parent_lot_id
        FROM accounts a LEFT JOIN lots l ON l.account_id = a.account_id AND l.open
        WHERE a.account_id = $1
        """,
        account_id,
    )
    if not rows:
        return None
    lots = [_lot(tuple(row)[5:]) for row in rows if row["lot_id"] is not None]
    books = ledger.Books(
        account_id,
        rows[0]["account_available"],
        rows[0]["account_held"],
        rows[0]["last_seq"],
        rows[0]["frozen"],
        {lot.lot_id: lot for lot in lots},
    )
    return books, rows[0]["now"]


def _lot(fields: Sequence[Any]) -> ledger.Lot:
    lot_id, source, *rest = fields
    return ledger.Lot(lot_id, ledger.LotSource(source), *rest)


HOLD_COLUMNS = """hold_id, account_id, state, created_at, fingerprint, item, labels, reserved, captured,
    released, refunded, price_version, policy_version, refusal, not_after, cause, verdict, settled_at,
    key_id"""

_HOLD_NAMES = [name.strip() for name in HOLD_COLUMNS.split(",")]


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


def _hold(fields: Sequence[Any]) -> holds.Hold:
    """The hold that HOLD_COLUMNS are, with its documents as text."""
    row = dict(zip(_HOLD_NAMES, fields, strict=True))
    for name in ("item", "labels", "refusal", "verdict"):
        row[name] = json.loads(row[name]) if row[name] is not None else None
    return hold_from(row)


_WRITE = """
WITH posted_accounts AS (
    UPDATE accounts a SET available = u.available, held = u.held, last_seq = u.last_seq
    FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[])
        AS u (account_id, available, held, last_seq, before)
    WHERE a.account_id = u.account_id AND a.last_seq = u.before
    RETURNING 1
), posted_lots AS (
    INSERT INTO lots (account_id, lot_id, source, priority, expires_at, created_at, granted, available,
        held, parent_lot_id)
    SELECT * FROM unnest($7::text[], $8::text[], $9::text[], $10::int[], $11::timestamptz[],
        $12::timestamptz[], $13::bigint[], $14::bigint[], $15::bigint[], $16::text[])
    ON CONFLICT (lot_id) DO UPDATE SET available = EXCLUDED.available, held = EXCLUDED.held,
        expires_at = EXCLUDED.expires_at
), new_holds AS (
    INSERT INTO holds (hold_id, account_id, state, created_at, fingerprint, item, labels, reserved,
        captured, released, refunded, price_version, policy_version, refusal, not_after, cause, verdict,
        settled_at, key_id)
    SELECT hold_id, account_id, state, created_at, fingerprint, item::jsonb, labels::jsonb, reserved,
        captured, released, refunded, price_version, policy_version, refusal::jsonb, not_after, cause,
        verdict::jsonb, settled_at, key_id
    FROM unnest($17::text[], $18::text[], $19::text[], $20::timestamptz[], $21::text[], $22::text[],
        $23::text[], $24::bigint[], $25::bigint[], $26::bigint[], $27::bigint[], $28::text[],
        $29::text[], $30::text[], $31::timestamptz[], $32::text[], $33::text[], $34::timestamptz[],
        $74::text[])
        AS u (hold_id, account_id, state, created_at, fingerprint, item, labels, reserved,
            captured, released, refunded, price_version, policy_version, refusal, not_after, cause,
            verdict, settled_at, key_id)
), changed_holds AS (
    UPDATE holds h SET state = u.state, captured = u.captured, released = u.released,
        refunded = u.refunded, cause = u.cause, verdict = u.verdict::jsonb, settled_at = u.settled_at
    FROM unnest($35::text[], $36::text[], $37::bigint[], $38::bigint[], $39::bigint[], $40::text[],
        $41::text[], $42::timestamptz[])
        AS u (hold_id, state, captured, released, refunded, cause, verdict, settled_at)
    WHERE h.hold_id = u.hold_id AND h.state IN ('HELD', u.state)
    RETURNING 1
), new_parts AS (
    INSERT INTO hold_lots (hold_id, position, lot_id, credits, lifetime_left, captured, released)
    SELECT * FROM unnest($43::text[], $44::smallint[], $45::text[], $46::bigint[], $47::interval[],
        $48::bigint[], $49::bigint[])
), changed_parts AS (
    UPDATE hold_lots p SET captured = u.captured, released = u.released
    FROM unnest($50::text[], $51::smallint[], $52::bigint[], $53::bigint[])
        AS u (hold_id, position, captured, released)
    WHERE p.hold_id = u.hold_id AND p.position = u.position
), posted_transfers AS (
    INSERT INTO transfers (account_id, seq, kind, available_change, held_change, hold_id, cause, note,
        trace_id, operator, purchase, created_at)
    SELECT *, $1 FROM unnest($54::text[], $55::bigint[], $56::text[], $57::bigint[], $58::bigint[],
        $59::text[], $60::text[], $61::text[], $75::text[], $76::text[], $77::text[])
), posted_entries AS (
    INSERT INTO entries (account_id, seq, line, book, credits, lot_id)
    SELECT * FROM unnest($62::text[], $63::bigint[], $64::smallint[], $65::text[], $66::bigint[],
        $67::text[])
), new_requests AS (
    INSERT INTO requests (account_id, method, request_id, fingerprint, lot_id, created_at)
    SELECT *, $1 FROM unnest($68::text[], $69::text[], $70::uuid[], $71::text[], $72::text[])
), met AS (
    DELETE FROM unsettled WHERE video_id = ANY($73::text[])
)
SELECT (SELECT count(*) FROM posted_accounts) AS accounts, (SELECT count(*) FROM changed_holds) AS holds
"""


async def write(connection: postgres.Connection, batch: operations.Batch) -> bool:
    """Writes down what operations made of a batch, in one statement; false when there is nothing to write."""
    moved = sorted(account_id for account_id, books in batch.books.items() if books.transfers)
    if not (moved or batch.new_holds or batch.changed_holds or batch.new_requests):
        return False
    new, changed = sorted(batch.new_holds), sorted(batch.changed_holds)
    row = await connection.fetchrow(
        _WRITE,
        batch.now,
        *_columns(5, (_account_row(batch, account_id) for account_id in moved)),
        *_columns(10, (row for account_id in moved for row in _lot_rows(batch, account_id))),
        *_columns(18, (_hold_row(batch.holds[hold_id]) for hold_id in new)),
        *_columns(8, (_changed_row(batch.holds[hold_id]) for hold_id in changed)),
        *_columns(7, (row for hold_id in new for row in _part_rows(batch, hold_id))),
        *_columns(
            4,
            (
                (hold_id, place, captured, released)
                for hold_id in sorted(batch.changed_parts)
                for _, place, _, _, _, captured, released in _part_rows(batch, hold_id)
            ),
        ),
        *_columns(8, (row for account_id in moved for row in _transfer_rows(batch, account_id))),
        *_columns(6, (row for account_id in moved for row in _entry_rows(batch, account_id))),
        *_columns(5, (_request_row(batch, request) for request in batch.new_requests)),
        [fact.hold.hold_id for fact in batch.facts if isinstance(fact, operations.Settled)],
        [batch.holds[hold_id].key_id for hold_id in new],
        *_columns(3, (row for account_id in moved for row in _origin_rows(batch, account_id))),
    )
    assert row is not None
    assert row["accounts"] == len(moved), "an account was written without its lock"
    assert row["holds"] == len(changed), "a hold was settled twice"
    return True


def _columns(width: int, rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True)) or [()] * width


def _json(value: Any) -> str | None:
    return json.dumps(value) if value is not None else None


def _account_row(batch: operations.Batch, account_id: str) -> tuple[Any, ...]:
    books, before = batch.books[account_id], batch.before[account_id]
    return account_id, books.available, books.held, books.last_seq, before.last_seq


def _lot_rows(batch: operations.Batch, account_id: str) -> Iterable[tuple[Any, ...]]:
    before = batch.before[account_id].lots
    for lot in batch.books[account_id].lots.values():
        if before.get(lot.lot_id) != lot:
            yield (
                *(account_id, lot.lot_id, lot.source, lot.priority, lot.expires_at, lot.created_at),
                *(lot.granted, lot.available, lot.held, lot.parent_lot_id),
            )


def _hold_row(hold: holds.Hold) -> tuple[Any, ...]:
    refusal = holds.refusal_fields(hold.refusal) if hold.refusal is not None else None
    return (
        *(hold.hold_id, hold.account_id, hold.state, hold.created_at, hold.fingerprint),
        *(_json(hold.item), json.dumps(dict(hold.labels)) if hold.labels else "{}"),
        *(hold.reserved, hold.captured, hold.released, hold.refunded),
        *(hold.price_version, hold.policy_version, _json(refusal), hold.not_after),
        *(hold.cause, _json(hold.verdict), hold.settled_at),
    )


def _changed_row(hold: holds.Hold) -> tuple[Any, ...]:
    return (
        *(hold.hold_id, hold.state, hold.captured, hold.released, hold.refunded),
        *(hold.cause, _json(hold.verdict), hold.settled_at),
    )


def _part_rows(batch: operations.Batch, hold_id: str) -> Iterable[tuple[Any, ...]]:
    for place, part in enumerate(batch.parts.get(hold_id, ())):
        yield (
            *(hold_id, place, part.lot_id, part.credits, part.lifetime_left),
            *(part.captured, part.released),
        )


def _transfer_rows(batch: operations.Batch, account_id: str) -> Iterable[tuple[Any, ...]]:
    first = batch.before[account_id].last_seq + 1
    for seq, one in enumerate(batch.books[account_id].transfers, first):
        available, held = one.change(ledger.Book.AVAILABLE), one.change(ledger.Book.HELD)
        yield account_id, seq, one.kind, available, held, one.hold_id, one.cause, one.note


def _origin_rows(batch: operations.Batch, account_id: str) -> Iterable[tuple[str, str, str]]:
    books, before = batch.books[account_id], batch.before[account_id]
    for seq in range(before.last_seq + 1, books.last_seq + 1):
        origin = batch.origins.get((account_id, seq), _NO_ORIGIN)
        yield origin.trace_id, origin.operator, origin.purchase


def _entry_rows(batch: operations.Batch, account_id: str) -> Iterable[tuple[Any, ...]]:
    first = batch.before[account_id].last_seq + 1
    for seq, one in enumerate(batch.books[account_id].transfers, first):
        for place, line in enumerate(one.lines):
            yield account_id, seq, place, line.book, line.credits, line.lot_id


def _request_row(batch: operations.Batch, request: operations.Request) -> tuple[Any, ...]:
    fingerprint, lot_id = batch.requests[request]
    return request.account_id, request.method, request.request_id, fingerprint, lot_id
