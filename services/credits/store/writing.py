"""How what operations made of a batch is written down: one statement, whatever the batch holds."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import postgres
from services.credits import batches, holds, ledger

_NO_ORIGIN = ledger.Origin()

_ROWS = {
    "accounts": "account_id text, available bigint, held bigint, last_seq bigint, before bigint",
    "new_lots": "account_id text, lot_id text, source text, priority int, expires_at timestamptz, granted bigint, "
    "available bigint, held bigint, parent_lot_id text",
    "lots": "lot_id text, available bigint, held bigint, expires_at timestamptz",
    "new_holds": "hold_id text, account_id text, state text, fingerprint text, item jsonb, labels jsonb, "
    "reserved bigint, captured bigint, released bigint, price_version text, policy_version text, refusal jsonb, "
    "not_after timestamptz, cause text, verdict jsonb, settled_at timestamptz, key_id text",
    "holds": "hold_id text, state text, captured bigint, released bigint, refunded bigint, cause text, "
    "verdict jsonb, settled_at timestamptz",
    "new_parts": "hold_id text, position smallint, lot_id text, credits bigint, lifetime_left interval, "
    "captured bigint, released bigint",
    "parts": "hold_id text, position smallint, captured bigint, released bigint",
    "transfers": "account_id text, seq bigint, kind text, available_change bigint, held_change bigint, "
    "hold_id text, cause text, note text, trace_id text, operator text, purchase text",
    "entries": "account_id text, seq bigint, line smallint, book text, credits bigint, lot_id text",
    "requests": "account_id text, method text, request_id uuid, fingerprint text, lot_id text",
    "settled": "video_id text",
    "spending": "account_id text, key_id text, seq bigint, credits bigint, began timestamptz",
}
"""The columns of the rows that go with the statement, each column as one array."""

_NAMES = {rows: [column.split()[0] for column in spec.split(", ")] for rows, spec in _ROWS.items()}


def _unnested() -> dict[str, str]:
    """Each kind of rows as a FROM item named u; $1 is the batch's time."""
    parameter, items = 1, dict[str, str]()
    for rows, spec in _ROWS.items():
        arrays: list[str] = []
        for column in spec.split(", "):
            parameter += 1
            arrays.append(f"${parameter}::text::{column.split()[1]}[]")
        items[rows] = f"unnest({', '.join(arrays)}) AS u ({', '.join(_NAMES[rows])})"
    return items


_U, _C = _unnested(), {rows: ", ".join(names) for rows, names in _NAMES.items()}

_WRITE = f"""
WITH posted_accounts AS (
    UPDATE accounts a SET available = u.available, held = u.held, last_seq = u.last_seq
    FROM {_U["accounts"]} WHERE a.account_id = u.account_id AND a.last_seq = u.before
    RETURNING 1
), new_lots AS (
    INSERT INTO lots ({_C["new_lots"]}, created_at) SELECT *, $1 FROM {_U["new_lots"]}
), changed_lots AS (
    UPDATE lots l SET available = u.available, held = u.held, expires_at = u.expires_at
    FROM {_U["lots"]} WHERE l.lot_id = u.lot_id
), new_holds AS (
    INSERT INTO holds ({_C["new_holds"]}, created_at) SELECT *, $1 FROM {_U["new_holds"]}
), changed_holds AS (
    UPDATE holds h SET state = u.state, captured = u.captured, released = u.released,
        refunded = u.refunded, cause = u.cause, verdict = u.verdict, settled_at = u.settled_at
    FROM {_U["holds"]} WHERE h.hold_id = u.hold_id AND h.state IN ('HELD', u.state)
    RETURNING 1
), new_parts AS (
    INSERT INTO hold_lots ({_C["new_parts"]}) SELECT * FROM {_U["new_parts"]}
), changed_parts AS (
    UPDATE hold_lots p SET captured = u.captured, released = u.released
    FROM {_U["parts"]} WHERE p.hold_id = u.hold_id AND p.position = u.position
), posted_transfers AS (
    INSERT INTO transfers ({_C["transfers"]}, created_at) SELECT *, $1 FROM {_U["transfers"]}
), posted_entries AS (
    INSERT INTO entries ({_C["entries"]}) SELECT * FROM {_U["entries"]}
), new_requests AS (
    INSERT INTO requests ({_C["requests"]}, created_at) SELECT *, $1 FROM {_U["requests"]}
), marked AS (
    INSERT INTO daily_spending ({_C["spending"]}) SELECT * FROM {_U["spending"]}
    ON CONFLICT (account_id, key_id)
    DO UPDATE SET seq = excluded.seq, credits = excluded.credits, began = excluded.began
), met AS (
    DELETE FROM unsettled WHERE video_id IN (SELECT video_id FROM {_U["settled"]})
)
SELECT pg_current_xact_id()::xid::text AS transaction, (SELECT count(*) FROM posted_accounts) AS accounts,
    (SELECT count(*) FROM changed_holds) AS holds
"""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a batch comes to, as the statement's parameters."""

    now: datetime
    accounts: frozenset[str]
    """All those that anything changes of: their rows get a new version, whether or not credits were moved."""
    changed_holds: int
    columns: list[str]


