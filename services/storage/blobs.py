"""Bytes in S3: with `parts` the only place that knows the `minio` client. Synchronous calls in bounded thread pools."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

import minio
import urllib3
from minio import error as minio_error

from kit import telemetry
from services.storage import assets, backstop, config, parts, presign, threads, troubles

T = TypeVar("T")

# Each holds parts of 5 MiB, so the number of writers bounds the memory.
WRITERS = 6
READERS = 8
READ_BYTES = 1024 * 1024
CHUNK_BYTES = 256 * 1024
CONNECT_TIMEOUT_SECONDS = 5.0
_ABSENT = frozenset({"NoSuchKey", "NoSuchBucket"})
PROBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Listed:
    """An object that is there."""

    key: str
    modified_at: datetime


class Blobs:
    """The buckets. Every call raises Unavailable when S3 does not do what it should."""

    def __init__(self, settings: config.Settings) -> None:
        self._names: Mapping[assets.Bucket, str] = {
            assets.Bucket.INPUT: settings.input_bucket,
            assets.Bucket.OUTPUT: settings.output_bucket,
        }
        self._base_url = settings.output_base_url
        # What lies under a key never changes, but it may be deleted.
        cached = {"Cache-Control": f"public, max-age={settings.output_cache_seconds}"}
        self._stored_headers: Mapping[assets.Bucket, dict[str, str]] = {
            assets.Bucket.INPUT: {},
            assets.Bucket.OUTPUT: cached if self._base_url else {},
        }
        self._http = troubles.Pool(
            num_pools=4,
            maxsize=WRITERS + settings.concurrent_gets,
            timeout=urllib3.Timeout(
                connect=CONNECT_TIMEOUT_SECONDS, read=settings.s3_timeout_seconds
            ),
            retries=urllib3.Retry(
                total=3, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504)
            ),
        )
        public_secure = (
            settings.secure if settings.public_secure is None else settings.public_secure
        )
        self._client = self._connect(settings, settings.endpoint, settings.secure, self._http)
        # Looked with, not worked with: asks once, and has a thread of its own.
        self._probing = troubles.Pool(timeout=urllib3.Timeout(PROBE_SECONDS), retries=False)
        self._probe = self._connect(settings, settings.endpoint, settings.secure, self._probing)
        self._prober = ThreadPoolExecutor(1, "s3-probe")
        # It only signs: the host is part of the signature, and ours is not the one that clients reach.
        self._public = self._connect(
            settings, settings.public_endpoint or settings.endpoint, public_secure, self._http
        )
        self._signer = presign.Signer(
            settings.access_key,
            settings.secret_key.get_secret_value(),
            settings.region,
            settings.public_endpoint or settings.endpoint,
            public_secure,
        )
        self._writers = ThreadPoolExecutor(WRITERS, "s3-write")
        self._readers = ThreadPoolExecutor(READERS, "s3-read")
        self._gets = asyncio.Semaphore(settings.concurrent_gets)

    def _connect(
        self, settings: config.Settings, endpoint: str, secure: bool, http: troubles.Pool
    ) -> parts.Client:
        return parts.Client(
            endpoint,
            access_key=settings.access_key,
            secret_key=settings.secret_key.get_secret_value(),
            secure=secure,
            region=settings.region,
            http_client=http,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._writers.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._prober.shutdown(wait=False, cancel_futures=True)
        self._http.clear()
        self._probing.clear()

    async def ensure_buckets(self) -> None:
        """Makes the buckets that are missing. Idempotent."""

        def ensure() -> None:
            for name in self._names.values():
                if self._client.bucket_exists(name):
                    continue
                try:
                    self._client.make_bucket(name)
                except minio_error.MinioException:
                    if not self._client.bucket_exists(name):  # else another was first
                        raise

        await self._run(self._writers, ensure, "make_buckets")

    async def check(self) -> None:
        """Raises Unavailable unless S3 answers now, and shows us our buckets."""

        def check() -> None:
            for name in self._names.values():
                if not self._probe.bucket_exists(name):
                    raise OSError(f"there is no bucket {name}")

        await self._run(self._prober, check, "check")

    async def ensure_rules(self, settings: config.Settings) -> list[str]:
        """Gives the buckets the rules that they take, and says which. Idempotent; having none is no mistake."""

        def ensure() -> list[str]:
            return [
                f"{bucket} {rule}"
                for bucket, name in self._names.items()
                for rule in backstop.ensure(self._client, name, backstop.rules(bucket, settings))
            ]

        return await self._run(self._writers, ensure, "bucket_rules")

    async def put_file(self, bucket: assets.Bucket, key: str, path: Path, media_type: str) -> None:
        """Stores a file of known size, and makes sure that all of it arrived."""

        def put() -> None:
            size_bytes = path.stat().st_size
            with path.open("rb") as file:
                self._client.put_object(
                    self._names[bucket],
                    key,
                    file,
                    size_bytes,
                    content_type=media_type,
                    metadata=dict(self._stored_headers[bucket]),
                    num_parallel_uploads=1,
                )
            self._client.check_size(self._names[bucket], key, size_bytes)

        await self._run(self._writers, put, "put")

    def grow(self, bucket: assets.Bucket, key: str, media_type: str) -> parts.Growing:
        """An object to be written bit by bit. What is not finished must be discarded."""

        async def run(call: Callable[[], None], operation: str) -> None:
            await self._run(self._writers, call, operation)

        headers = {"Content-Type": media_type, **self._stored_headers[bucket]}
        return parts.Growing(self._client, self._names[bucket], key, headers, run)

    async def discard(self, bucket: assets.Bucket, keys: Sequence[str]) -> None:
        """Removes objects, and what was sent of those that were never finished. Idempotent."""

        def abort() -> None:
            for key in keys:
                self._client.abort_parts(self._names[bucket], key)

        if keys:
            await self._run(self._writers, abort, "abort_parts")
            await self.remove(bucket, keys)

    async def get_file(self, bucket: assets.Bucket, key: str, path: Path) -> None:
        """Brings an object into a file."""

        def get() -> None:
            opened = _object(self._client, self._names[bucket], key, 0, 0)
            with opened as response, path.open("wb") as file:
                while chunk := response.read(READ_BYTES):
                    file.write(chunk)

        await self._run(self._readers, get, "get")

    async def read(
        self, bucket: assets.Bucket, key: str, offset: int, length: int
    ) -> AsyncIterator[bytes]:
        """Streams exactly `length` bytes, holding 1 MiB of them at a time."""
        async with self._gets:
            opened = _object(self._client, self._names[bucket], key, offset, length)
            response = await self._run(self._readers, opened.__enter__, "open")
            try:
                left = length
                while left:
                    piece = await self._run(
                        self._readers, lambda: response.read(READ_BYTES), "read"
                    )
                    left -= len(piece)
                    if not piece or left < 0:
                        raise troubles.told(OSError("S3 sent another number of bytes"))
                    for start in range(0, len(piece), CHUNK_BYTES):
                        yield piece[start : start + CHUNK_BYTES]
            finally:
                opened.__exit__(None, None, None)

    async def remove(self, bucket: assets.Bucket, keys: Sequence[str]) -> None:
        """Removes objects. Idempotent: one that is not there is as good as removed."""

        def remove() -> None:
            for key in keys:
                try:
                    self._client.remove_object(self._names[bucket], key)
                except minio_error.MinioException:
                    if self._exists(bucket, key):
                        raise

        if keys:
            await self._run(self._writers, remove, "remove")

    def _exists(self, bucket: assets.Bucket, key: str) -> bool:
        return self._size(bucket, key) is not None

    def _size(self, bucket: assets.Bucket, key: str) -> int | None:
        name = self._names[bucket]
        for bucket_is_there in (False, True):
            try:
                return self._client.stat_object(name, key).size
            except minio_error.S3Error as error:
                if error.code not in _ABSENT:
                    raise
                # A bucket that is not there (another server, another name) has not lost its objects, and one that
                # came back is asked again.
                if not bucket_is_there and not self._client.bucket_exists(name):
                    raise
        return None

    async def size(self, bucket: assets.Bucket, key: str) -> int | None:
        """How many bytes an object has; None: there is none."""
        return await self._run(self._readers, lambda: self._size(bucket, key), "stat")

    async def list_after(self, bucket: assets.Bucket, after: str, limit: int) -> list[Listed]:
        """The next objects by key."""

        def listed() -> list[Listed]:
            found = self._client.list_objects(
                self._names[bucket], recursive=True, start_after=after or None
            )
            return [
                Listed(item.object_name, item.last_modified)
                for item in itertools.islice(found, limit)
                if item.object_name is not None and item.last_modified is not None
            ]

        return await self._run(self._readers, listed, "list")

    def sign_put(
        self, bucket: assets.Bucket, key: str, headers: Mapping[str, str], seconds: int
    ) -> tuple[str, datetime]:
        """A URL at the public endpoint, good for one PUT with exactly these headers, and until when. Calls nobody."""
        now = datetime.now(UTC).replace(microsecond=0)
        url = self._signer.url("PUT", f"/{self._names[bucket]}/{key}", headers, seconds, now)
        return url, now + timedelta(seconds=seconds)

    def link(
        self, asset: assets.Asset, file_name: str, seconds: int
    ) -> tuple[str, datetime | None]:
        """Where clients read an asset, and until when; None: as long as it is there. Calls nobody.

        What was made is read at the base URL where there is one; a file's name needs a signature.
        """
        assert asset.object_key is not None
        bucket = assets.BUCKETS[asset.kind]
        if self._base_url and bucket is assets.Bucket.OUTPUT and asset.state is assets.State.READY:
            return f"{self._base_url}/{asset.object_key}", None
        return self.sign(bucket, asset.object_key, file_name, seconds)

    def sign(
        self, bucket: assets.Bucket, key: str, file_name: str, seconds: int
    ) -> tuple[str, datetime]:
        """A URL at the public endpoint, good for GET, and until when. Calls nobody."""
        now = datetime.now(UTC)
        disposition = f'attachment; filename="{file_name}"'
        url = self._public.presigned_get_object(
            self._names[bucket],
            key,
            timedelta(seconds=seconds),
            response_headers={
                "response-content-disposition": disposition,
                # Its own browser may keep it as long as the URL is good; nobody in between may.
                "response-cache-control": f"private, max-age={seconds}",
            },
            request_date=now,
        )
        return url, now.replace(microsecond=0) + timedelta(seconds=seconds)

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[[], T], operation: str) -> T:
        try:
            with telemetry.dependency("s3", operation):
                return await threads.run(pool, call)
        except troubles.RAISED as error:
            raise troubles.told(error) from error


@contextlib.contextmanager
def _object(client: minio.Minio, bucket: str, key: str, offset: int, length: int) -> Iterator[Any]:
    response = client.get_object(bucket, key, offset, length)
    try:
        yield response
    finally:
        response.close()  # what was not read is not wanted: the connection goes with it
        response.release_conn()
