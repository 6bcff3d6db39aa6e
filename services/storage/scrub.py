"""The scrub: stored bytes are read again and compared with what was stored, and objects that nobody knows are removed.

Deletes and overwrites by anyone else come to light here. What is damaged is taken out of sight and said loudly; nothing
is repaired, for the bytes are gone: the bucket's backup has them.
"""

from __future__ import annotations

import asyncio
import hashlib
from datetime import timedelta
from pathlib import Path

from prometheus_client import Counter

from kit import errors, loops, telemetry
from services.storage import assets, blobs, config, scratch, store
from services.storage.media import facts, sandbox

log = telemetry.logger(__name__)

SCRUBBED = Counter("framewire_storage_scrubbed", "Assets read again, by what was found.", ["found"])
for _found in ("good", "too_long_to_decode", "missing", "changed", "undecodable"):
    SCRUBBED.labels(_found)  # from 0 on: an alert sees the first one, too
ORPHANS = Counter(
    "framewire_storage_orphans", "Objects that no asset, put or upload knew, and that were removed."
)
SCRUB_BATCH = 8
ORPHAN_PAGE = 500


class Scrub:
    """The loop that reads assets again, those first that were not looked at for longest."""

    def __init__(
        self,
        settings: config.Settings,
        store_: store.Store,
        blobs_: blobs.Blobs,
        scratch_: scratch.Scratch,
        workers: sandbox.MediaWorkers,
    ) -> None:
        self._seconds = settings.scrub_seconds
        self._older = timedelta(seconds=settings.scrub_every_seconds)
        self._store = store_
        self._blobs = blobs_
        self._scratch = scratch_
        self._workers = workers

    async def run(self, stopping: asyncio.Event) -> None:
        """Scrubs until told to stop."""
        await loops.every("scrub", self._seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One batch, one asset after the other: a sample now and then, not the whole store at once."""
        claimed = list(await self._store.keeping.to_scrub(self._older, SCRUB_BATCH))
        while claimed:
            try:
                await self._look(claimed[0])
            except errors.Unavailable:
                await self._store.keeping.not_scrubbed([asset.asset_id for asset in claimed])
                raise
            claimed.pop(0)
        return False

    async def _look(self, asset: assets.Asset) -> None:
        found, damage = await self._damage(asset)
        SCRUBBED.labels(found).inc()
        if damage and await self._store.keeping.damaged(asset, damage):
            log.error("asset_damaged", asset_id=asset.asset_id, kind=asset.kind, damage=damage)

    async def _damage(self, asset: assets.Asset) -> tuple[str, str]:
        """What was found, in a word, and the damage in a sentence; empty: it is as it was stored."""
        assert asset.facts is not None
        assert asset.object_key is not None
        bucket, key = assets.BUCKETS[asset.kind], asset.object_key
        size_bytes = await self._blobs.size(bucket, key)
        if size_bytes is None:
            return "missing", "its object is gone"
        if size_bytes != asset.facts.size_bytes:
            return "changed", f"its object has {size_bytes} of {asset.facts.size_bytes} bytes"
        with self._scratch.work() as place:
            path = place / "scrubbed"
            await self._blobs.get_file(bucket, key, path)
            if await asyncio.to_thread(_sha256, path) != asset.facts.sha256:
                return "changed", "its object has other bytes"
            if asset.facts.media_type.startswith("video/"):
                try:
                    await self._workers.decode_video(path)
                except facts.MediaRefused as refused:
                    if refused.reason is facts.Reason.MEDIA_TOO_EXPENSIVE:
                        return (
                            "too_long_to_decode",
                            "",
                        )  # its bytes are good, and it was decoded in parts
                    return (
                        "undecodable",
                        f"its bytes are as they were stored, and do not play: {refused}",
                    )
        return "good", ""


class Orphans:
    """The loop over objects that nobody knows. What is younger than a put may live is left alone."""

    def __init__(self, settings: config.Settings, store_: store.Store, blobs_: blobs.Blobs) -> None:
        self._seconds = settings.orphan_seconds
        self._age = timedelta(seconds=settings.orphan_age_seconds)
        self._store = store_
        self._blobs = blobs_
        self._after = dict.fromkeys(assets.Bucket, "")

    async def run(self, stopping: asyncio.Event) -> None:
        """Looks until told to stop."""
        await loops.every("orphans", self._seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """The next page of each bucket; true while one is not through."""
        before = await self._store.keeping.clock() - self._age
        more = False
        for bucket in assets.Bucket:
            listed = await self._blobs.list_after(bucket, self._after[bucket], ORPHAN_PAGE)
            full = len(listed) == ORPHAN_PAGE
            self._after[bucket] = listed[-1].key if full else ""
            old = [item.key for item in listed if item.modified_at < before]
            orphans = await self._store.keeping.unknown(old)
            if orphans:
                log.warning("orphans_removed", bucket=bucket, count=len(orphans), first=orphans[0])
                await self._blobs.remove(bucket, orphans)
                ORPHANS.inc(len(orphans))
            more = more or full
        return more


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
