"""Counts for operators. Reads only, each by a partial index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kit import postgres

_LIVE = "state NOT IN ('COMPLETED', 'FAILED', 'CANCELLED')"


@dataclass(frozen=True, slots=True)
class Live:
    """Attempts of a state that have not ended."""

    state: str
    count: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class Queue:
    """Those of a pool and lane that wait for their turn."""

    pool: str
    lane: str
    count: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What was counted."""

    attempts: Sequence[Live]
    queues: Sequence[Queue]
    overdue: int
    polls_overdue: int
    late: Mapping[str, int]
    expiry_share: float
    """Of the time for which a provider keeps a finished film: the most that is over of one not stored yet."""


class MeasureStore:
    """Counts."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def read(self) -> Measured:
        """All of it, each as of its own moment."""
        live = await self._pool.fetch(
            f"""
            SELECT state, count(*) AS count, extract(epoch FROM clock_timestamp()
                - min(coalesce(submitted_at, created_at)))::float8 AS oldest_seconds
            FROM attempts WHERE {_LIVE} GROUP BY state
            """
        )
        queues = await self._pool.fetch(
            """
            SELECT pool, lane, count(*) AS count,
                extract(epoch FROM clock_timestamp() - min(created_at))::float8 AS oldest_seconds
            FROM attempts WHERE state = 'QUEUED' GROUP BY pool, lane
            """
        )
        overdue = await self._pool.fetchval(
            f"""
            SELECT count(*) FROM attempts WHERE {_LIVE} AND state NOT IN ('QUEUED', 'RENDERING')
              AND next_step_at < clock_timestamp() - interval '10 seconds'
              AND coalesce(lease_until, '-infinity') < clock_timestamp()
            """
        )
        polls_overdue = await self._pool.fetchval(
            """
            SELECT count(*) FROM provider_accounts p
            WHERE next_poll_at < clock_timestamp() - interval '1 minute' AND poll_lease_until < clock_timestamp()
              AND EXISTS (SELECT 1 FROM attempts a WHERE a.provider_account = p.provider_account
                          AND a.state = 'RENDERING' AND a.submitted_at < clock_timestamp() - interval '1 minute')
            """
        )
        late = await self._pool.fetch(
            """
            SELECT state, count(*) AS count FROM late_renders
            WHERE state IN ('LOOKING', 'FETCHING') GROUP BY state
            """
        )
        expiry_share = await self._pool.fetchval(
            """
            SELECT coalesce(max(extract(epoch FROM clock_timestamp() - rendered_at)
                / greatest(extract(epoch FROM content_expires_at - rendered_at), 1)), 0)::float8
            FROM attempts WHERE state = 'FETCHING' AND rendered_at IS NOT NULL
            """
        )
        return Measured(
            [Live(**row) for row in live],
            [Queue(**row) for row in queues],
            overdue,
            polls_overdue,
            {row["state"]: row["count"] for row in late},
            expiry_share,
        )
