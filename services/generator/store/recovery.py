"""What a restored database forgot, made good: attempts are doubted, forgotten videos made again, ends taken over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from framewire.events.v1 import event_pb2
from framewire.generator.v1 import job_pb2
from kit import postgres
from services.generator import attempts, events
from services.generator.store import rows, telling

_MARGIN = timedelta(minutes=1)
"""Between the gateway's database clock and ours, generously."""
_LIVE = "('COMPLETED', 'FAILED', 'CANCELLED')"


@dataclass(frozen=True, slots=True)
class Window:
    """What was forgotten lies in here, by this database's clock."""

    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Where an attempt may have been sent, the best account to look at first, and what that means there."""

    accounts: tuple[str, ...]
    fingerprint: str
    cost_micros: int
    resolve_after: timedelta
    render_limit: timedelta


@dataclass(frozen=True, slots=True)
class Known:
    """A video as the gateway knows it."""

    job: job_pb2.Job
    state: str
    last_event: event_pb2.Event
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Ended:
    """A video that ended, whose attempt has no job on record."""

    attempt: rows.Attempt


Done = tuple[str, str, str]
"""(video_id, action, detail)."""
Suspect = Callable[[job_pb2.Job, str, str | None], Suspicion | None]


class _DryRun(Exception):
    """Rolls back what was only to be seen."""


class RecoveryStore:
    """Statements of a recovery. None of them can lead to a second send without proof."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def window(self) -> Window | None:
        """What was forgotten; None: there is nothing to recover from."""
        row = await self._pool.fetchrow(
            "SELECT advanced_at, recovery_since FROM incarnation WHERE recovery_since IS NOT NULL"
        )
        return Window(row["advanced_at"], row["recovery_since"]) if row else None

    async def take(
        self, known: Known, window: Window, suspicion: Suspicion | None, pool: str, *, dry_run: bool
    ) -> Done:
        """One video that the gateway knows. Idempotent."""
        done: Done = (known.job.video_id, "NONE", "")

        async def work(connection: postgres.Connection) -> None:
            nonlocal done
            done = await _take(connection, known, window, suspicion, pool)

        await self._within(work, dry_run=dry_run)
        return done

    async def _within(
        self, work: Callable[[postgres.Connection], Awaitable[None]], *, dry_run: bool
    ) -> None:
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                await work(connection)
                if dry_run:
                    raise _DryRun
        except _DryRun:
            pass

    async def doubt_rest(self, window: Window, suspect: Suspect, *, dry_run: bool) -> list[Done]:
        """Doubts every live attempt that is not doubted yet."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM}
            WHERE a.state NOT IN {_LIVE} AND a.sent_until IS DISTINCT FROM $1
            """,
            window.until,
        )
        done: list[Done] = []
        for attempt in map(rows.attempt, found):
            suspicion = suspect(attempt.job, attempt.pool, attempt.provider_account)

            async def work(
                connection: postgres.Connection,
                attempt: rows.Attempt = attempt,
                suspicion: Suspicion | None = suspicion,
            ) -> None:
                if await telling.lock(connection, attempt.video_id) is not None:
                    done.append(await _doubt_video(connection, attempt.video_id, window, suspicion))

            await self._within(work, dry_run=dry_run)
        return done

    async def ended_without_job(self, window: Window) -> list[rows.Attempt]:
        """Attempts that a recovery ended, and of which no job is on record."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM}
            WHERE a.state = 'FAILED' AND a.sent_until = $1 AND NOT EXISTS (
                SELECT 1 FROM provider_jobs j WHERE j.attempt_id = a.attempt_id)
            """,
            window.until,
        )
        return [rows.attempt(row) for row in found]

    async def unowned(self, provider_account: str, job_ids: Sequence[str]) -> set[str]:
        """Those of the jobs that no attempt has."""
        found = await self._pool.fetch(
            """
            SELECT id FROM unnest($2::text[]) AS t(id) WHERE NOT EXISTS (
                SELECT 1 FROM provider_jobs j WHERE j.provider_account = $1 AND j.provider_job_id = id)
            """,
            provider_account,
            list(job_ids),
        )
        return {row["id"] for row in found}

    async def lookalikes(self, fingerprint: str, window: Window) -> int:
        """Attempts of which one such job might be."""
        return await self._pool.fetchval(
            "SELECT count(*) FROM attempts WHERE fingerprint = $1 AND sent_until = $2",
            fingerprint,
            window.until,
        )

    async def book(self, attempt: rows.Attempt, provider_account: str, job_id: str) -> bool:
        """Puts a paid job of an ended video on record. False: it is another's."""
        return bool(
            await self._pool.fetchval(
                """
                INSERT INTO provider_jobs (provider_account, provider_job_id, attempt_id, fence, adopted)
                VALUES ($1, $2, $3, $4, true) ON CONFLICT DO NOTHING RETURNING true
                """,
                provider_account,
                job_id,
                attempt.attempt_id,
                attempt.fence,
            )
        )


