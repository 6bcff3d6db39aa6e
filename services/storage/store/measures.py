"""Counts for operators. Reads only, each by a partial index."""

from __future__ import annotations

from dataclasses import dataclass

from kit import postgres


@dataclass(frozen=True, slots=True)
class Measured:
    """What was counted."""

    puts: int
    oldest_put_seconds: float
    deleting: int


class MeasureStore:
    """Counts."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def read(self) -> Measured:
        """All of it."""
        row = await self._pool.fetchrow(
            """
            SELECT count(*) AS puts,
                coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS oldest_put_seconds,
                (SELECT count(*) FROM assets WHERE state = 'DELETING') AS deleting
            FROM puts WHERE swept_at IS NULL
            """
        )
        assert row is not None
        return Measured(**row)
