"""An image and a prompt go in; an MP4 in S3, a settled charge and events come out."""

from __future__ import annotations

import asyncio
import urllib.request
import uuid
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from framewire import errors
from framewire.generator.v1 import job_pb2
from tests import invariants, pictures
from tests import system as systems
from tests.waiting import eventually

TINY = {"model": "sora-2", "width": 320, "height": 180, "seconds": 1}


def unique(text: str) -> str:
    return f"{text} {uuid.uuid4().hex}"


async def test_image_to_video(system: systems.System, tmp_path: Path) -> None:
    """The first frame is the photo, cut to the size; the charge is the quote; the events came in order."""
    prompt, out = unique("the camera rises"), tmp_path / "film.mp4"
    stages: list[str] = []
    async with await system.account(100) as client:
        quote = await client.quote_video(prompt, **TINY)
        video = await client.generate(
            prompt, pictures.ROCKET, out=out, on_progress=lambda v: stages.append(v.stage), **TINY
        )
        balance = await client.balance()
    assert video.state == "COMPLETED"
    assert video.credits.settlement == "DONE"
    assert video.credits.captured == video.credits.reserved == quote.credits > 0
    assert (balance.available_credits, balance.held_credits) == (100 - quote.credits, 0)
    output = video.outputs[0]
    assert (output.width, output.height, output.codec) == (320, 180, "h264")
    assert abs(output.duration_ms - 1000) <= 100
    film = pictures.frames(out)
    photo = ImageOps.fit(Image.open(pictures.ROCKET), (320, 180), centering=(0.5, 0.5))
    assert pictures.difference(film[0], photo) < 12
    assert pictures.difference(film[-1], photo) > 1, "the camera does not move"
    assert len(await system.paid_jobs(prompt)) == 1
    assert stages[-1] == "DONE"


async def test_image_to_video_by_the_other_dialect(system: systems.System, tmp_path: Path) -> None:
    """sora-1 is made by the account of the azure_jobs dialect; nothing else is different."""
    prompt, out = unique("the camera rises"), tmp_path / "film.mp4"
    async with await system.account(100) as client:
        video = await client.generate(
            prompt, pictures.ROCKET, out=out, **{**TINY, "model": "sora-1"}
        )
        balance = await client.balance()
    assert (video.state, video.credits.settlement) == ("COMPLETED", "DONE")
    assert video.credits.captured == video.credits.reserved > 0
    assert (balance.available_credits, balance.held_credits) == (100 - video.credits.captured, 0)
    film = pictures.frames(out)
    photo = ImageOps.fit(Image.open(pictures.ROCKET), (320, 180), centering=(0.5, 0.5))
    assert pictures.difference(film[0], photo) < 12
    (paid,) = await system.paid_jobs(prompt)
    assert (paid["dialect"], paid["model"]) == ("azure_jobs", "sora")


async def test_a_video_from_an_image_that_came_past_us(system: systems.System) -> None:
    """A browser, say, PUTs the bytes into S3 itself, at the address and with the headers that it was given."""
    body = pictures.ROCKET.read_bytes()
    async with await system.account(100) as client:
        upload = await client.create_upload(len(body), "image/jpeg")

        def put() -> int:
            sent = urllib.request.Request(upload.url, body, upload.headers, method="PUT")
            with urllib.request.urlopen(sent, timeout=10) as answer:
                return answer.status

        assert await asyncio.to_thread(put) == 200
        image = await client.complete_upload(upload.upload_id)
        assert await client.complete_upload(upload.upload_id) == image
        video = await client.generate(unique("past us"), image_id=image.image_id, **TINY)
    assert video.state == "COMPLETED"


async def test_text_to_video(system: systems.System, tmp_path: Path) -> None:
    """No image: the provider makes the first frame as well."""
    prompt, out = unique("a calm sea"), tmp_path / "sea.mp4"
    async with await system.account(100) as client:
        video = await client.generate(prompt, out=out, **TINY)
    assert video.state == "COMPLETED"
    assert len(pictures.frames(out)) > 10
    assert len(await system.paid_jobs(prompt)) == 1


