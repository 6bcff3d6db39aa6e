"""kill -9 of storage at each step of its calls: nothing half visible, the same call again gives the one asset."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from framewire.storage.v1 import storage_pb2 as pb
from kit import errors, ids
from tests import pictures
from tests.fault import kills
from tests.storage_world import (
    BODY,
    VIDEO,
    World,
    complete,
    create,
    film,
    incoming,
    refused,
    send,
    swept,
    world,
)
from tests.waiting import eventually

__all__ = ["world"]
pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(120)]

Call = Callable[[], Awaitable[pb.Asset]]
COMMITTED = {
    "storage.put.after_ready",
    "storage.complete.after_take",
    "storage.complete.after_object",
}
"""Whoever dies here has made the asset; before, there is none."""
WRONG = b"x" * len(BODY)
MAKING = kills.storage_cases("put", "fit", "complete")
FIRST = {point: (call, point) for call, point in reversed(MAKING)}
CASES = [
    pytest.param(*case, marks=[] if FIRST[case[1]] == case else [pytest.mark.long])
    for case in MAKING
]
"""A point that lies in several calls is struck in the first of them; in the others only in the long run."""


async def shown(world: World, account: str) -> dict[str, pb.Asset]:
    """What callers see, each read whole."""
    found = {asset.asset_id: asset for asset in (await world.listed(account)).assets}
    for asset in found.values():
        await whole(world, asset)
    return found


async def whole(world: World, asset: pb.Asset) -> None:
    body = await world.get(asset)
    assert (hashlib.sha256(body).hexdigest(), len(body)) == (asset.sha256, asset.size_bytes)


async def struck(world: World, point: str, call: Callable[[], Awaitable[object]]) -> None:
    """The service dies there, in this call, and comes up again with nothing in scratch."""
    world.arm(point)
    with pytest.raises(errors.ServiceError):
        await call()
    await world.revive()
    assert world.scratch() == []


async def over(world: World, account: str) -> None:
    """Makes everything that an account left look old, until the sweeper has removed it."""
    await world.pool.execute(
        "UPDATE uploads SET sweep_at = clock_timestamp() WHERE account_id = $1", account
    )
    await eventually(lambda: not incoming(world, account), what="the sweeper to remove it")
    await swept(world, account)


async def making(world: World, account: str, call: str, tmp_path: Path) -> Call:
    """A call that makes an asset, to be made again and again."""
    if call == "put":
        body = film(tmp_path / "film.mp4")
        return lambda: world.put(account, body, VIDEO)
    if call == "fit":
        image = await world.put(account, pictures.plain((5, 5, 5)), owner="image")
        return lambda: world.fit(image, 64, 64)
    upload = await create(world, account)
    assert await send(upload.url, upload.headers) == 200
    return lambda: complete(world, account, upload.upload_id)


@pytest.mark.parametrize(("call", "point"), CASES)
async def test_a_kill_while_an_asset_is_made(
    world: World, call: str, point: str, tmp_path: Path
) -> None:
    account = ids.new_id()
    await world.put(account, pictures.plain((1, 1, 1)), owner="bystander")
    make = await making(world, account, call, tmp_path)
    before = await shown(world, account)
    await struck(world, point, make)
    new = {key: one for key, one in (await shown(world, account)).items() if key not in before}
    assert bool(new) == (point in COMMITTED)
    made = await make()
    assert await make() == made
    assert made.asset_id in (new or {made.asset_id: made})
    await whole(world, made)
    after = await shown(world, account)
    assert after.keys() - before.keys() == {made.asset_id, made.poster_asset_id} - {""}
    await over(world, account)
    assert await shown(world, account) == after


async def test_a_kill_while_bytes_are_refused(world: World) -> None:
    account = ids.new_id()
    (point,) = kills.STORAGE["refused_put"]
    await struck(world, point, lambda: world.put(account, WRONG))
    assert await shown(world, account) == {}
    with refused(errors.InvalidArgument, "NOT_AN_IMAGE"):
        await world.put(account, WRONG)
    await whole(world, await world.put(account, BODY))
    await over(world, account)
    assert len(await shown(world, account)) == 1


async def test_a_kill_while_an_upload_is_refused(world: World) -> None:
    account = ids.new_id()
    (point,) = kills.STORAGE["refused_complete"]
    upload = await create(world, account)
    assert await send(upload.url, upload.headers, WRONG) == 200
    await struck(world, point, lambda: complete(world, account, upload.upload_id))
    assert await shown(world, account) == {}
    with refused(errors.InvalidArgument, "NOT_AN_IMAGE"):
        await complete(world, account, upload.upload_id)
    assert incoming(world, account) == []
    assert await send(upload.url, upload.headers) == 200
    await whole(world, await complete(world, account, upload.upload_id))
    await over(world, account)


async def test_a_kill_while_an_upload_is_announced(world: World) -> None:
    account = ids.new_id()
    (point,) = kills.STORAGE["create_upload"]
    await struck(world, point, lambda: create(world, account))
    upload = await create(world, account)
    assert upload.upload_id == (await create(world, account)).upload_id
    assert await send(upload.url, upload.headers) == 200
    await whole(world, await complete(world, account, upload.upload_id))
    await over(world, account)


@pytest.mark.parametrize("point", kills.STORAGE["delete"])
async def test_a_kill_while_an_asset_is_deleted(world: World, point: str, tmp_path: Path) -> None:
    """It is out of sight at once and with all that was made from it; its bytes go without another call."""
    account = ids.new_id()
    kept = await world.put(account, pictures.plain((1, 1, 1)), owner="bystander")
    video = await world.put(account, film(tmp_path / "film.mp4"), VIDEO)
    poster = pb.Asset(account_id=account, asset_id=video.poster_asset_id)
    await struck(world, point, lambda: world.delete(video))
    assert (await shown(world, account)).keys() == {kept.asset_id}
    for gone in (video, poster):
        with refused(errors.NotFound, "ASSET_NOT_FOUND"):
            await world.get(gone)
    await eventually(lambda: len(world.objects(account)) == 1, what="the sweeper to remove both")
    for _ in range(2):
        assert (await world.delete(video)).state == pb.ASSET_STATE_DELETED
    await over(world, account)
    await whole(world, kept)


async def test_a_kill_while_an_account_is_erased(world: World) -> None:
    account = ids.new_id()
    await world.put(account, pictures.plain((1, 1, 1)))
    await world.put(account, pictures.plain((2, 2, 2)), owner="two")
    request = pb.EraseAccountRequest(account_id=account)
    (point,) = kills.STORAGE["erase"]
    await struck(world, point, lambda: world.stub.EraseAccount(request, timeout=5))
    assert await shown(world, account) == {}
    await eventually(lambda: not world.objects(account), what="the sweeper to remove both")
    assert (await world.stub.EraseAccount(request, timeout=5)).still_needed == 0
    await over(world, account)


async def test_a_kill_while_an_asset_reaches_its_end(world: World) -> None:
    """Its end is told once, though who was to ring for it died."""
    account = ids.new_id()
    asset = await world.put(account, pictures.plain((1, 1, 1)))
    (point,) = kills.STORAGE["expire"]
    world.arm(point)
    query = "UPDATE assets SET expires_at = clock_timestamp() WHERE asset_id = $1"
    await world.pool.execute(query, asset.asset_id)
    await world.revive()
    assert await shown(world, account) == {}
    await eventually(lambda: not world.objects(account), what="the sweeper to remove it")

    async def told() -> bool:
        rows = await world.pool.fetch(
            "SELECT published_at FROM outbox WHERE ce_id LIKE $1", f"{asset.asset_id}:%"
        )
        assert len(rows) == 1
        return rows[0]["published_at"] is not None

    await eventually(told)
    await over(world, account)


@pytest.mark.parametrize("point", kills.STORAGE["sweep_put"])
async def test_a_kill_while_leavings_are_swept(world: World, point: str, tmp_path: Path) -> None:
    account, body = ids.new_id(), film(tmp_path / "film.mp4")
    await struck(world, "storage.put.after_object", lambda: world.put(account, body, VIDEO))
    assert len(world.objects(account)) == 2
    world.arm(point)
    sweeping = world.stack.supervisor.get("storage")

    async def dead() -> bool:
        hours = "interval '3 hours'"
        await world.pool.execute(
            f"UPDATE puts SET created_at = created_at - {hours}, swept_at = swept_at - {hours}"
        )
        return not sweeping.running

    await eventually(dead)
    await world.revive()
    await over(world, account)
    await world.nothing(account)
    await whole(world, await world.put(account, body, VIDEO))


async def test_a_kill_while_an_upload_is_swept(world: World) -> None:
    account = ids.new_id()
    upload = await create(world, account)
    assert await send(upload.url, upload.headers) == 200
    (point,) = kills.STORAGE["sweep_upload"]
    world.arm(point)
    await world.pool.execute(
        "UPDATE uploads SET sweep_at = clock_timestamp() WHERE account_id = $1", account
    )
    await world.revive()
    await over(world, account)

    async def forgotten() -> bool:
        query = "SELECT count(*) FROM uploads WHERE account_id = $1"
        return await world.pool.fetchval(query, account) == 0

    await eventually(forgotten)
    with refused(errors.NotFound, "UPLOAD_NOT_FOUND"):
        await complete(world, account, upload.upload_id)
