"""What videos start from, on the whole system: videos, images, fits and crops; smaller versions; what is no video."""

from __future__ import annotations

import asyncio
import hashlib
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest

from framewire import client as clients
from framewire import errors, types
from framewire.gateway.v1 import operator_pb2, operator_pb2_grpc
from services.storage.media import marks
from tests import pictures
from tests import system as systems
from tests.waiting import eventually

RED, BLUE, GREEN = (220, 30, 30), (30, 30, 220), (30, 200, 30)
TINY: dict[str, Any] = {"model": "sora-1", "width": 320, "height": 180, "seconds": 1}
LEFT_HALF = types.CropBounds(right_fraction=0.5)


def unique(text: str) -> str:
    return f"{text} {uuid.uuid4().hex}"


async def pins(system: systems.System, account_id: str) -> int:
    async with system.database("storage") as database:
        return await database.fetchval(
            "SELECT count(*) FROM pins WHERE account_id = $1", account_id
        )


def shown(path: Path) -> list[tuple[int, ...]]:
    return [pictures.colour(image) for image in pictures.frames(path)]


async def test_a_video_from_a_video(system: systems.System, tmp_path: Path) -> None:
    """The clip's own pictures are in the film, in its time; it is kept while the video lives, and then let go."""
    prompt, out = unique("the same, at night"), tmp_path / "film.mp4"
    clip = tmp_path / "clip.mp4"
    pictures.clip(clip, (RED, BLUE))
    async with await system.account(100) as client:
        quote = await client.quote_video(prompt, **TINY)
        video = await client.generate(prompt, video=clip, out=out, **TINY)
        assert (video.state, video.credits.captured) == ("COMPLETED", quote.credits)
        (used,) = video.spec.inputs
        assert (used.image_id, used.frame_index, used.fit) == ("", 0, "COVER")
        assert used.input_video_id
        assert video.spec.input_image_id == ""

        async def let_go() -> bool:
            return await pins(system, client.account_id) == 0

        assert await eventually(let_go)
    film = shown(out)
    assert pictures.is_near(film[2], RED)
    assert pictures.is_near(film[-3], BLUE)
    (paid,) = await system.paid_jobs(prompt)
    assert [item["type"] for item in paid["inputs"]] == ["video"]
    assert paid["inputs"][0]["file_name"].endswith(".mp4")


async def test_a_video_between_two_images(system: systems.System, tmp_path: Path) -> None:
    prompt, out = unique("from dawn to dusk"), tmp_path / "film.mp4"
    images = {23: pictures.plain(BLUE), 0: pictures.plain(RED)}
    async with await system.account(100) as client:
        video = await client.generate(prompt, images, out=out, **TINY)
    assert [each.frame_index for each in video.spec.inputs] == [0, 23]
    film = shown(out)
    assert pictures.is_near(film[0], RED)
    assert pictures.is_near(film[-1], BLUE)
    assert not pictures.is_near(film[12], RED, 40)
    (paid,) = await system.paid_jobs(prompt)
    names = [item["file_name"] for item in paid["inputs"]]
    assert [item["frame_index"] for item in paid["inputs"]] == [0, 23]
    assert len({name.split(".")[0] for name in names}) == 1, "both carry the attempt's marker"


async def test_the_preview_is_what_is_sent(system: systems.System, tmp_path: Path) -> None:
    """Byte for byte, of an image and of a video, with a fit and a crop."""
    half = tmp_path / "half.mp4"
    pictures.clip(half, (GREEN,), (96, 96))
    async with await system.account(100) as client:
        sources: list[dict[str, Any]] = [
            {"image": pictures.plain(RED, (100, 100)), "fit": "CONTAIN_BLURRED"},
            {"image": pictures.ROCKET, "fit": "contain", "crop": LEFT_HALF},
            {"video": half, "fit": "CONTAIN"},
        ]
        for source in sources:
            inputs = await client.upload_inputs(**source)
            size = {"width": 320, "height": 180}
            (preview,) = await client.preview_inputs(inputs, model="sora-1", **size)
            body = await asyncio.to_thread(lambda url=preview.url: fetched(url))
            assert hashlib.sha256(body).hexdigest() == preview.sha256
            assert (preview.width, preview.height) == (320, 180)
            prompt = unique("as shown")
            assert (await client.generate(prompt, inputs=inputs, **TINY)).state == "COMPLETED"
            (paid,) = await system.paid_jobs(prompt)
            assert [item["sha256"] for item in paid["inputs"]] == [preview.sha256]


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


async def test_bars_and_crops_are_seen_in_the_film(system: systems.System, tmp_path: Path) -> None:
    out, square = tmp_path / "film.mp4", pictures.plain(RED, (100, 100))
    async with await system.account(100) as client:
        for fit, side in (("CONTAIN", (0, 0, 0)), ("CONTAIN_BLURRED", (132, 18, 18))):
            await client.generate(unique("bars"), square, fit=fit, out=out, **TINY)
            first = pictures.frames(out)[0]
            bar = pictures.colour(first.crop((0, 0, 40, 180)))
            middle = pictures.colour(first.crop((120, 40, 200, 140)))
            assert pictures.is_near(bar, side), (fit, bar)
            assert pictures.is_near(middle, RED), (fit, middle)


