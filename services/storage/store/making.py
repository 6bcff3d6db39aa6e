"""Puts: how assets become READY."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from kit import errors, postgres
from services.storage import assets
from services.storage.store import rows

_BEGIN_TRIES = 5


class MakingStore:
    """What puts write. Whoever locks several rows locks the source first, then the asset, then its put."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def begin(
        self, identity: assets.Identity, nonce: str, source_asset_id: str | None = None
    ) -> assets.Asset:
        """Makes the asset's row where there is none, and notes the put. A READY asset is answered as it is.

        A deleted upload stays deleted: NotFound. A deleted rendition is made anew. What is kept aside stays refused.
        """
        for _ in range(_BEGIN_TRIES):
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(
                    """
                    INSERT INTO assets (asset_id, account_id, owner, kind, variant, source_asset_id, video_id, state)
                    VALUES ($1, $2, $3, $4, $5, $6,
                        COALESCE((SELECT video_id FROM assets WHERE asset_id = $6), ''), 'UPLOADING')
                    ON CONFLICT DO NOTHING
                    """,
                    identity.asset_id,
                    identity.account_id,
                    identity.owner,
                    identity.kind,
                    identity.variant,
                    source_asset_id,
                )
                row = await connection.fetchrow(
                    f"SELECT {rows.COLUMNS} FROM assets WHERE asset_id = $1 FOR UPDATE",
                    identity.asset_id,
                )
                if row is not None:
                    return await self._join(connection, identity, nonce, rows.asset(row))
            # A put that failed took the row away in between.
        raise errors.Aborted("CONFLICT", "puts of this asset keep failing; try again")

    async def _join(
        self,
        connection: postgres.Connection,
        identity: assets.Identity,
        nonce: str,
        asset: assets.Asset,
    ) -> assets.Asset:
        if asset.state is assets.State.READY:
            return asset
        if asset.state is assets.State.DELETED and asset.kind is assets.Kind.RENDITION:
            row = await connection.fetchrow(
                f"""
                UPDATE assets SET state = 'UPLOADING', sha256 = NULL, size_bytes = NULL, source_sha256 = NULL,
                    media_type = NULL, width = NULL, height = NULL, expires_at = NULL
                WHERE asset_id = $1 RETURNING {rows.COLUMNS}
                """,
                asset.asset_id,
            )
            assert row is not None
            asset = rows.asset(row)
        if asset.state is assets.State.QUARANTINED and asset.facts is not None:
            raise assets.kept_aside(asset.facts.sha256, "they are no video")
        if asset.state is not assets.State.UPLOADING:
            raise errors.NotFound(
                "ASSET_NOT_FOUND", "this asset was deleted; upload it as a new one"
            )
        await connection.execute(
            "INSERT INTO puts (nonce, asset_id, bucket) VALUES ($1, $2, $3)",
            nonce,
            asset.asset_id,
            identity.bucket,
        )
        return asset

    async def note_keys(self, nonce: str, object_keys: Sequence[str]) -> None:
        """Says what a put is going to store, before it does. Aborted when the put was swept."""
        noted = await self._pool.fetchval(
            "UPDATE puts SET object_keys = $2 WHERE nonce = $1 AND swept_at IS NULL RETURNING true",
            nonce,
            list(object_keys),
        )
        if not noted:
            raise _swept()

    async def ready(
        self,
        identity: assets.Identity,
        nonce: str,
        stored: rows.Stored,
        poster: rows.Poster | None = None,
    ) -> assets.Asset:
        """Makes the asset READY with this put's bytes, unless another put was first: then its asset is answered.

        Aborted when the put was swept; NotFound when what it was made from is gone.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await self._require_source(connection, identity)
            row = await connection.fetchrow(
                f"SELECT {rows.COLUMNS} FROM assets WHERE asset_id = $1 FOR UPDATE",
                identity.asset_id,
            )
            if row is not None and row["state"] == assets.State.READY:
                return rows.asset(row)
            fenced = await connection.fetchval(
                "DELETE FROM puts WHERE nonce = $1 AND swept_at IS NULL RETURNING true", nonce
            )
            if row is None or not fenced or row["state"] != assets.State.UPLOADING:
                raise _swept()
            if poster is not None:
                await self._insert_poster(connection, identity, poster)
            return await self._choose(connection, identity, stored, poster)

    async def quarantine(
        self, identity: assets.Identity, nonce: str, stored: rows.Stored, keep: timedelta
    ) -> None:
        """Keeps this put's bytes aside: the asset never becomes READY. Aborted when the put was swept."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "SELECT FROM assets WHERE asset_id = $1 FOR UPDATE", identity.asset_id
            )
            fenced = await connection.fetchval(
                "DELETE FROM puts WHERE nonce = $1 AND swept_at IS NULL RETURNING true", nonce
            )
            changed = fenced and await connection.fetchval(
                """
                UPDATE assets SET state = 'QUARANTINED', object_key = $2, sha256 = $3, size_bytes = $4,
                    source_sha256 = $3, media_type = $5, expires_at = clock_timestamp() + $6::interval
                WHERE asset_id = $1 AND state = 'UPLOADING' RETURNING true
                """,
                identity.asset_id,
                stored.object_key,
                stored.facts.sha256,
                stored.facts.size_bytes,
                stored.facts.media_type,
                keep,
            )
            if not changed:
                raise _swept()

    async def _require_source(
        self, connection: postgres.Connection, identity: assets.Identity
    ) -> None:
        """Locks what a rendition was made from, so that it cannot be deleted without it."""
        if identity.kind is not assets.Kind.RENDITION:
            return
        source = await connection.fetchval(
            """
            SELECT state FROM assets
            WHERE asset_id = (SELECT source_asset_id FROM assets WHERE asset_id = $1) FOR SHARE
            """,
            identity.asset_id,
        )
        if source != assets.State.READY:
            raise assets.not_found()

    async def _insert_poster(
        self, connection: postgres.Connection, video: assets.Identity, poster: rows.Poster
    ) -> None:
        facts = poster.stored.facts
        await connection.execute(
            """
            INSERT INTO assets (asset_id, account_id, owner, kind, variant, source_asset_id, state, object_key,
                sha256, size_bytes, source_sha256, media_type, width, height, expires_at)
            VALUES ($1, $2, $3, $4, $5, $6, 'READY', $7, $8, $9, $10, $11, $12, $13,
                clock_timestamp() + $14::interval)
            """,
            poster.identity.asset_id,
            poster.identity.account_id,
            poster.identity.owner,
            poster.identity.kind,
            poster.identity.variant,
            video.asset_id,
            poster.stored.object_key,
            facts.sha256,
            facts.size_bytes,
            facts.source_sha256,
            facts.media_type,
            facts.width,
            facts.height,
            poster.stored.keep,
        )

    async def _choose(
        self,
        connection: postgres.Connection,
        identity: assets.Identity,
        stored: rows.Stored,
        poster: rows.Poster | None,
    ) -> assets.Asset:
        facts = stored.facts
        row = await connection.fetchrow(
            f"""
            UPDATE assets SET state = 'READY', object_key = $2, sha256 = $3, size_bytes = $4, source_sha256 = $5,
                media_type = $6, width = $7, height = $8, duration_ms = $9, fps = $10, codec = $11,
                has_audio = $12, poster_asset_id = $13, expires_at = clock_timestamp() + $14::interval
            WHERE asset_id = $1 AND state = 'UPLOADING' RETURNING {rows.COLUMNS}
            """,
            identity.asset_id,
            stored.object_key,
            facts.sha256,
            facts.size_bytes,
            facts.source_sha256,
            facts.media_type,
            facts.width,
            facts.height,
            facts.duration_ms,
            facts.fps,
            facts.codec,
            facts.has_audio,
            poster.identity.asset_id if poster else None,
            stored.keep,
        )
        assert row is not None, "the row is locked"
        return rows.asset(row)

    async def give_up(self, nonce: str) -> rows.Leftover | None:
        """Takes from a put the right to make its asset READY; what it may have stored must then be removed.

        None when there is nothing to remove: its asset is READY with its bytes, or the put is over.
        """
        row = await self._pool.fetchrow(
            """
            UPDATE puts SET swept_at = coalesce(swept_at, clock_timestamp())
            WHERE nonce = $1 RETURNING nonce, bucket, object_keys
            """,
            nonce,
        )
        return rows.leftover(row) if row is not None else None

    async def end_put(self, nonce: str) -> None:
        """Forgets a put that was given up, and its asset where no other put is making it."""
        async with self._pool.acquire() as connection, connection.transaction():
            asset_id = await connection.fetchval(
                """
                SELECT asset_id FROM assets WHERE asset_id = (SELECT asset_id FROM puts WHERE nonce = $1)
                FOR UPDATE
                """,
                nonce,
            )
            await connection.execute("DELETE FROM puts WHERE nonce = $1", nonce)
            await connection.execute(
                """
                DELETE FROM assets WHERE asset_id = $1 AND state = 'UPLOADING'
                    AND NOT EXISTS (SELECT FROM puts WHERE asset_id = $1)
                """,
                asset_id,
            )

    async def leftovers(self, older_than: timedelta, limit: int) -> Sequence[rows.Leftover]:
        """Gives up the oldest puts that must have died."""
        found = await self._pool.fetch(
            """
            UPDATE puts SET swept_at = clock_timestamp()
            WHERE nonce IN (
                SELECT nonce FROM puts
                WHERE created_at < clock_timestamp() - $1::interval AND swept_at IS NULL
                ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
            )
            RETURNING nonce, bucket, object_keys
            """,
            older_than,
            limit,
        )
        return [rows.leftover(row) for row in found]

    async def swept(self, older_than: timedelta, limit: int) -> Sequence[rows.Leftover]:
        """Puts that were given up long ago, whose senders cannot store anything any more."""
        found = await self._pool.fetch(
            """
            SELECT nonce, bucket, object_keys FROM puts
            WHERE swept_at < clock_timestamp() - $1::interval ORDER BY swept_at LIMIT $2
            """,
            older_than,
            limit,
        )
        return [rows.leftover(row) for row in found]


def _swept() -> errors.Aborted:
    return errors.Aborted("CONFLICT", "this put took too long and was given up; send it again")
