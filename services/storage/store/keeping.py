"""How long assets are kept, what is used, and what the scrub finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from kit import outbox, postgres
from services.storage import assets, telling
from services.storage.store import rows


@dataclass(frozen=True, slots=True)
class Used:
    """What an account has of a kind."""

    kind: assets.Kind
    count: int
    size_bytes: int


class KeepingStore:
    """Statements of retention, usage and scrub."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def of_video(self, asset_id: str, video_id: str) -> None:
        """Notes which video an output, with its poster and renditions, belongs to."""
        await self._pool.execute(
            """
            UPDATE assets SET video_id = $2
            WHERE (asset_id = $1 OR source_asset_id = $1) AND video_id = ''
            """,
            asset_id,
            video_id,
        )

    async def expire(self, limit: int) -> int:
        """Hides assets whose time is over, with all that was made from them, and tells of each. Pinned ones stay."""
        async with self._pool.acquire() as connection, connection.transaction():
            due = await connection.fetch(
                """
                SELECT asset_id FROM assets
                WHERE state IN ('READY', 'QUARANTINED') AND expires_at <= clock_timestamp()
                    AND NOT EXISTS (SELECT FROM pins WHERE pins.asset_id = assets.asset_id)
                    AND NOT EXISTS (SELECT FROM pins JOIN assets made USING (asset_id)
                                    WHERE made.source_asset_id = assets.asset_id)
                ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
                """,
                limit,
            )
            ended = await self._hide(connection, [row["asset_id"] for row in due])
            told = [telling.expired(rows.asset(row), row["video_id"], row["now"]) for row in ended]
            if told:
                await outbox.add_all(connection, [outbox.headed(row) for row in told])
        return len(ended)

    async def extend(self, account_id: str, asset_id: str, keep: timedelta) -> assets.Asset:
        """Keeps a READY asset, and what was made from it, at least so long from now; never shorter. NotFound."""
        async with self._pool.acquire() as connection, connection.transaction():
            found = await connection.fetchrow(
                f"""
                UPDATE assets SET expires_at = greatest(expires_at, clock_timestamp() + $3::interval)
                WHERE asset_id = $1 AND account_id = $2 AND state = 'READY'
                RETURNING {rows.COLUMNS}
                """,
                asset_id,
                account_id,
                keep,
            )
            if found is None:
                raise assets.not_found()
            await connection.execute(
                """
                UPDATE assets SET expires_at = greatest(expires_at, $2)
                WHERE source_asset_id = $1 AND state = 'READY' AND expires_at IS NOT NULL
                """,
                asset_id,
                found["expires_at"],
            )
        return rows.asset(found)

    async def set_retention(self, account_id: str, keep_seconds: Mapping[assets.Kind, int]) -> None:
        """How long the account's assets are kept from now on; those that are there keep their time."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("DELETE FROM retention WHERE account_id = $1", account_id)
            await connection.executemany(
                "INSERT INTO retention (account_id, kind, keep_seconds) VALUES ($1, $2, $3)",
                [(account_id, kind, seconds) for kind, seconds in keep_seconds.items()],
            )

    async def retention(self, account_id: str) -> dict[assets.Kind, int]:
        """The account's own times."""
        found = await self._pool.fetch(
            "SELECT kind, keep_seconds FROM retention WHERE account_id = $1 ORDER BY kind",
            account_id,
        )
        return {assets.Kind(row["kind"]): row["keep_seconds"] for row in found}

    async def used(self, account_id: str | None) -> Sequence[Used]:
        """What lies in S3, by kind: of an account, or of all."""
        found = await self._pool.fetch(
            """
            SELECT kind, count(*) AS count, sum(size_bytes)::bigint AS size_bytes FROM assets
            WHERE object_key IS NOT NULL AND ($1::text IS NULL OR account_id = $1)
            GROUP BY kind ORDER BY kind
            """,
            account_id,
        )
        return [Used(assets.Kind(row["kind"]), row["count"], row["size_bytes"]) for row in found]

    async def erase(self, account_id: str) -> int:
        """Hides everything of an account that no live video needs; says how many are still there."""
        async with self._pool.acquire() as connection, connection.transaction():
            found = await connection.fetch(
                """
                SELECT asset_id FROM assets
                WHERE account_id = $1 AND state IN ('READY', 'QUARANTINED') AND source_asset_id IS NULL
                """,
                account_id,
            )
            await self._hide(connection, [row["asset_id"] for row in found])
            return await connection.fetchval(
                """
                SELECT count(*) FROM assets
                WHERE account_id = $1 AND state IN ('READY', 'QUARANTINED') AND source_asset_id IS NULL
                """,
                account_id,
            )

    async def _hide(
        self, connection: postgres.Connection, asset_ids: Sequence[str]
    ) -> Sequence[asyncpg.Record]:
        """Makes these, and what was made from them, DELETING, but for what is pinned or has pinned parts."""
        # The locks keep a pin, which takes a share of its asset's, from coming in between; then pins are looked for.
        every = await connection.fetch(
            """
            SELECT asset_id, COALESCE(source_asset_id, asset_id) AS root FROM assets
            WHERE (asset_id = ANY($1) OR source_asset_id = ANY($1)) AND state IN ('READY', 'QUARANTINED')
            ORDER BY source_asset_id IS NOT NULL, asset_id FOR UPDATE
            """,
            list(asset_ids),
        )
        pinned = await connection.fetch(
            """
            SELECT DISTINCT COALESCE(source_asset_id, asset_id) AS root FROM assets JOIN pins USING (asset_id)
            WHERE COALESCE(source_asset_id, asset_id) = ANY($1)
            """,
            [row["root"] for row in every],
        )
        kept = {row["root"] for row in pinned}
        return await connection.fetch(
            f"""
            UPDATE assets SET state = 'DELETING' WHERE asset_id = ANY($1)
            RETURNING {rows.COLUMNS}, video_id, clock_timestamp() AS now
            """,
            [row["asset_id"] for row in every if row["root"] not in kept],
        )

    async def to_scrub(self, older: timedelta, limit: int) -> Sequence[assets.Asset]:
        """Claims READY assets whose bytes were not looked at for so long. One replica gets each."""
        found = await self._pool.fetch(
            f"""
            UPDATE assets SET scrubbed_at = clock_timestamp()
            WHERE asset_id IN (
                SELECT asset_id FROM assets
                WHERE state = 'READY' AND COALESCE(scrubbed_at, created_at) <= clock_timestamp() - $1::interval
                ORDER BY COALESCE(scrubbed_at, created_at) LIMIT $2 FOR UPDATE SKIP LOCKED
            ) RETURNING {rows.COLUMNS}
            """,
            older,
            limit,
        )
        return [rows.asset(row) for row in found]

    async def not_scrubbed(self, asset_ids: Sequence[str]) -> None:
        """S3 did not answer: they are the next again."""
        await self._pool.execute(
            "UPDATE assets SET scrubbed_at = '-infinity' WHERE asset_id = ANY($1) AND state = 'READY'",
            list(asset_ids),
        )

    async def damaged(self, asset: assets.Asset, damage: str) -> bool:
        """Takes an asset whose bytes are not what was stored out of sight; false when it changed meanwhile."""
        return bool(
            await self._pool.fetchval(
                """
                UPDATE assets SET state = 'QUARANTINED', damage = $3
                WHERE asset_id = $1 AND object_key = $2 AND state = 'READY' RETURNING true
                """,
                asset.asset_id,
                asset.object_key,
                damage,
            )
        )

    async def unknown(self, keys: Sequence[str]) -> list[str]:
        """Those of the objects that no asset, put or upload knows."""
        found = await self._pool.fetch(
            """
            SELECT key FROM unnest($1::text[]) AS key
            WHERE NOT EXISTS (SELECT FROM assets WHERE object_key = key)
                AND NOT EXISTS (SELECT FROM puts WHERE key = ANY(object_keys))
                AND NOT EXISTS (SELECT FROM uploads WHERE object_key = key)
            """,
            list(keys),
        )
        return [row["key"] for row in found]

    async def clock(self) -> datetime:
        """The database's time."""
        return await self._pool.fetchval("SELECT clock_timestamp()")
