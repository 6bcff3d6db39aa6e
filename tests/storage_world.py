"""The storage service alone, as a process on a real Postgres and a real S3, and what tests do with it."""

from __future__ import annotations

import asyncio
import io
import urllib.error
import urllib.request
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import av
import minio
import pytest
import pytest_asyncio
from PIL import Image

from framewire.storage.v1 import storage_pb2 as pb
from framewire.storage.v1 import storage_pb2_grpc
from kit import auth, errors, rpc
from services.local import stack
from tests import containers, picture_server, pictures, s3_front
from tests.waiting import eventually

IMAGE, VIDEO = pb.ASSET_KIND_INPUT_IMAGE, pb.ASSET_KIND_OUTPUT_VIDEO
CLIP = pb.ASSET_KIND_INPUT_VIDEO
CHUNK = 256 * 1024
STALL_SECONDS = 1.0
BODY = pictures.plain((200, 40, 40))
"""What is PUT to a URL where nothing else is said."""
SETTINGS = {
    "STORAGE_STALL_SECONDS": f"{STALL_SECONDS}",
    "STORAGE_SWEEP_SECONDS": "0.1",
    "STORAGE_RETENTION_SECONDS": "0.1",
    "STORAGE_SCRUB_SECONDS": "0.1",
    "STORAGE_RENDITION_KEEP_SECONDS": "3600",
    "STORAGE_MAX_IMAGE_BYTES": "200000",
    "STORAGE_MAX_INPUT_VIDEO_BYTES": "300000",
    "STORAGE_MAX_INPUT_VIDEO_SECONDS": "3",
    "STORAGE_MAX_INPUT_VIDEO_PIXELS": "10000",
    "STORAGE_IMPORT_NETWORKS": "127.0.0.0/8",
    "STORAGE_IMPORT_SECONDS": "4",
}


class World:
    """The running service and what tests do with it."""

    def __init__(
        self,
        running: stack.Stack,
        outer: containers.Outer,
        stub: Any,
        generator: Any,
        pool: asyncpg.Pool,
    ) -> None:
        self.stack = running
        self.objects_server = outer.server(running, "s3")
        self.stub = stub
        """As the gateway calls it."""
        self.generator = generator
        self.pool = pool
        self.data_dir = running.data_dir
        where = running.addresses
        self.s3 = minio.Minio(
            where.s3_endpoint, where.s3_access_key, where.s3_secret_key, secure=False,
            region=where.s3_region,
        )  # fmt: skip

    async def put(
        self, account: str, body: bytes, kind: Any = IMAGE, owner: str = "one", **header: Any
    ) -> pb.Asset:
        return await self.send(account, pieces(body), kind, owner, **header)

    async def send(
        self,
        account: str,
        body: AsyncIterable[bytes],
        kind: Any = IMAGE,
        owner: str = "one",
        **header: Any,
    ) -> pb.Asset:
        async def requests() -> AsyncIterator[pb.PutRequest]:
            yield pb.PutRequest(
                header=pb.PutHeader(account_id=account, owner=owner, kind=kind, **header)
            )
            async for chunk in body:
                yield pb.PutRequest(chunk=chunk)

        return await self.stub.Put(requests(), timeout=30)

    async def get(self, asset: pb.Asset, offset: int = 0, length: int = 0) -> bytes:
        request = pb.GetRequest(
            account_id=asset.account_id, asset_id=asset.asset_id, offset=offset, length=length
        )
        return b"".join([part.chunk async for part in self.stub.Get(request, timeout=30)])

    async def stat(self, asset: pb.Asset) -> pb.Asset:
        return await self.stub.Stat(
            pb.StatRequest(account_id=asset.account_id, asset_id=asset.asset_id), timeout=10
        )

    async def listed(self, account: str, **fields: Any) -> pb.ListResponse:
        return await self.stub.List(pb.ListRequest(account_id=account, **fields), timeout=10)

    async def fit(self, asset: pb.Asset, width: int, height: int, **fields: Any) -> pb.Asset:
        request = pb.FitRequest(
            account_id=asset.account_id,
            asset_id=asset.asset_id,
            width=width,
            height=height,
            **fields,
        )
        return await self.stub.Fit(request, timeout=30)

    async def rendition(self, asset: pb.Asset, height: int) -> pb.Asset:
        request = pb.MakeRenditionRequest(
            account_id=asset.account_id, asset_id=asset.asset_id, height=height
        )
        return await self.generator.MakeRendition(request, timeout=30)

    async def delete(self, asset: pb.Asset) -> pb.Asset:
        return await self.stub.Delete(
            pb.DeleteRequest(account_id=asset.account_id, asset_id=asset.asset_id), timeout=10
        )

    async def unpin(self, account: str, owner: str) -> int:
        answer = await self.stub.Unpin(pb.UnpinRequest(account_id=account, owner=owner), timeout=10)
        return answer.dropped

    def objects(self, account: str) -> set[str]:
        """Keys of everything in S3 that belongs to the account."""
        buckets = ("framewire-inputs", "framewire-outputs")
        found = [self.s3.list_objects(name, f"{account}/", recursive=True) for name in buckets]
        return {str(item.object_name) for items in found for item in items}

    async def clean(self, account: str) -> None:
        """Every object is that of a READY asset and every READY asset has one; no put is left."""
        rows = await self.pool.fetch("SELECT * FROM assets WHERE account_id = $1", account)
        states = {row["state"] for row in rows}
        assert states <= {"READY", "DELETED"}, states
        known = {row["object_key"] for row in rows if row["state"] == "READY"}
        found = self.objects(account)
        assert known == found, f"missing: {known - found}, unknown: {found - known}"
        left = await self.pool.fetchval(
            "SELECT count(*) FROM puts JOIN assets USING (asset_id) WHERE account_id = $1", account
        )
        assert left == 0, f"{left} puts are left"

    async def nothing(self, account: str) -> bool:
        """There is no trace of a put in the account."""
        await self.clean(account)
        assert await self.pool.fetchval(
            "SELECT count(*) FROM assets WHERE account_id = $1", account
        ) in (0, None)
        return True

    def arm(self, point: str) -> None:
        """The service kills itself there, once."""
        (self.data_dir / "failpoints").write_text(f"{point}=kill\n")

    async def revive(self) -> None:
        """Starts the service again after it was killed, and waits until it answers on our channel."""
        assert await self.stack.supervisor.wait_exit("storage") == -9
        await self.stack.supervisor.start("storage")

        async def answers() -> bool:
            try:
                await self.listed("a" * 26)
            except errors.Unavailable:  # the channel has not connected again
                return False
            return True

        await eventually(answers)

    def scratch(self) -> list[Path]:
        place = self.stack.data_dir / "scratch"
        return [path for path in place.glob("process-*/*") if path.name != "lock"]


