"""What the books say: balances, statements, holds, usage, and the proof that they balance. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import errors, postgres
from services.credits import holds, ledger, usage
from services.credits.store import posting, proof, rulebooks

MOST_USAGE_LINES = 5000
_NOBODY_ELSE = 0x70726F6F


@dataclass(frozen=True, slots=True)
class Filter:
    """Which transfers of an account are asked for; what is not set lets all through."""

    from_: datetime | None = None
    to: datetime | None = None
    hold_id: str = ""
    kinds: tuple[ledger.TransferKind, ...] = ()


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
    trace_id: str
    operator: str
    purchase: str
    price_version: str
    policy_version: str


class StatementStore:
    """Reads of the ledger."""

    def __init__(self, pool: postgres.Pool, rules_: rulebooks.RulebookStore) -> None:
        self._pool = pool
        self._rulebooks = rules_

    async def get_balance(self, account_id: str) -> ledger.Balance:
        """What an account has, without what is due. Raises NotFound/ACCOUNT_NOT_FOUND."""
        async with self._acquire() as connection:
            read = await posting.read_books(connection, account_id)
        if read is None:
            raise holds.account_unknown(account_id)
        return ledger.balance(ledger.expire_due(*read))

    async def list_entries(
        self, account_id: str, before_seq: int | None, limit: int, only: Filter | None = None
    ) -> Sequence[StatementLine]:
        """An account's transfers, newest first, from below a number on. Raises NotFound/ACCOUNT_NOT_FOUND."""
        only = only or Filter()
        async with self._acquire() as connection:
            await _require_account(connection, account_id)
            rows = await connection.fetch(
                """
                SELECT t.account_id, t.seq, t.kind, t.available_change, t.held_change, t.hold_id,
                    t.cause, t.note, t.created_at, t.trace_id, t.operator, t.purchase,
                    coalesce(h.price_version, '') AS price_version,
                    coalesce(h.policy_version, '') AS policy_version
                FROM transfers t LEFT JOIN holds h USING (hold_id)
                WHERE t.account_id = $1 AND t.seq < (SELECT least(
                        coalesce($2::bigint, 9223372036854775807),
                        CASE WHEN $4::timestamptz IS NOT NULL THEN first_seq_at($1, $4) END))
                    AND t.seq >= (SELECT coalesce(
                        CASE WHEN $5::timestamptz IS NOT NULL THEN first_seq_at($1, $5) END, 1))
                    AND ($6 = '' OR t.hold_id = $6)
                    AND (cardinality($7::text[]) = 0 OR t.kind = ANY($7))
                ORDER BY t.seq DESC LIMIT $3
                """,
                *(account_id, before_seq, limit, only.to, only.from_),
                *(only.hold_id, list(only.kinds)),
            )
        return [
            StatementLine(**{**dict(row), "kind": ledger.TransferKind(row["kind"])}) for row in rows
        ]

    async def get_usage(
        self, account_id: str, asked: usage.Asked
    ) -> tuple[usage.Period, Sequence[usage.Line]]:
        """What an account used, by month and group. Raises NotFound/ACCOUNT_NOT_FOUND, InvalidArgument."""
        async with self._acquire() as connection:
            await _require_account(connection, account_id)
            period = usage.period(asked, await connection.fetchval("SELECT clock_timestamp()"))
            rows = await connection.fetch(
                f"""
                WITH used AS (
                    SELECT settled_at AS at, item, key_id, labels, (cause = 'NONE')::int AS video,
                        captured, 0 AS refunded
                    FROM holds
                    WHERE account_id = $1 AND state IN ('CAPTURED', 'RELEASED')
                        AND settled_at >= $2 AND settled_at < $3
                    UNION ALL
                    SELECT t.created_at, h.item, h.key_id, h.labels, 0, 0, t.available_change
                    FROM transfers t JOIN holds h USING (hold_id)
                    WHERE t.account_id = $1 AND t.kind = 'REFUND'
                        AND t.created_at >= $2 AND t.created_at < $3
                )
                SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM') AS month,
                    CASE WHEN 'MODEL' = ANY($4::text[]) THEN item ->> 'model' ELSE '' END AS model,
                    CASE WHEN 'LANE' = ANY($4) THEN item ->> 'lane' ELSE '' END AS lane,
                    CASE WHEN 'KEY' = ANY($4) THEN key_id ELSE '' END AS key_id,
                    CASE WHEN 'LABEL' = ANY($4) THEN coalesce(labels ->> $5, '') ELSE '' END
                        AS label_value,
                    sum(video) AS videos, sum(captured)::bigint AS captured,
                    sum(refunded)::bigint AS refunded
                FROM used GROUP BY 1, 2, 3, 4, 5
                HAVING sum(video) > 0 OR sum(captured) > 0 OR sum(refunded) > 0
                ORDER BY 1 DESC, 2, 3, 4, 5 LIMIT {MOST_USAGE_LINES + 1}
                """,
                *(account_id, period.from_, period.to, list(asked.groups), asked.label),
            )
        if len(rows) > MOST_USAGE_LINES:
            raise errors.InvalidArgument(
                "INVALID_FIELD",
                f"that is more than {MOST_USAGE_LINES} lines: ask for a shorter time or fewer groups",
                violations=[("group_by", f"gives more than {MOST_USAGE_LINES} lines")],
            )
        return period, [usage.Line(**dict(row)) for row in rows]

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

    async def check_books(self) -> proof.Proof:
        """Proves the books in one snapshot; at most proof.MOST_FINDINGS sentences."""
        async with (
            self._acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            return await proof.prove(connection, self._rulebooks)

    async def check_books_alone(self) -> proof.Proof | None:
        """The same, unless another replica is at it: then None."""
        async with (
            self._acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _NOBODY_ELSE):
                return None
            return await proof.prove(connection, self._rulebooks)

    def _acquire(self) -> Any:
        return self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS)


async def _require_account(connection: postgres.Connection, account_id: str) -> None:
    if not await connection.fetchval("SELECT true FROM accounts WHERE account_id = $1", account_id):
        raise holds.account_unknown(account_id)