def rows(batch: batches.Batch) -> Rows | None:
    """What operations made of a batch; None when there is nothing to write."""
    changed = batch.new_holds | batch.changed_holds
    accounts = {account_id for account_id, books in batch.books.items() if books.transfers}
    accounts.update(batch.holds[hold_id].account_id for hold_id in changed)
    accounts.update(request.account_id for request in batch.new_requests)
    if not accounts:
        return None
    columns = list(_arrays(batch, sorted(accounts)))
    return Rows(batch.now, frozenset(accounts), len(batch.changed_holds), columns)


async def write(connection: postgres.Connection, made: Rows) -> str:
    """Writes a batch down, in one statement. Answers the transaction, the version of the accounts' rows from now on."""
    row = await connection.fetchrow(_WRITE, made.now, *made.columns)
    assert row is not None
    assert row["accounts"] == len(made.accounts), "an account was written without its lock"
    assert row["holds"] == made.changed_holds, "a hold was settled twice"
    return row["transaction"]


def _arrays(batch: batches.Batch, moved: list[str]) -> Iterable[str]:
    """The statement's parameters after the first: the rows of each kind, column by column."""
    new, changed = sorted(batch.new_holds), sorted(batch.changed_holds)
    rows: dict[str, Iterable[tuple[Any, ...]]] = {
        "accounts": (_account(batch, account_id) for account_id in moved),
        "new_lots": (row for account_id in moved for row in _new_lots(batch, account_id)),
        "lots": (row for account_id in moved for row in _changed_lots(batch, account_id)),
        "new_holds": (_new_hold(batch.holds[hold_id]) for hold_id in new),
        "holds": (_changed_hold(batch.holds[hold_id]) for hold_id in changed),
        "new_parts": (row for hold_id in new for row in _new_parts(batch, hold_id)),
        "parts": (row for hold_id in sorted(batch.changed_parts) for row in _parts(batch, hold_id)),
        "transfers": (row for account_id in moved for row in _transfers(batch, account_id)),
        "entries": (row for account_id in moved for row in _entries(batch, account_id)),
        "requests": (_request(batch, request) for request in batch.new_requests),
        "settled": (
            (fact.hold.hold_id,) for fact in batch.facts if isinstance(fact, batches.Settled)
        ),
        "spending": ((*mark, batch.spending.began) for mark in batch.spending.marks),
    }
    for kind, names in _NAMES.items():
        columns = list(zip(*rows[kind], strict=True)) or [()] * len(names)
        assert len(columns) == len(names), kind
        # Columns are padded with NULL: those that have nothing else need no reading.
        yield from (
            "{}" if column.count(None) == len(column) else postgres.array(column)
            for column in columns
        )


