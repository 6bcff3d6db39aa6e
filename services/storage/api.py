"""StorageService: proto to domain and back, and who may call what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any

from google.protobuf import timestamp_pb2

from framewire.storage.v1 import storage_pb2, storage_pb2_grpc
from kit import auth, errors, pages, rpc
from kit.failpoints import failpoint
from services.storage import (
    api_keeping,
    assets,
    blobs,
    fits,
    imports,
    puts,
    store,
    sweeper,
    uploads,
)
from services.storage.media import facts

SIGNED_SECONDS = 900
DELETE_BATCH = 1000
PINS_OF_OWNERS = 10_000

_BOTH = frozenset({"gateway", "generator"})
_GATEWAY = frozenset({"gateway"})
_MODES: Mapping[int, facts.FitMode] = {
    storage_pb2.FIT_MODE_CONTAIN: facts.FitMode.CONTAIN,
    storage_pb2.FIT_MODE_CONTAIN_BLURRED: facts.FitMode.CONTAIN_BLURRED,
}
_CALLERS: Mapping[str, frozenset[str]] = {
    "Put": _BOTH,
    "CreateUpload": _GATEWAY,
    "CompleteUpload": _GATEWAY,
    "Import": _GATEWAY,
    "Get": _BOTH,
    "Stat": _BOTH,
    "Fit": _BOTH,
    "MakeRendition": frozenset({"generator"}),
    "Pin": _BOTH,
    "Unpin": _BOTH,
    "SignUrl": _GATEWAY,
    "List": _GATEWAY,
    "Delete": _GATEWAY,
    "SurveyAssets": _GATEWAY,
    "SurveyPins": _GATEWAY,
    "SetRetention": _GATEWAY,
    "ExtendRetention": _GATEWAY,
    "GetUsage": _GATEWAY,
    "EraseAccount": _GATEWAY,
}


def authenticate(tokens: auth.ServiceTokens) -> rpc.Authenticate:
    """Lets in whom the table names."""

    async def check(method: str, metadata: Mapping[str, str]) -> str:
        allowed = _CALLERS.get(method.rsplit("/", 1)[-1], frozenset())
        return tokens.caller(metadata.get("authorization", ""), allowed)

    return check


class StorageApi(api_keeping.KeepingApi, storage_pb2_grpc.StorageServiceServicer):
    """The gRPC face. Callers are services of ours, which say whose asset they mean."""

    def __init__(
        self,
        store_: store.Store,
        blobs_: blobs.Blobs,
        puts_: puts.Puts,
        fits_: fits.Fits,
        renditions: fits.Renditions,
        sweeper_: sweeper.Sweeper,
        uploads_: uploads.Uploads,
        imports_: imports.Imports,
        max_keep_seconds: int,
    ) -> None:
        super().__init__(store_, max_keep_seconds)
        self._store = store_
        self._blobs = blobs_
        self._puts = puts_
        self._fits = fits_
        self._renditions = renditions
        self._sweeper = sweeper_
        self._uploads = uploads_
        self._imports = imports_

    async def Put(self, request_iterator: Any, context: Any) -> storage_pb2.Asset:
        """Stores one asset."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise _out_of_order("the first message must be the header")
        header = first.header
        identity = assets.Identity(
            header.account_id,
            header.owner,
            assets.Kind(storage_pb2.AssetKind.Name(header.kind).removeprefix("ASSET_KIND_")),
            header.variant,
        )
        wanted = puts.Header(
            identity=identity,
            size_bytes=header.size_bytes,
            sha256=header.sha256,
            model=header.mark.model,
            video_id=header.mark.video_id,
            refused_sha256=header.refused_sha256,
        )
        asset = await self._puts.put(wanted, _chunks(request_iterator))
        if wanted.video_id:
            await self._store.keeping.of_video(asset.asset_id, wanted.video_id)
        return _asset(asset)

    async def CreateUpload(
        self, request: storage_pb2.CreateUploadRequest, context: Any
    ) -> storage_pb2.CreateUploadResponse:
        """A URL to PUT to."""
        signed = await self._uploads.create(
            request.account_id, request.owner, request.size_bytes, request.media_type
        )
        return storage_pb2.CreateUploadResponse(
            upload_id=signed.upload_id,
            url=signed.url,
            headers=signed.headers,
            expires_at=_timestamp(signed.expires_at),
        )

    async def CompleteUpload(
        self, request: storage_pb2.CompleteUploadRequest, context: Any
    ) -> storage_pb2.Asset:
        """Takes what was PUT."""
        return _asset(await self._uploads.complete(request.account_id, request.upload_id))

    async def Import(self, request: storage_pb2.ImportRequest, context: Any) -> storage_pb2.Asset:
        """Fetches an image."""
        identity = assets.Identity(request.account_id, request.owner, assets.Kind.INPUT_IMAGE)
        return _asset(await self._imports.fetch(identity, request.url))

    async def Get(
        self, request: storage_pb2.GetRequest, context: Any
    ) -> AsyncIterator[storage_pb2.GetResponse]:
        """Streams bytes."""
        asset = await self._store.library.find(request.account_id, request.asset_id)
        assert asset.facts is not None
        assert asset.object_key is not None
        length = assets.check_range(request.offset, request.length, asset.facts.size_bytes)
        bucket = assets.BUCKETS[asset.kind]
        async for chunk in self._blobs.read(bucket, asset.object_key, request.offset, length):
            yield storage_pb2.GetResponse(chunk=chunk)

    async def Stat(self, request: storage_pb2.StatRequest, context: Any) -> storage_pb2.Asset:
        """What is known of an asset."""
        return _asset(await self._store.library.find(request.account_id, request.asset_id))

    async def Fit(self, request: storage_pb2.FitRequest, context: Any) -> storage_pb2.Asset:
        """An image or video of exactly that size."""
        crop = request.crop
        area = assets.Area(
            crop.left_fraction, crop.top_fraction, crop.right_fraction, crop.bottom_fraction
        )
        fit = assets.Fit(
            request.width,
            request.height,
            mode=_MODES.get(request.mode, facts.FitMode.COVER),
            area=area if request.HasField("crop") else None,
        )
        return _asset(
            await self._fits.fit(request.account_id, request.asset_id, fit, request.pin_owner)
        )

    async def MakeRendition(
        self, request: storage_pb2.MakeRenditionRequest, context: Any
    ) -> storage_pb2.Asset:
        """A smaller version of an output."""
        return _asset(
            await self._renditions.make(request.account_id, request.asset_id, request.height)
        )

    async def Pin(self, request: storage_pb2.PinRequest, context: Any) -> storage_pb2.PinResponse:
        """Keeps an asset."""
        asset = await self._store.library.pin(request.account_id, request.asset_id, request.owner)
        return storage_pb2.PinResponse(asset=_asset(asset))

    async def Unpin(
        self, request: storage_pb2.UnpinRequest, context: Any
    ) -> storage_pb2.UnpinResponse:
        """Drops an owner's pins."""
        dropped = await self._store.library.unpin(request.account_id, request.owner)
        return storage_pb2.UnpinResponse(dropped=dropped)

    async def SignUrl(
        self, request: storage_pb2.SignUrlRequest, context: Any
    ) -> storage_pb2.SignUrlResponse:
        """A URL for clients."""
        asset = await self._store.library.find(
            request.account_id, request.asset_id, _state(request.state)
        )
        assert asset.facts is not None
        name = request.file_name or assets.file_name(asset.asset_id, asset.facts.media_type)
        seconds = request.expires_in_seconds or SIGNED_SECONDS
        url, until = self._blobs.link(asset, name, seconds)
        return storage_pb2.SignUrlResponse(url=url, expires_at=_timestamp(until) if until else None)

    async def List(
        self, request: storage_pb2.ListRequest, context: Any
    ) -> storage_pb2.ListResponse:
        """Assets, newest first."""
        size = request.page_size or pages.DEFAULT_SIZE
        name = storage_pb2.AssetKind.Name(request.kind).removeprefix("ASSET_KIND_")
        kind = assets.Kind(name) if request.kind else None
        before = pages.decode(request.page_token)
        found = await self._store.library.list_assets(
            request.account_id, kind, before, size + 1, _state(request.state)
        )
        last = found[size - 1] if len(found) > size else None
        token = pages.encode(last.created_at, last.asset_id) if last else ""
        return storage_pb2.ListResponse(
            assets=[_asset(item) for item in found[:size]], next_page_token=token
        )

    async def Delete(self, request: storage_pb2.DeleteRequest, context: Any) -> storage_pb2.Asset:
        """Hides an asset, then removes its bytes; the sweeper does that again when it fails here."""
        asset = await self._store.library.delete(request.account_id, request.asset_id)
        await failpoint("storage.delete.after_commit")
        await self._sweeper.remove(await self._store.library.deleting(asset.asset_id, DELETE_BATCH))
        return _asset(await self._store.library.in_any_state(asset.asset_id))

    async def ExtendRetention(
        self, request: storage_pb2.ExtendRetentionRequest, context: Any
    ) -> storage_pb2.Asset:
        """Keeps an asset longer."""
        return _asset(await self.extend(request))

    async def SurveyAssets(
        self, request: storage_pb2.SurveyAssetsRequest, context: Any
    ) -> storage_pb2.SurveyAssetsResponse:
        """Assets, and whether their objects are there."""
        found, as_of = await self._store.library.survey(request.asset_ids)
        places = {
            asset.asset_id: (assets.BUCKETS[asset.kind], asset.object_key)
            for asset in found
            if asset.object_key is not None
        }
        sizes = await asyncio.gather(*(self._blobs.size(*place) for place in places.values()))
        there = dict(zip(places, sizes, strict=True))
        return storage_pb2.SurveyAssetsResponse(
            assets=[
                storage_pb2.SurveyedAsset(
                    asset=_asset(asset),
                    object_found=there.get(asset.asset_id) is not None,
                    object_size_bytes=there.get(asset.asset_id) or 0,
                )
                for asset in found
            ],
            as_of=_timestamp(as_of),
        )

    async def SurveyPins(
        self, request: storage_pb2.SurveyPinsRequest, context: Any
    ) -> storage_pb2.SurveyPinsResponse:
        """Pins at a watermark."""
        size = request.page_size or pages.DEFAULT_SIZE
        limit = PINS_OF_OWNERS if request.owners else size + 1
        before = pages.decode(request.page_token)
        found, as_of = await self._store.library.survey_pins(request.owners, before, limit)
        shown = found if request.owners else found[:size]
        last = shown[-1] if len(found) > len(shown) else None
        token = pages.encode(last.created_at, f"{last.asset_id} {last.owner}") if last else ""
        return storage_pb2.SurveyPinsResponse(
            pins=[
                storage_pb2.Pin(
                    asset_id=pin.asset_id,
                    owner=pin.owner,
                    account_id=pin.account_id,
                    created_at=_timestamp(pin.created_at),
                )
                for pin in shown
            ],
            as_of=_timestamp(as_of),
            next_page_token=token,
        )