async def doubt_further(connection: postgres.Connection, before: str, further: str) -> None:
    """The attempt after a doubted one may have been sent as well, at the same accounts."""
    await connection.execute(
        """
        UPDATE attempts a SET state = 'UNRESOLVED', submissions = 1, submitted_at = b.submitted_at,
            sent_until = b.sent_until, suspects = b.suspects, provider_account = b.provider_account,
            cost_micros = coalesce(b.cost_micros, 0), next_step_at = clock_timestamp(),
            resolve_by = clock_timestamp() + (b.resolve_by - b.submitted_at),
            render_deadline = clock_timestamp() + (b.render_deadline - b.submitted_at)
        FROM attempts b WHERE b.attempt_id = $1 AND a.attempt_id = $2
        """,
        before,
        further,
    )


async def _take(
    connection: postgres.Connection,
    known: Known,
    window: Window,
    suspicion: Suspicion | None,
    pool: str,
) -> Done:
    video_id = known.job.video_id
    ended = known.state in telling.TERMINAL_STATES
    video = await telling.lock(connection, video_id)
    if video is None:
        if known.created_at > window.until + _MARGIN:
            return video_id, "NONE", "its job has not come yet"
        await _make(connection, known, window, suspicion, pool, ended=ended)
        if ended:
            return video_id, "ENDED", f"{known.state}; the generator had forgotten it"
        done = await _doubt_video(connection, video_id, window, suspicion)
        return (video_id, "RECREATED", done[2])
    # What was told before the restore keeps its number: what is told next comes after it.
    await connection.execute(
        """
        UPDATE videos SET seq = greatest(seq, $2),
            state = CASE WHEN state = 'PENDING' AND $3 = 'PROCESSING' THEN $3 ELSE state END
        WHERE video_id = $1
        """,
        video_id,
        known.last_event.seq,
        known.state,
    )
    if video.state in telling.TERMINAL_STATES:
        return video_id, "NONE", ""
    if ended:
        return await _end(connection, known, window)
    return await _doubt_video(connection, video_id, window, suspicion)


