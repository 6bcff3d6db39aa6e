"""The queue: whose turn it is, and the provider accounts' quota, which all replicas share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from kit import postgres
from kit.failpoints import failpoint
from services.generator import events
from services.generator.store import rows, telling

_DISPATCH_LOCK = 0x64697370
_ACCOUNT_STATES = """
    SELECT p.provider_account, NOT p.paused AND p.submits_after <= clock_timestamp() AS open,
        CASE WHEN p.paused THEN 'paused by an operator'
             WHEN p.submits_after > clock_timestamp() THEN p.closed_reason ELSE '' END AS closed_reason,
        (SELECT count(*) FROM attempts a WHERE a.provider_account = p.provider_account
         AND a.state IN ('PREPARING', 'SUBMITTING', 'UNKNOWN', 'UNRESOLVED', 'RENDERING')
         AND (a.state NOT IN ('UNKNOWN', 'UNRESOLVED') OR a.render_deadline > clock_timestamp())
        ) AS jobs_in_flight
    FROM provider_accounts p ORDER BY p.provider_account
"""


@dataclass(frozen=True, slots=True)
class AccountState:
    """A provider account as it stands."""

    provider_account: str
    open: bool
    closed_reason: str
    jobs_in_flight: int


class QueueStore:
    """Turns and quota."""

    def __init__(self, pool: postgres.Pool, told: Callable[[], None]) -> None:
        self._pool = pool
        self._told = told

    async def ensure_accounts(self, names: Sequence[str]) -> None:
        """A row for each provider account of the catalogue. Idempotent."""
        await self._pool.executemany(
            "INSERT INTO provider_accounts (provider_account) VALUES ($1) ON CONFLICT DO NOTHING",
            [(name,) for name in names],
        )

    async def account_states(self) -> list[AccountState]:
        """Every provider account with its circuit and its jobs in flight, counted from rows."""
        found = await self._pool.fetch(_ACCOUNT_STATES)
        return [AccountState(**row) for row in found]

    async def pick(
        self,
        pool: str,
        limits: Mapping[str, int],
        lane_weights: Mapping[str, float],
        lease: timedelta,
    ) -> rows.Attempt | None:
        """Gives the next attempt of a pool its turn and moves it to PREPARING at the account with most room.

        Fair: the lane with the smallest weighted virtual time, in it the account with the smallest, its oldest attempt
        of which no twin is undecided. `limits`: the pool's provider accounts with the most jobs that each may have. One
        dispatcher of a pool at a time; None when there is nothing to do or another one is at it.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval(
                "SELECT pg_try_advisory_xact_lock($1, hashtext($2))", _DISPATCH_LOCK, pool
            ):
                return None
            # Inside the lock: what another dispatcher has just given away is counted.
            states = await connection.fetch(_ACCOUNT_STATES)
            room = {
                row["provider_account"]: limits[row["provider_account"]] - row["jobs_in_flight"]
                for row in states
                if row["open"] and row["provider_account"] in limits
            }
            open_accounts = sorted(
                (name for name in room if room[name] > 0), key=lambda n: -room[n]
            )
            if not open_accounts:
                return None
            chosen = await self._next_turn(connection, pool, lane_weights, open_accounts)
            if chosen is None:
                return None
            attempt_id, video_id, lane, account = chosen
            video = await telling.lock(connection, video_id)
            assert video is not None
            row = await connection.fetchrow(
                f"""
                WITH picked AS (
                    UPDATE attempts SET state = 'PREPARING', fence = fence + 1, provider_account = $2,
                        lease_until = clock_timestamp() + $3
                    WHERE attempt_id = $1 AND state = 'QUEUED' RETURNING *)
                SELECT {rows.ATTEMPT_COLUMNS} FROM picked a JOIN videos v USING (video_id)
                """,
                attempt_id,
                account,
                lease,
            )
            if row is None:  # cancelled between the two statements
                return None
            attempt = rows.attempt(row)
            await self._advance(connection, attempt, lane, lane_weights)
            if video.state == "PENDING":
                await telling.tell(connection, video, events.started(attempt.number, account))
            await failpoint("generator.pick.before_commit")
        self._told()
        await failpoint("generator.pick.after_commit")
        return attempt

    async def _next_turn(
        self,
        connection: postgres.Connection,
        pool: str,
        lane_weights: Mapping[str, float],
        accounts: list[str],
    ) -> tuple[str, str, str, str] | None:
        # One probe of the queue's index per waiting account, not a sort of the whole queue. Who was away starts where
        # the others have come to (`reached`): nobody saves turns up by being away.
        row = await connection.fetchrow(
            """
            WITH RECURSIVE waiting AS (
                (SELECT lane, account_id FROM attempts WHERE pool = $1 AND state = 'QUEUED'
                 ORDER BY lane, account_id LIMIT 1)
                UNION ALL
                SELECT n.lane, n.account_id FROM waiting w CROSS JOIN LATERAL (
                    SELECT a.lane, a.account_id FROM attempts a
                    WHERE a.pool = $1 AND a.state = 'QUEUED' AND (a.lane, a.account_id) > (w.lane, w.account_id)
                    ORDER BY a.lane, a.account_id LIMIT 1) n
            )
            SELECT o.attempt_id, o.video_id, w.lane, o.provider_account
            FROM waiting w
            CROSS JOIN LATERAL (
                SELECT a.attempt_id, a.video_id, r.provider_account
                FROM attempts a
                CROSS JOIN LATERAL (
                    SELECT r.provider_account
                    FROM unnest($2::text[]) WITH ORDINALITY AS r(provider_account, place)
                    WHERE (NOT a.key_pinned OR a.provider_account = r.provider_account)
                      AND NOT EXISTS (SELECT 1 FROM attempts u
                                      WHERE u.provider_account = r.provider_account AND u.fingerprint = a.fingerprint
                                        AND u.state IN ('PREPARING', 'SUBMITTING', 'UNKNOWN'))
                    ORDER BY r.place LIMIT 1) r
                WHERE a.pool = $1 AND a.state = 'QUEUED' AND a.lane = w.lane AND a.account_id = w.account_id
                  AND a.next_step_at <= clock_timestamp()
                ORDER BY a.created_at LIMIT 1) o
            LEFT JOIN turns p ON p.pool = $1 AND p.lane = '' AND p.account_id = ''
            LEFT JOIN turns l ON l.pool = $1 AND l.lane = w.lane AND l.account_id = ''
            LEFT JOIN turns t ON t.pool = $1 AND t.lane = w.lane AND t.account_id = w.account_id
            ORDER BY greatest(l.virtual_time, p.reached, 0), array_position($3::text[], w.lane),
                     greatest(t.virtual_time, l.reached, 0), w.account_id
            LIMIT 1
            """,
            pool,
            accounts,
            list(lane_weights),
        )
        return tuple(row) if row else None

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
                        next_step_at = clock_timestamp() + $4, absent_since = NULL, key_pinned = $5
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

    async def hold_submits(self, provider_account: str, delay: timedelta, reason: str) -> None:
        """Sends nothing more to an account for a while: its own word, or an open circuit. Only ever tightens."""
        await self._pool.execute(
            """
            UPDATE provider_accounts SET closed_reason = $3,
                submits_after = greatest(submits_after, clock_timestamp() + $2)
            WHERE provider_account = $1
            """,
            provider_account,
            delay,
            reason,
        )

    async def take_request(self, provider_account: str, per_minute: float) -> float:
        """Takes one request of the account's quota (GCRA, burst 2). 0 when taken, else the seconds until it can be."""
        interval = timedelta(seconds=60 / per_minute)
        taken = await self._pool.fetchval(
            """
            UPDATE provider_accounts SET requests_tat = greatest(requests_tat, clock_timestamp()) + $2
            WHERE provider_account = $1 AND requests_tat <= clock_timestamp() + $2 RETURNING 0
            """,
            provider_account,
            interval,
        )
        if taken is not None:
            return 0.0
        return await self._pool.fetchval(
            """
            SELECT greatest(0.005, extract(epoch FROM requests_tat - clock_timestamp() - $2))::float8
            FROM provider_accounts WHERE provider_account = $1
            """,
            provider_account,
            interval,
        )

    async def pause(self, provider_account: str, paused: bool) -> bool:
        """Stops or starts an account by hand. False when there is none of that name."""
        return bool(
            await self._pool.fetchval(
                "UPDATE provider_accounts SET paused = $2 WHERE provider_account = $1 RETURNING true",
                provider_account,
                paused,
            )
        )

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
