"""Removes what nothing refers to: objects and rows of puts that died, and bytes of deleted assets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from kit import loops, telemetry
from kit.failpoints import failpoint
from services.storage import assets, blobs, config, store

log = telemetry.logger(__name__)

BATCH = 100


class Sweeper:
    """The loop over leftovers."""

    def __init__(
        self,
        settings: config.Settings,
        store_: store.Store,
        blobs_: blobs.Blobs,
        wake: loops.Wake | None = None,
    ) -> None:
        self._seconds = settings.sweep_seconds
        self._leftover = timedelta(seconds=settings.put_leftover_seconds)
        self._store = store_
        self._blobs = blobs_
        self._wake = wake

    async def run(self, stopping: asyncio.Event) -> None:
        """Sweeps until told to stop."""
        await loops.every("sweeper", self._seconds, self.run_once, stopping, self._wake)

    async def run_once(self) -> bool:
        """One pass; True when there is more to do."""
        given_up = await self._store.making.leftovers(self._leftover, BATCH)
        for left in given_up:
            await failpoint("storage.sweep.after_give_up")
            log.warning("put_leftover", nonce=left.nonce, objects=len(left.object_keys))
            await self._blobs.discard(left.bucket, left.object_keys)
        # A process that was paused may have stored something after the first removal: the put is remembered for as
        # long again, and then its objects are removed once more.
        over = await self._store.making.swept(self._leftover, BATCH)
        for left in over:
            await self._blobs.discard(left.bucket, left.object_keys)
            await failpoint("storage.sweep.after_objects")
            await self._store.making.end_put(left.nonce)
        uploads = await self._store.announced.over(BATCH)
        for upload in uploads:
            if upload.object_key is not None:
                await self._blobs.remove(assets.Bucket.INPUT, [upload.object_key])
                await failpoint("storage.sweep.after_upload")
            await self._store.announced.forget(upload.upload_id)
        deleting = await self.remove(await self._store.library.deleting(None, BATCH))
        return BATCH in (len(given_up), len(over), len(uploads), deleting)

    async def remove(self, deleting: Sequence[assets.Asset]) -> int:
        """Removes the bytes of assets that are DELETING, then says so."""
        for asset in deleting:
            assert asset.object_key is not None
            await self._blobs.remove(assets.BUCKETS[asset.kind], [asset.object_key])
            await failpoint("storage.delete.after_object")
            await self._store.library.deleted(asset.asset_id)
            await failpoint("storage.delete.after_row")
        return len(deleting)
