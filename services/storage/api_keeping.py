"""StorageService: how long assets are kept, what there is, and the end of everything."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from framewire.storage.v1 import storage_pb2
from kit import errors
from kit.failpoints import failpoint
from services.storage import assets, store


class KeepingApi:
    """The part of the gRPC face that StorageApi is made of."""

    def __init__(self, store_: store.Store, max_keep_seconds: int) -> None:
        self._keeping = store_.keeping
        self._max_keep_seconds = max_keep_seconds

    async def SetRetention(
        self, request: storage_pb2.SetRetentionRequest, context: Any
    ) -> storage_pb2.Retention:
        """The account's own times."""
        wanted = {kind(item.kind): item.keep_seconds for item in request.kinds}
        if len(wanted) != len(request.kinds):
            raise _invalid("kinds", "each kind may be named once")
        await self._keeping.set_retention(request.account_id, wanted)
        kept = await self._keeping.retention(request.account_id)
        return storage_pb2.Retention(
            account_id=request.account_id,
            kinds=[
                storage_pb2.KindRetention(kind=number(name), keep_seconds=seconds)
                for name, seconds in kept.items()
            ],
        )

    async def extend(self, request: storage_pb2.ExtendRetentionRequest) -> assets.Asset:
        """Keeps an asset."""
        if request.keep_seconds > self._max_keep_seconds:
            days = self._max_keep_seconds // 86_400
            raise _invalid("keep_seconds", f"at most {self._max_keep_seconds} ({days} days)")
        return await self._keeping.extend(
            request.account_id, request.asset_id, timedelta(seconds=request.keep_seconds)
        )

    async def GetUsage(
        self, request: storage_pb2.GetUsageRequest, context: Any
    ) -> storage_pb2.GetUsageResponse:
        """What there is."""
        return storage_pb2.GetUsageResponse(
            kinds=[
                storage_pb2.KindUsage(
                    kind=number(used.kind), count=used.count, size_bytes=used.size_bytes
                )
                for used in await self._keeping.used(request.account_id)
            ]
        )

    async def EraseAccount(
        self, request: storage_pb2.EraseAccountRequest, context: Any
    ) -> storage_pb2.EraseAccountResponse:
        """Hides everything; the sweeper removes the bytes."""
        left = await self._keeping.erase(request.account_id)
        await failpoint("storage.erase.after_commit")
        return storage_pb2.EraseAccountResponse(still_needed=left)


def kind(value: storage_pb2.AssetKind.ValueType) -> assets.Kind:
    """A kind by the contract's value."""
    return assets.Kind(storage_pb2.AssetKind.Name(value).removeprefix("ASSET_KIND_"))


def number(name: assets.Kind) -> storage_pb2.AssetKind.ValueType:
    """The contract's value of a kind."""
    return storage_pb2.AssetKind.Value(f"ASSET_KIND_{name}")


def _invalid(field: str, sentence: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "INVALID_FIELD", f"{field}: {sentence}", violations=[(field, sentence)]
    )
