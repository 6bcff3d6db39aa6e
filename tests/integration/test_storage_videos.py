"""Storage and videos: those that callers send, smaller versions of those that were made, and bytes that are none."""

from __future__ import annotations

import asyncio
import hashlib
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from framewire.storage.v1 import storage_pb2 as pb
from kit import errors, ids
from services.storage.media import marks
from tests import pictures
from tests.storage_world import CLIP, VIDEO, World, film, refused, swept, world
from tests.waiting import eventually

__all__ = ["world"]  # fixture

BAD = b"\0\0\0\x18ftypisom" + b"no video at all" * 100


def shown(place: Path, body: bytes) -> list[tuple[int, ...]]:
    place.write_bytes(body)
    return [pictures.colour(image) for image in pictures.frames(place)]


async def test_a_clip_is_cleaned_measured_and_fitted(world: World, tmp_path: Path) -> None:
    account, body = ids.new_id(), film(tmp_path / "film.mp4", 200)
    clip = await world.put(account, body, CLIP)
    assert (clip.kind, clip.state, clip.media_type) == (CLIP, pb.ASSET_STATE_READY, "video/mp4")
    assert (clip.width, clip.height, clip.duration_ms, clip.fps) == (64, 48, 1000, 24)
    assert (clip.codec, clip.has_audio, clip.poster_asset_id) == ("h264", False, "")
    assert clip.source_sha256 == hashlib.sha256(body).hexdigest()
    kept = await world.get(clip)
    assert hashlib.sha256(kept).hexdigest() == clip.sha256
    assert shown(tmp_path / "kept", kept) == shown(tmp_path / "sent", body)
    fitted = await world.fit(clip, 32, 32, mode=pb.FIT_MODE_CONTAIN, pin_owner="v")
    assert (fitted.kind, fitted.media_type) == (pb.ASSET_KIND_RENDITION, "video/mp4")
    assert (fitted.width, fitted.height, fitted.duration_ms) == (32, 32, 1000)
    assert await world.fit(clip, 32, 32, mode=pb.FIT_MODE_CONTAIN) == fitted
    part = pb.CropBounds(left_fraction=0, top_fraction=0, right_fraction=0.5, bottom_fraction=1)
    assert (await world.fit(clip, 32, 32, crop=part)).asset_id != fitted.asset_id
    with refused(errors.InvalidArgument, "INVALID_FIELD"):
        await world.fit(clip, 33, 32)
    with refused(errors.FailedPrecondition, "CONFLICT"):
        await world.delete(clip)
    assert await world.unpin(account, "v") == 2
    await world.clean(account)
    await world.delete(clip)
    assert world.objects(account) == set()


