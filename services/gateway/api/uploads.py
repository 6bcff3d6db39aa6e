"""UploadService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from framewire.gateway.v1 import upload_pb2, upload_pb2_grpc
from framewire.storage.v1 import storage_pb2
from kit import errors
from services.gateway import auth, peers, store
from services.gateway.api import common

UPLOAD_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Sort:
    """What is uploaded."""

    name: str
    kind: storage_pb2.AssetKind.ValueType
    max_bytes: int
    way: str
    """Before the request_ids of what is sent through: each way in has ids of its own."""
    reason: str
    """Of bytes that are something else."""
    seconds: float
    """Longest that one may take on its way."""


IMAGE = Sort(
    "an image",
    storage_pb2.ASSET_KIND_INPUT_IMAGE,
    10 * 1024 * 1024,
    "upload",
    "NOT_AN_IMAGE",
    120.0,
)
VIDEO = Sort(
    "a video",
    storage_pb2.ASSET_KIND_INPUT_VIDEO,
    100 * 1024 * 1024,
    "upload-video",
    "NOT_A_VIDEO",
    600.0,
)


class UploadApi(upload_pb2_grpc.UploadServiceServicer):
    """Uploads, served: bytes go straight through to storage, which looks into them."""

    def __init__(self, accounts: store.AccountStore, peers_: peers.Peers) -> None:
        self._accounts = accounts
        self._peers = peers_

    async def UploadImage(
        self, request_iterator: AsyncIterator[upload_pb2.UploadImageRequest], context: Any
    ) -> upload_pb2.Image:
        """Sends an image through."""
        return _image(await self._send_through(request_iterator, IMAGE))

    async def UploadVideo(
        self, request_iterator: AsyncIterator[upload_pb2.UploadVideoRequest], context: Any
    ) -> upload_pb2.InputVideo:
        """Sends a video through."""
        return _input_video(await self._send_through(request_iterator, VIDEO))

    async def _send_through(self, requests: AsyncIterator[Any], sort: Sort) -> storage_pb2.Asset:
        caller = common.caller()
        header = await _header(requests, sort)
        account_id = await self._account(caller, header.account_id)
        passing = _Passing(requests, sort)
        sent = storage_pb2.PutHeader(
            account_id=account_id,
            owner=_owner(sort.way, caller, header.request_id),
            kind=sort.kind,
            size_bytes=header.size_bytes,
            sha256=header.sha256,
        )
        try:
            asset = await self._peers.stubs.storage.Put(
                passing.requests(sent), timeout=sort.seconds
            )
        except errors.ServiceError as error:
            raise (passing.refusal or peers.for_caller(error)) from error
        except asyncio.CancelledError:
            # grpc cancels its call when what it sends raises; that is not the caller's hanging up.
            if passing.refusal is None:
                raise
            raise passing.refusal from None
        if header.sha256 and asset.source_sha256 not in ("", header.sha256):
            common.check_reuse(asset.source_sha256.encode(), header.sha256.encode())
        return asset

    async def CreateUpload(self, request: Any, context: Any) -> upload_pb2.CreateUploadResponse:
        """A URL to PUT to."""
        caller = common.caller()
        signed = await self._storage(
            self._peers.stubs.storage.CreateUpload,
            storage_pb2.CreateUploadRequest(
                account_id=await self._account(caller, request.account_id),
                owner=_owner("put", caller, request.request_id),
                size_bytes=request.size_bytes,
                media_type=request.media_type,
            ),
            peers.TIMEOUT_SECONDS,
        )
        return upload_pb2.CreateUploadResponse(
            upload_id=signed.upload_id,
            url=signed.url,
            headers=signed.headers,
            expires_at=signed.expires_at,
        )

    async def CompleteUpload(self, request: Any, context: Any) -> upload_pb2.Image:
        """Takes an image that was PUT."""
        return _image(await self._complete(request, IMAGE))

    async def CompleteVideoUpload(self, request: Any, context: Any) -> upload_pb2.InputVideo:
        """Takes a video that was PUT."""
        return _input_video(await self._complete(request, VIDEO))

    async def _complete(self, request: Any, sort: Sort) -> storage_pb2.Asset:
        asset = await self._storage(
            self._peers.stubs.storage.CompleteUpload,
            storage_pb2.CompleteUploadRequest(
                account_id=await self._account(common.caller(), request.account_id),
                upload_id=request.upload_id,
            ),
            UPLOAD_SECONDS,
        )
        if asset.kind != sort.kind:
            raise errors.InvalidArgument(
                sort.reason,
                f"the upload is not {sort.name}, by the media type that was announced; "
                "complete it with the call for the other",
            )
        return asset

    async def ImportImage(self, request: Any, context: Any) -> upload_pb2.Image:
        """Fetches an image."""
        caller = common.caller()
        asset = await self._storage(
            self._peers.stubs.storage.Import,
            storage_pb2.ImportRequest(
                account_id=await self._account(caller, request.account_id),
                owner=_owner("import", caller, request.request_id),
                url=request.url,
            ),
            UPLOAD_SECONDS,
        )
        return _image(asset)

    async def _account(self, caller: auth.Caller, named: str) -> str:
        account_id = caller.account(named)
        if await self._accounts.get(account_id) is None:
            raise auth.account_not_found()
        return account_id

    async def _storage(self, method: Any, request: Any, seconds: float) -> Any:
        try:
            return await method(request, timeout=seconds)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error


class _Passing:
    """Passes chunks on and counts them; keeps what it refused, because grpc swallows what an iterator raises."""

    def __init__(self, received: AsyncIterator[Any], sort: Sort) -> None:
        self._received = received
        self._sort = sort
        self.refusal: errors.ServiceError | None = None

    async def requests(
        self, header: storage_pb2.PutHeader
    ) -> AsyncIterator[storage_pb2.PutRequest]:
        yield storage_pb2.PutRequest(header=header)
        size = 0
        try:
            async for part in self._received:
                size += len(part.chunk)
                _check(part, size, self._sort)
                yield storage_pb2.PutRequest(chunk=part.chunk)
        except errors.ServiceError as error:
            self.refusal = error
            raise


def _check(part: Any, size: int, sort: Sort) -> None:
    if part.WhichOneof("part") != "chunk":
        raise _out_of_order("the header comes once, first")
    if size > sort.max_bytes:
        raise _too_large(sort)


def _too_large(sort: Sort) -> errors.InvalidArgument:
    return errors.InvalidArgument("TOO_LARGE", f"{sort.name} has at most {sort.max_bytes:,} bytes")


def _out_of_order(rule: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("INVALID_FIELD", f"part: {rule}", violations=[("part", rule)])


async def _header(requests: AsyncIterator[Any], sort: Sort) -> Any:
    async for part in requests:
        if part.WhichOneof("part") != "header":
            break
        if part.header.size_bytes > sort.max_bytes:
            raise _too_large(sort)
        return part.header
    raise _out_of_order("the first message is the header")


def _owner(way: str, caller: auth.Caller, request_id: str) -> str:
    """Whose request_id it is: each way in has ids of its own."""
    return ":".join(filter(None, (way, caller.scope, request_id)))


def _image(asset: storage_pb2.Asset) -> upload_pb2.Image:
    return upload_pb2.Image(
        image_id=asset.asset_id,
        account_id=asset.account_id,
        media_type=asset.media_type,
        width=asset.width,
        height=asset.height,
        size_bytes=asset.size_bytes,
        created_at=asset.created_at,
        expires_at=asset.expires_at if asset.HasField("expires_at") else None,
    )


def _input_video(asset: storage_pb2.Asset) -> upload_pb2.InputVideo:
    return upload_pb2.InputVideo(
        input_video_id=asset.asset_id,
        account_id=asset.account_id,
        media_type=asset.media_type,
        width=asset.width,
        height=asset.height,
        duration_ms=asset.duration_ms,
        fps=asset.fps,
        codec=asset.codec,
        size_bytes=asset.size_bytes,
        created_at=asset.created_at,
        expires_at=asset.expires_at if asset.HasField("expires_at") else None,
    )
