"""What the books say: balances, statements, holds, and the proof that they balance. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import postgres
from services.credits import batches, holds, ledger
from services.credits.store import posting

MOST_FINDINGS = 100
CHECK_SECONDS = 300.0

# Each gives one sentence for each row that disagrees.
_CHECKS = (
    # L1: every transfer sums to zero, and its line on the statement is what its entries say.
    """
    SELECT format('transfer %s-%s: %s lines sum to %s; available %s, entries say %s; held %s, entries say %s',
        t.account_id, t.seq, e.lines, e.total, t.available_change, e.available, t.held_change, e.held)
    FROM transfers t CROSS JOIN LATERAL (
        SELECT count(*) AS lines, coalesce(sum(credits), 0) AS total,
            coalesce(sum(credits) FILTER (WHERE book = 'available'), 0) AS available,
            coalesce(sum(credits) FILTER (WHERE book = 'held'), 0) AS held
        FROM entries WHERE entries.account_id = t.account_id AND entries.seq = t.seq
    ) e
    WHERE e.lines < 2 OR e.total <> 0 OR e.available <> t.available_change OR e.held <> t.held_change
    """,
    # L2, L3: balances are the sum of the entries and of the lots, not negative, and the numbers have no gap.
    """
    SELECT format('account %s: available %s, entries say %s, lots say %s; held %s, entries say %s, lots say %s; '
        'newest transfer %s of %s', a.account_id, a.available, coalesce(t.available, 0),
        coalesce(l.available, 0), a.held, coalesce(t.held, 0), coalesce(l.held, 0),
        a.last_seq, coalesce(t.transfers, 0))
    FROM accounts a
    LEFT JOIN (
        SELECT account_id, sum(available_change) AS available, sum(held_change) AS held,
            count(*) AS transfers, max(seq) AS newest
        FROM transfers GROUP BY account_id
    ) t USING (account_id)
    LEFT JOIN (
        SELECT account_id, sum(available) AS available, sum(held) AS held FROM lots GROUP BY account_id
    ) l USING (account_id)
    WHERE a.available <> coalesce(t.available, 0) OR a.available <> coalesce(l.available, 0)
        OR a.held <> coalesce(t.held, 0) OR a.held <> coalesce(l.held, 0)
        OR a.last_seq <> coalesce(t.newest, 0) OR a.last_seq <> coalesce(t.transfers, 0)
        OR a.available < 0 OR a.held < 0
    """,
    # Each lot is the sum of its entries, and what it holds is pinned by open holds.
    """
    SELECT format('lot %s: available %s, entries say %s; held %s, entries say %s, open holds say %s',
        l.lot_id, l.available, coalesce(e.available, 0), l.held, coalesce(e.held, 0), coalesce(p.held, 0))
    FROM lots l
    LEFT JOIN (
        SELECT lot_id, sum(credits) FILTER (WHERE book = 'available') AS available,
            sum(credits) FILTER (WHERE book = 'held') AS held
        FROM entries WHERE lot_id IS NOT NULL GROUP BY lot_id
    ) e USING (lot_id)
    LEFT JOIN (
        SELECT lot_id, sum(credits) AS held FROM hold_lots WHERE captured + released = 0 GROUP BY lot_id
    ) p USING (lot_id)
    WHERE l.available <> coalesce(e.available, 0) OR l.held <> coalesce(e.held, 0)
        OR l.held <> coalesce(p.held, 0) OR l.available < 0 OR l.held < 0
    """,
    # L5: a hold is settled once, wholly, and its numbers are those of its transfers and of its parts.
    """
    SELECT format('hold %s (%s): reserved %s, transfers say %s, parts say %s; captured %s, transfers say %s; '
        'released %s, transfers say %s; refunded %s, transfers say %s', h.hold_id, h.state,
        h.reserved, coalesce(t.reserved, 0), coalesce(p.credits, 0), h.captured, coalesce(t.captured, 0),
        h.released, coalesce(t.released, 0), h.refunded, coalesce(t.refunded, 0))
    FROM holds h
    LEFT JOIN (
        SELECT hold_id, sum(held_change) FILTER (WHERE kind = 'RESERVE') AS reserved,
            -sum(held_change) FILTER (WHERE kind = 'CAPTURE') AS captured,
            -sum(held_change) FILTER (WHERE kind = 'RELEASE') AS released,
            sum(available_change) FILTER (WHERE kind = 'REFUND') AS refunded
        FROM transfers WHERE hold_id IS NOT NULL GROUP BY hold_id
    ) t USING (hold_id)
    LEFT JOIN (
        SELECT hold_id, sum(credits) AS credits, sum(captured) AS captured, sum(released) AS released
        FROM hold_lots GROUP BY hold_id
    ) p USING (hold_id)
    WHERE h.reserved <> coalesce(t.reserved, 0) OR h.reserved <> coalesce(p.credits, 0)
        OR h.captured <> coalesce(t.captured, 0) OR h.captured <> coalesce(p.captured, 0)
        OR h.released <> coalesce(t.released, 0) OR h.released <> coalesce(p.released, 0)
        OR h.refunded <> coalesce(t.refunded, 0) OR h.refunded > h.captured
    """,
)


@dataclass(frozen=True, slots=True)
class StatementLine:
    """One transfer, as its account sees it."""

    account_id: str
    seq: int
    kind: ledger.TransferKind
    available_change: int
    held_change: int
    hold_id: str | None
    cause: str | None
    note: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Proof:
    """What CheckBooks found; no findings: the books balance."""

    findings: tuple[str, ...]
    transfers: int
    accounts: int
    open_holds: int


class StatementStore:
    """Reads of the ledger."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def get_balance(self, account_id: str) -> ledger.Balance:
        """What an account has, without what is due. Raises NotFound/ACCOUNT_NOT_FOUND."""
        async with self._acquire() as connection:
            read = await posting.read_books(connection, account_id)
        if read is None:
            raise batches.account_unknown(account_id)
        return ledger.balance(ledger.expire_due(*read))

    async def list_entries(
        self, account_id: str, before_seq: int | None, limit: int
    ) -> Sequence[StatementLine]:
        """An account's transfers, newest first, from below a number on. Raises NotFound/ACCOUNT_NOT_FOUND."""
        async with self._acquire() as connection:
            if not await connection.fetchval(
                "SELECT true FROM accounts WHERE account_id = $1", account_id
            ):
                raise batches.account_unknown(account_id)
            rows = await connection.fetch(
                """
                SELECT account_id, seq, kind, available_change, held_change, hold_id, cause, note,
                    created_at
                FROM transfers
                WHERE account_id = $1 AND ($2::bigint IS NULL OR seq < $2)
                ORDER BY seq DESC LIMIT $3
                """,
                account_id,
                before_seq,
                limit,
            )
        return [
            StatementLine(**{**dict(row), "kind": ledger.TransferKind(row["kind"])}) for row in rows
        ]

    async def list_holds(
        self,
        account_id: str | None,
        state: holds.HoldState | None,
        before: tuple[datetime, str] | None,
        limit: int,
    ) -> Sequence[holds.Hold]:
        """Holds, newest first, from below a place (created_at, hold_id) on."""
        created_at, hold_id = before or (None, None)
        async with self._acquire() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {posting.HOLD_COLUMNS} FROM holds
                WHERE ($1::text IS NULL OR account_id = $1) AND ($2::text IS NULL OR state = $2)
                    AND ($3::timestamptz IS NULL OR (created_at, hold_id) < ($3, $4::text))
                ORDER BY created_at DESC, hold_id DESC LIMIT $5
                """,
                account_id,
                state,
                created_at,
                hold_id,
                limit,
            )
        return [posting.hold_from(row) for row in rows]

    async def check_books(self) -> Proof:
        """Proves the books in one snapshot; at most MOST_FINDINGS sentences."""
        findings: list[str] = []
        async with (
            self._acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            for check in _CHECKS:
                rows = await connection.fetch(
                    f"{check} LIMIT {MOST_FINDINGS - len(findings)}", timeout=CHECK_SECONDS
                )
                findings += [row[0] for row in rows]
            counts: Any = await connection.fetchrow(
                """
                SELECT (SELECT count(*) FROM transfers) AS transfers,
                    (SELECT count(*) FROM accounts) AS accounts,
                    (SELECT count(*) FROM holds WHERE state = 'HELD') AS open_holds
                """,
                timeout=CHECK_SECONDS,
            )
        return Proof(tuple(findings), counts["transfers"], counts["accounts"], counts["open_holds"])

    def _acquire(self) -> Any:
        return self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS)
