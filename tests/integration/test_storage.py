"""Storage as a process, on a real Postgres and S3: what each call promises, also twice, at once and after kill -9."""

from __future__ import annotations

import asyncio
import hashlib
import io
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from pydantic import SecretStr

from framewire.storage.v1 import storage_pb2 as pb
from framewire.storage.v1 import storage_pb2_grpc
from kit import errors, ids, rpc
from services.storage import blobs, config
from services.storage.media import marks
from tests import pictures
from tests.storage_world import (
    IMAGE,
    STALL_SECONDS,
    VIDEO,
    World,
    film,
    opened,
    refused,
    stalling,
    swept,
    tokens,
    world,
)
from tests.waiting import eventually

__all__ = ["world"]  # fixture


async def test_an_image_is_cleaned_measured_and_given_back(world: World) -> None:
    account, body = ids.new_id(), noted_jpeg()
    digest = hashlib.sha256(body).hexdigest()
    asset = await world.put(account, body, size_bytes=len(body), sha256=digest)
    assert (asset.account_id, asset.kind, asset.state) == (account, IMAGE, pb.ASSET_STATE_READY)
    assert (asset.media_type, asset.width, asset.height) == ("image/jpeg", 320, 180)
    assert (asset.source_sha256, asset.codec, asset.fps) == (digest, "", 0)
    assert not asset.HasField("expires_at")
    assert await world.stat(asset) == asset
    kept = await world.get(asset)
    assert (hashlib.sha256(kept).hexdigest(), len(kept)) == (asset.sha256, asset.size_bytes)
    assert b"secret place" in body
    assert b"secret place" not in kept
    assert opened(kept).size == (320, 180)
    assert await world.get(asset, 10, 20) == kept[10:30]
    assert await world.get(asset, 10) == kept[10:]
    assert await world.get(asset, len(kept) - 1, 99) == kept[-1:]
    with refused(errors.InvalidArgument, "INVALID_FIELD"):
        await world.get(asset, len(kept))
    assert world.scratch() == []


def noted_jpeg() -> bytes:
    image, exif, out = Image.new("RGB", (320, 180), (10, 200, 90)), Image.Exif(), io.BytesIO()
    exif[0x010E] = "secret place"
    image.save(out, "JPEG", exif=exif)
    return out.getvalue()


async def test_a_video_is_measured_marked_and_has_a_poster(world: World, tmp_path: Path) -> None:
    account, body = ids.new_id(), film(tmp_path / "film.mp4")
    mark = pb.Mark(model="sora-2", video_id="v-1")
    asset = await world.put(account, body, VIDEO, mark=mark)
    digest = hashlib.sha256(body).hexdigest()
    assert (asset.media_type, asset.width, asset.height) == ("video/mp4", 64, 48)
    assert (asset.codec, asset.duration_ms, asset.fps) == ("h264", 1000, 24)
    assert (asset.has_audio, asset.source_sha256) == (False, digest)
    kept = await world.get(asset)
    assert hashlib.sha256(kept).hexdigest() == asset.sha256
    (tmp_path / "kept.mp4").write_bytes(kept)
    said = marks.read_mark(tmp_path / "kept.mp4")
    assert said is not None
    assert (said.model, said.video_id, said.source_sha256) == ("sora-2", "v-1", digest)
    assert said.created_at == asset.created_at.ToDatetime(UTC)
    assert len(pictures.frames(tmp_path / "kept.mp4")) == 24
    poster = await world.stat(pb.Asset(account_id=account, asset_id=asset.poster_asset_id))
    assert (poster.kind, poster.media_type) == (pb.ASSET_KIND_POSTER, "image/jpeg")
    assert opened(await world.get(poster)).size == (64, 48)
    await world.clean(account)


async def test_a_repeated_put_is_answered_before_its_bytes_come(world: World) -> None:
    account, body = ids.new_id(), pictures.plain((1, 2, 3))
    first = await world.put(account, body)
    assert await world.put(account, body) == first
    assert await world.put(account, b"dropped unseen") == first
    # Had it waited for more, the stalled sender would have been cut off.
    assert await asyncio.wait_for(world.send(account, stalling(b"x")), 30) == first
    other = await world.put(account, body, variant=1)
    assert other.asset_id != first.asset_id
    assert (await world.put(ids.new_id(), body)).asset_id != first.asset_id