async def test_a_video_upload_past_us_and_its_limits(
    system: systems.System, tmp_path: Path
) -> None:
    body = pictures.clip(tmp_path / "clip.mp4", (GREEN,), seconds=6)
    async with await system.account(100) as client:
        upload = await client.create_upload(len(body), "video/mp4")
        request = urllib.request.Request(upload.url, body, upload.headers, method="PUT")
        with await asyncio.to_thread(urllib.request.urlopen, request, timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(errors.FramewireError) as caught:
            await client.complete_upload(upload.upload_id)
        assert caught.value.reason == "NOT_AN_IMAGE"
        clip = await client.complete_video_upload(upload.upload_id)
        assert (clip.width, clip.height, clip.codec) == (160, 90, "h264")
        assert abs(clip.duration_ms - 6000) < 60
        with pytest.raises(errors.FramewireError) as caught:
            await client.complete_video_upload((await image_upload(client)).upload_id)
        assert caught.value.reason == "NOT_A_VIDEO"
        # Too long for the model, which is known when it is admitted: nothing is held, and the id is free.
        long = types.VideoInput(input_video_id=clip.input_video_id)
        with pytest.raises(errors.FramewireError) as caught:
            await client.create_video(unique("too long"), inputs=[long], **TINY)
        assert caught.value.reason == "INPUT_NOT_SUPPORTED"
        assert "6.00 s" in caught.value.message
        assert "a video of at most 5 s" in caught.value.message
        assert (await client.balance()).held_credits == 0

        async def let_go() -> bool:
            return await pins(system, client.account_id) == 0

        assert await eventually(let_go)


async def image_upload(client: clients.Client) -> types.Upload:
    body = pictures.plain(RED)
    upload = await client.create_upload(len(body), "image/jpeg")
    request = urllib.request.Request(upload.url, body, upload.headers, method="PUT")
    await asyncio.to_thread(urllib.request.urlopen, request, timeout=10)
    return upload


async def test_an_output_may_start_another_video(system: systems.System, tmp_path: Path) -> None:
    out = tmp_path / "second.mp4"
    async with await system.account(100) as client:
        first = await client.generate(unique("first"), pictures.plain(GREEN), **TINY)
        again = types.VideoInput(input_video_id=first.outputs[0].asset_id)
        second = await client.generate(unique("second"), inputs=[again], out=out, **TINY)
    assert second.state == "COMPLETED"
    assert pictures.is_near(shown(out)[3], GREEN)


async def test_smaller_versions_come_with_the_video(system: systems.System, tmp_path: Path) -> None:
    async with await system.account(100) as client:
        asked = {**TINY, "rendition_heights": [90, 120], "variants": 2}
        plain = await client.quote_video("a", **{**TINY, "variants": 2})
        assert (await client.quote_video("a", **asked)).credits == plain.credits
        video = await client.generate(unique("also small"), pictures.plain(RED), **asked)
        assert (video.state, video.spec.rendition_heights) == ("COMPLETED", (120, 90))
        for output in video.outputs:
            assert [(r.width, r.height) for r in output.renditions] == [(214, 120), (160, 90)]
        place = tmp_path / "small.mp4"
        await client.download(video.video_id, place, variant=1, rendition_height=90)
        wanted = video.outputs[1].renditions[1]
        assert hashlib.sha256(place.read_bytes()).hexdigest() == wanted.sha256
        assert pictures.frames(place)[0].size == (160, 90)
        assert pictures.is_near(shown(place)[0], RED)
        mark = marks.read_mark(place)
        assert mark is not None
        assert (mark.model, mark.video_id) == ("sora-1", video.video_id)


async def test_what_is_no_video_is_kept_aside_for_operators(system: systems.System) -> None:
    """The provider gives the same bad bytes twice: its fault, nothing is charged, and the bytes can be looked at."""
    prompt = f"{unique('broken')} [fault:content_corrupt=9]"
    async with await system.account(100) as client:
        asked = await client.create_video(prompt, **{**TINY, "model": "sora-2"})
        made = [state async for state in client.watch_video(asked.video_id)][-1]
        assert made.failure is not None
        assert (made.state, made.failure.cause) == ("FAILED", "OUTPUT_UNUSABLE")
        assert (made.credits.captured, made.credits.settlement) == (0, "DONE")
        assert (await client.balance()).available_credits == 100
        found = await system.operator.operations.quarantined(client.account_id, why="a test")
    (kept,) = found
    assert kept.asset.state == "QUARANTINED"
    body = await asyncio.to_thread(fetched, kept.url)
    assert hashlib.sha256(body).hexdigest() == kept.asset.sha256
    assert len(body) == kept.asset.size_bytes > 1000
    async with system.database("gateway") as database:
        audited = await database.fetchval(
            "SELECT why FROM audit WHERE method = 'ListQuarantined' AND account_id = $1",
            made.account_id,
        )
    assert audited == "a test"


async def test_nobody_else_looks_at_what_is_kept_aside(system: systems.System) -> None:
    async with (
        await system.account(1) as client,
        grpc.aio.insecure_channel(system.stack.gateway_address) as channel,
    ):
        key = await client.create_api_key()
        stub = operator_pb2_grpc.OperatorServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListQuarantined(
                operator_pb2.ListQuarantinedRequest(account_id=client.account_id),
                metadata=(("authorization", f"Bearer {key.secret}"),),
                timeout=10,
            )
    assert errors.from_rpc(caught.value).reason == "ROLE_NOT_ALLOWED"
