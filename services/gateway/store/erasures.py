"""Accounts that are erased: what ends at once, what is still to be done, and the words that go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from kit import postgres
from services.gateway.store import accounts

AT_ONCE = 10
_GO_AT_ONCE = ("webhook_endpoints", "webhook_events", "templates", "requests", "upload_counts")
BATCH = 100


@dataclass(frozen=True, slots=True)
class Left:
    """How far an erasure is."""

    asked_at: datetime
    done_at: datetime | None
    live: int
    to_remove: int
    settled: bool
    """Calls that were under way when it began have ended."""


class ErasureStore:
    """Statements of erasure."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def begin(self, account_id: str, why: str, principal: str) -> bool:
        """Nobody can call for the account any more, and its name is gone. False: no such account. Idempotent."""
        async with self._pool.acquire() as connection, connection.transaction():
            there = await connection.fetchval(
                """
                UPDATE accounts SET erased_at = COALESCE(erased_at, clock_timestamp()), display_name = 'erased'
                WHERE account_id = $1 RETURNING true
                """,
                account_id,
            )
            if not there:
                return False
            await connection.execute(
                """
                INSERT INTO erasures (account_id) VALUES ($1)
                ON CONFLICT (account_id) DO UPDATE SET next_step_at = clock_timestamp()
                """,
                account_id,
            )
            await connection.execute(
                """
                UPDATE api_keys SET revoked_at = COALESCE(revoked_at, clock_timestamp()), display_name = ''
                WHERE account_id = $1
                """,
                account_id,
            )
            await connection.execute(_PRINCIPALS, account_id)
            await connection.execute(
                """
                DELETE FROM webhook_deliveries WHERE endpoint_id IN (
                    SELECT endpoint_id FROM webhook_endpoints WHERE account_id = $1)
                """,
                account_id,
            )
            for table in _GO_AT_ONCE:
                await connection.execute(f"DELETE FROM {table} WHERE account_id = $1", account_id)
            await accounts.audit(connection, principal, "EraseAccount", account_id, why, {}, "OK")
            return True

    async def take_due(self, retry_seconds: float) -> Sequence[str]:
        """Erasures with something to do; put off first, so that two replicas do not do the same at once."""
        found = await self._pool.fetch(
            f"""
            UPDATE erasures SET next_step_at = clock_timestamp() + make_interval(secs => $1)
            WHERE account_id IN (
                SELECT account_id FROM erasures
                WHERE done_at IS NULL AND next_step_at <= clock_timestamp()
                ORDER BY next_step_at LIMIT {AT_ONCE} FOR UPDATE SKIP LOCKED
            ) RETURNING account_id
            """,
            retry_seconds,
        )
        return [row["account_id"] for row in found]

    async def admitting(self, account_id: str) -> Sequence[str]:
        """Videos whose admission is under way."""
        return await self._ids(account_id, "state = 'ADMITTING'")

    async def ended(self, account_id: str) -> Sequence[str]:
        """Some videos that have ended and are not deleted."""
        return await self._ids(account_id, "finished_at IS NOT NULL AND deleted_at IS NULL")

    async def _ids(self, account_id: str, which: str) -> Sequence[str]:
        found = await self._pool.fetch(
            f"SELECT video_id FROM videos WHERE account_id = $1 AND {which} LIMIT {BATCH}",
            account_id,
        )
        return [row["video_id"] for row in found]

    async def cancel_live(self, account_id: str) -> None:
        """Asks for the end of every live video, to be deleted then; the sweeper tells the generator. Idempotent."""
        await self._pool.execute(
            """
            UPDATE videos SET cancel_requested = true, delete_when_terminal = true, revision = revision + 1,
                              stage = CASE WHEN state = 'PROCESSING' THEN 'CANCELLING' ELSE stage END,
                              revised_at = clock_timestamp(), updated_at = clock_timestamp(),
                              next_check_at = clock_timestamp()
            WHERE account_id = $1 AND state IN ('PENDING', 'PROCESSING')
              AND NOT (cancel_requested AND delete_when_terminal)
            """,
            account_id,
        )

    async def left(self, account_id: str, settle_seconds: float) -> Left:
        """How far it is. Videos that were never admitted count until what they held is given back."""
        row = await self._pool.fetchrow(
            """
            SELECT asked_at, done_at,
                   asked_at < clock_timestamp() - make_interval(secs => $2) AS settled,
                   count(*) FILTER (WHERE state IN ('ADMITTING', 'PENDING', 'PROCESSING')) AS live,
                   count(*) FILTER (WHERE release_due OR unpin_due OR delete_due
                                       OR finished_at IS NOT NULL AND deleted_at IS NULL) AS to_remove
            FROM erasures LEFT JOIN videos USING (account_id)
            WHERE account_id = $1 GROUP BY account_id
            """,
            account_id,
            settle_seconds,
        )
        assert row is not None, "it has begun"
        return Left(**dict(row))

    async def scrub(self, account_id: str) -> None:
        """Takes away what callers wrote beside prompts, and the rows of what was never admitted."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                """
                DELETE FROM videos WHERE account_id = $1 AND state IN ('REJECTED', 'ABANDONED')
                    AND NOT release_due AND NOT unpin_due
                """,
                account_id,
            )
            await connection.execute(
                """
                UPDATE videos SET labels = '{}', client_reference = '', failure_message = ''
                WHERE account_id = $1 AND deleted_at IS NOT NULL AND NOT delete_due
                  AND (labels <> '{}' OR client_reference <> '' OR failure_message <> '')
                """,
                account_id,
            )

    async def done(self, account_id: str) -> None:
        """Everything is gone."""
        await self._pool.execute(
            "UPDATE erasures SET done_at = COALESCE(done_at, clock_timestamp()) WHERE account_id = $1",
            account_id,
        )


_PRINCIPALS = """
    WITH gone AS (DELETE FROM members WHERE account_id = $1 RETURNING principal_id)
    DELETE FROM principals p USING gone
    WHERE p.principal_id = gone.principal_id AND p.role = 'MEMBER' AND NOT EXISTS (
        SELECT FROM members m WHERE m.principal_id = p.principal_id AND m.account_id <> $1)
"""
"""Memberships, and whoever has no other: with their e-mail address."""