async def _make(
    connection: postgres.Connection,
    known: Known,
    window: Window,
    suspicion: Suspicion | None,
    pool: str,
    *,
    ended: bool,
) -> None:
    job, event = known.job, known.last_event
    await connection.execute(
        """
        INSERT INTO videos (video_id, account_id, job, state, seq, last_event, finished_at, created_at)
        VALUES ($1, $2, $3, $4, $5, $6, CASE WHEN $7 THEN clock_timestamp() END, $8)
        """,
        job.video_id,
        job.account_id,
        job.SerializeToString(),
        known.state,
        event.seq,
        event.SerializeToString() if ended else None,
        ended,
        known.created_at,
    )
    await connection.execute(
        """
        INSERT INTO attempts (attempt_id, video_id, number, account_id, pool, lane, weight, state, fingerprint,
                              start_by, model, cause, message, sent_until, submitted_at, cost_known)
        VALUES ($1, $2, 1, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
        """,
        attempts.attempt_id(job.video_id, 1),
        job.video_id,
        job.account_id,
        pool,
        events.lane_name(job.lane),
        max(1, job.weight),
        "FAILED" if ended else "QUEUED",
        suspicion.fingerprint if suspicion else "",
        events.moment(job.start_by),
        job.spec.model,
        "INTERNAL" if ended else None,
        "its end was forgotten by a restore" if ended else "",
        window.until if ended else None,
        window.since if ended else None,
        not ended,
    )


async def _end(connection: postgres.Connection, known: Known, window: Window) -> Done:
    """The gateway was told its end before the restore: that stands, and nothing more is sent or told."""
    video_id = known.job.video_id
    await connection.execute(
        f"""
        UPDATE attempts SET state = 'FAILED', cause = 'INTERNAL', message = 'its end was forgotten by a restore',
            fence = fence + 1, lease_until = NULL, worker = NULL, cost_known = false, sent_until = $2,
            submitted_at = coalesce(submitted_at, $3)
        WHERE video_id = $1 AND state NOT IN {_LIVE}
        """,
        video_id,
        window.until,
        window.since,
    )
    await connection.execute(
        "UPDATE videos SET state = $2, last_event = $3, finished_at = clock_timestamp() WHERE video_id = $1",
        video_id,
        known.state,
        known.last_event.SerializeToString(),
    )
    return video_id, "ENDED", known.state


async def _doubt_video(
    connection: postgres.Connection, video_id: str, window: Window, suspicion: Suspicion | None
) -> Done:
    """Its live attempt may have been sent in the window: UNKNOWN, or UNRESOLVED where a twin is UNKNOWN."""
    if suspicion is None:
        return video_id, "NONE", "no provider account serves its model any more"
    changed = await connection.fetchval(
        f"""
        UPDATE attempts a SET fence = fence + 1, worker = NULL, sent_until = $2, absent_since = NULL,
            lease_until = NULL, next_step_at = clock_timestamp(),
            state = CASE WHEN a.state = 'UNRESOLVED' OR EXISTS (
                SELECT 1 FROM attempts t WHERE t.attempt_id <> a.attempt_id AND t.fingerprint = $5
                AND t.provider_account = $4 AND t.state IN ('SUBMITTING', 'UNKNOWN'))
                THEN 'UNRESOLVED' ELSE 'UNKNOWN' END,
            submitted_at = least(submitted_at, $3), submissions = greatest(submissions, 1),
            provider_account = $4, suspects = $6, fingerprint = $5, cost_micros = coalesce(cost_micros, $7),
            resolve_by = clock_timestamp() + $8, render_deadline = clock_timestamp() + $9,
            message = 'a restore forgot whether it was sent'
        WHERE video_id = $1 AND state NOT IN {_LIVE} AND provider_job_id IS NULL
          AND sent_until IS DISTINCT FROM $2
          AND NOT EXISTS (SELECT 1 FROM provider_jobs j WHERE j.attempt_id = a.attempt_id)
        RETURNING state
        """,
        video_id,
        window.until,
        window.since,
        suspicion.accounts[0],
        suspicion.fingerprint,
        list(suspicion.accounts[1:]),
        suspicion.cost_micros,
        suspicion.resolve_after,
        suspicion.render_limit,
    )
    if changed:
        return video_id, "DOUBTED", ", ".join(suspicion.accounts)
    # A job of it is on record: only whether another try followed it is not known.
    await connection.execute(
        f"UPDATE attempts SET sent_until = $2 WHERE video_id = $1 AND state NOT IN {_LIVE}",
        video_id,
        window.until,
    )
    return video_id, "NONE", ""
