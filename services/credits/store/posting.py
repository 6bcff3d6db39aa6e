"""How the books of some accounts are read under their locks, in a constant number of statements.

Accounts are locked in the order of their ids, all by one statement, before anything else: no two postings can deadlock.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import postgres
from services.credits import batches, caps, holds, ledger, operations, rules
from services.credits.store import rulebooks

BEGIN = (
    "BEGIN; SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_seqscan = off; "
    "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"
)
"""A posting's transaction, in one round trip. Its statements look up rows by key, with plans that are made once,
perhaps while the tables are still small: the planner must not count on that."""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is, beside the accounts themselves, of what some operations are about."""

    now: datetime
    in_force: tuple[str, str]
    books: dict[str, ledger.Books]
    versions: dict[str, str]
    """Of the accounts' rows: another one after every change."""
    hold_ids: list[str]
    """The holds that were asked for; `holds` has those that there are."""
    holds: dict[str, holds.Hold]
    parts: dict[str, tuple[ledger.Part, ...]]
    requests: dict[batches.Request, tuple[str, str]]
    unsettled: dict[str, rules.Verdict]


async def lock(connection: postgres.Connection, account_ids: Collection[str]) -> dict[str, str]:
    """Locks accounts, those that there are, until the transaction ends, and answers the versions of their rows."""
    rows = await connection.fetch(
        """
        SELECT account_id, xmin::text AS version FROM accounts
        WHERE account_id = ANY($1::text[]) ORDER BY account_id FOR NO KEY UPDATE
        """,
        sorted(account_ids),
    )
    return {row["account_id"]: row["version"] for row in rows}


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
        SELECT array_agg(ROW(account_id, available, held, last_seq, frozen, daily_caps::text, xmin::text))
        FROM accounts WHERE account_id = ANY($1::text[])
    ) AS accounts,
    (
        SELECT array_agg(ROW(account_id, lot_id, source, priority, expires_at, created_at, granted,
            available, held, parent_lot_id))
        FROM (
            SELECT * FROM lots WHERE account_id = ANY($1::text[]) AND open
            UNION ALL
            SELECT l.* FROM (SELECT DISTINCT lot_id FROM hold_lots WHERE hold_id = ANY($2::text[])) p
                JOIN lots l USING (lot_id)
            WHERE NOT l.open
        ) wanted
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


async def read(connection: postgres.Connection, wanted: Sequence[operations.Operation]) -> Found:
    """What operations need, in one snapshot.

    Of accounts that are locked it sees what those before us committed, and its clock is not from before the wait; of
    others, what anybody may be changing.
    """
    requests = [one.request for one in wanted if one.request is not None]
    row = await connection.fetchrow(
        _READ,
        sorted({one.account_id for one in wanted}),
        _hold_ids(wanted),
        [one.account_id for one in requests],
        [one.method for one in requests],
        [one.request_id for one in requests],
    )
    assert row is not None
    return _found(row, wanted)


def _hold_ids(wanted: Sequence[operations.Operation]) -> list[str]:
    return [one.hold_id for one in wanted if one.hold_id is not None]


def _found(row: Any, wanted: Sequence[operations.Operation]) -> Found:
    accounts = row["accounts"] or ()
    lots: dict[str, dict[str, ledger.Lot]] = {one[0]: {} for one in accounts}
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
            account_id: ledger.Books(
                *(account_id, available, held, last_seq, frozen, lots[account_id]),
                daily_caps=json.loads(daily_caps) if daily_caps != "{}" else {},
            )
            for account_id, available, held, last_seq, frozen, daily_caps, _ in accounts
        },
        versions={one[0]: one[6] for one in accounts},
        hold_ids=_hold_ids(wanted),
        holds={fields[0]: _hold(fields) for fields in row["holds"] or ()},
        parts=parts,
        requests={
            batches.Request(account_id, method, request_id): (fingerprint, lot_id)
            for account_id, method, request_id, fingerprint, lot_id in row["requests"] or ()
        },
        unsettled={verdict.video_id: verdict for verdict in verdicts},
    )


def caps_met(found: Found, wanted: Sequence[operations.Operation]) -> set[tuple[str, str]]:
    """The caps, by account and key, that reservations meet."""
    return {
        (one.account_id, name)
        for one in wanted
        if isinstance(one, operations.Reservation) and one.account_id in found.books
        for name in caps.met(found.books[one.account_id].daily_caps, one.key_id)
    }


async def spending(
    connection: postgres.Connection, found: Found, wanted: Sequence[operations.Operation]
) -> caps.Spending:
    """What was spent today of the caps that reservations meet; most meet none, and cost no statement.

    From the last sum that was kept on, or from the day's first transfer: by keys alone, for an index on the time of
    holds would be everybody's. What took long to sum up is to be kept (`marks`).
    """
    met = caps_met(found, wanted)
    spent = caps.Spending(caps.day(found.now), {})
    if met:
        rows = await connection.fetch(
            """
            SELECT w.account_id, w.key_id, later.transfers,
                (coalesce(s.credits, 0) + later.credits)::bigint AS credits
            FROM unnest($1::text[], $2::text[]) AS w (account_id, key_id)
            LEFT JOIN daily_spending s ON s.account_id = w.account_id AND s.key_id = w.key_id
                AND s.began = $3
            CROSS JOIN LATERAL (
                SELECT coalesce(s.seq + 1, first_seq_at(w.account_id, $3)) AS seq OFFSET 0
            ) first
            CROSS JOIN LATERAL (
                SELECT count(*) AS transfers, coalesce(sum(t.held_change) FILTER (
                    WHERE h.created_at >= $3 AND (w.key_id = '' OR h.key_id = w.key_id)
                ), 0) AS credits
                FROM transfers t JOIN holds h USING (hold_id)
                WHERE t.account_id = w.account_id AND t.seq >= first.seq
                    AND t.kind IN ('RESERVE', 'RELEASE')
            ) later
            """,
            *([names[place] for names in sorted(met)] for place in (0, 1)),
            spent.began,
        )
        spent.credits = {(row["account_id"], row["key_id"]): row["credits"] for row in rows}
        spent.marks = [
            (*name, found.books[name[0]].last_seq, spent.credits[name])
            for row in rows
            if row["transfers"] >= caps.MARKED_AFTER
            for name in [(row["account_id"], row["key_id"])]
        ]
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
