"""Late renders: what is still looked for after an attempt was given up. The verdict on its video never changes."""

from __future__ import annotations

from datetime import datetime, timedelta

import asyncpg

from kit import postgres
from services.generator.store import rows

_COLUMNS = f"""
    {rows.ATTEMPT_COLUMNS}, l.provider_job_id AS late_job_id, l.fence AS late_fence, l.look_until,
    l.state AS late_state, l.content_expires_at AS late_expires_at,
    extract(epoch FROM clock_timestamp() - l.created_at)::float8 AS age_seconds
"""


class LateStore:
    """Given-up attempts whose render may turn up."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def turned_up(self) -> int:
        """Takes over ids that a late worker, a spool or an operator recorded. Answers how many.

        An id is the proof of a paid job: it is followed for an hour at least, however late it comes.
        """
        done = await self._pool.execute(
            """
            UPDATE late_renders l SET provider_job_id = j.provider_job_id, state = 'LOOKING', fence = l.fence + 1,
                next_step_at = clock_timestamp(), updated_at = clock_timestamp(),
                look_until = greatest(l.look_until, clock_timestamp() + interval '1 hour')
            FROM (SELECT DISTINCT ON (attempt_id) attempt_id, provider_account, provider_job_id
                  FROM provider_jobs ORDER BY attempt_id, seen_at) j
            WHERE j.attempt_id = l.attempt_id AND l.provider_job_id IS NULL
              AND l.state IN ('LOOKING', 'GIVEN_UP')
            """
        )
        return int(done.split()[-1])

    async def give_up(self) -> int:
        """Ends what was looked for long enough. Answers how many."""
        done = await self._pool.execute(
            """
            UPDATE late_renders SET state = 'GIVEN_UP', updated_at = clock_timestamp()
            WHERE state = 'LOOKING' AND look_until <= clock_timestamp()
            """
        )
        return int(done.split()[-1])

    async def claim(self, state: str, lease: timedelta, limit: int) -> list[rows.LateRender]:
        """Claims those in a state that are due."""
        found = await self._pool.fetch(
            f"""
            WITH due AS (
                SELECT attempt_id FROM late_renders
                WHERE state = $1 AND next_step_at <= clock_timestamp()
                ORDER BY next_step_at LIMIT $3 FOR UPDATE SKIP LOCKED
            ), l AS (
                UPDATE late_renders l SET fence = l.fence + 1, next_step_at = clock_timestamp() + $2
                FROM due WHERE l.attempt_id = due.attempt_id RETURNING l.*
            )
            SELECT {_COLUMNS} FROM l JOIN attempts a USING (attempt_id)
            JOIN videos v ON v.video_id = a.video_id
            """,
            state,
            lease,
            limit,
        )
        return [_late(row) for row in found]

    async def renew(self, late: rows.LateRender, lease: timedelta) -> None:
        """Keeps a long fetch."""
        await self._changed(late, "next_step_at = clock_timestamp() + $4", lease)

    async def again(self, late: rows.LateRender, delay: timedelta, message: str) -> None:
        """Looks, or fetches, again later."""
        await self._changed(
            late, "next_step_at = clock_timestamp() + $4, message = $5", delay, message
        )

    async def adopt(self, late: rows.LateRender, provider_job_id: str) -> bool:
        """It is this job. False when that is another attempt's."""
        attempt = late.attempt
        mine = await self._pool.fetchval(
            """
            INSERT INTO provider_jobs (provider_account, provider_job_id, attempt_id, fence, adopted)
            VALUES ($1, $2, $3, $4, true)
            ON CONFLICT (provider_account, provider_job_id)
            DO UPDATE SET provider_job_id = EXCLUDED.provider_job_id
            WHERE provider_jobs.attempt_id = EXCLUDED.attempt_id RETURNING true
            """,
            attempt.provider_account,
            provider_job_id,
            attempt.attempt_id,
            attempt.fence,
        )
        if mine:
            await self.turned_up()
        return bool(mine)

    async def finished(self, late: rows.LateRender, content_expires_at: datetime) -> bool:
        """The provider has finished it: it is to be fetched."""
        return await self._changed(
            late,
            "state = 'FETCHING', content_expires_at = $4, next_step_at = clock_timestamp(), message = ''",
            content_expires_at,
        )

    async def gone(self, late: rows.LateRender, message: str) -> None:
        """There is nothing to be had."""
        await self._changed(late, "state = 'GIVEN_UP', message = $4", message)

    async def _changed(self, late: rows.LateRender, changes: str, *values: object) -> bool:
        """Changes one that is as it was claimed."""
        return bool(
            await self._pool.fetchval(
                f"""
                UPDATE late_renders SET {changes}, updated_at = clock_timestamp()
                WHERE attempt_id = $1 AND fence = $2 AND state = $3 RETURNING true
                """,
                late.attempt.attempt_id,
                late.fence,
                late.state,
                *values,
            )
        )


def _late(row: asyncpg.Record) -> rows.LateRender:
    return rows.LateRender(
        attempt=rows.attempt(row),
        provider_job_id=row["late_job_id"],
        state=row["late_state"],
        fence=row["late_fence"],
        look_until=row["look_until"],
        content_expires_at=row["late_expires_at"],
        age_seconds=row["age_seconds"],
    )