async def test_several_variants_are_several_films(system: systems.System, tmp_path: Path) -> None:
    """Two variants of one request: two different films, two prices, one paid job."""
    prompt, out = unique("twice the sea"), tmp_path / "film.mp4"
    asked = {**TINY, "model": "sora-1"}
    async with await system.account(100) as client:
        one = await client.quote_video(prompt, **asked)
        video = await client.generate(prompt, out=out, variants=2, **asked)
    assert (video.state, len(video.outputs)) == ("COMPLETED", 2)
    assert video.credits.captured == 2 * one.credits
    assert video.outputs[0].sha256 != video.outputs[1].sha256
    films = [pictures.frames(path) for path in sorted(tmp_path.glob("film*.mp4"))]
    assert [len(film) for film in films] == [len(films[0])] * 2
    assert len(await system.paid_jobs(prompt)) == 1


async def test_the_output_is_marked_as_synthetic(system: systems.System, tmp_path: Path) -> None:
    """EU AI Act, article 50: a machine-readable mark that names the model and the video."""
    from services.storage.media import marks

    out = tmp_path / "marked.mp4"
    async with await system.account(100) as client:
        video = await client.generate(unique("a marked film"), out=out, **TINY)
    mark = marks.read_mark(out)
    assert mark is not None
    assert (mark.model, mark.video_id) == ("sora-2", video.video_id)


async def test_fifty_calls_with_one_request_id_make_one_video(system: systems.System) -> None:
    prompt, request_id = unique("fifty at once"), str(uuid.uuid4())
    async with await system.account(100) as client:
        videos = await asyncio.gather(
            *(client.create_video(prompt, request_id=request_id, **TINY) for _ in range(50))
        )
        assert len({video.video_id for video in videos}) == 1
        async for _ in client.watch_video(videos[0].video_id):
            pass
        balance = await client.balance()
        again = await client.create_video(prompt, request_id=request_id, **TINY)
    assert again.video_id == videos[0].video_id
    assert again.state == "COMPLETED"
    assert balance.available_credits == 100 - again.credits.captured
    assert len(await system.paid_jobs(prompt)) == 1


async def test_the_same_id_with_another_request_is_refused(system: systems.System) -> None:
    request_id = str(uuid.uuid4())
    async with await system.account(100) as client:
        await client.create_video(unique("one"), request_id=request_id, **TINY)
        with pytest.raises(errors.FramewireError) as caught:
            await client.create_video(unique("another"), request_id=request_id, **TINY)
    assert caught.value.reason == "REQUEST_ID_REUSED"


async def test_too_few_credits_are_refused_and_leave_nothing(system: systems.System) -> None:
    request_id, prompt = str(uuid.uuid4()), unique("too dear")
    async with await system.account(0) as client:
        with pytest.raises(errors.FramewireError) as caught:
            await client.create_video(prompt, request_id=request_id, **TINY)
        assert caught.value.reason == "INSUFFICIENT_CREDITS"
        assert {"needed", "available"} <= set(caught.value.metadata)
        assert [video async for video in client.list_videos()] == []
        # Only an accepted request binds its id: topped up, the same call goes through.
        await system.operator.grant(client.account_id, 50)
        video = await client.create_video(prompt, request_id=request_id, **TINY)
        assert video.state in ("PENDING", "PROCESSING")


