"""`make bench-storage`: bytes through storage beside the same bytes by the `minio` client, to the same server."""

from __future__ import annotations

import asyncio
import io
import os
import random
import struct
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minio
import psutil
import uvloop
from PIL import Image

from bench import frame
from bench.generator_stack import Memory
from framewire.storage.v1 import storage_pb2 as pb
from framewire.storage.v1 import storage_pb2_grpc
from kit import auth, ids, rpc
from services.local import stack
from tests import storage_world

ROUNDS = int(os.environ.get("ROUNDS", "5"))
LARGE = 64 * 1024 * 1024
AT_ONCE = 16
CHUNK = 1024 * 1024
SMALL = {"1 kB": 1_000, "256 kB": 256_000}
SMALL_EACH = 40
BUCKET = "framewire-outputs"
ACCOUNT = "b" * 26

Timed = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Bench:
    """The running service and the server behind it."""

    stub: Any
    s3: minio.Minio
    memory: Memory

    async def put(self, body: bytes, kind: Any) -> pb.Asset:
        """One more asset, through gRPC."""

        async def requests() -> AsyncIterator[pb.PutRequest]:
            header = pb.PutHeader(
                account_id=ACCOUNT, owner=ids.new_id(), kind=kind, size_bytes=len(body)
            )
            yield pb.PutRequest(header=header)
            for start in range(0, len(body), CHUNK):
                yield pb.PutRequest(chunk=body[start : start + CHUNK])

        return await self.stub.Put(requests(), timeout=300)

    async def get(self, asset: pb.Asset) -> None:
        """All of its bytes, through gRPC."""
        request = pb.GetRequest(account_id=ACCOUNT, asset_id=asset.asset_id)
        size_bytes = 0
        async for part in self.stub.Get(request, timeout=300):
            size_bytes += len(part.chunk)
        assert size_bytes == asset.size_bytes

    async def signed(self, asset: pb.Asset) -> None:
        """All of its bytes, by a URL that was signed before."""
        request = pb.SignUrlRequest(account_id=ACCOUNT, asset_id=asset.asset_id)
        url = (await self.stub.SignUrl(request, timeout=10)).url

        def fetch() -> int:
            with urllib.request.urlopen(url, timeout=300) as answer:
                return sum(len(piece) for piece in iter(lambda: answer.read(CHUNK), b""))

        assert await asyncio.to_thread(fetch) == asset.size_bytes

    async def put_straight(self, body: bytes, key: str) -> None:
        """The same bytes by the client itself, whole parts in flight one at a time, as we do."""
        await asyncio.to_thread(
            self.s3.put_object,
            *(BUCKET, key, io.BytesIO(body), len(body)),
            num_parallel_uploads=1,
        )

    async def get_straight(self, key: str, size_bytes: int) -> None:
        """All bytes of an object by the client itself."""

        def fetch() -> int:
            answer = self.s3.get_object(BUCKET, key)
            try:
                return sum(len(piece) for piece in iter(lambda: answer.read(CHUNK), b""))
            finally:
                answer.close()
                answer.release_conn()

        assert await asyncio.to_thread(fetch) == size_bytes


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    """A new storage on a new S3."""
    with tempfile.TemporaryDirectory(prefix="framewire-bench-") as folder:
        whole = stack.Stack(Path(folder), services=("storage",), environ={}, report=lambda _: None)
        try:
            await whole.start()
            where = whole.addresses
            keys = (where.s3_access_key, where.s3_secret_key)
            s3 = minio.Minio(where.s3_endpoint, *keys, secure=False, region=where.s3_region)
            tokens = auth.ServiceTokens("gateway", where.service_token_secret)
            pid = next(one.pid for one in whole.supervisor.status() if one.name == "storage")
            async with rpc.channel(where.listen["storage"], tokens) as channel:
                assert pid is not None
                memory = Memory(psutil.Process(pid))
                yield Bench(storage_pb2_grpc.StorageServiceStub(channel), s3, memory)
        finally:
            await whole.destroy()


