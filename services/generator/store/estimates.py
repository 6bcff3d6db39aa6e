"""Where videos stand in the queue, and when they may be done: counted every few seconds, not per question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from framewire.events.v1 import event_pb2, vocabulary_pb2
from kit import postgres
from services.generator import events, turns

_RECENT = 50
"""So many renders make the measured time of a model at an account."""


@dataclass(frozen=True, slots=True)
class Queued:
    """One that waits, with what was last told of it."""

    attempt_id: str
    video_id: str
    number: int
    account_id: str
    model: str
    lane: str
    ahead: int
    """Videos of its own account before it in its lane."""
    queue_position: int
    expected_at: datetime | None
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is to be told of one that waits."""

    queued: Queued
    queue_position: int
    expected_at: datetime | None


class EstimateStore:
    """Counts, measured times, and what was told of them."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def claim(self, pool: str, every: timedelta) -> bool:
        """Whether it is this replica's turn to count the pool. A count that fails is made good by the next."""
        return bool(
            await self._pool.fetchval(
                """
                INSERT INTO queue_counted (pool, counted_at) VALUES ($1, clock_timestamp())
                ON CONFLICT (pool) DO UPDATE SET counted_at = clock_timestamp()
                WHERE queue_counted.counted_at <= clock_timestamp() - $2::interval RETURNING true
                """,
                pool,
                every,
            )
        )

    async def count(self, pool: str) -> tuple[turns.Counts, datetime]:
        """Counts the queue anew, and the moment."""
        async with self._pool.acquire() as connection, connection.transaction():
            found = await connection.fetch(
                """
                SELECT lane, account_id, max(weight) AS weight, count(*)::int AS waiting
                FROM attempts WHERE pool = $1 AND state = 'QUEUED' GROUP BY lane, account_id ORDER BY lane, account_id
                """,
                pool,
            )
            # In the order in which a batch of new ones adds to them, so that neither waits for the other.
            await connection.execute(
                """
                SELECT FROM queue_counts WHERE pool = $1 ORDER BY lane, account_id FOR UPDATE
                """,
                pool,
            )
            await connection.execute("DELETE FROM queue_counts WHERE pool = $1", pool)
            await connection.executemany(
                """
                INSERT INTO queue_counts (pool, lane, account_id, weight, waiting) VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT (pool, lane, account_id) DO UPDATE SET waiting = EXCLUDED.waiting
                """,
                [(pool, r["lane"], r["account_id"], r["weight"], r["waiting"]) for r in found],
            )
            now = await connection.fetchval("SELECT clock_timestamp()")
        return _counts(found), now

    async def render_seconds(self, provider_account: str, model: str) -> float | None:
        """The median time of the newest renders; None: there was none."""
        return await self._pool.fetchval(
            """
            SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM rendered_at - submitted_at))
            FROM (SELECT rendered_at, submitted_at FROM attempts
                  WHERE provider_account = $1 AND model = $2 AND rendered_at IS NOT NULL
                  ORDER BY rendered_at DESC LIMIT $3) newest
            """,
            provider_account,
            model,
            _RECENT,
        )

    async def set_rate(self, pool: str, model: str, rate: turns.Rate) -> None:
        """What the pool is expected to do for a model, for those that come next."""
        await self._pool.execute(
            """
            INSERT INTO queue_rates (pool, model, turns_per_second, render_seconds, free)
            VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (pool, model) DO UPDATE SET turns_per_second = $3, render_seconds = $4, free = $5
            """,
            pool,
            model,
            rate.turns_per_second,
            rate.render_seconds,
            rate.free,
        )

    async def counted(self) -> tuple[dict[str, turns.Counts], dict[tuple[str, str], turns.Rate]]:
        """What was counted last: who waits, by pool, and rates, by pool and model."""
        waiting = await self._pool.fetch(
            "SELECT pool, lane, account_id, weight, waiting FROM queue_counts WHERE waiting > 0"
        )
        rates = await self._pool.fetch(
            "SELECT pool, model, turns_per_second, render_seconds, free FROM queue_rates"
        )
        by_pool: dict[str, list[Any]] = {}
        for row in waiting:
            by_pool.setdefault(row["pool"], []).append(row)
        return {pool: _counts(found) for pool, found in by_pool.items()}, {
            (row["pool"], row["model"]): turns.Rate(
                row["turns_per_second"], row["render_seconds"], row["free"]
            )
            for row in rates
        }

    async def queued(self, pool: str, next_up: int, longest_untold: int) -> list[Queued]:
        """Of those that wait: the next ones, and those of which nothing was told for longest."""
        found = await self._pool.fetch(
            """
            WITH ranked AS MATERIALIZED (
                SELECT attempt_id, estimated_at,
                    row_number() OVER (PARTITION BY lane, account_id ORDER BY created_at) - 1 AS ahead
                FROM attempts WHERE pool = $1 AND state = 'QUEUED'
            ), chosen AS (
                (SELECT attempt_id, ahead FROM ranked ORDER BY ahead LIMIT $2)
                UNION
                (SELECT attempt_id, ahead FROM ranked ORDER BY estimated_at LIMIT $3)
            )
            SELECT a.attempt_id, a.video_id, a.number, a.account_id, a.model, a.lane, c.ahead::int AS ahead,
                a.queue_position, a.expected_at, v.cancel_requested
            FROM chosen c JOIN attempts a USING (attempt_id) JOIN videos v USING (video_id)
            """,
            pool,
            next_up,
            longest_untold,
        )
        return [Queued(**row) for row in found]

    async def write(self, estimates: Sequence[Estimate]) -> list[event_pb2.Progress]:
        """Writes them; answers what is to be told of those that still wait."""
        found = await self._pool.fetch(
            """
            UPDATE attempts a SET queue_position = e.place, expected_at = e.at, estimated_at = clock_timestamp(),
                progress_version = progress_version + 1
            FROM unnest($1::text[], $2::int[], $3::timestamptz[]) AS e(attempt_id, place, at)
            WHERE a.attempt_id = e.attempt_id AND a.state = 'QUEUED'
            RETURNING a.attempt_id, a.progress_version
            """,
            [estimate.queued.attempt_id for estimate in estimates],
            [estimate.queue_position for estimate in estimates],
            [estimate.expected_at for estimate in estimates],
        )
        versions = {row["attempt_id"]: row["progress_version"] for row in found}
        return [
            _progress(estimate, versions[estimate.queued.attempt_id])
            for estimate in estimates
            if estimate.queued.attempt_id in versions
        ]


