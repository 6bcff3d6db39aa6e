"""Storage as the generator needs it: fitted inputs, stored outputs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from framewire.events.v1 import vocabulary_pb2
from framewire.storage.v1 import storage_pb2, storage_pb2_grpc
from kit import errors, ids
from services.generator.providers import contract
from services.generator.store import rows

CHUNK_BYTES = 256 * 1024
FIT_TIMEOUT_SECONDS = 30
FIT_VIDEO_TIMEOUT_SECONDS = 130
"""A little more than storage allows its work."""
RENDITION_TIMEOUT_SECONDS = 130
STAT_TIMEOUT_SECONDS = 5
OUTPUT_KIND = "OUTPUT_VIDEO"
"""The part that the kind has in an asset id; storage.proto says how ids are made."""
PUT_TIMEOUT_SECONDS = 600


class Assets:
    """The storage service, by what is asked of it."""

    def __init__(self, stub: storage_pb2_grpc.StorageServiceAsyncStub) -> None:
        self._stub = stub

    async def inputs(self, attempt: rows.Attempt) -> tuple[contract.Input, ...]:
        """What the video starts from, exactly the requested size, the same bytes each time; none for text-to-video."""
        return tuple([await self._input(attempt, each) for each in _inputs(attempt.job.spec)])

    async def _input(
        self, attempt: rows.Attempt, each: vocabulary_pb2.VideoInput
    ) -> contract.Input:
        spec, is_video = attempt.job.spec, each.HasField("input_video_id")
        request = storage_pb2.FitRequest(
            account_id=attempt.account_id,
            asset_id=each.image_id or each.input_video_id,
            width=spec.width,
            height=spec.height,
            mode=storage_pb2.FitMode.Value(vocabulary_pb2.FitMode.Name(each.fit)),
            crop=_crop(each.crop) if each.HasField("crop") else None,
            pin_owner=attempt.video_id,
        )
        seconds = FIT_VIDEO_TIMEOUT_SECONDS if is_video else FIT_TIMEOUT_SECONDS
        fitted = await self._stub.Fit(request, timeout=seconds)
        get = storage_pb2.GetRequest(account_id=attempt.account_id, asset_id=fitted.asset_id)
        parts = [part.chunk async for part in self._stub.Get(get, timeout=FIT_TIMEOUT_SECONDS)]
        return contract.Input(b"".join(parts), is_video, each.frame_index)

    async def stored_output(self, attempt: rows.Attempt, variant: int) -> storage_pb2.Asset | None:
        """The output where an earlier fetch has stored it already; None where it has not."""
        asset_id = ids.derived_id(attempt.account_id, _owner(attempt), OUTPUT_KIND, variant)
        request = storage_pb2.StatRequest(account_id=attempt.account_id, asset_id=asset_id)
        try:
            return await self._stub.Stat(request, timeout=STAT_TIMEOUT_SECONDS)
        except errors.NotFound:
            return None

    async def store_output(
        self,
        attempt: rows.Attempt,
        variant: int,
        size_bytes: int | None,
        chunks: AsyncIterator[bytes],
        refused_sha256: str,
    ) -> storage_pb2.Asset:
        """Streams a finished video into storage. Idempotent by (attempt, variant).

        `refused_sha256`: of bytes that came before and were no video; the same again are kept aside and refused.
        """
        header = storage_pb2.PutHeader(
            account_id=attempt.account_id,
            owner=_owner(attempt),
            kind=storage_pb2.ASSET_KIND_OUTPUT_VIDEO,
            variant=variant,
            size_bytes=size_bytes or 0,
            mark=storage_pb2.Mark(model=attempt.job.spec.model, video_id=attempt.video_id),
            refused_sha256=refused_sha256,
        )

        async def requests() -> AsyncIterator[storage_pb2.PutRequest]:
            yield storage_pb2.PutRequest(header=header)
            async for chunk in chunks:
                for start in range(0, len(chunk), CHUNK_BYTES):
                    yield storage_pb2.PutRequest(chunk=chunk[start : start + CHUNK_BYTES])

        return await self._stub.Put(requests(), timeout=PUT_TIMEOUT_SECONDS)

    async def rendition(
        self, attempt: rows.Attempt, output: storage_pb2.Asset, height: int
    ) -> storage_pb2.Asset:
        """A smaller version of a stored output. Idempotent."""
        request = storage_pb2.MakeRenditionRequest(
            account_id=attempt.account_id, asset_id=output.asset_id, height=height
        )
        return await self._stub.MakeRendition(request, timeout=RENDITION_TIMEOUT_SECONDS)


def _inputs(spec: vocabulary_pb2.VideoSpec) -> Sequence[vocabulary_pb2.VideoInput]:
    """Either is set, as the gateway normalises a spec."""
    if spec.input_image_id:
        return [vocabulary_pb2.VideoInput(image_id=spec.input_image_id)]
    return spec.inputs


def _crop(crop: vocabulary_pb2.CropBounds) -> storage_pb2.CropBounds:
    return storage_pb2.CropBounds(
        left_fraction=crop.left_fraction,
        top_fraction=crop.top_fraction,
        right_fraction=crop.right_fraction,
        bottom_fraction=crop.bottom_fraction,
    )


def _owner(attempt: rows.Attempt) -> str:
    return f"attempt:{attempt.attempt_id}"
