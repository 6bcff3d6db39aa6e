"""The queue: whose turn it is, and at which provider account."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import job_pb2
from kit import postgres
from kit.failpoints import failpoint
from services.generator import catalogue, events, standings
from services.generator.store import accounts as account_rows
from services.generator.store import rows, telling

_DISPATCH_LOCK = 0x64697370
_TWINS_LOOKED_AT = 200
"""So many of an account's oldest are looked at for one that has no undecided twin."""


class QueueStore:
    """Turns."""

    def __init__(self, pool: postgres.Pool, told: Callable[[], None]) -> None:
        self._pool = pool
        self._told = told

    async def pick(
        self,
        pool: str,
        accounts: Mapping[str, catalogue.ProviderAccount],
        most_preparing: Mapping[str, int],
        lane_weights: Mapping[str, float],
        lease: timedelta,
    ) -> rows.Attempt | None:
        """Gives the next attempt of a pool its turn and moves it to PREPARING at an account that can take it.

        Fair: the lane with the smallest weighted virtual time, in it the account with the smallest, its oldest attempt
        that has an open provider account where no twin of it is undecided. `accounts`: the pool's provider accounts,
        with how many of each may be in preparation. One dispatcher of a pool at a time; None when there is nothing to
        do or another one is at it.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval(
                "SELECT pg_try_advisory_xact_lock($1, hashtext($2))", _DISPATCH_LOCK, pool
            ) or not await connection.fetchval(
                "SELECT EXISTS (SELECT 1 FROM attempts WHERE pool = $1 AND state = 'QUEUED')", pool
            ):
                return None
            # Inside the lock: what another dispatcher has just given away is counted.
            standing, now = await account_rows.read(connection, accounts)
            by_name = {item.provider_account: item for item in standing}
            able = standings.able(standing, accounts, most_preparing, now)
            while able:
                chosen = await self._next_turn(connection, pool, lane_weights, able)
                if chosen is None:
                    return None
                attempt_id, video_id, lane, name, spec = chosen
                cost_micros = standings.price(accounts[name], spec)
                if standings.why_closed(by_name[name], accounts[name], cost_micros):
                    # It is its turn, and there is no money for it: nobody dearer or cheaper goes before it there.
                    able = [item for item in able if item[1] != name]
                    continue
                attempt = await self._give(
                    connection, attempt_id, video_id, name, cost_micros, lease
                )
                if attempt is None:  # cancelled between the two statements
                    return None
                await self._advance(connection, attempt, lane, lane_weights)
                await failpoint("generator.pick.before_commit")
                break
            else:
                return None
        self._told()
        await failpoint("generator.pick.after_commit")
        return attempt

    async def _give(
        self,
        connection: postgres.Connection,
        attempt_id: str,
        video_id: str,
        provider_account: str,
        cost_micros: int,
        lease: timedelta,
    ) -> rows.Attempt | None:
        """PREPARING at that account, with its price, so that caps count it from here."""
        video = await telling.lock(connection, video_id)
        assert video is not None
        row = await connection.fetchrow(
            f"""
            WITH picked AS (
                UPDATE attempts p SET state = 'PREPARING', fence = fence + 1, provider_account = $2,
                    lease_until = clock_timestamp() + $3, cost_micros = $4, queue_position = 0,
                    expected_at = clock_timestamp() + make_interval(secs => (
                        SELECT render_seconds FROM queue_rates q WHERE q.pool = p.pool AND q.model = p.model))
                WHERE attempt_id = $1 AND state = 'QUEUED' RETURNING *)
            SELECT {rows.ATTEMPT_COLUMNS} FROM picked a JOIN videos v USING (video_id)
            """,
            attempt_id,
            provider_account,
            lease,
            cost_micros,
        )
        if row is None:
            return None
        attempt = rows.attempt(row)
        await connection.execute(
            """
            UPDATE queue_counts SET waiting = greatest(0, waiting - 1)
            WHERE pool = $1 AND lane = $2 AND account_id = $3
            """,
            attempt.pool,
            attempt.lane,
            attempt.account_id,
        )
        if video.state == "PENDING":
            await telling.tell(connection, video, events.started(attempt.number, provider_account))
        return attempt

    async def _next_turn(
        self,
        connection: postgres.Connection,
        pool: str,
        lane_weights: Mapping[str, float],
        able: Sequence[tuple[str, str]],
    ) -> tuple[str, str, str, str, vocabulary_pb2.VideoSpec] | None:
        # One probe of the index per waiting account and model that somebody can take, not a sort of the whole queue.
        # Who was away starts where the others have come to (`reached`): nobody saves turns up by being away.
        row = await connection.fetchrow(
            """
            WITH RECURSIVE able AS (
                SELECT * FROM unnest($2::text[], $3::text[]) WITH ORDINALITY AS s(model, provider_account, place)
            ), waiting AS (
                SELECT m.model, f.lane, f.account_id FROM (SELECT DISTINCT model FROM able) m
                CROSS JOIN LATERAL (
                    SELECT lane, account_id FROM attempts a
                    WHERE a.pool = $1 AND a.model = m.model AND a.state = 'QUEUED'
                    ORDER BY lane, account_id LIMIT 1) f
                UNION ALL
                SELECT w.model, n.lane, n.account_id FROM waiting w CROSS JOIN LATERAL (
                    SELECT a.lane, a.account_id FROM attempts a
                    WHERE a.pool = $1 AND a.model = w.model AND a.state = 'QUEUED'
                      AND (a.lane, a.account_id) > (w.lane, w.account_id)
                    ORDER BY a.lane, a.account_id LIMIT 1) n
            )
            SELECT o.attempt_id, o.video_id, w.lane, o.provider_account, v.job
            FROM waiting w
            CROSS JOIN LATERAL (
                SELECT a.attempt_id, a.video_id, a.created_at, r.provider_account
                FROM (SELECT * FROM attempts q
                      WHERE q.pool = $1 AND q.model = w.model AND q.state = 'QUEUED' AND q.lane = w.lane
                        AND q.account_id = w.account_id AND q.next_step_at <= clock_timestamp()
                      ORDER BY q.created_at LIMIT $5) a
                CROSS JOIN LATERAL (
                    SELECT r.provider_account FROM able r
                    WHERE r.model = w.model AND (NOT a.key_pinned OR a.provider_account = r.provider_account)
                      AND NOT EXISTS (SELECT 1 FROM attempts u
                                      WHERE u.provider_account = r.provider_account AND u.fingerprint = a.fingerprint
                                        AND u.state IN ('PREPARING', 'SUBMITTING', 'UNKNOWN'))
                    ORDER BY r.place LIMIT 1) r
                ORDER BY a.created_at LIMIT 1) o
            JOIN videos v ON v.video_id = o.video_id
            LEFT JOIN turns p ON p.pool = $1 AND p.lane = '' AND p.account_id = ''
            LEFT JOIN turns l ON l.pool = $1 AND l.lane = w.lane AND l.account_id = ''
            LEFT JOIN turns t ON t.pool = $1 AND t.lane = w.lane AND t.account_id = w.account_id
            ORDER BY greatest(l.virtual_time, p.reached, 0), array_position($4::text[], w.lane),
                     greatest(t.virtual_time, l.reached, 0), w.account_id, o.created_at
            LIMIT 1
            """,
            pool,
            [model for model, _ in able],
            [name for _, name in able],
            list(lane_weights),
            _TWINS_LOOKED_AT,
        )
        if row is None:
            return None
        spec = job_pb2.Job.FromString(bytes(row["job"])).spec
        return row["attempt_id"], row["video_id"], row["lane"], row["provider_account"], spec

    async def _advance(
        self,
        connection: postgres.Connection,
        attempt: rows.Attempt,
        lane: str,
        lane_weights: Mapping[str, float],
    ) -> None:
        """Moves the lane's and the account's virtual time on by what was served, and with it where all have come to."""
        spec = attempt.job.spec
        cost = float(max(1, spec.seconds) * max(1, spec.variants))
        for among, account_id, weight in (
            ("", "", lane_weights[lane]),
            (lane, attempt.account_id, attempt.weight),
        ):
            await connection.execute(
                """
                WITH start AS (
                    SELECT greatest(
                        (SELECT virtual_time FROM turns WHERE pool = $1 AND lane = $2 AND account_id = $3),
                        (SELECT reached FROM turns WHERE pool = $1 AND lane = $4 AND account_id = ''), 0) AS at),
                others AS (
                    INSERT INTO turns (pool, lane, account_id, reached) SELECT $1, $4, '', at FROM start
                    ON CONFLICT (pool, lane, account_id) DO UPDATE SET reached = EXCLUDED.reached)
                INSERT INTO turns (pool, lane, account_id, virtual_time) SELECT $1, $2, $3, at + $5 FROM start
                ON CONFLICT (pool, lane, account_id) DO UPDATE SET virtual_time = EXCLUDED.virtual_time
                """,
                attempt.pool,
                lane,
                account_id,
                among,
                cost / weight,
            )

    async def are_last(self, attempt: rows.Attempt, requests_per_second: float) -> bool:
        """Whether all that wait in its pool can be sent before this one is rendered, by the measured render time."""
        found = await self._pool.fetchval(
            """
            SELECT (SELECT coalesce(sum(waiting), 0) FROM queue_counts WHERE pool = $1)
                <= $3 * (SELECT render_seconds FROM queue_rates WHERE pool = $1 AND model = $2)
            """,
            attempt.pool,
            attempt.job.spec.model,
            requests_per_second,
        )
        return bool(found)

    async def renew(self, attempt: rows.Attempt, lease: timedelta) -> None:
        """Keeps an attempt that is being prepared; of one that is no longer the caller's nothing changes."""
        await self._pool.execute(
            """
            UPDATE attempts SET lease_until = clock_timestamp() + $3
            WHERE attempt_id = $1 AND fence = $2 AND state = 'PREPARING'
            """,
            attempt.attempt_id,
            attempt.fence,
            lease,
        )

    async def put_back(
        self,
        attempt: rows.Attempt,
        delay: timedelta,
        message: str,
        *,
        key_pinned: bool,
    ) -> bool:
        """Back to QUEUED, unharmed: not sent, or proved absent, or safe to send again under its key.

        An attempt that is pinned to its key stays so: what became of the earlier send is not known by this one.
        """
        async with self._pool.acquire() as connection:
            return bool(
                await connection.fetchval(
                    """
                    UPDATE attempts SET state = 'QUEUED', lease_until = NULL, worker = NULL, message = $3,
                        next_step_at = clock_timestamp() + $4, absent_since = NULL, key_pinned = $5,
                        cost_micros = CASE WHEN $5 THEN cost_micros END
                    WHERE attempt_id = $1 AND fence = $2
                      AND state IN ('PREPARING', 'SUBMITTING', 'UNKNOWN', 'UNRESOLVED')
                    RETURNING true
                    """,
                    attempt.attempt_id,
                    attempt.fence,
                    message,
                    delay,
                    key_pinned,
                )
            )

    async def settle_in(self, pool_of_model: Mapping[str, str]) -> None:
        """Moves what is under way into the pools that the catalogue has now. Idempotent."""
        unnamed = await self._pool.fetch(
            """
            SELECT a.attempt_id, v.job FROM attempts a JOIN videos v USING (video_id)
            WHERE a.model = '' AND a.state NOT IN ('COMPLETED', 'FAILED', 'CANCELLED')
            """
        )
        await self._pool.executemany(
            "UPDATE attempts SET model = $2 WHERE attempt_id = $1",
            [
                (row["attempt_id"], job_pb2.Job.FromString(bytes(row["job"])).spec.model)
                for row in unnamed
            ],
        )
        await self._pool.executemany(
            """
            UPDATE attempts SET pool = $2
            WHERE model = $1 AND pool <> $2 AND state NOT IN ('COMPLETED', 'FAILED', 'CANCELLED')
            """,
            list(pool_of_model.items()),
        )

    async def outlived(self, ends: Mapping[str, datetime], limit: int) -> list[rows.Attempt]:
        """Queued attempts whose model nobody can finish any more. `ends`: by model, the last moment to send."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM}
            JOIN unnest($1::text[], $2::timestamptz[]) AS e(model, at) ON e.model = a.model
            WHERE a.state = 'QUEUED' AND e.at <= clock_timestamp() AND NOT a.key_pinned LIMIT $3
            """,
            list(ends),
            list(ends.values()),
            limit,
        )
        return [rows.attempt(row) for row in found]

    async def overdue(self, limit: int) -> list[rows.Attempt]:
        """Queued attempts whose start_by is over."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM}
            WHERE a.state = 'QUEUED' AND a.start_by <= clock_timestamp() AND NOT a.key_pinned
            ORDER BY a.start_by LIMIT $1
            """,
            limit,
        )
        return [rows.attempt(row) for row in found]