async def _chunks(requests: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise _out_of_order("there is one header, and only chunks follow it")
        yield request.chunk


def _out_of_order(sentence: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("INVALID_FIELD", sentence, violations=[("header", sentence)])


def _state(number: storage_pb2.AssetState.ValueType) -> assets.State:
    """READY where it is not set."""
    name = storage_pb2.AssetState.Name(number or storage_pb2.ASSET_STATE_READY)
    return assets.State(name.removeprefix("ASSET_STATE_"))


def _timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def _asset(asset: assets.Asset) -> storage_pb2.Asset:
    answer = storage_pb2.Asset(
        asset_id=asset.asset_id,
        account_id=asset.account_id,
        kind=storage_pb2.AssetKind.Value(f"ASSET_KIND_{asset.kind}"),
        state=storage_pb2.AssetState.Value(f"ASSET_STATE_{asset.state}"),
        poster_asset_id=asset.poster_asset_id or "",
        created_at=_timestamp(asset.created_at),
        expires_at=_timestamp(asset.expires_at) if asset.expires_at else None,
    )
    measured = asset.facts
    if measured is not None:
        answer.sha256 = measured.sha256
        answer.size_bytes = measured.size_bytes
        answer.media_type = measured.media_type
        answer.width = measured.width
        answer.height = measured.height
        answer.duration_ms = measured.duration_ms
        answer.fps = measured.fps
        answer.codec = measured.codec
        answer.has_audio = measured.has_audio
        answer.source_sha256 = measured.source_sha256
    return answer
