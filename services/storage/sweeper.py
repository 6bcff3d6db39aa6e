"""Removes what nothing refers to: objects and rows of puts that died, and bytes of deleted assets."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

from kit import errors, loops, telemetry
from kit.failpoints import failpoint
from services.storage import assets, blobs, config, store

log = telemetry.logger(__name__)

T = TypeVar("T")

BATCH = 100
FAILURES_IN_A_ROW = 5
"""So many, and S3 is away: a pass then leaves the rest to the next one."""


class _Pass:
    """One pass over things to be removed: one that cannot be must not keep the others."""

    def __init__(self) -> None:
        self._first: errors.Unavailable | None = None
        self._in_a_row = 0

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Outlives a failure, but for one too many in a row."""
        try:
            yield
        except errors.Unavailable as error:
            self._first = self._first or error
            self._in_a_row += 1
            if self._in_a_row >= FAILURES_IN_A_ROW:
                raise self._first from error
        else:
            self._in_a_row = 0

    def end(self) -> None:
        """Raises what went wrong first."""
        if self._first is not None:
            raise self._first


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
        done = _Pass()
        given_up = await self._store.making.leftovers(self._leftover, BATCH)
        for left in given_up:
            await failpoint("storage.sweep.after_give_up")
            log.warning("put_leftover", nonce=left.nonce, objects=len(left.object_keys))
            with done.going_on():
                await self._blobs.discard(left.bucket, left.object_keys)
        # A process that was paused may have stored something after the first removal: the put is remembered for as
        # long again, and then its objects are removed once more.
        over = await self._store.making.swept(self._leftover, BATCH)
        for left in _shuffled(over):
            with done.going_on():
                await self._blobs.discard(left.bucket, left.object_keys)
                await failpoint("storage.sweep.after_objects")
                await self._store.making.end_put(left.nonce)
        uploads = await self._store.announced.over(BATCH)
        for upload in _shuffled(uploads):
            with done.going_on():
                if upload.object_key is not None:
                    await self._blobs.remove(assets.Bucket.INPUT, [upload.object_key])
                    await failpoint("storage.sweep.after_upload")
                await self._store.announced.forget(upload.upload_id)
        deleting = await self.remove(await self._store.library.deleting(None, BATCH), done)
        done.end()
        return BATCH in (len(given_up), len(over), len(uploads), deleting)

    async def remove(self, deleting: Sequence[assets.Asset], within: _Pass | None = None) -> int:
        """Removes the bytes of assets that are DELETING, then says so. Unavailable when some of them stay."""
        done = within or _Pass()
        for asset in _shuffled(deleting):
            assert asset.object_key is not None
            with done.going_on():
                await self._blobs.remove(assets.BUCKETS[asset.kind], [asset.object_key])
                await failpoint("storage.delete.after_object")
                await self._store.library.deleted(asset.asset_id)
                await failpoint("storage.delete.after_row")
        if within is None:
            done.end()
        return len(deleting)


def _shuffled(items: Sequence[T]) -> list[T]:
    """In any order: a few that always fail must not stand at the head of each pass."""
    return random.sample(items, len(items))
