"""Assets that are there: found, listed, pinned, deleted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from kit import postgres
from services.storage import assets
from services.storage.store import rows


class LibraryStore:
    """Assets as their accounts see them."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def find(
        self, account_id: str, asset_id: str, state: assets.State = assets.State.READY
    ) -> assets.Asset:
        """An asset of the account in that state; NotFound otherwise."""
        row = await self._pool.fetchrow(
            f"SELECT {rows.COLUMNS} FROM assets WHERE asset_id = $1 AND account_id = $2 AND state = $3",
            asset_id,
            account_id,
            state,
        )
        if row is None:
            raise assets.not_found()
        return rows.asset(row)

    async def ready(self, asset_id: str) -> assets.Asset | None:
        """This asset, if it is READY. For callers who know whose it is."""
        row = await self._pool.fetchrow(
            f"SELECT {rows.COLUMNS} FROM assets WHERE asset_id = $1 AND state = 'READY'", asset_id
        )
        return rows.asset(row) if row is not None else None

    async def list_assets(
        self,
        account_id: str,
        kind: assets.Kind | None,
        before: tuple[datetime, str] | None,
        limit: int,
        state: assets.State = assets.State.READY,
    ) -> Sequence[assets.Asset]:
        """Assets of the account in that state, newest first."""
        # The state stands in the text, so that the partial index of each is used: it is ours, no caller's.
        found = await self._pool.fetch(
            f"""
            SELECT {rows.COLUMNS} FROM assets
            WHERE account_id = $1 AND state = '{state}' AND ($2::text IS NULL OR kind = $2)
                AND ($3::timestamptz IS NULL OR (created_at, asset_id) < ($3, $4))
            ORDER BY created_at DESC, asset_id DESC LIMIT $5
            """,
            account_id,
            kind,
            before[0] if before else None,
            before[1] if before else "",
            limit,
        )
        return [rows.asset(row) for row in found]

    async def pin(self, account_id: str, asset_id: str, owner: str) -> assets.Asset:
        """Keeps a READY asset for its owner; NotFound otherwise."""
        async with self._pool.acquire() as connection, connection.transaction():
            # The lock keeps a delete, which looks for pins, from going on beside this.
            row = await connection.fetchrow(
                f"""
                SELECT {rows.COLUMNS} FROM assets
                WHERE asset_id = $1 AND account_id = $2 AND state = 'READY' FOR SHARE
                """,
                asset_id,
                account_id,
            )
            if row is None:
                raise assets.not_found()
            await connection.execute(
                """
                INSERT INTO pins (asset_id, owner, account_id) VALUES ($1, $2, $3)
                ON CONFLICT (asset_id, owner) DO NOTHING
                """,
                asset_id,
                owner,
                account_id,
            )
        return rows.asset(row)

    async def unpin(self, account_id: str, owner: str) -> int:
        """Drops all pins of an owner; says how many there were."""
        found = await self._pool.fetch(
            "DELETE FROM pins WHERE account_id = $1 AND owner = $2 RETURNING asset_id",
            account_id,
            owner,
        )
        return len(found)

    async def delete(self, account_id: str, asset_id: str) -> assets.Asset:
        """Hides an asset and all that was made from it: DELETING. FailedPrecondition while one of them is pinned."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                f"""
                SELECT {rows.COLUMNS} FROM assets
                WHERE asset_id = $1 AND account_id = $2 AND state <> 'UPLOADING' FOR UPDATE
                """,
                asset_id,
                account_id,
            )
            if row is None:
                raise assets.not_found()
            made = await connection.fetch(
                "SELECT asset_id FROM assets WHERE source_asset_id = $1 ORDER BY asset_id FOR UPDATE",
                asset_id,
            )
            every = [asset_id, *(item["asset_id"] for item in made)]
            if await connection.fetchval(
                "SELECT EXISTS (SELECT FROM pins WHERE asset_id = ANY($1))", every
            ):
                raise assets.pinned()
            await connection.execute(
                """
                UPDATE assets SET state = 'DELETING'
                WHERE asset_id = ANY($1) AND state IN ('READY', 'QUARANTINED')
                """,
                every,
            )
        return await self.in_any_state(asset_id)

    async def deleting(self, asset_id: str | None, limit: int) -> Sequence[assets.Asset]:
        """Assets whose objects are to be removed: one and what was made from it, or any."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.COLUMNS} FROM assets
            WHERE state = 'DELETING' AND ($1::text IS NULL OR asset_id = $1 OR source_asset_id = $1)
            ORDER BY source_asset_id IS NOT NULL, asset_id LIMIT $2
            """,
            asset_id,
            limit,
        )
        return [rows.asset(row) for row in found]

    async def deleted(self, asset_id: str) -> None:
        """The object is gone: DELETED."""
        await self._pool.execute(
            "UPDATE assets SET state = 'DELETED', object_key = NULL WHERE asset_id = $1 AND state = 'DELETING'",
            asset_id,
        )

    async def survey(self, asset_ids: Sequence[str]) -> tuple[Sequence[assets.Asset], datetime]:
        """Assets in any state, of any account, and the clock from just before they were read."""
        as_of = await self._pool.fetchval("SELECT clock_timestamp()")
        found = await self._pool.fetch(
            f"SELECT {rows.COLUMNS} FROM assets WHERE asset_id = ANY($1) ORDER BY asset_id",
            list(asset_ids),
        )
        return [rows.asset(row) for row in found], as_of

    async def survey_pins(
        self, owners: Sequence[str], before: tuple[datetime, str] | None, limit: int
    ) -> tuple[Sequence[rows.Pin], datetime]:
        """Pins of the owners, or of all where none is named, newest first, and the clock from just before."""
        as_of = await self._pool.fetchval("SELECT clock_timestamp()")
        found = await self._pool.fetch(
            """
            SELECT asset_id, owner, account_id, created_at FROM pins
            WHERE (cardinality($1::text[]) = 0 OR owner = ANY($1))
                AND ($2::timestamptz IS NULL OR (created_at, asset_id || ' ' || owner) < ($2, $3))
            ORDER BY created_at DESC, asset_id || ' ' || owner DESC LIMIT $4
            """,
            list(owners),
            before[0] if before else None,
            before[1] if before else "",
            limit,
        )
        return [rows.Pin(**dict(row)) for row in found], as_of

    async def in_any_state(self, asset_id: str) -> assets.Asset:
        """An asset that was READY once, whatever became of it."""
        row = await self._pool.fetchrow(
            f"SELECT {rows.COLUMNS} FROM assets WHERE asset_id = $1", asset_id
        )
        assert row is not None, "rows of assets that were READY stay"
        return rows.asset(row)
