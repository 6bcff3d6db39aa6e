"""Renders: a render in flight is a row with `next_step_at`; polls, progress, fetches."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from framewire.events.v1 import event_pb2
from kit import postgres
from kit.failpoints import failpoint
from services.generator import attempts, events
from services.generator.store import rows


class RenderStore:
    """Attempts that the provider has."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def claim_poll(self, provider_account: str, lease: timedelta) -> bool:
        """Takes the account's poll pass, for one replica at a time, when it is due."""
        return bool(
            await self._pool.fetchval(
                """
                UPDATE provider_accounts SET poll_lease_until = clock_timestamp() + $2
                WHERE provider_account = $1 AND poll_lease_until <= clock_timestamp()
                  AND next_poll_at <= clock_timestamp() RETURNING true
                """,
                provider_account,
                lease,
            )
        )

    async def end_poll(self, provider_account: str, interval: timedelta) -> None:
        """Gives the pass back; the next one is due after the interval."""
        await self._pool.execute(
            """
            UPDATE provider_accounts SET poll_lease_until = '-infinity',
                next_poll_at = clock_timestamp() + $2
            WHERE provider_account = $1
            """,
            provider_account,
            interval,
        )

    async def in_flight(self, provider_account: str) -> list[rows.Attempt]:
        """Attempts that the account is rendering, oldest first."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM}
            WHERE a.provider_account = $1 AND a.state IN ('RENDERING', 'UNRESOLVED')
              AND a.provider_job_id IS NOT NULL
            ORDER BY a.submitted_at
            """,
            provider_account,
        )
        return [rows.attempt(row) for row in found]

    async def progress(self, attempt: rows.Attempt, percent: int) -> event_pb2.Progress | None:
        """Writes progress and answers what is to be told of it; None when nothing changed hands."""
        version = await self._pool.fetchval(
            """
            UPDATE attempts SET progress_percent = $2, progress_at = clock_timestamp(),
                not_found_count = 0, not_found_since = NULL, progress_version = progress_version + 1
            WHERE attempt_id = $1 AND state IN ('RENDERING', 'UNRESOLVED') AND progress_percent <= $2
            RETURNING progress_version
            """,
            attempt.attempt_id,
            percent,
        )
        return self._progress(attempt, attempt.state, percent, version) if version else None

    async def stage(self, attempt: rows.Attempt, state: attempts.State) -> event_pb2.Progress:
        """The progress message for a change of stage that is told, not stored as an event."""
        version = await self._pool.fetchval(
            """
            UPDATE attempts SET progress_version = progress_version + 1 WHERE attempt_id = $1
            RETURNING progress_version
            """,
            attempt.attempt_id,
        )
        return self._progress(attempt, state, attempt.progress_percent, version)

    def _progress(
        self, attempt: rows.Attempt, state: attempts.State, percent: int, version: int
    ) -> event_pb2.Progress:
        stage = "CANCELLING" if attempt.cancel_requested else attempts.STAGES[state]
        return event_pb2.Progress(
            video_id=attempt.video_id,
            account_id=attempt.account_id,
            version=attempt.number * 1_000_000 + version,
            stage=events.stage(stage),
            progress_percent=percent,
        )

    async def finished(self, attempt: rows.Attempt, content_expires_at: datetime) -> bool:
        """The provider has finished it: FETCHING."""
        moved = await self._pool.fetchval(
            """
            UPDATE attempts SET state = 'FETCHING', fence = fence + 1, progress_percent = 100,
                content_expires_at = $2, next_step_at = clock_timestamp(), lease_until = NULL,
                not_found_count = 0, not_found_since = NULL
            WHERE attempt_id = $1 AND state IN ('RENDERING', 'UNRESOLVED') AND provider_job_id IS NOT NULL
            RETURNING true
            """,
            attempt.attempt_id,
            content_expires_at,
        )
        await failpoint("generator.poll.after_finished")
        return bool(moved)

    async def not_found(self, attempt: rows.Attempt) -> tuple[int, float]:
        """Counts a definite 404; answers how many there were in a row and over how many seconds."""
        row = await self._pool.fetchrow(
            """
            UPDATE attempts SET not_found_count = not_found_count + 1,
                not_found_since = coalesce(not_found_since, clock_timestamp())
            WHERE attempt_id = $1 AND state IN ('RENDERING', 'UNRESOLVED')
            RETURNING not_found_count,
                extract(epoch FROM clock_timestamp() - not_found_since)::float8 AS seconds
            """,
            attempt.attempt_id,
        )
        return (row["not_found_count"], row["seconds"]) if row else (0, 0.0)

    async def late(self) -> Sequence[rows.Attempt]:
        """Marks late renders UNRESOLVED: a timeout is no verdict. Answers undecided ones past resolve_by."""
        await self._pool.execute(
            """
            UPDATE attempts SET state = 'UNRESOLVED', fence = fence + 1,
                message = 'not finished in the time of its model; still asking'
            WHERE state = 'RENDERING' AND render_deadline <= clock_timestamp()
            """
        )
        found = await self._pool.fetch(
            f"""
            SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM}
            WHERE a.resolve_by <= clock_timestamp()
              AND (a.state IN ('UNKNOWN', 'UNRESOLVED') OR (a.state = 'QUEUED' AND a.key_pinned))
            ORDER BY a.resolve_by LIMIT 100
            """
        )
        return [rows.attempt(row) for row in found]

    async def claim_fetch(self, lease: timedelta, limit: int) -> list[rows.Attempt]:
        """Claims finished renders to be fetched, those first whose content expires first."""
        found = await self._pool.fetch(
            f"""
            WITH due AS (
                SELECT attempt_id FROM attempts
                WHERE state = 'FETCHING' AND next_step_at <= clock_timestamp()
                  AND (lease_until IS NULL OR lease_until <= clock_timestamp())
                ORDER BY content_expires_at, next_step_at LIMIT $2 FOR UPDATE SKIP LOCKED
            ), claimed AS (
                UPDATE attempts a SET fence = a.fence + 1, lease_until = clock_timestamp() + $1
                FROM due WHERE a.attempt_id = due.attempt_id RETURNING a.*
            )
            SELECT {rows.ATTEMPT_COLUMNS} FROM claimed a JOIN videos v USING (video_id)
            """,
            lease,
            limit,
        )
        return [rows.attempt(row) for row in found]

    async def renew_fetch(self, attempt: rows.Attempt, lease: timedelta) -> bool:
        """Keeps a long fetch; False when it is no longer the caller's."""
        return bool(
            await self._pool.fetchval(
                """
                UPDATE attempts SET lease_until = clock_timestamp() + $3
                WHERE attempt_id = $1 AND fence = $2 AND state = 'FETCHING' RETURNING true
                """,
                attempt.attempt_id,
                attempt.fence,
                lease,
            )
        )

    async def fetch_again(
        self,
        attempt: rows.Attempt,
        delay: timedelta,
        message: str,
        *,
        gone: bool = False,
    ) -> None:
        """Gives a fetch back to be tried later; counts in a row that the provider did not show what there is."""
        await self._pool.execute(
            """
            UPDATE attempts SET lease_until = NULL, next_step_at = clock_timestamp() + $3, message = $4,
                fetch_tries = fetch_tries + 1,
                not_found_count = CASE WHEN $5 THEN not_found_count + 1 ELSE 0 END,
                not_found_since = CASE WHEN $5 THEN coalesce(not_found_since, clock_timestamp()) END
            WHERE attempt_id = $1 AND fence = $2 AND state = 'FETCHING'
            """,
            attempt.attempt_id,
            attempt.fence,
            delay,
            message,
            gone,
        )