async def test_the_bill_says_who_what_and_by_which_version(system: systems.System) -> None:
    operations = system.operator.operations
    async with await system.account(100) as client:
        video = await client.generate(unique("a bill"), labels={"team": "red"}, **TINY)
        paid = video.credits.captured
        entries = [entry async for entry in client.entries(video_id=video.video_id)]
        assert [entry.kind for entry in entries] == ["CAPTURE", "RESERVE"]
        assert all(len(entry.trace_id) == 32 for entry in entries)
        assert {entry.policy_version for entry in entries} == {"2026-11-1"}
        (granted,) = [entry async for entry in client.entries(kinds=["grant"])]
        assert granted.operator
        await operations.refund(video.video_id, 1, from_loss=True, why="a gift")
        (line,) = await client.usage(group_by=["key", "label"], label="team")
        assert (line.videos, line.credits, line.refunded_credits) == (1, paid, 1)
        assert (len(line.key_id), line.label_value) == (26, "red")
        await operations.set_daily_cap(client.account_id, paid, key_id=line.key_id, why="enough")
        request_id = str(uuid.uuid4())
        for reason in ("CREDIT_CAP_REACHED", "ACCOUNT_FROZEN"):
            with pytest.raises(errors.FramewireError) as caught:
                await client.create_video("too much", request_id=request_id, **TINY)
            assert caught.value.reason == reason
            await operations.set_daily_cap(client.account_id, None, key_id=line.key_id)
            await operations.set_frozen(client.account_id, True, why="abuse")
        await operations.set_frozen(client.account_id, False)
        assert await client.create_video("again", request_id=request_id, **TINY)
    proof = await operations.check_books()
    assert (proof.balanced, proof.findings) == (True, ())
    assert proof.recomputed_holds >= 2


async def test_a_job_delivered_again_changes_nothing(system: systems.System) -> None:
    import nats

    from framewire import subjects

    prompt = unique("delivered twice")
    async with await system.account(100) as client:
        video = await client.generate(prompt, **TINY)
    async with system.database("generator") as database:
        job = await database.fetchval("SELECT job FROM videos WHERE video_id = $1", video.video_id)
        before = await database.fetchval("SELECT count(*) FROM attempt_history")
    assert job_pb2.Job.FromString(bytes(job)).video_id == video.video_id
    connection = await nats.connect(system.stack.addresses.nats_url)
    try:
        jetstream = connection.jetstream()
        ack = await jetstream.publish(subjects.JOBS_SUBJECT, bytes(job))

        async def consumed() -> bool:
            state = (await jetstream.stream_info(subjects.JOBS_STREAM)).state
            return state.messages == 0 and state.last_seq >= ack.seq

        await eventually(consumed)
    finally:
        await connection.close()
    async with system.database("generator") as database:
        assert await database.fetchval("SELECT count(*) FROM attempt_history") == before
    assert len(await system.paid_jobs(prompt)) == 1


async def test_a_terminal_event_told_again_changes_nothing(system: systems.System) -> None:
    import nats

    async with await system.account(100) as client:
        video = await client.generate(unique("told twice"), **TINY)
        revision, balance = video.revision, await client.balance()
        entries = [entry async for entry in client.entries()]
        told = [
            (headers, data)
            for headers, data in await invariants.stream_events(system)
            if headers.get("ce-subject") == video.video_id
            and headers["ce-type"].endswith(".completed")
        ]
        assert len(told) == 1
        connection = await nats.connect(system.stack.addresses.nats_url)
        try:
            jetstream = connection.jetstream()
            headers = {key: value for key, value in told[0][0].items() if key != "Nats-Msg-Id"}
            subject = f"framewire.events.v1.{video.account_id}.completed"
            ack = await jetstream.publish(subject, told[0][1], headers=headers)

            async def consumed() -> bool:
                infos = [
                    await jetstream.consumer_info("EVENTS", name)
                    for name in ("credits-settlement", "gateway-projector")
                ]
                return all(info.ack_floor.stream_seq >= ack.seq for info in infos)

            await eventually(consumed)
        finally:
            await connection.close()
        after = await client.get_video(video.video_id)
        assert (after.revision, after.credits) == (revision, video.credits)
        assert await client.balance() == balance
        assert [entry async for entry in client.entries()] == entries


async def test_a_refused_prompt_costs_nothing(system: systems.System) -> None:
    prompt = unique("[fault:moderated_now] nothing that may be shown")
    async with await system.account(100) as client:
        with pytest.raises(errors.FramewireError) as caught:
            await client.generate(prompt, **TINY)
        assert caught.value.reason == "INPUT_REFUSED"
        assert (await client.balance()).available_credits == 100


