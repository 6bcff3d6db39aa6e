"""Images brought to a size: each made once, kept as an asset of its own."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from kit import errors
from services.storage import assets, blobs, puts, store
from services.storage.media import facts, sandbox


class Fits:
    """Makes renditions of images."""

    def __init__(
        self,
        store_: store.Store,
        blobs_: blobs.Blobs,
        keeper: puts.Keeper,
        workers: sandbox.MediaWorkers,
    ) -> None:
        self._store = store_
        self._blobs = blobs_
        self._keeper = keeper
        self._workers = workers

    async def fit(
        self, account_id: str, asset_id: str, fit: assets.Fit, pin_owner: str
    ) -> assets.Asset:
        """The rendition; idempotent, the same bytes each time. `pin_owner` keeps it and the image for that owner."""
        if fit.area is not None:
            assets.check_area(fit.area)
        source = await self._source(account_id, asset_id, pin_owner)
        assert source.facts is not None
        if not source.facts.media_type.startswith("image/"):
            raise errors.InvalidArgument("NOT_AN_IMAGE", "only images can be fitted to a size")

        async def make(place: Path, _: datetime) -> puts.Work:
            return await self._make(source, fit, place)

        identity = assets.fitted(account_id, asset_id, fit)
        made = await self._keeper.keep(identity, make, asset_id)
        if pin_owner:
            return await self._store.library.pin(account_id, made.asset_id, pin_owner)
        return made

    async def _source(self, account_id: str, asset_id: str, pin_owner: str) -> assets.Asset:
        if pin_owner:
            return await self._store.library.pin(account_id, asset_id, pin_owner)
        return await self._store.library.find(account_id, asset_id)

    async def _make(self, source: assets.Asset, fit: assets.Fit, place: Path) -> puts.Work:
        assert source.facts is not None
        assert source.object_key is not None
        path, out = place / "source", place / "fitted"
        await self._blobs.get_file(assets.BUCKETS[source.kind], source.object_key, path)
        with puts.refusing():
            mode = facts.FitMode.CONTAIN if fit.contain else facts.FitMode.COVER
            crop = None
            if fit.area is not None:
                crop = assets.crop(fit.area, source.facts.width, source.facts.height)
                mode = facts.FitMode.CROP
            if crop is not None and fit.contain:
                path, crop, mode = await self._cut(path, crop), None, facts.FitMode.CONTAIN
            measured = await self._workers.fit_image(path, out, fit.width, fit.height, mode, crop)
        return puts.Work(puts.Made(out, puts.image_facts(measured, source.facts.sha256)))

    async def _cut(self, path: Path, crop: facts.Crop) -> Path:
        """The part alone, without loss, as large as the sandbox makes images."""
        out = path.with_name("part")
        scale = min(1.0, facts.MAX_FIT_SIDE_PIXELS / max(crop.width, crop.height))
        width, height = max(1, round(crop.width * scale)), max(1, round(crop.height * scale))
        await self._workers.fit_image(
            path, out, width, height, facts.FitMode.CROP, crop, facts.FitFormat.PNG
        )
        return out
