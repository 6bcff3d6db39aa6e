"""What settlement and the floor keep beside the ledger: events without a hold, unreadable ones, overdue holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kit import postgres
from services.credits import rules
from services.credits.store import posting


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits to be settled."""

    open_holds: int
    oldest_hold_seconds: float
    unsettled: int
    oldest_unsettled_seconds: float
    parked: int


class WaitingStore:
    """Rows that wait for somebody. Nothing here moves credits."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def keep_unsettled(self, verdict: rules.Verdict) -> bool:
        """Keeps a verdict whose hold is not known, for the Reserve that comes late. False: its hold is there by now."""
        async with self._acquire() as connection, connection.transaction():
            # Under the account's lock a Reserve either committed before us, and we see its hold, or sees our row. Where
            # the account itself is only being made, the floor brings the two together.
            await posting.lock(connection, [verdict.account_id])
            if await connection.fetchval(
                "SELECT true FROM holds WHERE hold_id = $1", verdict.video_id
            ):
                return False
            await connection.execute(
                """
                INSERT INTO unsettled (video_id, account_id, verdict) VALUES ($1, $2, $3)
                ON CONFLICT (video_id) DO NOTHING
                """,
                verdict.video_id,
                verdict.account_id,
                verdict.fields(),
            )
            # A Reserve that was judged without our lock is judged again: the account's row is another one now.
            await connection.execute(
                "UPDATE accounts SET last_seq = last_seq WHERE account_id = $1", verdict.account_id
            )
        return True

    async def park(self, subject: str, stream_sequence: int, reason: str, data: bytes) -> None:
        """Keeps a message that nobody can settle by. Idempotent."""
        async with self._acquire() as connection:
            await connection.execute(
                """
                INSERT INTO parked_events (subject, stream_sequence, reason, data)
                VALUES ($1, $2, $3, $4)
                ON CONFLICT DO NOTHING
                """,
                subject,
                stream_sequence,
                reason,
                data,
            )

    async def late_holds(self, limit: int) -> list[rules.Verdict]:
        """Verdicts whose hold came after all."""
        async with self._acquire() as connection:
            rows = await connection.fetch(
                """
                SELECT u.verdict FROM unsettled u
                JOIN holds h ON h.hold_id = u.video_id AND h.account_id = u.account_id
                WHERE h.state = 'HELD' LIMIT $1
                """,
                limit,
            )
        return [rules.verdict_from(row["verdict"]) for row in rows]

    async def claim_overdue(self, overdue_seconds: float, limit: int) -> list[str]:
        """Videos whose holds have been open so long, or as long since they were last claimed. Replicas claim apart.

        Locks no account: it skips holds that are being settled, and waits for nothing.
        """
        async with self._acquire() as connection:
            rows = await connection.fetch(
                """
                UPDATE holds SET asked_at = clock_timestamp()
                WHERE hold_id IN (
                    SELECT hold_id FROM holds
                    WHERE state = 'HELD' AND coalesce(asked_at, created_at)
                        < clock_timestamp() - make_interval(secs => $1)
                    ORDER BY coalesce(asked_at, created_at) LIMIT $2
                    FOR NO KEY UPDATE SKIP LOCKED
                )
                RETURNING hold_id
                """,
                overdue_seconds,
                limit,
            )
        return [row["hold_id"] for row in rows]

    async def unclaim(self, hold_ids: Sequence[str]) -> None:
        """Gives back what was claimed in vain, to be claimed by the next pass."""
        async with self._acquire() as connection:
            await connection.execute(
                """
                UPDATE holds SET asked_at = NULL WHERE hold_id IN (
                    SELECT hold_id FROM holds WHERE hold_id = ANY($1::text[]) AND state = 'HELD'
                    FOR NO KEY UPDATE SKIP LOCKED
                )
                """,
                hold_ids,
            )

    async def due_accounts(self, limit: int) -> list[str]:
        """Accounts with lots that are due."""
        async with self._acquire() as connection:
            rows = await connection.fetch(
                """
                SELECT DISTINCT account_id FROM lots
                WHERE open AND expires_at <= clock_timestamp()
                ORDER BY account_id LIMIT $1
                """,
                limit,
            )
        return [row["account_id"] for row in rows]

    async def backlog(self) -> Backlog:
        """What waits, for the metrics."""
        async with self._acquire() as connection:
            row: Any = await connection.fetchrow(
                """
                SELECT count(*) AS open_holds, coalesce(extract(epoch FROM clock_timestamp()
                    - min(created_at)), 0)::float8 AS oldest_hold_seconds,
                    (SELECT count(*) FROM unsettled) AS unsettled,
                    (SELECT coalesce(extract(epoch FROM clock_timestamp() - min(first_seen_at)), 0)
                     FROM unsettled)::float8 AS oldest_unsettled_seconds,
                    (SELECT count(*) FROM parked_events) AS parked
                FROM holds WHERE state = 'HELD'
                """
            )
        return Backlog(**dict(row))

    def _acquire(self) -> Any:
        return self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS)
