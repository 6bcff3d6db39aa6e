"""Storage as the generator needs it: fitted inputs, stored outputs."""

from __future__ import annotations

from collections.abc import AsyncIterator

from framewire.events.v1 import vocabulary_pb2
from framewire.storage.v1 import storage_pb2, storage_pb2_grpc
from kit import errors, ids
from services.generator.store import rows

CHUNK_BYTES = 256 * 1024
FIT_TIMEOUT_SECONDS = 30
STAT_TIMEOUT_SECONDS = 5
OUTPUT_KIND = "OUTPUT_VIDEO"
"""The part that the kind has in an asset id; storage.proto says how ids are made."""
PUT_TIMEOUT_SECONDS = 600


class Assets:
    """The storage service, by what is asked of it."""

    def __init__(self, stub: storage_pb2_grpc.StorageServiceAsyncStub) -> None:
        self._stub = stub

    async def first_frame(self, attempt: rows.Attempt) -> bytes | None:
        """The input image, exactly the requested size, the same bytes each time; None for text-to-video."""
        spec = attempt.job.spec
        if not spec.input_image_id:
            return None
        request = storage_pb2.FitRequest(
            account_id=attempt.account_id,
            asset_id=spec.input_image_id,
            width=spec.width,
            height=spec.height,
            pin_owner=attempt.video_id,
        )
        fitted = await self._stub.Fit(request, timeout=FIT_TIMEOUT_SECONDS)
        get = storage_pb2.GetRequest(account_id=attempt.account_id, asset_id=fitted.asset_id)
        parts = [part.chunk async for part in self._stub.Get(get, timeout=FIT_TIMEOUT_SECONDS)]
        return b"".join(parts)

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
        spec: vocabulary_pb2.VideoSpec,
    ) -> storage_pb2.Asset:
        """Streams a finished video into storage. Idempotent by (attempt, variant)."""
        header = storage_pb2.PutHeader(
            account_id=attempt.account_id,
            owner=_owner(attempt),
            kind=storage_pb2.ASSET_KIND_OUTPUT_VIDEO,
            variant=variant,
            size_bytes=size_bytes or 0,
            mark=storage_pb2.Mark(model=spec.model, video_id=attempt.video_id),
        )

        async def requests() -> AsyncIterator[storage_pb2.PutRequest]:
            yield storage_pb2.PutRequest(header=header)
            async for chunk in chunks:
                for start in range(0, len(chunk), CHUNK_BYTES):
                    yield storage_pb2.PutRequest(chunk=chunk[start : start + CHUNK_BYTES])

        return await self._stub.Put(requests(), timeout=PUT_TIMEOUT_SECONDS)


def _owner(attempt: rows.Attempt) -> str:
    return f"attempt:{attempt.attempt_id}"