def _json(value: Any) -> str | None:
    return json.dumps(value) if value is not None else None


@functools.lru_cache(maxsize=1024)
def _item_json(names: tuple[str, ...], values: tuple[Any, ...]) -> str:
    """Few different items are asked for again and again."""
    return json.dumps(dict(zip(names, values, strict=True)))


def _item(hold: holds.Hold) -> str | None:
    item = hold.item
    return _item_json(tuple(item), tuple(item.values())) if item is not None else None


def _account(batch: batches.Batch, account_id: str) -> tuple[Any, ...]:
    books, before = batch.books[account_id], batch.before[account_id]
    return account_id, books.available, books.held, books.last_seq, before.last_seq


def _new_lots(batch: batches.Batch, account_id: str) -> Iterable[tuple[Any, ...]]:
    before = batch.before[account_id].lots
    for lot in batch.books[account_id].lots.values():
        if lot.lot_id not in before:
            yield (
                *(account_id, lot.lot_id, lot.source, lot.priority, lot.expires_at),
                *(lot.granted, lot.available, lot.held, lot.parent_lot_id),
            )


def _changed_lots(batch: batches.Batch, account_id: str) -> Iterable[tuple[Any, ...]]:
    before = batch.before[account_id].lots
    for lot in batch.books[account_id].lots.values():
        if lot.lot_id in before and before[lot.lot_id] is not lot:
            yield lot.lot_id, lot.available, lot.held, lot.expires_at


def _new_hold(hold: holds.Hold) -> tuple[Any, ...]:
    refusal = holds.refusal_fields(hold.refusal) if hold.refusal is not None else None
    return (
        *(hold.hold_id, hold.account_id, hold.state, hold.fingerprint, _item(hold)),
        *(json.dumps(dict(hold.labels)) if hold.labels else "{}", hold.reserved, hold.captured),
        *(hold.released, hold.price_version, hold.policy_version, _json(refusal), hold.not_after),
        *(hold.cause, _json(hold.verdict), hold.settled_at, hold.key_id),
    )


def _changed_hold(hold: holds.Hold) -> tuple[Any, ...]:
    return (
        *(hold.hold_id, hold.state, hold.captured, hold.released, hold.refunded),
        *(hold.cause, _json(hold.verdict), hold.settled_at),
    )


def _new_parts(batch: batches.Batch, hold_id: str) -> Iterable[tuple[Any, ...]]:
    for place, part in enumerate(batch.parts.get(hold_id, ())):
        yield (
            *(hold_id, place, part.lot_id, part.credits, part.lifetime_left),
            *(part.captured, part.released),
        )


def _parts(batch: batches.Batch, hold_id: str) -> Iterable[tuple[Any, ...]]:
    for place, part in enumerate(batch.parts.get(hold_id, ())):
        yield hold_id, place, part.captured, part.released


def _transfers(batch: batches.Batch, account_id: str) -> Iterable[tuple[Any, ...]]:
    first = batch.before[account_id].last_seq + 1
    for seq, one in enumerate(batch.books[account_id].transfers, first):
        origin = batch.origins.get((account_id, seq), _NO_ORIGIN)
        yield (
            *(account_id, seq, one.kind, one.change(ledger.Book.AVAILABLE)),
            *(one.change(ledger.Book.HELD), one.hold_id, one.cause, one.note),
            *(origin.trace_id, origin.operator, origin.purchase),
        )


def _entries(batch: batches.Batch, account_id: str) -> Iterable[tuple[Any, ...]]:
    first = batch.before[account_id].last_seq + 1
    for seq, one in enumerate(batch.books[account_id].transfers, first):
        for place, line in enumerate(one.lines):
            yield account_id, seq, place, line.book, line.credits, line.lot_id


def _request(batch: batches.Batch, request: batches.Request) -> tuple[Any, ...]:
    fingerprint, lot_id = batch.requests[request]
    return request.account_id, request.method, request.request_id, fingerprint, lot_id
