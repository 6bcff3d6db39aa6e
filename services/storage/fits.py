"""Images and videos brought to a size: each made once, kept as an asset of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kit import errors
from services.storage import arriving, assets, blobs, puts, signer, store
from services.storage.media import sandbox


class Fits:
    """Makes what is sent to providers."""

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
        """The fitted one; idempotent, the same bytes each time. `pin_owner` keeps it and its source for that owner."""
        if fit.area is not None:
            assets.check_area(fit.area)
        source = await self._source(account_id, asset_id, pin_owner)
        if assets.is_video(source):
            assets.check_even(width=fit.width, height=fit.height)

        async def make(place: arriving.Place) -> puts.Work:
            return await self._make(source, fit, place.path)

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
        crop = None
        if fit.area is not None:
            crop = assets.crop(fit.area, source.facts.width, source.facts.height)
        wanted = (fit.width, fit.height, fit.mode, crop)
        with puts.refusing():
            if assets.is_video(source):
                video = await self._workers.fit_video(path, out, *wanted)
                return puts.Work(puts.Made(out, puts.video_facts(video, source.facts.sha256)))
            image = await self._workers.fit_image(path, out, *wanted)
        return puts.Work(puts.Made(out, puts.image_facts(image, source.facts.sha256)))


class Renditions:
    """Makes smaller versions of what was made."""

    def __init__(
        self,
        store_: store.Store,
        blobs_: blobs.Blobs,
        keeper: puts.Keeper,
        workers: sandbox.MediaWorkers,
        signing: signer.Signer | None = None,
    ) -> None:
        self._store = store_
        self._blobs = blobs_
        self._keeper = keeper
        self._workers = workers
        self._signer = signing

    async def make(self, account_id: str, asset_id: str, height: int) -> assets.Asset:
        """The output at that height; idempotent. InvalidArgument unless it is an output that is taller."""
        source = await self._store.library.find(account_id, asset_id)
        assert source.facts is not None
        assets.check_even(height=height)
        if source.kind is not assets.Kind.OUTPUT_VIDEO or height >= source.facts.height:
            sentence = f"must be below that of an output; this is {source.kind} of {source.facts.height} pixels"
            raise errors.InvalidArgument(
                "INVALID_FIELD", f"height: {sentence}", violations=[("height", sentence)]
            )

        async def work(place: arriving.Place) -> puts.Work:
            assert source.facts is not None
            assert source.object_key is not None
            path, out = place.path / "source", place.path / "smaller"
            await self._blobs.get_file(assets.BUCKETS[source.kind], source.object_key, path)
            with puts.refusing():
                video = await self._workers.make_rendition(path, out, height)
                if self._signer is not None and (
                    signed := await self._signer.sign(out, path, signer.SMALLER)
                ):
                    out = signed[0]
                    video = replace(video, size_bytes=signed[1].size_bytes, sha256=signed[1].sha256)
            made = puts.Made(out, puts.video_facts(video, source.facts.sha256))
            return puts.Work(made, kept_as=assets.Kind.OUTPUT_VIDEO)

        return await self._keeper.keep(
            assets.rendition(account_id, asset_id, height), work, asset_id
        )
