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
    overdue_seconds: float


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
                (SELECT count(*) FROM assets WHERE state = 'DELETING') AS deleting,
                coalesce((SELECT extract(epoch FROM clock_timestamp() - min(expires_at)) FROM assets
                    WHERE state IN ('READY', 'QUARANTINED') AND expires_at <= clock_timestamp()
                        AND NOT EXISTS (SELECT FROM pins WHERE pins.asset_id = assets.asset_id)
                        AND NOT EXISTS (SELECT FROM pins JOIN assets made USING (asset_id)
                                        WHERE made.source_asset_id = assets.asset_id)), 0)::float8 AS overdue_seconds
            FROM puts WHERE swept_at IS NULL
            """
        )
        assert row is not None
        return Measured(**row)