async def test_senders_of_much_get_their_answer_too(world: World) -> None:
    account, much = ids.new_id(), bytes(16_000_000)
    first = await world.put(account, pictures.plain((1, 2, 3)))
    for _ in range(3):
        assert await world.put(account, much) == first
        with refused(errors.InvalidArgument, "TOO_LARGE"):
            await world.put(account, much, owner="other")
        with refused(errors.InvalidArgument, "TOO_LARGE"):
            await world.put(account, much, owner="other", size_bytes=len(much))


async def test_of_puts_at_once_one_wins_for_all(world: World, tmp_path: Path) -> None:
    account = ids.new_id()
    bodies = [film(tmp_path / f"{shade}.mp4", shade) for shade in (10, 90, 170, 250)]
    answers = await asyncio.gather(*(world.put(account, body, VIDEO) for body in bodies))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].source_sha256 in {hashlib.sha256(body).hexdigest() for body in bodies}
    assert hashlib.sha256(await world.get(answers[0])).hexdigest() == answers[0].sha256
    await world.clean(account)
    assert len(world.objects(account)) == 2  # the video and its poster


async def test_bad_bytes_are_refused_and_leave_nothing(world: World, tmp_path: Path) -> None:
    account, image = ids.new_id(), pictures.plain((9, 9, 9))
    video = film(tmp_path / "film.mp4")
    cases: list[tuple[str, bytes, Any, dict[str, Any]]] = [
        ("CHECKSUM_MISMATCH", image, IMAGE, {"sha256": "0" * 64}),
        ("CHECKSUM_MISMATCH", image, IMAGE, {"size_bytes": len(image) + 1}),
        ("CHECKSUM_MISMATCH", image, IMAGE, {"size_bytes": len(image) - 1}),
        ("NOT_AN_IMAGE", b"<html>no</html>", IMAGE, {}),
        ("NOT_AN_IMAGE", b"", IMAGE, {}),
        ("NOT_AN_IMAGE", image[: len(image) // 2], IMAGE, {}),
        ("NOT_AN_IMAGE", video, IMAGE, {}),
        ("NOT_A_VIDEO", image, VIDEO, {}),
        ("NOT_A_VIDEO", video[: len(video) // 2], VIDEO, {}),
        ("TOO_LARGE", image, IMAGE, {"size_bytes": 200_001}),
        ("TOO_LARGE", bytes(200_001), IMAGE, {}),
        ("INVALID_FIELD", image, pb.ASSET_KIND_POSTER, {}),
    ]
    for reason, body, kind, header in cases:
        with refused(errors.InvalidArgument, reason):
            await world.put(account, body, kind, **header)
    await world.nothing(account)
    assert world.scratch() == []
    assert (await world.put(account, image)).state == pb.ASSET_STATE_READY


async def test_a_sender_that_stalls_or_leaves_leaves_nothing(world: World) -> None:
    account, body = ids.new_id(), pictures.plain((9, 9, 9))
    with refused(errors.DeadlineExceeded, "DEADLINE_EXCEEDED"):
        await world.send(account, stalling(body[:100]))
    await world.nothing(account)
    leaving = asyncio.create_task(world.send(account, stalling(body)))
    await eventually(
        lambda: world.pool.fetchval("SELECT true FROM assets WHERE state = 'UPLOADING'")
    )
    leaving.cancel()
    await eventually(lambda: world.nothing(account), within_seconds=STALL_SECONDS / 2)
    assert world.scratch() == []


async def test_a_put_that_was_given_up_cannot_come_back(world: World) -> None:
    account, body, go_on = ids.new_id(), pictures.plain((9, 9, 9)), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:100]
        await go_on.wait()
        yield body[100:]

    sending = asyncio.create_task(world.send(account, slowly()))

    async def given_up() -> bool:
        return await world.pool.fetchval(
            """
            UPDATE puts SET created_at = puts.created_at - interval '3 hours' FROM assets
            WHERE puts.asset_id = assets.asset_id AND account_id = $1
            RETURNING swept_at IS NOT NULL
            """,
            account,
        )

    await eventually(given_up, every_seconds=0.01)
    go_on.set()
    with refused(errors.Aborted, "CONFLICT"):
        await sending
    await world.nothing(account)


async def test_messages_out_of_order_are_refused(world: World) -> None:
    header = pb.PutRequest(header=pb.PutHeader(account_id=ids.new_id(), owner="x", kind=IMAGE))
    chunk = pb.PutRequest(chunk=b"x")
    for requests in ([], [chunk], [header, header], [header, pb.PutRequest()]):
        with refused(errors.InvalidArgument, "INVALID_FIELD"):
            await world.stub.Put(iter(requests), timeout=10)


async def test_who_may_call_what(world: World) -> None:
    asset = await world.put(ids.new_id(), pictures.plain((1, 1, 1)))
    who = {"account_id": asset.account_id, "asset_id": asset.asset_id}
    address = world.stack.addresses.listen["storage"]
    async with rpc.channel(address, tokens(world.stack, "generator")) as channel:
        stub = storage_pb2_grpc.StorageServiceStub(channel)
        assert await stub.Stat(pb.StatRequest(**who), timeout=10) == asset
        with refused(errors.PermissionDenied, "ROLE_NOT_ALLOWED"):
            await stub.Delete(pb.DeleteRequest(**who), timeout=10)
    with refused(errors.PermissionDenied, "ROLE_NOT_ALLOWED"):
        await world.stub.MakeRendition(pb.MakeRenditionRequest(**who, height=10), timeout=10)
    async with rpc.channel(address, tokens(world.stack, "credits")) as channel:
        with refused(errors.PermissionDenied, "ROLE_NOT_ALLOWED"):
            stub = storage_pb2_grpc.StorageServiceStub(channel)
            await stub.Stat(pb.StatRequest(**who), timeout=10)


async def test_a_signed_url_gives_the_bytes_for_a_time(world: World) -> None:
    asset = await world.put(ids.new_id(), pictures.plain((200, 30, 30)))
    who = {"account_id": asset.account_id, "asset_id": asset.asset_id}
    signed = await world.stub.SignUrl(pb.SignUrlRequest(**who), timeout=10)
    assert await asyncio.to_thread(fetched, signed.url) == await world.get(asset)
    assert f"{asset.asset_id}.jpg" in signed.url
    named = pb.SignUrlRequest(**who, file_name="my film.jpg", expires_in_seconds=60)
    until = (await world.stub.SignUrl(named, timeout=10)).expires_at.ToDatetime(UTC)
    assert 50 < (until - datetime.now(UTC)).total_seconds() <= 60
    with pytest.raises(urllib.error.HTTPError):
        await asyncio.to_thread(
            fetched, signed.url.replace("X-Amz-Expires=900", "X-Amz-Expires=901")
        )


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


async def test_urls_are_signed_for_the_public_endpoint() -> None:
    settings = config.Settings(
        database_url=SecretStr("postgresql://x"),
        service_token_secret=SecretStr("x" * 32),
        endpoint="minio:9000",
        public_endpoint="media.example.com",
        public_secure=True,
        access_key="a",
        secret_key=SecretStr("s"),
    )
    async with blobs.Blobs(settings) as opened_:
        url, _ = opened_.sign(blobs.assets.Bucket.OUTPUT, "a/b.mp4", "my film.mp4", 60)
    assert url.startswith("https://media.example.com/framewire-outputs/a/b.mp4?")
    assert "filename%3D%22my%20film.mp4%22" in url


async def test_a_fit_is_exact_and_made_once(world: World) -> None:
    account = ids.new_id()
    asset = await world.put(account, halves())
    first, again = await asyncio.gather(world.fit(asset, 200, 100), world.fit(asset, 200, 100))
    assert first == again
    assert (first.kind, first.width, first.height) == (pb.ASSET_KIND_RENDITION, 200, 100)
    assert (first.source_sha256, first.HasField("expires_at")) == (asset.sha256, True)
    assert opened(await world.get(first)).size == (200, 100)
    await world.clean(account)
    assert (await world.delete(first)).state == pb.ASSET_STATE_DELETED
    remade = await world.fit(asset, 200, 100)
    assert (remade.asset_id, remade.sha256) == (first.asset_id, first.sha256)
    barred = opened(await world.get(await world.fit(asset, 100, 100, mode=pb.FIT_MODE_CONTAIN)))
    assert pictures.colour(barred.crop((0, 0, 100, 15))) == (0, 0, 0)
    right = pb.CropBounds(left_fraction=0.5, right_fraction=1, bottom_fraction=1)
    for mode in (pb.FIT_MODE_COVER, pb.FIT_MODE_CONTAIN):
        cut = opened(await world.get(await world.fit(asset, 50, 50, mode=mode, crop=right)))
        red, _, blue = pictures.colour(cut.crop((15, 15, 35, 35)))
        assert (red < 20, blue > 230) == (True, True)
    empty = pb.CropBounds(left_fraction=0.5, right_fraction=0.5, bottom_fraction=1)
    with refused(errors.InvalidArgument, "INVALID_FIELD"):
        await world.fit(asset, 50, 50, crop=empty)


def halves() -> bytes:
    """Left red, right blue."""
    image, out = Image.new("RGB", (400, 200), (255, 0, 0)), io.BytesIO()
    image.paste((0, 0, 255), (200, 0, 400, 200))
    image.save(out, "PNG")
    return out.getvalue()


async def test_what_is_pinned_stays(world: World) -> None:
    account = ids.new_id()
    asset = await world.put(account, pictures.plain((5, 5, 5)))
    who = {"account_id": account, "asset_id": asset.asset_id}
    for _ in range(2):
        pinned = await world.stub.Pin(pb.PinRequest(**who, owner="v1"), timeout=10)
        assert pinned.asset == asset
    fitted = await world.fit(asset, 40, 40, pin_owner="v2")
    assert await world.unpin(account, "v1") == 1
    for one in (asset, fitted):
        with refused(errors.FailedPrecondition, "CONFLICT"):
            await world.delete(one)
    assert await world.unpin(account, "v2") == 2
    assert await world.unpin(account, "v2") == 0
    assert (await world.delete(asset)).state == pb.ASSET_STATE_DELETED


async def test_a_survey_asks_the_object_store_itself(world: World) -> None:
    account, other = ids.new_id(), ids.new_id()
    kept, lost, cut = [
        await world.put(account, pictures.plain((at, 0, 0)), owner=str(at)) for at in range(3)
    ]
    deleted = await world.delete(await world.put(other, pictures.plain((9, 9, 9))))
    keys = {asset.asset_id: key for asset in (lost, cut) for key in world.objects(account)
            if asset.asset_id in key}  # fmt: skip
    world.s3.remove_object("framewire-inputs", keys[lost.asset_id])
    world.s3.put_object("framewire-inputs", keys[cut.asset_id], io.BytesIO(b"cut"), 3)
    asked = [kept.asset_id, lost.asset_id, cut.asset_id, deleted.asset_id, ids.new_id()]
    answer = await world.stub.SurveyAssets(pb.SurveyAssetsRequest(asset_ids=asked), timeout=10)
    found = {one.asset.asset_id: one for one in answer.assets}
    assert {key: (one.object_found, one.object_size_bytes) for key, one in found.items()} == {
        kept.asset_id: (True, kept.size_bytes),
        lost.asset_id: (False, 0),
        cut.asset_id: (True, 3),
        deleted.asset_id: (False, 0),
    }
    assert found[cut.asset_id].asset == cut
    assert found[deleted.asset_id].asset.state == pb.ASSET_STATE_DELETED
    assert answer.HasField("as_of")


async def test_a_survey_tells_every_pin_once(world: World) -> None:
    account = ids.new_id()
    assets = [await world.put(account, pictures.plain((1, at, 0)), owner=str(at)) for at in (1, 2)]
    pins = {(asset.asset_id, owner) for asset in assets for owner in ("p1", "p2")}
    for asset_id, owner in pins:
        who = {"account_id": account, "asset_id": asset_id}
        await world.stub.Pin(pb.PinRequest(**who, owner=owner), timeout=10)
    request = pb.SurveyPinsRequest(page_size=1)
    seen: list[pb.Pin] = []
    while True:
        page = await world.stub.SurveyPins(request, timeout=10)
        seen += [pin for pin in page.pins if pin.account_id == account]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert {(pin.asset_id, pin.owner) for pin in seen} == pins
    assert len(seen) == len(pins)
    some = await world.stub.SurveyPins(pb.SurveyPinsRequest(owners=["p1"], page_size=1), timeout=10)
    assert {(pin.asset_id, pin.owner) for pin in some.pins} == {
        pin for pin in pins if pin[1] == "p1"
    }
    for owner in ("p1", "p2"):
        assert await world.unpin(account, owner) == 2


async def test_delete_takes_the_bytes_and_what_was_made_of_them(
    world: World, tmp_path: Path
) -> None:
    account = ids.new_id()
    image = await world.put(account, pictures.plain((5, 5, 5)))
    fitted = await world.fit(image, 40, 40)
    video = await world.put(account, film(tmp_path / "film.mp4"), VIDEO, owner="attempt")
    assert len(world.objects(account)) == 4
    for asset in (image, video):
        for _ in range(2):
            assert (await world.delete(asset)).state == pb.ASSET_STATE_DELETED
    assert world.objects(account) == set()
    await world.clean(account)
    poster = pb.Asset(account_id=account, asset_id=video.poster_asset_id)
    for gone in (image, fitted, video, poster):
        with refused(errors.NotFound, "ASSET_NOT_FOUND"):
            await world.stat(gone)
    with refused(errors.NotFound, "ASSET_NOT_FOUND"):
        await world.put(account, pictures.plain((5, 5, 5)))
    assert not (await world.listed(account)).assets


async def test_a_listing_goes_from_newest_to_oldest_in_pages(world: World) -> None:
    account = ids.new_id()
    made = [await world.put(account, pictures.plain((5, 5, 5)), owner=str(i)) for i in range(5)]
    fitted = await world.fit(made[0], 10, 10)
    seen: list[pb.Asset] = []
    token = ""
    for _ in range(3):
        page = await world.listed(account, page_size=2, page_token=token)
        seen, token = [*seen, *page.assets], page.next_page_token
    assert token == ""
    assert seen == [fitted, *reversed(made)]
    assert list((await world.listed(account, kind=pb.ASSET_KIND_RENDITION)).assets) == [fitted]
    with refused(errors.InvalidArgument, "PAGE_TOKEN_INVALID"):
        await world.listed(account, page_token="made up")


async def test_a_large_put_and_get_hold_little_memory(world: World, tmp_path: Path) -> None:
    account, small = ids.new_id(), film(tmp_path / "film.mp4")
    await world.get(await world.put(account, small, VIDEO, owner="warm"))
    padding = 30_000_000
    large = small + (padding + 8).to_bytes(4, "big") + b"free" + bytes(padding)
    process = psutil.Process(world.stack.supervisor.get("storage").pid)
    before = process.memory_info().rss
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak counts from here
    asset = await world.put(account, large, VIDEO, owner="large", size_bytes=len(large))
    assert hashlib.sha256(await world.get(asset)).hexdigest() == asset.sha256
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    assert asset.size_bytes > padding
    assert peak - before < 25_000_000


async def test_nothing_is_stored_while_s3_is_away(world: World) -> None:
    account, body = ids.new_id(), pictures.plain((5, 5, 5))
    kept = await world.put(account, body, owner="kept")
    await world.objects_server.kill()
    try:
        with refused(errors.Unavailable, "DEPENDENCY_UNAVAILABLE"):
            await world.put(account, body)
        with refused(errors.Unavailable, "DEPENDENCY_UNAVAILABLE"):
            await world.get(kept)
    finally:
        await world.objects_server.start()
    assert [item.asset_id for item in (await world.listed(account)).assets] == [kept.asset_id]
    await world.put(account, body)
    await swept(world, account)