def _progress(estimate: Estimate, version: int) -> event_pb2.Progress:
    queued = estimate.queued
    return event_pb2.Progress(
        video_id=queued.video_id,
        account_id=queued.account_id,
        version=events.progress_version(queued.number, version),
        stage=vocabulary_pb2.VIDEO_STAGE_CANCELLING
        if queued.cancel_requested
        else vocabulary_pb2.VIDEO_STAGE_QUEUED,
        queue_position=estimate.queue_position,
        expected_at=events.timestamp(estimate.expected_at) if estimate.expected_at else None,
    )


JOINED = """
    counted AS (
        INSERT INTO queue_counts (pool, lane, account_id, weight, waiting) SELECT $5, $6, $2, $7, 1 FROM new
        ON CONFLICT (pool, lane, account_id) DO UPDATE SET waiting = queue_counts.waiting + 1
        RETURNING weight, waiting - 1 AS ahead
    )
    SELECT $1::text AS video_id, ahead, weight, clock_timestamp() AS now, turns_per_second, render_seconds, free,
        ARRAY(SELECT (lane, account_id, weight, waiting) FROM queue_counts WHERE pool = $5) AS counts
    FROM counted LEFT JOIN queue_rates ON pool = $5 AND model = $8
"""
"""One more waits, where `new` has a row. $1 is the video, $2 its account, $5 the pool, $6 the lane, $7 the weight, $8
the model."""


def foreseen(joined: Any, lane: str, account_id: str) -> tuple[int, datetime | None]:
    """By a row of JOINED: its place in its lane, and when it is expected to be done."""
    counts: dict[str, dict[str, turns.Waiting]] = {}
    for counted_lane, counted_account, weight, waiting in joined["counts"]:
        counts.setdefault(counted_lane, {})[counted_account] = turns.Waiting(waiting, weight)
    counts.setdefault(lane, {})[account_id] = turns.Waiting(joined["ahead"] + 1, joined["weight"])
    rate = None
    if joined["free"] is not None:
        rate = turns.Rate(joined["turns_per_second"], joined["render_seconds"], joined["free"])
    place, seconds = turns.estimate(joined["ahead"], lane, account_id, counts, rate)
    expected = joined["now"] + timedelta(seconds=seconds) if seconds is not None else None
    return place, expected


def _counts(found: Sequence[Any]) -> turns.Counts:
    counts: dict[str, dict[str, turns.Waiting]] = {}
    for row in found:
        waiting = turns.Waiting(row["waiting"], row["weight"])
        counts.setdefault(row["lane"], {})[row["account_id"]] = waiting
    return counts
