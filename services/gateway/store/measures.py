"""Counts for operators. Reads only, each by a partial index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kit import postgres


@dataclass(frozen=True, slots=True)
class Live:
    """Videos that have not ended, of one state and stage."""

    state: str
    stage: str
    count: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What was counted."""

    live: Sequence[Live]
    unheard_of: int
    undo: int
    admission_paused: bool
    confirmed: Mapping[str, int]


class MeasureStore:
    """Counts."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def read(self) -> Measured:
        """All of it, each as of its own moment."""
        live = await self._pool.fetch(
            """
            SELECT state, stage, count(*) AS count,
                extract(epoch FROM clock_timestamp() - min(created_at))::float8 AS oldest_seconds
            FROM videos WHERE state IN ('ADMITTING', 'PENDING', 'PROCESSING') GROUP BY state, stage
            """
        )
        row = await self._pool.fetchrow(
            """
            SELECT admission_paused,
                (SELECT count(*) FROM videos WHERE state IN ('PENDING', 'PROCESSING') AND accepted_at IS NULL
                    AND created_at < clock_timestamp() - interval '1 minute') AS unheard_of,
                (SELECT count(*) FROM videos WHERE release_due OR unpin_due) AS undo
            FROM settings
            """
        )
        assert row is not None
        kinds = await self._pool.fetch(
            "SELECT kind, count(*) FROM findings WHERE confirmed_at IS NOT NULL GROUP BY kind"
        )
        confirmed = {one["kind"]: one["count"] for one in kinds}
        return Measured([Live(**one) for one in live], confirmed=confirmed, **row)
