"""Outputs of finished renders: facts about each, written unfenced, since whoever found them out is right."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from kit import postgres
from services.generator import outputs

_COLUMNS = """
    variant, output_id, state, gone_count, bad_count, bad_sha256, storage_refused, message,
    coalesce(extract(epoch FROM clock_timestamp() - gone_since), 0)::float8 AS gone_seconds,
    coalesce(extract(epoch FROM clock_timestamp() - spooled_at), 0)::float8 AS spooled_seconds
"""
_OPEN = "state IN ('WAITING', 'SPOOLED')"


class OutputStore:
    """What became of each output. One that has ended changes no more, except that STORED is a fact and stands."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def of(self, attempt_id: str) -> list[outputs.Output]:
        """The outputs of an attempt, by variant; none before its first fetch."""
        found = await self._pool.fetch(
            f"SELECT {_COLUMNS} FROM outputs WHERE attempt_id = $1 ORDER BY variant", attempt_id
        )
        return [_output(row) for row in found]

    async def plan(self, attempt_id: str, planned: Sequence[outputs.Output]) -> None:
        """Writes down what is to be fetched. Idempotent."""
        await self._pool.executemany(
            """
            INSERT INTO outputs (attempt_id, variant, output_id, state, message) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (attempt_id, variant) DO UPDATE SET output_id = EXCLUDED.output_id
            WHERE outputs.state IN ('WAITING', 'SPOOLED') AND outputs.output_id <> EXCLUDED.output_id
            """,
            [(attempt_id, o.variant, o.output_id, o.state, o.message) for o in planned],
        )

    async def stored(self, attempt_id: str, variant: int) -> None:
        """Storage has it."""
        await self._pool.execute(
            """
            INSERT INTO outputs (attempt_id, variant, output_id, state) VALUES ($1, $2, '', 'STORED')
            ON CONFLICT (attempt_id, variant)
            DO UPDATE SET state = 'STORED', message = '', updated_at = clock_timestamp()
            """,
            attempt_id,
            variant,
        )

    async def gone(self, attempt_id: str, variant: int, message: str) -> outputs.Output | None:
        """Counts a definite answer that it is not there. None: it has ended."""
        return await self._changed(
            """
            gone_count = gone_count + 1, gone_since = coalesce(gone_since, clock_timestamp()), message = $3
            """,
            attempt_id,
            variant,
            message,
        )

    async def bad(
        self, attempt_id: str, variant: int, sha256: str, message: str
    ) -> outputs.Output | None:
        """Counts a download that was no video; the same bytes twice make it UNUSABLE. None: it has ended."""
        return await self._changed(
            """
            bad_count = bad_count + 1, bad_sha256 = $4, message = $3, gone_count = 0, gone_since = NULL,
            state = CASE WHEN bad_sha256 = $4 THEN 'UNUSABLE' ELSE 'WAITING' END
            """,
            attempt_id,
            variant,
            message,
            sha256,
        )

    async def trouble(
        self, attempt_id: str, variant: int, message: str, *, storage: bool
    ) -> outputs.Output | None:
        """A try that says nothing of the output itself; `storage`: it was ours that refused. None: it has ended."""
        return await self._changed(
            """
            message = $3, storage_refused = storage_refused OR $4,
            gone_count = CASE WHEN $4 THEN gone_count ELSE 0 END,
            gone_since = CASE WHEN $4 THEN gone_since END
            """,
            attempt_id,
            variant,
            message,
            storage,
        )

    async def spooled(self, attempt_id: str, variant: int) -> None:
        """Its bytes are on our own disk."""
        await self._changed(
            "state = 'SPOOLED', spooled_at = clock_timestamp(), message = $3",
            attempt_id,
            variant,
            "kept on our own disk until storage takes it",
        )

    async def end(self, attempt_id: str, output: outputs.Output) -> None:
        """Writes how it ended."""
        await self._changed(
            "state = $4, message = $3", attempt_id, output.variant, output.message, output.state
        )

    async def unneeded(self, kept: Sequence[tuple[str, int]]) -> set[tuple[str, int]]:
        """Those of the (attempt, variant) that nobody waits for any more: ended, or unknown here."""
        needed = await self._pool.fetch(
            f"""
            SELECT k.attempt_id, k.variant FROM unnest($1::text[], $2::int[]) AS k(attempt_id, variant)
            JOIN outputs o USING (attempt_id, variant) WHERE o.{_OPEN}
            """,
            [attempt_id for attempt_id, _ in kept],
            [variant for _, variant in kept],
        )
        return set(kept) - {(row["attempt_id"], row["variant"]) for row in needed}

    async def seconds_until(self, moment: datetime) -> float:
        """From now, by the database's clock."""
        return await self._pool.fetchval(
            "SELECT extract(epoch FROM $1::timestamptz - clock_timestamp())::float8", moment
        )

    async def _changed(
        self, changes: str, attempt_id: str, variant: int, *values: object
    ) -> outputs.Output | None:
        row = await self._pool.fetchrow(
            f"""
            UPDATE outputs SET {changes}, updated_at = clock_timestamp()
            WHERE attempt_id = $1 AND variant = $2 AND {_OPEN} RETURNING {_COLUMNS}
            """,
            attempt_id,
            variant,
            *values,
        )
        return _output(row) if row else None


def _output(row: asyncpg.Record) -> outputs.Output:
    return outputs.Output(**{**dict(row), "state": outputs.State(row["state"])})
