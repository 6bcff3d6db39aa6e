"""A video that was made goes to S3 while it arrives: out of sight until it was judged, and never left half there."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from framewire.storage.v1 import storage_pb2 as pb
from kit import errors, ids
from services.storage import parts
from services.storage.media import boxes, marks
from tests.fault import kills
from tests.storage_world import VIDEO, World, film, pieces, refused, swept, world
from tests.waiting import eventually

__all__ = ["world"]  # fixture

PARTS = 2
LARGE = PARTS * parts.PART_BYTES + 1_000_000
BUCKET = "framewire-outputs"


def large(path: Path, size_bytes: int = LARGE, *, open_ended: bool = False) -> bytes:
    """A film that plays, with a box behind it that players skip."""
    body = film(path)
    padding = size_bytes - len(body)
    said = 0 if open_ended else padding
    return body + said.to_bytes(4, "big") + b"free" + b"\7" * (padding - 8)


def digest(body: bytes) -> str:
    """Compared in place of bytes, of which pytest would print megabytes."""
    return hashlib.sha256(body).hexdigest()


def client(world: World) -> parts.Client:
    where = world.stack.addresses
    return parts.Client(
        where.s3_endpoint,
        access_key=where.s3_access_key,
        secret_key=where.s3_secret_key,
        secure=False,
        region=where.s3_region,
    )


async def unfinished(world: World, key: str) -> list[str]:
    return await asyncio.to_thread(client(world).unfinished, BUCKET, key)


async def noted(world: World, account: str) -> list[str]:
    """Keys that the account's puts are going to store."""
    query = "SELECT unnest(object_keys) AS key FROM puts JOIN assets USING (asset_id) WHERE account_id = $1"
    return [row["key"] for row in await world.pool.fetch(query, account)]


class Paused:
    """A sender that stops after most of the bytes until it is told to go on."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.there = asyncio.Event()
        self.go_on = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        most = PARTS * parts.PART_BYTES + 200_000
        async for piece in pieces(self._body[:most]):
            yield piece
        self.there.set()
        await self.go_on.wait()
        yield self._body[most:]


async def begun(world: World, account: str, sender: Paused) -> tuple[asyncio.Task[pb.Asset], str]:
    """A put whose first parts are in S3, and its key."""
    putting = asyncio.create_task(world.send(account, sender.chunks(), VIDEO))
    await sender.there.wait()

    async def key() -> str:
        found = [key for key in await noted(world, account) if await unfinished(world, key)]
        return found[0] if found else ""

    return putting, await eventually(key, what="parts to be sent while the sender pauses")


async def test_parts_are_sent_while_bytes_arrive_and_nothing_is_seen(
    world: World, tmp_path: Path
) -> None:
    account, body = ids.new_id(), large(tmp_path / "film.mp4")
    sender = Paused(body)
    putting, key = await begun(world, account, sender)
    assert (await world.listed(account)).assets == []
    assert key not in world.objects(account)
    sender.go_on.set()
    asset = await putting
    kept = await world.get(asset)
    assert digest(kept[: len(body)]) == digest(body)
    assert asset.source_sha256 == digest(body)
    assert (asset.sha256, asset.size_bytes) == (digest(kept), len(kept))
    (tmp_path / "kept").write_bytes(kept)
    mark = marks.read_mark(tmp_path / "kept")
    assert mark is not None
    assert mark.source_sha256 == asset.source_sha256
    assert await unfinished(world, key) == []
    assert world.scratch() == []
    await world.clean(account)


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_the_tail_falls_on_either_side_of_a_part(
    world: World, tmp_path: Path, more: int
) -> None:
    """Parts that are exactly full with the mark, and one byte off."""
    account = ids.new_id()
    first = await world.put(account, large(tmp_path / "film.mp4"), VIDEO)
    mark_bytes = first.size_bytes - LARGE
    body = large(tmp_path / "film.mp4", PARTS * parts.PART_BYTES - mark_bytes + more)
    asset = await world.put(account, body, VIDEO, "two")
    assert asset.size_bytes == PARTS * parts.PART_BYTES + more
    kept = await world.get(asset)
    assert digest(kept[: len(body)]) == digest(body)
    assert digest(kept) == asset.sha256
    await world.clean(account)


async def test_where_the_mark_cannot_stand_behind_what_was_sent_is_dropped(
    world: World, tmp_path: Path
) -> None:
    """A last box "to the end of the file" would swallow it."""
    account, body = ids.new_id(), large(tmp_path / "film.mp4", open_ended=True)
    sender = Paused(body)
    putting, key = await begun(world, account, sender)
    sender.go_on.set()
    asset = await putting
    (tmp_path / "kept").write_bytes(await world.get(asset))
    assert marks.read_mark(tmp_path / "kept") is not None
    with (tmp_path / "kept").open("rb") as file:
        assert [box.kind for box in boxes.top_level(file)][-2:] == [b"free", b"uuid"]
    assert await unfinished(world, key) == []
    await world.clean(account)


async def test_bytes_that_are_refused_leave_nothing_and_come_aside_the_second_time(
    world: World,
) -> None:
    account = ids.new_id()
    bad = b"\0\0\0\x18ftypisom" + b"no video at all." * (LARGE // 16)
    sha256 = digest(bad)
    sender = Paused(bad)
    putting, key = await begun(world, account, sender)
    sender.go_on.set()
    with refused(errors.InvalidArgument, "NOT_A_VIDEO"):
        await putting
    assert await unfinished(world, key) == []
    await world.nothing(account)
    with refused(errors.InvalidArgument, "NOT_A_VIDEO"):
        await world.put(account, bad, VIDEO, refused_sha256=sha256)
    (aside,) = await world.pool.fetch("SELECT * FROM assets WHERE account_id = $1", account)
    assert (aside["state"], aside["sha256"]) == ("QUARANTINED", sha256)
    assert world.objects(account) == {aside["object_key"]}


async def test_a_caller_that_hangs_up_in_the_middle_leaves_nothing(
    world: World, tmp_path: Path
) -> None:
    account = ids.new_id()
    putting, key = await begun(world, account, Paused(large(tmp_path / "film.mp4")))
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    await eventually(lambda: world.nothing(account), what="the put to be cleaned up")
    assert await unfinished(world, key) == []


@pytest.mark.fault
async def test_what_a_killed_put_had_sent_is_aborted(world: World, tmp_path: Path) -> None:
    account, body = ids.new_id(), large(tmp_path / "film.mp4")
    (point,) = kills.STORAGE["large_put"]
    world.arm(point)
    with pytest.raises(errors.ServiceError):
        await world.put(account, body, VIDEO)
    await world.revive()
    (key,) = await noted(world, account)
    assert await unfinished(world, key) != []
    await swept(world, account)
    assert await unfinished(world, key) == []
    await world.nothing(account)
    assert (await world.put(account, body, VIDEO)).state == pb.ASSET_STATE_READY
