"""How long assets are kept, what is told of their end, and what the scrub finds of what others did to the bytes."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import nats
import pytest
from google.protobuf import json_format
from nats.aio.msg import Msg

from framewire.events.v1 import event_pb2
from framewire.storage.v1 import storage_pb2 as pb
from kit import errors, ids, postgres
from services.storage import blobs, config, scrub, store
from services.storage.media import sandbox, videos
from tests import pictures
from tests.storage_world import VIDEO, World, film, refused, world
from tests.waiting import eventually

__all__ = ["world"]
NEVER = "'-infinity'::timestamptz"
PICTURE = pictures.plain((9, 99, 9), (40, 30))


@pytest.fixture
def account() -> str:
    return ids.new_id()


async def row(world: World, asset: pb.Asset) -> dict[str, object]:
    found = await world.pool.fetchrow("SELECT * FROM assets WHERE asset_id = $1", asset.asset_id)
    assert found is not None
    return dict(found)


async def over(world: World, asset: pb.Asset) -> None:
    await world.pool.execute(
        "UPDATE assets SET expires_at = clock_timestamp() WHERE asset_id = $1", asset.asset_id
    )


async def until(world: World, asset: pb.Asset, state: str) -> None:
    async def check() -> bool:
        now = (await row(world, asset))["state"]
        assert now == state, now
        return True

    await eventually(check)


async def output(world: World, account: str, tmp_path: Path, video_id: str) -> pb.Asset:
    mark = pb.Mark(model="sora-2", video_id=video_id)
    return await world.put(account, film(tmp_path / "a.mp4"), VIDEO, owner=ids.new_id(), mark=mark)


@pytest.fixture
async def told(world: World) -> AsyncIterator[list[event_pb2.Event]]:
    """Events of the stream, from now on."""
    client = await nats.connect(world.stack.addresses.nats_url)
    events: list[event_pb2.Event] = []

    async def heard(message: Msg) -> None:
        events.append(json_format.Parse(message.data, event_pb2.Event()))

    await client.subscribe("framewire.events.v1.*.expired", cb=heard)
    await client.flush()
    yield events
    await client.close()


async def test_what_is_over_goes_with_its_poster_and_is_told_of(
    world: World, account: str, tmp_path: Path, told: list[event_pb2.Event]
) -> None:
    video_id = ids.new_id()
    asset = await output(world, account, tmp_path, video_id)
    await over(world, asset)
    await until(world, asset, "DELETED")
    assert world.objects(account) == set()
    await eventually(lambda: len(told) == 2)
    assert {event.expired.asset_id for event in told} == {asset.asset_id, asset.poster_asset_id}
    assert {(event.video_id, event.account_id, event.seq) for event in told} == {
        (video_id, account, 0)
    }
    with refused(errors.NotFound, "ASSET_NOT_FOUND"):
        await world.stat(asset)


async def test_what_a_live_video_needs_is_kept_until_it_lets_go(world: World, account: str) -> None:
    asset = await world.put(account, PICTURE)
    fitted = await world.fit(asset, 20, 20, pin_owner="video")
    await over(world, asset)
    await over(world, fitted)
    other = await world.put(account, PICTURE, owner="two")
    await over(world, other)
    await until(world, other, "DELETED")  # a pass went by
    assert (await row(world, asset))["state"] == (await row(world, fitted))["state"] == "READY"
    await world.unpin(account, "video")
    await until(world, asset, "DELETED")
    await until(world, fitted, "DELETED")


async def test_what_is_late_is_measured_and_what_is_in_use_is_not(
    world: World, account: str
) -> None:
    """Within a transaction, where no pass of the retention comes in between."""
    late = await world.put(account, PICTURE)
    used = await world.put(account, PICTURE, owner="two")
    made = await world.fit(used, 20, 20, pin_owner="video")
    async with world.pool.acquire() as connection:
        measured = store.MeasureStore(cast("postgres.Pool", connection))
        transaction = connection.transaction()
        await transaction.start()
        try:
            change = "UPDATE assets SET expires_at = clock_timestamp() - interval '2 hours' WHERE asset_id = $1"
            await connection.execute(change, used.asset_id)
            # Its own pin keeps it, and so does that of what was made from it.
            for move in (
                "DELETE FROM pins WHERE asset_id = $2 AND $1 <> ''",
                "UPDATE pins SET asset_id = $2 WHERE asset_id = $1",
            ):
                await connection.execute(move, used.asset_id, made.asset_id)
                assert (await measured.read()).overdue_seconds < 60
            await connection.execute(change, late.asset_id)
            assert 7200 <= (await measured.read()).overdue_seconds < 7260
        finally:
            await transaction.rollback()


async def test_an_account_has_times_of_its_own(world: World, account: str) -> None:
    before = await world.put(account, PICTURE, owner="before")
    assert not before.HasField("expires_at")
    kinds = [
        pb.KindRetention(kind=pb.ASSET_KIND_INPUT_IMAGE, keep_seconds=1000),
        pb.KindRetention(kind=pb.ASSET_KIND_RENDITION, keep_seconds=0),
    ]
    asked = pb.SetRetentionRequest(account_id=account, kinds=kinds)
    kept = await world.stub.SetRetention(asked, timeout=5)
    assert {item.kind: item.keep_seconds for item in kept.kinds} == {1: 1000, 5: 0}
    after = await world.put(account, PICTURE, owner="after")
    seconds = after.expires_at.ToDatetime() - after.created_at.ToDatetime()
    assert 999 <= seconds.total_seconds() <= 1010
    assert not (await world.fit(after, 20, 20)).HasField("expires_at"), "0: for ever"
    assert not (await world.stat(before)).HasField("expires_at"), "those that are there stay"
    with refused(errors.InvalidArgument, "INVALID_FIELD"):
        twice = pb.SetRetentionRequest(account_id=account, kinds=kinds[:1] * 2)
        await world.stub.SetRetention(twice, timeout=5)


async def test_keeping_longer_never_shortens_and_has_a_limit(world: World, account: str) -> None:
    asset = await world.put(account, PICTURE)

    async def extend(seconds: int, whose: str = account) -> pb.Asset:
        request = pb.ExtendRetentionRequest(
            account_id=whose, asset_id=asset.asset_id, keep_seconds=seconds
        )
        return await world.stub.ExtendRetention(request, timeout=5)

    later = (await extend(5000)).expires_at
    assert (await extend(10)).expires_at == later
    with refused(errors.NotFound, "ASSET_NOT_FOUND"):
        await extend(10, ids.new_id())
    with refused(errors.InvalidArgument, "INVALID_FIELD"):
        await extend(366 * 86_400)


async def test_usage_counts_what_lies_there_and_erasure_ends_it(
    world: World, account: str, tmp_path: Path
) -> None:
    picture = await world.put(account, PICTURE)
    pinned = await world.put(account, PICTURE, owner="pinned")
    await output(world, account, tmp_path, ids.new_id())
    request = pb.PinRequest(account_id=account, asset_id=pinned.asset_id, owner="video")
    await world.stub.Pin(request, timeout=5)

    async def used() -> dict[str, tuple[int, int]]:
        answer = await world.stub.GetUsage(pb.GetUsageRequest(account_id=account), timeout=5)
        return {
            pb.AssetKind.Name(item.kind)[11:]: (item.count, item.size_bytes)
            for item in answer.kinds
        }

    found = await used()
    assert found.keys() == {"INPUT_IMAGE", "OUTPUT_VIDEO", "POSTER"}
    assert found["INPUT_IMAGE"] == (2, picture.size_bytes + pinned.size_bytes)

    async def erase() -> int:
        request = pb.EraseAccountRequest(account_id=account)
        return (await world.stub.EraseAccount(request, timeout=5)).still_needed

    assert await erase() == 1
    await until(world, picture, "DELETED")

    async def only_the_pinned_one() -> bool:
        return (await used()) == {"INPUT_IMAGE": (1, pinned.size_bytes)}

    await eventually(only_the_pinned_one)
    await world.unpin(account, "video")
    assert await erase() == 0
    await until(world, pinned, "DELETED")
    assert world.objects(account) == set()


async def scrubbed(world: World, asset: pb.Asset) -> dict[str, object]:
    """The row after the scrub has looked at it."""
    await world.pool.execute(
        f"UPDATE assets SET scrubbed_at = {NEVER} WHERE asset_id = $1", asset.asset_id
    )

    async def check() -> bool:
        return bool(
            await world.pool.fetchval(
                f"SELECT scrubbed_at > {NEVER} OR state <> 'READY' FROM assets WHERE asset_id = $1",
                asset.asset_id,
            )
        )

    await eventually(check)
    return await row(world, asset)


@pytest.mark.parametrize("damage", ["", "other bytes", "is gone", "of"])
async def test_what_others_did_to_the_bytes_comes_to_light(
    world: World, account: str, tmp_path: Path, damage: str
) -> None:
    asset = await output(world, account, tmp_path, ids.new_id())
    key = str((await row(world, asset))["object_key"])
    body = await world.get(asset)
    bucket = "framewire-outputs"
    if damage == "is gone":
        world.s3.remove_object(bucket, key)
    elif damage:
        changed = body[:-1] if damage == "of" else body[:-1] + bytes([body[-1] ^ 1])
        world.s3.put_object(bucket, key, io.BytesIO(changed), len(changed))

    async def judged() -> bool:
        now = await scrubbed(world, asset)
        assert now["state"] == ("QUARANTINED" if damage else "READY"), now["damage"]
        return True

    await eventually(judged)
    assert damage in str((await row(world, asset))["damage"])
    if damage:
        with refused(errors.NotFound, "ASSET_NOT_FOUND"):
            await world.stat(asset)


async def test_an_object_that_nobody_knows_is_removed_when_it_is_old(
    world: World, account: str
) -> None:
    asset = await world.put(account, PICTURE)
    stray = f"{account}/stray.jpg"
    world.s3.put_object("framewire-inputs", stray, io.BytesIO(b"x"), 1)
    where = world.stack.addresses
    settings = config.Settings(
        database_url=where.database_url("storage"),  # pyright: ignore[reportArgumentType]
        service_token_secret=where.service_token_secret,  # pyright: ignore[reportArgumentType]
        endpoint=where.s3_endpoint,
        access_key=where.s3_access_key,
        secret_key=where.s3_secret_key,  # pyright: ignore[reportArgumentType]
        region=where.s3_region,
    )
    url = where.database_url("storage")
    async with postgres.pool(url, "test", 2) as pool, blobs.Blobs(settings) as bytes_:
        database = store.Store(pool)

        async def walk(age_seconds: float) -> None:
            aged = settings.model_copy(update={"orphan_age_seconds": age_seconds})
            orphans = scrub.Orphans(aged, database, bytes_)
            while await orphans.run_once():
                pass

        await walk(3600)
        assert stray in world.objects(account), "it is young"
        await walk(-5)  # by the clock of the database, whose seconds are not S3's
    assert world.objects(account) == {(await row(world, asset))["object_key"]}


async def test_the_whole_of_a_video_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    film(path)
    assert videos.decode(path).frames == 24
    async with sandbox.MediaWorkers(tmp_path) as workers:
        assert (await workers.decode_video(path)).frames == 24