async def test_foreign_videos_and_images_are_not_found(system: systems.System) -> None:
    async with await system.account(100) as owner, await system.account(100) as other:
        image = await owner.upload_image(pictures.plain((200, 30, 30)))
        video = await owner.create_video(unique("mine"), **TINY)
        with pytest.raises(errors.FramewireError) as caught:
            await other.get_video(video.video_id)
        assert caught.value.reason == "VIDEO_NOT_FOUND"
        with pytest.raises(errors.FramewireError) as caught:
            await other.create_video(unique("theirs"), image_id=image.image_id, **TINY)
        assert caught.value.reason == "ASSET_NOT_FOUND"
        assert (await other.balance()).held_credits == 0


async def test_every_invariant_holds_after_all_of_it(system: systems.System) -> None:
    await system.quiet()
    assert await invariants.violations(system) == []


async def test_the_services_agree_after_all_of_it(system: systems.System) -> None:
    """Pins of inputs are let go of a moment after the end."""

    async def agreed() -> bool:
        found = await system.operator.operations.reconcile()
        assert found.findings == ()
        assert [side for side in found.done.sides if side.error] == []
        return found.done.videos > 0

    await eventually(agreed, every_seconds=0.3)


async def test_a_deleted_video_leaves_nothing_stored(system: systems.System) -> None:
    async with await system.account(100) as client:
        video = await client.generate(unique("to be deleted"), pictures.ROCKET, **TINY)
        assert {one.kind for one in await client.assets.usage()} >= {"INPUT_IMAGE", "OUTPUT_VIDEO"}
        gone = await client.delete_video(video.video_id)
        assert gone.deleted_at is not None

        async def nothing() -> bool:
            left = await client.assets.usage()
            assert left == (), left
            return True

        await eventually(nothing)
        assert [one async for one in client.list_videos()] == []
        kept = await client.get_video(video.video_id)
        assert (kept.spec.prompt, kept.credits.captured) == ("", video.credits.captured)
    assert await job_of(system, video.video_id) == ("", "sora-2")


async def job_of(system: systems.System, video_id: str) -> tuple[str, str]:
    """Prompt and model of a video as the generator has it."""
    query = "SELECT job FROM videos WHERE video_id = $1"
    async with system.database("generator") as database:
        row = await database.fetchval(query, video_id)
    spec = job_pb2.Job.FromString(row).spec
    return spec.prompt, spec.model


async def test_an_erased_account_leaves_its_books_and_nothing_else(system: systems.System) -> None:
    """Words, pictures, videos and keys go, of a video that lives, too; what was paid stays."""
    operations = system.operator.operations
    async with await system.account(100) as client:
        prompt = unique("to be erased")
        video = await client.generate(prompt, pictures.ROCKET, **TINY)
        unused = await client.upload_image(pictures.plain((9, 9, 9)))
        live = await client.create_video(unique("still live"), **TINY)
        account_id = video.account_id
        assert unused.image_id
        assert (await job_of(system, video.video_id))[0] == prompt

        async def erased() -> bool:
            found = await operations.erase_account(account_id, why="asked by letter")
            return found.done_at is not None

        await eventually(erased, within_seconds=60, every_seconds=0.3)
        with pytest.raises(errors.FramewireError) as refused:
            await client.get_video(video.video_id)
        assert refused.value.reason == "CREDENTIALS_INVALID"
    for each in (video, live):
        assert (await job_of(system, each.video_id))[0] == ""
    async with system.database("gateway") as gateway:
        rows = await gateway.fetch("SELECT * FROM videos WHERE account_id = $1", account_id)
    assert len(rows) == 2
    assert all(row["deleted_at"] for row in rows)
    assert prompt.encode() not in b"".join(row["spec"] for row in rows)
    async with system.database("storage") as storage:
        query = "SELECT DISTINCT state FROM assets WHERE account_id = $1"
        states = await storage.fetch(query, account_id)
    assert {row["state"] for row in states} <= {"DELETING", "DELETED"}
    async with system.database("credits") as ledger:
        query = "SELECT captured FROM holds WHERE hold_id = $1"
        assert await ledger.fetchval(query, video.video_id) == video.credits.captured > 0
