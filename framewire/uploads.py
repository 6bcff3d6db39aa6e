"""What videos start from, as the SDK sends it: images and videos, in one stream or past the gateway."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from framewire import encode, transport, types
from framewire.decode import decode
from framewire.gateway.v1 import upload_pb2, upload_pb2_grpc

MAX_IMAGE_BYTES = 10 * 1024 * 1024
MAX_VIDEO_BYTES = 100 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024

Source = Path | str | bytes
"""A file, its bytes, or, of an image, a public https:// URL."""


class Uploads:
    """The part of a Client that is about uploads."""

    account_id: str

    @property
    def _transport(self) -> transport.Transport:
        raise NotImplementedError  # a Client has it; this class is no client by itself

    @property
    def _uploads(self) -> upload_pb2_grpc.UploadServiceAsyncStub:
        return upload_pb2_grpc.UploadServiceStub(self._transport.channel)

    async def upload_image(self, image: Source, *, request_id: str = "") -> types.Image:
        """Stores an image for create_video: JPEG, PNG, WebP or AVIF, at most 10 MB."""
        body = await _body(image, MAX_IMAGE_BYTES, "10 MB")
        header = upload_pb2.UploadImageHeader(**self._header(body, request_id))

        async def requests() -> AsyncIterator[upload_pb2.UploadImageRequest]:
            yield upload_pb2.UploadImageRequest(header=header)
            for start in range(0, len(body), _CHUNK_BYTES):
                yield upload_pb2.UploadImageRequest(chunk=body[start : start + _CHUNK_BYTES])

        stored = await self._transport.upload(self._uploads.UploadImage, requests)
        return decode(types.Image, stored)

    async def upload_video(self, video: Source, *, request_id: str = "") -> types.InputVideo:
        """Stores a video for create_video: MP4, MOV or WebM, at most 100 MB and 30 s. Its sound is not kept."""
        body = await _body(video, MAX_VIDEO_BYTES, "100 MB")
        header = upload_pb2.UploadVideoHeader(**self._header(body, request_id))

        async def requests() -> AsyncIterator[upload_pb2.UploadVideoRequest]:
            yield upload_pb2.UploadVideoRequest(header=header)
            for start in range(0, len(body), _CHUNK_BYTES):
                yield upload_pb2.UploadVideoRequest(chunk=body[start : start + _CHUNK_BYTES])

        stored = await self._transport.upload(self._uploads.UploadVideo, requests)
        return decode(types.InputVideo, stored)

    def _header(self, body: bytes, request_id: str) -> dict[str, Any]:
        return {
            "request_id": request_id or new_request_id(),
            "account_id": self.account_id,
            "size_bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }

    async def import_image(self, url: str, *, request_id: str = "") -> types.Image:
        """Has an image fetched from a public https URL, as if its bytes were uploaded."""
        request = upload_pb2.ImportImageRequest(
            request_id=request_id or new_request_id(), account_id=self.account_id, url=url
        )
        stored = await self._transport.unary(self._uploads.ImportImage, request)
        return decode(types.Image, stored)

    async def create_upload(
        self, size_bytes: int, media_type: str, *, request_id: str = ""
    ) -> types.Upload:
        """A URL that someone else, a browser say, can PUT exactly such an image or video to, with the headers that it
        names.

        complete_upload makes it an image, complete_video_upload a video; what is not completed within an hour is
        removed.
        """
        request = upload_pb2.CreateUploadRequest(
            request_id=request_id or new_request_id(),
            account_id=self.account_id,
            size_bytes=size_bytes,
            media_type=media_type,
        )
        signed = await self._transport.unary(self._uploads.CreateUpload, request)
        return decode(types.Upload, signed)

    async def complete_upload(self, upload_id: str) -> types.Image:
        """Makes what was PUT an image for create_video. Idempotent."""
        request = upload_pb2.CompleteUploadRequest(upload_id=upload_id, account_id=self.account_id)
        stored = await self._transport.unary(self._uploads.CompleteUpload, request)
        return decode(types.Image, stored)

    async def complete_video_upload(self, upload_id: str) -> types.InputVideo:
        """Makes what was PUT a video for create_video. Idempotent."""
        request = upload_pb2.CompleteVideoUploadRequest(
            upload_id=upload_id, account_id=self.account_id
        )
        stored = await self._transport.unary(self._uploads.CompleteVideoUpload, request)
        return decode(types.InputVideo, stored)

    async def upload_inputs(
        self,
        image: Source | Mapping[int, Source] | None = None,
        video: Source | None = None,
        *,
        fit: str = "",
        crop: types.CropBounds | None = None,
        request_id: str = "",
    ) -> tuple[types.VideoInput, ...]:
        """Stores what a video is to start from, for create_video's `inputs`: an image, images by frame, or a video.

        Fits: "COVER", "CONTAIN", "CONTAIN_BLURRED"; as the crop, of all of them. Idempotent with a request_id.
        """
        request_id = request_id or new_request_id()
        images = image if isinstance(image, Mapping) else {0: image} if image is not None else {}
        inputs: list[types.VideoInput] = []
        for frame, source in images.items():
            name = "image" if frame == 0 else f"image at {frame}"
            image_id = await self._store_image(source, _derived(request_id, name))
            inputs.append(
                types.VideoInput(image_id=image_id, frame_index=frame, fit=fit, crop=crop)
            )
        if video is not None:
            stored = await self.upload_video(video, request_id=_derived(request_id, "video"))
            clip = types.VideoInput(input_video_id=stored.input_video_id, fit=fit, crop=crop)
            inputs.append(clip)
        return tuple(inputs)

    async def _store_image(self, source: Source, request_id: str) -> str:
        if isinstance(source, str) and source.startswith("https://"):
            return (await self.import_image(source, request_id=request_id)).image_id
        return (await self.upload_image(source, request_id=request_id)).image_id


def new_request_id() -> str:
    """The id of one logical call."""
    return str(uuid.uuid4())


def _derived(request_id: str, name: str) -> str:
    return str(uuid.uuid5(uuid.UUID(request_id), name))


async def _body(source: Source, max_bytes: int, limit: str) -> bytes:
    """The whole file; one that is too large is refused before it is read."""
    if isinstance(source, bytes):
        return source
    path = Path(source)

    def read() -> bytes:
        if path.stat().st_size > max_bytes:
            raise encode.invalid(
                "TOO_LARGE", f"{path} has more than {limit}; make it smaller first"
            )
        return path.read_bytes()

    return await asyncio.to_thread(read)
