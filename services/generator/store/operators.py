"""What operators see and say: everything on record of an attempt, and their verdicts on undecided ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from kit import postgres
from services.generator import outputs
from services.generator.store import rows, videos

LIST_COLUMNS = """
    attempt_id, video_id, number, account_id, state, provider_account, provider_job_id,
    cause, message, resolve_by, created_at, updated_at
"""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which attempts; empty: any."""

    video_id: str
    state: str
    account_id: str
    provider_account: str


@dataclass(frozen=True, slots=True)
class Detail:
    """An attempt with all that belongs to it."""

    row: asyncpg.Record
    history: Sequence[asyncpg.Record]
    provider_jobs: Sequence[asyncpg.Record]
    outputs: Sequence[outputs.Output]
    late: asyncpg.Record | None


class OperatorStore:
    """Attempts, for operators."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def find(self, video_id: str, number: int) -> rows.Attempt | None:
        """An attempt of a video; 0: the newest."""
        row = await self._pool.fetchrow(
            f"""
            SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM}
            WHERE a.video_id = $1 AND $2 IN (0, a.number) ORDER BY a.number DESC LIMIT 1
            """,
            video_id,
            number,
        )
        return rows.attempt(row) if row else None

    async def list_attempts(
        self, only: Filter, before: tuple[datetime, str] | None, limit: int
    ) -> list[asyncpg.Record]:
        """Attempts, newest first."""
        return await self._pool.fetch(
            f"""
            SELECT {LIST_COLUMNS} FROM attempts
            WHERE ($1 = '' OR video_id = $1) AND ($2 = '' OR state = $2)
              AND ($3 = '' OR account_id = $3) AND ($4 = '' OR provider_account = $4)
              AND ($5::timestamptz IS NULL OR (created_at, attempt_id) < ($5, $6))
            ORDER BY created_at DESC, attempt_id DESC LIMIT $7
            """,
            only.video_id,
            only.state,
            only.account_id,
            only.provider_account,
            before[0] if before else None,
            before[1] if before else "",
            limit,
        )

    async def listed(self, attempt_id: str) -> asyncpg.Record:
        """An attempt as it is listed."""
        row = await self._pool.fetchrow(
            f"SELECT {LIST_COLUMNS} FROM attempts WHERE attempt_id = $1", attempt_id
        )
        assert row is not None
        return row

    async def detail(self, attempt_id: str) -> Detail:
        """Everything on record of it, as of one moment."""
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            row = await connection.fetchrow(
                f"""
                SELECT {LIST_COLUMNS}, submissions, submitted_at, cost_micros, cost_known, lease_until, next_step_at
                FROM attempts WHERE attempt_id = $1
                """,
                attempt_id,
            )
            assert row is not None
            history = await connection.fetch(
                "SELECT state_after, message, at FROM attempt_history WHERE attempt_id = $1 ORDER BY id",
                attempt_id,
            )
            jobs = await connection.fetch(
                """
                SELECT provider_account, provider_job_id, adopted, seen_at FROM provider_jobs
                WHERE attempt_id = $1 ORDER BY seen_at
                """,
                attempt_id,
            )
            films = await connection.fetch(
                "SELECT variant, output_id, state, message FROM outputs WHERE attempt_id = $1 ORDER BY variant",
                attempt_id,
            )
            late = await connection.fetchrow(
                "SELECT state, provider_job_id, look_until, message FROM late_renders WHERE attempt_id = $1",
                attempt_id,
            )
        made = [outputs.Output(**{**row, "state": outputs.State(row["state"])}) for row in films]
        return Detail(row, history, jobs, made, late)

    async def take(self, attempt: rows.Attempt, lease: timedelta) -> rows.Attempt | None:
        """Claims an undecided attempt from whoever looks into it, for one verdict. None: it is undecided no more."""
        taken = await self._pool.fetchval(
            """
            UPDATE attempts SET fence = fence + 1, next_step_at = clock_timestamp() + $2
            WHERE attempt_id = $1 AND state IN ('UNKNOWN', 'UNRESOLVED') RETURNING number
            """,
            attempt.attempt_id,
            lease,
        )
        return await self.find(attempt.video_id, taken) if taken else None

    async def owner(self, provider_account: str, provider_job_id: str) -> str | None:
        """The attempt whose a provider's job is."""
        return await self._pool.fetchval(
            "SELECT attempt_id FROM provider_jobs WHERE provider_account = $1 AND provider_job_id = $2",
            provider_account,
            provider_job_id,
        )

    async def late(self, attempt_id: str) -> tuple[str, str | None] | None:
        """State and job of an attempt's late render; None where none is looked for."""
        row = await self._pool.fetchrow(
            "SELECT state, provider_job_id FROM late_renders WHERE attempt_id = $1", attempt_id
        )
        return (row["state"], row["provider_job_id"]) if row else None

    async def never_accepted(self, attempt: rows.Attempt) -> bool:
        """Back to QUEUED, to be sent again and paid once. Fenced."""
        return bool(
            await self._pool.fetchval(
                """
                UPDATE attempts SET state = 'QUEUED', fence = fence + 1, lease_until = NULL, worker = NULL,
                    message = 'an operator: never accepted', next_step_at = clock_timestamp(),
                    absent_since = NULL, key_pinned = false,
                    start_by = greatest(start_by, clock_timestamp() + $3)
                WHERE attempt_id = $1 AND fence = $2 AND state IN ('UNKNOWN', 'UNRESOLVED')
                  AND provider_job_id IS NULL
                  AND NOT EXISTS (SELECT 1 FROM provider_jobs j WHERE j.attempt_id = attempts.attempt_id)
                RETURNING true
                """,
                attempt.attempt_id,
                attempt.fence,
                videos.RETRY_STARTS_WITHIN,
            )
        )