async def test_clips_over_the_limits_or_that_are_none_leave_nothing(
    world: World, tmp_path: Path
) -> None:
    account = ids.new_id()
    long, image = film(tmp_path / "long.mp4", frames=100), pictures.plain((1, 1, 1))
    whole = film(tmp_path / "film.mp4")
    for body, reason in (
        (long, "TOO_LARGE"),
        (bytes(300_001), "TOO_LARGE"),
        (image, "NOT_A_VIDEO"),
        (BAD, "NOT_A_VIDEO"),
        (whole[: len(whole) // 2], "NOT_A_VIDEO"),
    ):
        with refused(errors.InvalidArgument, reason):
            await world.put(account, body, CLIP)
        await world.nothing(account)
    # What was made may be larger than what callers send.
    assert (await world.put(account, long, VIDEO)).duration_ms > 4000


async def test_a_clip_may_be_put_past_us(world: World, tmp_path: Path) -> None:
    account, body = ids.new_id(), film(tmp_path / "film.mp4")

    def announced(**changed: object) -> pb.CreateUploadRequest:
        said = {"size_bytes": len(body), "media_type": "video/mp4", **changed}
        return pb.CreateUploadRequest(account_id=account, owner="one", **said)

    with refused(errors.InvalidArgument, "TOO_LARGE"):
        await world.stub.CreateUpload(announced(size_bytes=300_001), timeout=10)
    with refused(errors.InvalidArgument, "TOO_LARGE"):
        await world.stub.CreateUpload(
            announced(size_bytes=200_001, media_type="image/png"), timeout=10
        )
    upload = await world.stub.CreateUpload(announced(), timeout=10)
    request = urllib.request.Request(upload.url, body, dict(upload.headers), method="PUT")
    with await asyncio.to_thread(urllib.request.urlopen, request, timeout=10) as answer:
        assert answer.status == 200
    done = pb.CompleteUploadRequest(account_id=account, upload_id=upload.upload_id)
    clip = await world.stub.CompleteUpload(done, timeout=30)
    assert (clip.kind, clip.asset_id, clip.width) == (CLIP, upload.upload_id, 64)
    assert await world.stub.CompleteUpload(done, timeout=30) == clip
    await world.clean(account)


async def test_a_rendition_is_marked_made_once_and_goes_with_its_output(
    world: World, tmp_path: Path
) -> None:
    account, mark = ids.new_id(), pb.Mark(model="sora-2", video_id="v-1")
    output = await world.put(account, film(tmp_path / "film.mp4", 120), VIDEO, mark=mark)
    one, other = await asyncio.gather(world.rendition(output, 24), world.rendition(output, 24))
    assert one == other
    assert (one.kind, one.media_type, one.codec) == (pb.ASSET_KIND_RENDITION, "video/mp4", "h264")
    assert (one.width, one.height, one.duration_ms) == (32, 24, 1000)
    assert one.source_sha256 == output.sha256
    # As long as its output, not as other renditions (an hour, here).
    assert one.HasField("expires_at") == output.HasField("expires_at")
    (tmp_path / "small").write_bytes(await world.get(one))
    assert marks.read_mark(tmp_path / "small") is not None
    (tmp_path / "large").write_bytes(await world.get(output))
    assert marks.read_mark(tmp_path / "small") == marks.read_mark(tmp_path / "large")
    for height in (48, 64, 23):
        with refused(errors.InvalidArgument, "INVALID_FIELD"):
            await world.rendition(output, height)
    clip = await world.put(account, film(tmp_path / "clip.mp4"), CLIP)
    with refused(errors.InvalidArgument, "INVALID_FIELD"):
        await world.rendition(clip, 24)
    await world.clean(account)
    await world.delete(output)
    assert (await world.stub.Stat(_of(clip), timeout=10)).state == pb.ASSET_STATE_READY
    with refused(errors.NotFound, "ASSET_NOT_FOUND"):
        await world.stat(one)


def _of(asset: pb.Asset) -> pb.StatRequest:
    return pb.StatRequest(account_id=asset.account_id, asset_id=asset.asset_id)


# What is no video, twice


async def quarantined(world: World, account: str) -> list[pb.Asset]:
    found = await world.listed(account, state=pb.ASSET_STATE_QUARANTINED)
    return list(found.assets)


async def test_the_same_bad_bytes_again_are_kept_aside(world: World, tmp_path: Path) -> None:
    account, sha256 = ids.new_id(), hashlib.sha256(BAD).hexdigest()
    with refused(errors.InvalidArgument, "NOT_A_VIDEO"):
        await world.put(account, BAD, VIDEO)
    await world.nothing(account)
    with refused(errors.InvalidArgument, "NOT_A_VIDEO"):
        await world.put(account, BAD, VIDEO, refused_sha256="0" * 64)
    await world.nothing(account)
    with refused(errors.InvalidArgument, "NOT_A_VIDEO") as first:
        await world.put(account, BAD, VIDEO, refused_sha256=sha256)
    assert first.value.metadata["sha256"] == sha256
    (kept,) = await quarantined(world, account)
    assert (kept.state, kept.sha256) == (pb.ASSET_STATE_QUARANTINED, sha256)
    assert (kept.size_bytes, kept.media_type) == (len(BAD), "application/octet-stream")
    soon = datetime.now(UTC) + timedelta(days=29)
    assert kept.expires_at.ToDatetime(UTC) > soon
    # To everyone else there is no such asset, and it stays so when good bytes come.
    for call in (world.stat(kept), world.get(kept), world.fit(kept, 10, 10)):
        with refused(errors.NotFound, "ASSET_NOT_FOUND"):
            await call
    assert not (await world.listed(account)).assets
    with refused(errors.InvalidArgument, "NOT_A_VIDEO") as again:
        await world.put(account, film(tmp_path / "good.mp4"), VIDEO)
    assert again.value.metadata["sha256"] == sha256
    # An operator reads it.
    who = {"account_id": account, "asset_id": kept.asset_id}
    with refused(errors.NotFound, "ASSET_NOT_FOUND"):
        await world.stub.SignUrl(pb.SignUrlRequest(**who), timeout=10)
    signed = await world.stub.SignUrl(
        pb.SignUrlRequest(**who, state=pb.ASSET_STATE_QUARANTINED), timeout=10
    )
    with await asyncio.to_thread(urllib.request.urlopen, signed.url, timeout=10) as answer:
        assert answer.read() == BAD
    # Its time ends.
    await world.pool.execute(
        "UPDATE assets SET expires_at = clock_timestamp() WHERE asset_id = $1", kept.asset_id
    )

    async def gone() -> bool:
        return world.objects(account) == set() and not await quarantined(world, account)

    assert await eventually(gone)
    await world.clean(account)


async def test_killed_while_it_is_kept_aside_a_retry_keeps_it(world: World) -> None:
    account, sha256 = ids.new_id(), hashlib.sha256(BAD).hexdigest()
    (world.stack.data_dir / "failpoints").write_text("storage.quarantine.after_object=kill\n")
    with pytest.raises(errors.ServiceError):
        await world.put(account, BAD, VIDEO, refused_sha256=sha256)
    assert await world.stack.supervisor.wait_exit("storage") == -9
    await world.stack.supervisor.start("storage")

    async def kept() -> bool:
        try:
            await world.put(account, BAD, VIDEO, refused_sha256=sha256)
        except errors.Unavailable:  # the channel has not connected again
            return False
        except errors.InvalidArgument as refusal:
            return refusal.reason == "NOT_A_VIDEO"
        return False

    assert await eventually(kept)
    assert [asset.sha256 for asset in await quarantined(world, account)] == [sha256]
    await world.pool.execute("UPDATE assets SET state = 'DELETING' WHERE account_id = $1", account)
    await swept(world, account)
