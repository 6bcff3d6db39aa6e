"""Renders: a render in flight is a row with `next_step_at`; polls, progress, fetches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from framewire.events.v1 import event_pb2
from kit import postgres
from kit.failpoints import failpoint
from services.generator import attempts, events
from services.generator.store import rows


@dataclass(frozen=True, slots=True)
class Render:
    """An attempt that a provider is rendering, in little: there may be ten thousand of them in one pass."""

    attempt_id: str
    video_id: str
    account_id: str
    number: int
    state: attempts.State
    provider_job_id: str
    submitted_at: datetime
    progress_percent: int
    progress_age_seconds: float | None
    """Since progress was last written; None: never."""
    not_found_count: int
    cancel_requested: bool
    cancel_sent: bool
    """The provider was asked to stop it."""
    expected_at: datetime | None
    ask_after_seconds: float
    """When it may be asked for singly; at or below 0: now."""


class RenderStore:
    """Attempts that the provider has."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def claim_poll(self, provider_account: str, lease: timedelta) -> datetime | None:
        """Takes the account's poll pass, for one replica at a time, when it is due; answers until when it is held."""
        return await self._pool.fetchval(
            """
            UPDATE provider_accounts SET poll_lease_until = clock_timestamp() + $2,
                poll_began_at = clock_timestamp()
            WHERE provider_account = $1 AND poll_lease_until <= clock_timestamp()
              AND next_poll_at <= clock_timestamp() RETURNING poll_lease_until
            """,
            provider_account,
            lease,
        )

    async def renew_poll(
        self, provider_account: str, held_until: datetime, lease: timedelta
    ) -> datetime | None:
        """Keeps a long pass; None when another replica has it meanwhile."""
        return await self._pool.fetchval(
            """
            UPDATE provider_accounts SET poll_lease_until = clock_timestamp() + $3
            WHERE provider_account = $1 AND poll_lease_until = $2 RETURNING poll_lease_until
            """,
            provider_account,
            held_until,
            lease,
        )

    async def end_poll(
        self,
        provider_account: str,
        held_until: datetime,
        interval: timedelta,
        with_webhooks: timedelta,
    ) -> float | None:
        """Gives the pass back; the next one is due an interval after it began, or at once where a hint came meanwhile.

        `with_webhooks` is the interval while webhooks come; they have ceased when there was none for two of it. A
        provider may hint before it shows the end: soon after a hint the interval is the usual one. Answers in how many
        seconds that is; None, and nothing is done, when another replica has the pass.
        """
        return await self._pool.fetchval(
            """
            UPDATE provider_accounts SET poll_lease_until = '-infinity',
                next_poll_at = CASE WHEN hinted_at >= poll_began_at THEN clock_timestamp()
                    ELSE greatest(clock_timestamp(), poll_began_at + CASE
                        WHEN hinted_at >= poll_began_at - $3::interval THEN $3
                        WHEN webhook_heard_at > clock_timestamp() - 2 * $4::interval THEN greatest($3, $4)
                        ELSE $3 END) END
            WHERE provider_account = $1 AND poll_lease_until = $2
            RETURNING extract(epoch FROM next_poll_at - clock_timestamp())::float8
            """,
            provider_account,
            held_until,
            interval,
            with_webhooks,
        )

    async def in_flight(self, provider_account: str, interval: timedelta) -> list[Render]:
        """Attempts that the account is rendering, oldest first; none is asked for singly within an interval."""
        found = await self._pool.fetch(
            """
            SELECT a.attempt_id, a.video_id, a.account_id, a.number, a.state, a.provider_job_id, a.submitted_at,
                a.progress_percent, a.not_found_count, v.cancel_requested, a.expected_at,
                a.cancel_sent_at IS NOT NULL AS cancel_sent,
                extract(epoch FROM clock_timestamp() - a.progress_at)::float8 AS progress_age_seconds,
                extract(epoch FROM greatest(a.next_step_at, a.submitted_at + $2) - clock_timestamp())::float8
                    AS ask_after_seconds
            FROM attempts a JOIN videos v USING (video_id)
            WHERE a.provider_account = $1 AND a.state IN ('RENDERING', 'UNRESOLVED')
              AND a.provider_job_id IS NOT NULL
            ORDER BY a.submitted_at
            """,
            provider_account,
            interval,
        )
        return [Render(**{**row, "state": attempts.State(row["state"])}) for row in found]

    async def sent_since(self, provider_account: str, moments: Sequence[datetime]) -> list[int]:
        """By moment, how many attempts were sent to the account from then on: so many jobs a list shows back to it."""
        return await self._pool.fetchval(
            """
            SELECT array_agg(n ORDER BY place) FROM unnest($2::timestamptz[]) WITH ORDINALITY AS m(at, place)
            CROSS JOIN LATERAL (SELECT count(*)::int AS n FROM attempts
                                WHERE provider_account = $1 AND submitted_at >= m.at) c
            """,
            provider_account,
            moments,
        )

    async def load(self, attempt_id: str) -> rows.Attempt:
        """The whole of it."""
        row = await self._pool.fetchrow(
            f"SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM} WHERE a.attempt_id = $1",
            attempt_id,
        )
        assert row is not None
        return rows.attempt(row)

    async def begin_cancel(self, render: Render) -> bool:
        """Notes that the provider is to be asked to stop it; false: its owner does not want that, or it is over."""
        noted = await self._pool.fetchval(
            """
            UPDATE attempts a SET cancel_sent_at = coalesce(a.cancel_sent_at, clock_timestamp()) FROM videos v
            WHERE a.attempt_id = $1 AND a.state = 'RENDERING'
              AND v.video_id = a.video_id AND v.cancel_requested
            RETURNING true
            """,
            render.attempt_id,
        )
        return bool(noted)

    async def asked(self, attempt_id: str, delay: timedelta) -> None:
        """It was asked for singly; not again before the delay is over."""
        await self._pool.execute(
            """
            UPDATE attempts SET next_step_at = clock_timestamp() + $2
            WHERE attempt_id = $1 AND state IN ('RENDERING', 'UNRESOLVED')
            """,
            attempt_id,
            delay,
        )

    async def progress(self, seen: Sequence[tuple[Render, int]]) -> list[event_pb2.Progress]:
        """Writes the progress of many at once; answers what is to be told of those where it counted.

        One that another writer has at this moment is passed over: progress waits for nobody, and comes again.
        """
        found = await self._pool.fetch(
            """
            WITH seen AS (
                SELECT a.attempt_id, s.percent
                FROM unnest($1::text[], $2::int[]) AS s(attempt_id, percent) JOIN attempts a USING (attempt_id)
                WHERE a.state IN ('RENDERING', 'UNRESOLVED') AND a.progress_percent <= s.percent
                FOR UPDATE OF a SKIP LOCKED)
            UPDATE attempts a SET progress_percent = seen.percent, progress_at = clock_timestamp(),
                not_found_count = 0, not_found_since = NULL, progress_version = progress_version + 1
            FROM seen WHERE a.attempt_id = seen.attempt_id
            RETURNING a.attempt_id, a.progress_version
            """,
            [render.attempt_id for render, _ in seen],
            [percent for _, percent in seen],
        )
        versions = {row["attempt_id"]: row["progress_version"] for row in found}
        return [
            self._progress(render, render.state, percent, versions[render.attempt_id])
            for render, percent in seen
            if render.attempt_id in versions
        ]

    async def stage(
        self, attempt: rows.Attempt | Render, state: attempts.State
    ) -> event_pb2.Progress:
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
        self, attempt: rows.Attempt | Render, state: attempts.State, percent: int, version: int
    ) -> event_pb2.Progress:
        stage = "CANCELLING" if attempt.cancel_requested else attempts.STAGES[state]
        return event_pb2.Progress(
            video_id=attempt.video_id,
            account_id=attempt.account_id,
            version=events.progress_version(attempt.number, version),
            stage=events.stage(stage),
            progress_percent=percent,
            expected_at=events.timestamp(attempt.expected_at) if attempt.expected_at else None,
        )

    async def finished(self, attempt: rows.Attempt | Render, content_expires_at: datetime) -> bool:
        """The provider has finished it: FETCHING."""
        moved = await self._pool.fetchval(
            """
            UPDATE attempts SET state = 'FETCHING', fence = fence + 1, progress_percent = 100,
                content_expires_at = $2, next_step_at = clock_timestamp(), lease_until = NULL,
                rendered_at = clock_timestamp(),
                not_found_count = 0, not_found_since = NULL
            WHERE attempt_id = $1 AND state IN ('RENDERING', 'UNRESOLVED') AND provider_job_id IS NOT NULL
            RETURNING true
            """,
            attempt.attempt_id,
            content_expires_at,
        )
        await failpoint("generator.poll.after_finished")
        return bool(moved)

    async def not_found(self, attempt: rows.Attempt | Render) -> tuple[int, float]:
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
