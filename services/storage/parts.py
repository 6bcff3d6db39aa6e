"""Objects that are written while their bytes still arrive: S3's uploads in parts. Nobody sees one before its end.

The `minio` client does such uploads as a whole only, from a stream that it reads by itself. Here its calls for the
single steps are used, and unfinished ones can be found and aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

import minio
from minio import datatypes
from minio import error as minio_error

from kit.failpoints import failpoint

# Some servers (R2) want all parts but the last of one size; none takes smaller ones than this.
PART_BYTES = 5 * 1024 * 1024
_GONE = "NoSuchUpload"
REFUSED = minio_error.MinioException
"""What the client raises of an answer that is none of success."""


class Client(minio.Minio):
    """The `minio` client with the steps of an upload in parts."""

    def put_bytes(
        self, bucket: str, key: str, body: bytearray | memoryview, headers: Mapping[str, str]
    ) -> None:
        """Stores what is small, in one call."""
        self._put_object(bucket, key, _bytes(body), dict(headers))

    def begin_parts(self, bucket: str, key: str, headers: Mapping[str, str]) -> str:
        """The id of a new upload."""
        return self._create_multipart_upload(bucket, key, dict(headers))

    def send_part(
        self, bucket: str, key: str, upload: str, number: int, body: bytearray | memoryview
    ) -> datatypes.Part:
        """One part. Sent again it takes the place of the first."""
        return datatypes.Part(
            number, self._upload_part(bucket, key, _bytes(body), None, upload, number)
        )

    def end_parts(self, bucket: str, key: str, upload: str, parts: list[datatypes.Part]) -> None:
        """Makes the object of its parts."""
        self._complete_multipart_upload(bucket, key, upload, parts)

    def check_size(self, bucket: str, key: str, size_bytes: int) -> None:
        """Raises OSError where the object is of another size."""
        stored_bytes = self.stat_object(bucket, key).size
        if stored_bytes != size_bytes:
            raise OSError(f"{stored_bytes} of {size_bytes} bytes were stored")

    def unfinished(self, bucket: str, key: str) -> list[str]:
        """Uploads of that very key that are neither ended nor aborted."""
        with _gone():
            # MinIO lists the uploads of one key and of nothing else: never those of a prefix.
            listed = self._list_multipart_uploads(bucket, prefix=key).uploads
            return [str(upload.upload_id) for upload in listed if upload.object_name == key]
        return []

    def abort_parts(self, bucket: str, key: str) -> None:
        """Drops every unfinished upload of that very key. Idempotent."""
        for upload in self.unfinished(bucket, key):
            with _gone():
                self._abort_multipart_upload(bucket, key, upload)


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    """What is not there any more is as good as aborted."""
    try:
        yield
    except minio_error.MinioException as error:
        # rclone says so of a bucket in which nothing is under way, as text/xml, which the client does not read.
        if _GONE not in str(error):
            raise


def _bytes(body: bytearray | memoryview) -> Any:
    """Its signature says bytes; whatever has a buffer is hashed and sent without a copy."""
    return body


class Run(Protocol):
    """Runs a call in a thread that writes to S3."""

    def __call__(self, call: Callable[[], None], operation: str, /) -> Awaitable[None]: ...


class Growing:
    """One object on its way. One part is filled while the one before is sent, and more is not taken."""

    def __init__(
        self, client: Client, bucket: str, key: str, headers: Mapping[str, str], run: Run
    ) -> None:
        self.key = key
        self._headers = headers
        self.size_bytes = 0
        self._client = client
        self._bucket = bucket
        self._run = run
        self._part, self._spare = bytearray(PART_BYTES), bytearray(PART_BYTES)
        self._filled = 0
        self._upload = ""
        self._parts: list[datatypes.Part] = []
        self._sending: asyncio.Task[None] | None = None

    async def write(self, piece: bytes) -> None:
        """Takes the next bytes; waits while S3 is slower than the sender. Raises Unavailable."""
        rest = memoryview(piece)
        while rest:
            taken = rest[: PART_BYTES - self._filled]
            self._part[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            self.size_bytes += len(taken)
            rest = rest[len(taken) :]
            if self._filled == PART_BYTES:
                await self._send()

    async def _send(self) -> None:
        await self._sent()
        if self._parts:
            await failpoint("storage.put.after_part")
        body = memoryview(self._part)[: self._filled]
        self._part, self._spare, self._filled = self._spare, self._part, 0

        def send() -> None:
            where = (self._bucket, self.key)
            if not self._upload:
                self._upload = self._client.begin_parts(*where, self._headers)
            number = len(self._parts) + 1
            self._parts.append(self._client.send_part(*where, self._upload, number, body))

        self._sending = asyncio.ensure_future(self._run(send, "put_part"))

    async def _sent(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            await sending

    async def finish(self, tail: bytes) -> None:
        """Adds the last bytes and makes the object; makes sure that all of it is there. Raises Unavailable."""
        await self.write(tail)
        await self._sent()
        rest = memoryview(self._part)[: self._filled]

        def end() -> None:
            where = (self._bucket, self.key)
            if self._parts:
                if rest:
                    number = len(self._parts) + 1
                    last = self._client.send_part(*where, self._upload, number, rest)
                    self._parts.append(last)
                self._client.end_parts(*where, self._upload, self._parts)
            else:
                self._client.put_bytes(*where, rest, self._headers)
            self._client.check_size(*where, self.size_bytes)

        await self._run(end, "put")

    async def settle(self) -> None:
        """Waits until nothing is being sent any more, however it ends: only then can it be aborted."""
        if self._sending is not None:
            await asyncio.wait({self._sending})
            if not self._sending.cancelled():
                self._sending.exception()  # seen, so that asyncio does not report it