async def create(
    world: World, account: str, size: int = len(BODY), owner: str = "one"
) -> pb.CreateUploadResponse:
    request = pb.CreateUploadRequest(
        account_id=account, owner=owner, size_bytes=size, media_type="image/jpeg"
    )
    return await world.stub.CreateUpload(request, timeout=10)


async def complete(world: World, account: str, upload_id: str) -> pb.Asset:
    request = pb.CompleteUploadRequest(account_id=account, upload_id=upload_id)
    return await world.stub.CompleteUpload(request, timeout=30)


async def send(url: str, headers: Mapping[str, str], body: bytes = BODY) -> int:
    def put() -> int:
        request = urllib.request.Request(url, body, dict(headers), method="PUT")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    return await asyncio.to_thread(put)


def incoming(world: World, account: str) -> list[str]:
    found = world.s3.list_objects("framewire-inputs", f"incoming/{account}/", recursive=True)
    return [str(item.object_name) for item in found]


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), CHUNK):
        yield body[start : start + CHUNK]


async def stalling(body: bytes) -> AsyncIterator[bytes]:
    yield body
    await asyncio.Event().wait()


@contextmanager
def refused(kind: type[errors.ServiceError], *reasons: str) -> Iterator[Any]:
    with pytest.raises(kind) as raised:
        yield raised
    assert raised.value.reason in reasons


def film(path: Path, shade: int = 90, frames: int = 24) -> bytes:
    """A real MP4: 24 frames of 64 x 48 at 24 per second."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_image(
                Image.new("RGB", (64, 48), (shade, index * 5 % 256, 0))
            )
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def opened(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with running(tmp_path_factory.mktemp("storage")) as opened_:
        yield opened_


@asynccontextmanager
async def running(
    place: Path, front: s3_front.Front | None = None, **more: str
) -> AsyncIterator[World]:
    """A storage of its own, with further settings, and with the front between it and S3."""
    own = {
        "STORAGE_IMPORT_CA_FILE": str(picture_server.certificate(place)),
        "FRAMEWIRE_FAILPOINTS": str(place / "failpoints"),
        "STORAGE_SCRATCH_DIR": str(place / "scratch"),
    }
    if front is not None:
        own["STORAGE_ENDPOINT"] = front.address
    async with containers.outer_servers() as outer:
        whole = stack.Stack(
            place,
            services=("storage",),
            environ=outer.environ,
            overrides={"storage": SETTINGS | own | more},
        )
        if front is not None:
            front.upstream = lambda: whole.addresses.s3_endpoint
        try:
            await whole.start()
            async with (
                rpc.channel(whole.addresses.listen["storage"], tokens(whole, "gateway")) as channel,
                rpc.channel(whole.addresses.listen["storage"], tokens(whole, "generator")) as other,
                asyncpg.create_pool(whole.addresses.database_url("storage"), min_size=1) as pool,
            ):
                stubs = [storage_pb2_grpc.StorageServiceStub(each) for each in (channel, other)]
                yield World(whole, outer, *stubs, pool)
        finally:
            await whole.destroy()


def tokens(whole: stack.Stack, service: str) -> auth.ServiceTokens:
    return auth.ServiceTokens(service, whole.addresses.service_token_secret)


async def swept(world: World, account: str) -> None:
    """Makes every put look old, until the sweeper has removed what no READY asset has."""

    async def clean() -> bool:
        hours = "interval '3 hours'"
        await world.pool.execute(
            f"UPDATE puts SET created_at = created_at - {hours}, swept_at = swept_at - {hours}"
        )
        await world.clean(account)
        return True

    await eventually(clean, within_seconds=10)
