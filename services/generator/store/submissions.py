"""Submissions: the write-ahead of every paid request, what came of it, and what is not known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from kit import postgres
from services.generator.store import rows


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What else must be known to decide an undecided attempt, read *after* the provider's list.

    A twin that was sent meanwhile is a claimant then, and one that was answered has its job among the known.
    """

    claimants: int
    """Undecided ones that look alike, with those that were given up and are still looked for."""
    known_job_ids: frozenset[str]
    """Those of the listed jobs that belong to attempts."""


class SubmissionStore:
    """Between the decision to send and the provider's answer, however late."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def begin(
        self,
        connection: asyncpg.Connection,
        attempt: rows.Attempt,
        worker: int,
        lease: timedelta,
        resolve_after: timedelta,
        render_limit: timedelta,
        body_sha256: str,
        fingerprint: str,
        key_good_for: timedelta,
        cost_micros: int,
    ) -> bool:
        """Commits that the attempt is about to be sent, on the connection that holds the worker's advisory lock.

        False when it may not be sent: cancelled, no longer the caller's, a twin is undecided, its key too old, a job of
        it turned up, or the database waits for its recovery. Only after True may anything be sent, and at once.
        `fingerprint` is what the list will show of what is sent now: names in the catalogue may have changed since.
        """
        try:
            return bool(
                await connection.fetchval(
                    """
                    UPDATE attempts a SET state = 'SUBMITTING', worker = $3, submissions = submissions + 1,
                        submitted_at = CASE WHEN a.key_pinned THEN a.submitted_at ELSE clock_timestamp() END,
                        lease_until = clock_timestamp() + $4, fingerprint = $9,
                        resolve_by = clock_timestamp() + $5, render_deadline = clock_timestamp() + $6,
                        body_sha256 = $7, cost_micros = $8, absent_since = NULL, sent_until = NULL,
                        suspects = '{}'
                    FROM videos v
                    WHERE a.attempt_id = $1 AND a.fence = $2 AND a.state = 'PREPARING'
                      AND v.video_id = a.video_id AND (a.key_pinned OR NOT v.cancel_requested)
                      AND (NOT a.key_pinned OR a.submitted_at + $10 > clock_timestamp())
                      AND NOT EXISTS (SELECT 1 FROM provider_jobs j WHERE j.attempt_id = a.attempt_id)
                      AND NOT EXISTS (SELECT 1 FROM incarnation WHERE recovery_since IS NOT NULL)
                    RETURNING true
                    """,
                    attempt.attempt_id,
                    attempt.fence,
                    worker,
                    lease,
                    resolve_after,
                    render_limit,
                    body_sha256,
                    cost_micros,
                    fingerprint,
                    key_good_for,
                )
            )
        except asyncpg.UniqueViolationError:
            return False

    async def adopt(self, attempt: rows.Attempt, provider_job_id: str) -> bool:
        """Makes a job that the list shows the attempt's. Fenced; False when either is somebody's already."""
        return bool(
            await self._pool.fetchval(
                """
                INSERT INTO provider_jobs (provider_account, provider_job_id, attempt_id, fence, adopted)
                SELECT provider_account, $3, attempt_id, fence, true FROM attempts
                WHERE attempt_id = $1 AND fence = $2 AND state IN ('UNKNOWN', 'UNRESOLVED')
                FOR UPDATE
                ON CONFLICT (provider_account, provider_job_id) DO NOTHING RETURNING true
                """,
                attempt.attempt_id,
                attempt.fence,
                provider_job_id,
            )
        )

    async def add_job(
        self, attempt_id: str, provider_account: str, provider_job_id: str, fence: int
    ) -> None:
        """Records what a provider accepted; never fenced. Idempotent."""
        await self._pool.execute(
            """
            INSERT INTO provider_jobs (provider_account, provider_job_id, attempt_id, fence)
            VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING
            """,
            provider_account,
            provider_job_id,
            attempt_id,
            fence,
        )

    async def accepted(self, attempt: rows.Attempt, provider_job_id: str) -> bool:
        """The provider has it, and its job is on record as this attempt's: RENDERING. Fenced."""
        return bool(
            await self._pool.fetchval(
                """
                UPDATE attempts SET state = 'RENDERING', provider_job_id = $3, worker = NULL,
                    lease_until = NULL, next_step_at = clock_timestamp(), message = ''
                WHERE attempt_id = $1 AND fence = $2 AND state IN ('SUBMITTING', 'UNKNOWN', 'UNRESOLVED')
                  AND EXISTS (SELECT 1 FROM provider_jobs j WHERE j.provider_account = attempts.provider_account
                              AND j.provider_job_id = $3 AND j.attempt_id = $1)
                RETURNING true
                """,
                attempt.attempt_id,
                attempt.fence,
                provider_job_id,
            )
        )

    async def unknown(self, attempt: rows.Attempt, message: str) -> bool:
        """The sender itself does not know, and will not send any more."""
        return bool(
            await self._pool.fetchval(
                """
                UPDATE attempts SET state = 'UNKNOWN', worker = NULL, lease_until = NULL, message = $3,
                    next_step_at = clock_timestamp()
                WHERE attempt_id = $1 AND fence = $2 AND state = 'SUBMITTING' RETURNING true
                """,
                attempt.attempt_id,
                attempt.fence,
                message,
            )
        )

    async def unsent(self, attempt: rows.Attempt, worker: int, submission: int) -> bool:
        """The one process that was allowed to send says, however late, that it has not: back to QUEUED.

        Safe without the fence: the same submission of the same worker, and nobody else could have sent it.
        """
        return bool(
            await self._pool.fetchval(
                """
                UPDATE attempts SET state = 'QUEUED', worker = NULL, lease_until = NULL, fence = fence + 1,
                    next_step_at = clock_timestamp(), message = 'was not sent in time'
                WHERE attempt_id = $1 AND worker = $2 AND submissions = $3 AND NOT key_pinned
                  AND state IN ('SUBMITTING', 'UNKNOWN', 'UNRESOLVED') AND provider_job_id IS NULL
                RETURNING true
                """,
                attempt.attempt_id,
                worker,
                submission,
            )
        )

    async def sender_done(self, attempt: rows.Attempt, worker: int, submission: int) -> None:
        """The sender's task broke off: it will not send any more, though its process lives and holds its lock."""
        await self._pool.execute(
            """
            UPDATE attempts SET worker = NULL
            WHERE attempt_id = $1 AND worker = $2 AND submissions = $3
            """,
            attempt.attempt_id,
            worker,
            submission,
        )

    async def expire_leases(self) -> tuple[int, int]:
        """Takes attempts from workers whose lease is over: not sent ones back to QUEUED, perhaps sent ones to UNKNOWN.

        Answers how many of each. An attempt whose provider job is on record goes on to RENDERING with it.
        """
        unsent = await self._pool.execute(
            """
            UPDATE attempts SET state = 'QUEUED', fence = fence + 1, lease_until = NULL,
                next_step_at = clock_timestamp(), message = 'its worker went away before sending'
            WHERE state = 'PREPARING' AND lease_until <= clock_timestamp()
            """
        )
        await self._pool.execute(
            """
            UPDATE attempts a SET state = 'RENDERING', fence = a.fence + 1, lease_until = NULL, worker = NULL,
                provider_job_id = j.provider_job_id, provider_account = j.provider_account,
                next_step_at = clock_timestamp()
            FROM provider_jobs j
            WHERE j.attempt_id = a.attempt_id AND a.provider_job_id IS NULL AND a.submitted_at IS NOT NULL
              AND (a.state IN ('QUEUED', 'UNKNOWN', 'UNRESOLVED')
                   OR (a.state = 'SUBMITTING' AND a.lease_until <= clock_timestamp()))
            """
        )
        sent = await self._pool.execute(
            """
            UPDATE attempts SET state = 'UNKNOWN', fence = fence + 1, lease_until = NULL,
                next_step_at = clock_timestamp(), message = 'its worker went away while sending'
            WHERE state = 'SUBMITTING' AND lease_until <= clock_timestamp()
            """
        )
        return int(unsent.split()[-1]), int(sent.split()[-1])

    async def undecided(self, lease: timedelta, limit: int) -> list[rows.Attempt]:
        """Claims undecided attempts that are due, for one pass over them."""
        found = await self._pool.fetch(
            f"""
            WITH due AS (
                SELECT attempt_id FROM attempts
                WHERE state IN ('UNKNOWN', 'UNRESOLVED') AND provider_job_id IS NULL
                  AND next_step_at <= clock_timestamp()
                ORDER BY next_step_at LIMIT $2 FOR UPDATE SKIP LOCKED
            ), claimed AS (
                UPDATE attempts a SET fence = a.fence + 1, next_step_at = clock_timestamp() + $1
                FROM due WHERE a.attempt_id = due.attempt_id RETURNING a.*
            )
            SELECT {rows.ATTEMPT_COLUMNS} FROM claimed a JOIN videos v USING (video_id)
            """,
            lease,
            limit,
        )
        return [rows.attempt(row) for row in found]

    async def senders_gone(self, attempts: Sequence[rows.Attempt]) -> tuple[datetime, set[str]]:
        """The moment, and those attempts whose senders cannot send any more. Read *before* the provider's list."""
        async with self._pool.acquire() as connection, connection.transaction():
            gone = {
                attempt.attempt_id
                for attempt in attempts
                if attempt.worker is None
                or await connection.fetchval(
                    "SELECT pg_try_advisory_xact_lock_shared($1)", attempt.worker
                )
            }
            return await connection.fetchval("SELECT clock_timestamp()"), gone

    async def surroundings(self, attempt: rows.Attempt, job_ids: Sequence[str]) -> Surroundings:
        """Claimants, and those of the jobs that are somebody's already."""
        async with self._pool.acquire() as connection:
            claimants = await connection.fetchval(
                """
                SELECT (SELECT count(*) FROM attempts
                        WHERE provider_account = $1 AND fingerprint = $2 AND provider_job_id IS NULL
                          AND (state IN ('SUBMITTING', 'UNKNOWN', 'UNRESOLVED')
                               -- Ended before a restore: its job is somewhere in the list, too.
                               OR (state = 'FAILED' AND sent_until IS NOT NULL)))
                     + (SELECT count(*) FROM late_renders l JOIN attempts a USING (attempt_id)
                        WHERE l.provider_account = $1 AND l.provider_job_id IS NULL AND l.state = 'LOOKING'
                          AND a.fingerprint = $2)
                """,
                attempt.provider_account,
                attempt.fingerprint,
            )
            known = await connection.fetch(
                """
                SELECT provider_job_id FROM provider_jobs
                WHERE provider_account = $1 AND provider_job_id = ANY($2::text[])
                """,
                attempt.provider_account,
                job_ids,
            )
        return Surroundings(claimants, frozenset(row["provider_job_id"] for row in known))

    async def suspect_next(self, attempt: rows.Attempt, fingerprint: str) -> None:
        """It is proved that one account does not have it: the next one that may is looked at."""
        await self._pool.execute(
            """
            UPDATE attempts SET state = 'UNRESOLVED', provider_account = suspects[1], suspects = suspects[2:],
                fingerprint = $3, absent_since = NULL, next_step_at = clock_timestamp()
            WHERE attempt_id = $1 AND fence = $2 AND state IN ('UNKNOWN', 'UNRESOLVED')
            """,
            attempt.attempt_id,
            attempt.fence,
            fingerprint,
        )

    async def wait(
        self, attempt: rows.Attempt, delay: timedelta, *, absent: bool, unresolved: bool
    ) -> None:
        """Looks again later; says `unresolved` once the ordinary time is over.

        Keeps since when absence was proved, pass after pass: one that does not prove it begins anew.
        """
        await self._pool.execute(
            """
            UPDATE attempts SET next_step_at = clock_timestamp() + $3,
                absent_since = CASE WHEN $4 THEN coalesce(absent_since, clock_timestamp()) END,
                state = CASE WHEN $5 THEN 'UNRESOLVED' ELSE state END
            WHERE attempt_id = $1 AND fence = $2 AND state IN ('UNKNOWN', 'UNRESOLVED')
            """,
            attempt.attempt_id,
            attempt.fence,
            delay,
            absent,
            unresolved,
        )
