"""The video resource: batches, listings, deletion, retries and double clicks; the services behind are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest_asyncio

from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import video_pb2
from kit import errors
from services.gateway import videos
from services.gateway.store import VideoStore
from tests import gateway_world
from tests.gateway_world import IMAGE, Caller, World, new_id, wanted
from tests.waiting import eventually

STATE = vocabulary_pb2


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: Any) -> AsyncIterator[World]:
    async with gateway_world.running(tmp_path_factory.mktemp("videos")) as running:
        yield running


async def ended(world: World, member: Caller, kind: str = "completed", **fields: Any) -> Any:
    """A video that has ended, as its owner sees it."""
    made = await member.create(**fields)
    detail: dict[str, Any] = {}
    if kind == "completed":
        detail = {"outputs": [event_pb2.Output(asset_id="o" * 26, poster_asset_id="p" * 26)]}
    await world.tell(made, "queued", 1)
    await world.tell(made, kind, 2, **detail)

    async def seen() -> Any:
        video = await member.video(made.video_id)
        return video if video.HasField("finished_at") else None

    return await eventually(seen)


def batch(request_id: str, *items: Any) -> Any:
    return video_pb2.BatchCreateVideosRequest(request_id=request_id, requests=items)


def item(prompt: str = "a cat", model: str = "", **fields: Any) -> Any:
    spec = vocabulary_pb2.VideoSpec(prompt=prompt, model=model)
    return video_pb2.CreateVideoRequest(spec=spec, **fields)


# Batches


async def test_a_batch_is_ordinary_admissions_with_a_verdict_each(world: World) -> None:
    member, request_id = await world.member(), new_id()
    asked = batch(request_id, item("one"), item("two", model="sora-9"), item(""), item("four"))
    answer = await member.call("BatchCreateVideos", asked)
    first, unknown, empty, last = answer.results
    assert first.video.state == last.video.state == STATE.VIDEO_STATE_PENDING
    assert first.video.spec.prompt == "one"
    invalid = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (unknown.code, unknown.reason) == (invalid, "MODEL_UNKNOWN")
    assert (empty.code, empty.reason) == (invalid, "INVALID_FIELD")
    again = await member.call("BatchCreateVideos", asked)
    assert [one.video.video_id for one in again.results] == [
        first.video.video_id, "", "", last.video.video_id,
    ]  # fmt: skip
    assert sorted(world.behind.holds(member.account_id)) == sorted(
        [first.video.video_id, last.video.video_id]
    )
    other = batch(request_id, item("another"))
    assert (await member.refused("BatchCreateVideos", other)).reason == "REQUEST_ID_REUSED"


async def test_what_was_not_decided_is_tried_again(world: World) -> None:
    member, request_id = await world.member(), new_id()
    world.behind.refuse[f"Reserve {member.account_id}"] = errors.Unavailable("X", "away")
    asked = batch(request_id, item("one"), item("two"))
    answer = await member.call("BatchCreateVideos", asked)
    assert {one.code for one in answer.results} == {grpc.StatusCode.UNAVAILABLE.value[0]}
    del world.behind.refuse[f"Reserve {member.account_id}"]

    async def admitted() -> bool:
        results = (await member.call("BatchCreateVideos", asked)).results
        assert all(one.HasField("video") for one in results), results
        return True

    await eventually(admitted, every_seconds=0.2)


async def test_a_batch_of_which_nothing_was_accepted_binds_nothing(world: World) -> None:
    member, request_id = await world.member(), new_id()
    await member.call("BatchCreateVideos", batch(request_id, item("", model="sora-9")))
    answer = await member.call("BatchCreateVideos", batch(request_id, item("corrected")))
    assert answer.results[0].HasField("video")


async def test_a_batch_is_of_one_account_and_of_at_most_a_hundred(world: World) -> None:
    member, other = await world.member(), await world.member()
    mixed = batch(new_id(), item(), item(account_id=other.account_id))
    assert (await member.refused("BatchCreateVideos", mixed)).reason == "INVALID_FIELD"
    for count in (0, 101):
        many = batch(new_id(), *[item()] * count)
        assert (await member.refused("BatchCreateVideos", many)).reason == "INVALID_FIELD"


# Listings


async def test_listings_are_filtered_ordered_and_paged(world: World) -> None:
    member = await world.member()
    made = [
        await member.create(
            client_reference=f"r{number % 2}", labels={"team": "a" if number < 3 else "b"}
        )
        for number in range(5)
    ]
    ids_ = [video.video_id for video in made]

    async def listed(**fields: Any) -> list[str]:
        request = video_pb2.ListVideosRequest(page_size=2, **fields)
        found: list[str] = []
        while True:
            page = await member.call("ListVideos", request)
            assert len(page.videos) <= 2
            found += [video.video_id for video in page.videos]
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    assert await listed() == ids_[::-1]
    assert await listed(order=video_pb2.VIDEO_ORDER_OLDEST_FIRST) == ids_
    assert await listed(client_reference="r1") == [ids_[3], ids_[1]]
    assert await listed(labels={"team": "b"}) == [ids_[4], ids_[3]]
    assert await listed(model="sora-2") == ids_[::-1]
    assert await listed(model="sora-1") == []
    assert await listed(state=STATE.VIDEO_STATE_COMPLETED) == []
    assert await listed(created_from=made[3].created_at) == [ids_[4], ids_[3]]
    assert await listed(created_to=made[1].created_at) == [ids_[0]]
    first = await member.call("ListVideos", video_pb2.ListVideosRequest(page_size=2))
    for changed in ({"model": "sora-2"}, {"order": video_pb2.VIDEO_ORDER_OLDEST_FIRST}):
        request = video_pb2.ListVideosRequest(page_token=first.next_page_token, **changed)
        assert (await member.refused("ListVideos", request)).reason == "PAGE_TOKEN_INVALID"


# Deletion


async def delete(member: Caller, video_id: str, *, cancel: bool = False) -> Any:
    request = video_pb2.DeleteVideoRequest(video_id=video_id, cancel=cancel)
    return await member.call("DeleteVideo", request)


async def test_a_deleted_video_is_gone_with_what_was_made_of_it(world: World) -> None:
    member = await world.member()
    video = await ended(world, member, image=IMAGE, client_reference="mine")
    before = world.behind.calls["Delete", "o" * 26]
    gone = await delete(member, video.video_id)
    assert gone.HasField("deleted_at")
    assert list(gone.outputs) == []
    assert world.behind.calls["Delete", "o" * 26] == before + 1
    assert world.behind.calls["Unpin", video.video_id] >= 1
    now = await member.video(video.video_id)
    assert (now.spec.prompt, now.state) == ("", STATE.VIDEO_STATE_COMPLETED)
    assert (await delete(member, video.video_id)).deleted_at == gone.deleted_at
    listing = await member.call("ListVideos", video_pb2.ListVideosRequest())
    assert list(listing.videos) == []
    stranger = await world.member()
    request = video_pb2.DeleteVideoRequest(video_id=video.video_id)
    assert (await stranger.refused("DeleteVideo", request)).reason == "VIDEO_NOT_FOUND"
    told = await world.pool.fetch("SELECT ce_id FROM outbox WHERE subject LIKE $1 || '%'",
        f"framewire.events.v1.{member.account_id}.deleted")  # fmt: skip
    assert [row["ce_id"] for row in told] == [f"{video.video_id}:deleted"]


async def test_a_projection_undoes_nothing_that_was_written_meanwhile(world: World) -> None:
    member = await world.member()
    video = await member.create()
    async with world.pool.acquire() as connection, connection.transaction():
        statement = "UPDATE videos SET cancel_requested = true WHERE video_id = $1"
        await connection.execute(statement, video.video_id)
        await world.tell(video, "started", 1)

        async def waits_for_us() -> bool:
            return await world.pool.fetchval(
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE cardinality(pg_blocking_pids(pid)) > 0"
            )

        await eventually(waits_for_us, what="the projector has read the row and would write it")

    async def projected() -> bool:
        return (await member.video(video.video_id)).state == STATE.VIDEO_STATE_PROCESSING

    await eventually(projected)
    assert await world.pool.fetchval(
        "SELECT cancel_requested FROM videos WHERE video_id = $1", video.video_id
    ), "the wish to cancel, written between the projector's look and its word, is still there"


async def test_what_is_told_together_is_projected_together(world: World) -> None:
    member = await world.member()
    one, other, unknown = await member.create(), await member.create(), "z" * 26
    now = datetime.now(UTC)

    def told(kind: str, seq: int, **more: Any) -> videos.Fact:
        return videos.Fact(videos.Kind[kind], seq, now, **more)

    failed = told("FAILED", 3, cause="PROVIDER_ERROR", message="it broke")
    facts = [
        (one.video_id, told("QUEUED", 1, queue_position=4)),
        (one.video_id, told("STARTED", 2)),
        (other.video_id, told("STARTED", 1)),
        (unknown, told("STARTED", 1)),
        (one.video_id, failed),
        (one.video_id, failed),
        (other.video_id, told("QUEUED", 1)),
    ]
    store = VideoStore(world.pool)
    answers = await asyncio.gather(*(store.project(*fact, 60) for fact in facts))
    states = [answer and answer.state for answer in answers]
    assert states == ["PENDING", "PROCESSING", "PROCESSING", None, "FAILED", None, None]
    assert (await member.video(one.video_id)).state == STATE.VIDEO_STATE_FAILED
    assert (await member.video(one.video_id)).revision == one.revision + 3
    assert (await member.video(other.video_id)).state == STATE.VIDEO_STATE_PROCESSING


async def test_an_image_goes_with_the_last_video_made_from_it(world: World) -> None:
    member = await world.member()
    one = await ended(world, member, image=IMAGE)
    two = await ended(world, member, image=IMAGE)
    before = world.behind.calls["Delete", IMAGE]
    await delete(member, one.video_id)
    assert world.behind.calls["Delete", IMAGE] == before
    await delete(member, two.video_id)
    assert world.behind.calls["Delete", IMAGE] == before + 1


async def test_a_live_video_is_deleted_when_it_has_ended(world: World) -> None:
    member = await world.member()
    made = await member.create()
    refused = await member.refused(
        "DeleteVideo", video_pb2.DeleteVideoRequest(video_id=made.video_id)
    )
    assert refused.reason == "VIDEO_NOT_TERMINAL"
    assert (await delete(member, made.video_id, cancel=True)).HasField("deleted_at")
    assert (await member.video(made.video_id)).state == STATE.VIDEO_STATE_CANCELLED


async def test_what_storage_refuses_to_remove_now_the_sweeper_removes(world: World) -> None:
    member = await world.member()
    video = await ended(world, member)
    world.behind.refuse["Delete " + "o" * 26] = errors.Unavailable("X", "away")
    assert (await delete(member, video.video_id)).HasField("deleted_at")
    del world.behind.refuse["Delete " + "o" * 26]

    async def removed() -> bool:
        await world.pool.execute(
            "UPDATE videos SET next_check_at = clock_timestamp() WHERE delete_due"
        )
        return not await world.pool.fetchval(
            "SELECT delete_due FROM videos WHERE video_id = $1", video.video_id
        )

    await eventually(removed)
    assert (await member.video(video.video_id)).spec.prompt == ""


# Again


async def test_a_failed_video_is_made_anew_as_another_one(world: World) -> None:
    member, request_id = await world.member(), new_id()
    failed = await ended(world, member, "failed", labels={"team": "a"})

    def again(video_id: str, request_id: str = "") -> Any:
        return video_pb2.RetryVideoRequest(request_id=request_id or new_id(), video_id=video_id)

    made = await member.call("RetryVideo", again(failed.video_id, request_id))
    assert made.retry_of == failed.video_id
    assert made.video_id != failed.video_id
    assert (made.spec, made.labels) == (failed.spec, failed.labels)
    assert made.video_id in world.behind.holds(member.account_id)
    replay = await member.call("RetryVideo", again(failed.video_id, request_id))
    assert replay.video_id == made.video_id
    live = await member.refused("RetryVideo", again(made.video_id))
    assert live.reason == "VIDEO_NOT_TERMINAL"
    done = await ended(world, member)
    assert (await member.refused("RetryVideo", again(done.video_id))).reason == "VIDEO_NOT_FAILED"
    await delete(member, failed.video_id)
    assert (await member.refused("RetryVideo", again(failed.video_id))).reason == "VIDEO_DELETED"


async def test_a_double_click_is_refused_where_the_caller_wants_that(world: World) -> None:
    member = await world.member()
    within = timedelta(seconds=60)
    first = await member.create(reject_duplicates_within=within)
    refused = await member.refused("CreateVideo", wanted(reject_duplicates_within=within))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_VIDEO")
    assert refused.metadata["video_id"] == first.video_id
    both = await asyncio.gather(member.create(), member.create(client_reference="another"))
    assert len({first.video_id, *(video.video_id for video in both)}) == 3