def film(size_bytes: int) -> bytes:
    """A film that plays, padded with a box that players skip."""
    with tempfile.TemporaryDirectory() as folder:
        body = storage_world.film(Path(folder) / "film.mp4")
    padding = size_bytes - len(body)
    return body + struct.pack(">I4s", padding, b"free") + bytes(padding - 8)


def picture(size_bytes: int) -> bytes:
    """A PNG of noise, of about that size."""
    side = max(4, int((size_bytes / 3) ** 0.5))
    noise = random.Random(7).randbytes(side * side * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (side, side), noise).save(out, "PNG")
    return out.getvalue()


async def rates(sides: dict[str, Timed], size_bytes: int) -> dict[str, list[float]]:
    """MB a second of each side, rounds interleaved; the first round warms."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(ROUNDS + 1):
        for name, call in sides.items():
            began = time.perf_counter()
            await call()
            if round_:
                found[name].append(size_bytes / 1e6 / (time.perf_counter() - began))
    return found


async def large(bench: Bench) -> list[frame.Measured]:
    """64 MB in and out."""
    body = film(LARGE)
    asset = await bench.put(body, storage_world.VIDEO)
    await bench.put_straight(body, "straight")
    found = await rates(
        {
            "put": lambda: bench.put(body, storage_world.VIDEO),
            "put straight": lambda: bench.put_straight(body, ids.new_id()),
            "get": lambda: bench.get(asset),
            "get straight": lambda: bench.get_straight("straight", LARGE),
            "signed": lambda: bench.signed(asset),
        },
        LARGE,
    )
    put, get = found["put straight"], found["get straight"]
    return [
        frame.against("Put of 64 MB", found["put"], "MB/s", "minio put_object", put, at_least=0.6),
        frame.against("Get of 64 MB", found["get"], "MB/s", "minio get_object", get, at_least=0.6),
        frame.against("signed URL, 64 MB", found["signed"], "MB/s", "minio get_object", get, at_least=0.95),
    ]  # fmt: skip


async def at_once(bench: Bench) -> list[frame.Measured]:
    """16 films of 64 MB arriving together: what they add to the process' resident memory."""
    body = film(LARGE)
    before = bench.memory.begin()
    await asyncio.gather(*(bench.put(body, storage_world.VIDEO) for _ in range(AT_ONCE)))
    grown = bench.memory.peak() - before
    name = f"{AT_ONCE} puts of 64 MB at once: resident memory more than before"
    return [frame.alone(name, grown, "MB", at_most=128)]


async def small(bench: Bench) -> list[frame.Measured]:
    """Small pictures one after the other: each is decoded, cleaned and written again on its way."""
    measured: list[frame.Measured] = []
    for name, size_bytes in SMALL.items():
        body = picture(size_bytes)

        async def ours(body: bytes = body) -> None:
            for _ in range(SMALL_EACH):
                await bench.put(body, storage_world.IMAGE)

        async def theirs(body: bytes = body) -> None:
            for _ in range(SMALL_EACH):
                await bench.put_straight(body, ids.new_id())

        found = await rates({"ours": ours, "theirs": theirs}, SMALL_EACH * 1_000_000)
        against = "minio put_object"
        measured.append(
            frame.against(
                f"Put of a picture of {name}", found["ours"], "1/s", against, found["theirs"]
            )
        )
    return measured


NOTES = f"""\
One process of storage, Postgres and the S3 server of `services/local` on one machine, {ROUNDS} rounds, both sides in
turn, medians. A Put through storage is hashed, written to a file and sent on in parts while it arrives, inspected,
gets a poster and a mark behind it, and its size is looked at afterwards; the client's own is none of these. The film
is short and padded to its size. Pictures: {SMALL_EACH} one after the other, each decoded and written again without
metadata in the sandbox.
Memory is that of storage's own process; the sandbox's workers have bounds of their own."""


async def main() -> None:
    """All of it."""
    async with running() as bench:
        measured = await large(bench)
        measured += await at_once(bench)
        measured += await small(bench)
    frame.publish("storage", "make bench-storage", measured, NOTES)


if __name__ == "__main__":
    uvloop.run(main())
