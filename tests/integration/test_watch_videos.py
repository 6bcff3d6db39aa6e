"""Many videos on one stream: named ones to their end, and whole accounts over breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from framewire import client
from framewire import errors as public_errors
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import video_pb2
from tests import gateway_world
from tests.gateway_world import PRICE, World
from tests.waiting import eventually

COMPLETED = vocabulary_pb2.VIDEO_STATE_COMPLETED


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: Any) -> AsyncIterator[World]:
    """Two replicas on one database."""
    async with gateway_world.running(tmp_path_factory.mktemp("watching"), replicas=2) as running:
        yield running


async def end(world: World, video: Any) -> None:
    """The video is made and paid for."""
    output = event_pb2.Output(asset_id="o" * 26, poster_asset_id="p" * 26)
    await world.tell(video, "completed", 3, outputs=[output], variants_requested=1)
    await world.tell(video, "settled", 0, captured_credits=PRICE)


async def until_settled(stream: Any, video_id: str) -> list[Any]:
    """What the stream tells until that video is settled."""
    told = []
    async for response in stream:
        told.append(response)
        settled = response.video.credits.settlement == vocabulary_pb2.SETTLEMENT_DONE
        if response.video.video_id == video_id and settled:
            return told
    raise AssertionError(f"the stream ended: {told}")


async def test_named_videos_are_told_to_their_ends(world: World) -> None:
    member = await world.member()
    one, two, other = [await member.create() for _ in range(3)]
    watched = [
        video_pb2.WatchedVideo(video_id=one.video_id),
        video_pb2.WatchedVideo(video_id=two.video_id, after_revision=two.revision),
    ]
    stream = member.watch_many(*watched)
    first = (await anext(aiter(stream))).video
    assert (first.video_id, first.revision) == (one.video_id, 1)
    for video in (two, other, one):
        await end(world, video)
    told = [response.video async for response in stream if response.HasField("video")]
    assert {video.video_id for video in told} == {one.video_id, two.video_id}
    last = {video.video_id: video for video in told}
    assert {video.state for video in last.values()} == {COMPLETED}
    assert {video.credits.captured for video in last.values()} == {PRICE}
    revisions = [(video.video_id, video.revision) for video in told]
    assert len(set(revisions)) == len(revisions), "nothing is told twice"


async def test_a_video_that_is_not_the_callers_is_named(world: World) -> None:
    member, other = await world.member(), await world.member()
    mine, theirs = await member.create(), await other.create()
    watched = [video_pb2.WatchedVideo(video_id=each.video_id) for each in (mine, theirs)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(member.watch_many(*watched)))
    refused = public_errors.from_rpc(caught.value)
    assert (refused.reason, theirs.video_id in refused.message) == ("VIDEO_NOT_FOUND", True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(member.watch_many(cursor="x")))
    assert public_errors.from_rpc(caught.value).reason == "PAGE_TOKEN_INVALID"


async def test_an_account_is_told_of_everything_also_over_a_break(world: World) -> None:
    member, stranger = await world.member(), await world.member()
    before = await member.create()
    stream = member.watch_many()
    assert (await anext(aiter(stream))).video.video_id == before.video_id
    cursor = (await anext(aiter(stream))).cursor
    assert cursor
    later, theirs = await member.create(), await stranger.create()
    await end(world, theirs)
    await end(world, later)
    told = await until_settled(stream, later.video_id)
    assert {each.video.video_id for each in told if each.HasField("video")} <= {
        before.video_id, later.video_id,
    }  # fmt: skip
    stream.cancel()
    missed = await member.create()
    await end(world, missed)

    async def over() -> bool:
        return (await member.video(missed.video_id)).credits.settlement == 2

    await eventually(over)
    fresh = [response async for response in _some(member.watch_many())]
    assert missed.video_id not in {each.video.video_id for each in fresh}, "it is not live"
    again = [response async for response in _some(member.watch_many(cursor=cursor))]
    ends = {each.video.video_id for each in again if each.video.state == COMPLETED}
    assert ends == {later.video_id, missed.video_id}, "an end during the break is not skipped"


async def _some(stream: Any) -> AsyncIterator[Any]:
    """What a stream begins with, until it says where it is."""
    async for response in stream:
        yield response
        if response.cursor:
            return


async def test_a_lost_nudge_and_a_quiet_account(world: World) -> None:
    """The floor reads what nobody was told of, and says where it is while nothing happens."""
    member = await world.member()
    video = await member.create()
    stream = member.watch_many()
    await anext(aiter(stream))
    first = (await anext(aiter(stream))).cursor
    statement = "UPDATE videos SET revision = 7, revised_at = clock_timestamp() WHERE video_id = $1"
    await world.pool.execute(statement, video.video_id)
    told = [await anext(aiter(stream)), await anext(aiter(stream))]
    assert [each.video.revision for each in told if each.HasField("video")] == [7]
    cursors = [each.cursor for each in told if each.cursor]
    assert cursors
    assert first not in cursors


async def test_who_does_not_read_holds_up_nobody(world: World) -> None:
    member = await world.member()
    lazy = [member.watch_many() for _ in range(20)]
    for stream in lazy:
        await stream.read()  # it is open, and nobody takes anything more from it
    keen = member.watch_many()
    for _ in range(30):
        await member.create()
    video = await member.create()
    await end(world, video)
    assert await asyncio.wait_for(until_settled(keen, video.video_id), 20)


async def test_the_sdk_goes_on_where_it_was(world: World) -> None:
    member = await world.member()
    made = [await member.create() for _ in range(3)]
    async with client.Client(world.address, member.secret) as target:
        ids = [video.video_id for video in made]
        watching = asyncio.ensure_future(_all(target, ids))
        for video in made:
            await end(world, video)
        told = await asyncio.wait_for(watching, 20)
    assert {video.video_id for video in told if video.is_settled} == set(ids)


async def _note(target: client.Client, ids: list[str], seen: list[Any]) -> None:
    async for video in target.watch_videos(ids):
        seen.append(video)  # noqa: PERF401 - read while it grows


async def _all(target: client.Client, ids: list[str]) -> list[Any]:
    return [video async for video in target.watch_videos(ids)]


async def test_a_watcher_hears_of_what_the_other_replica_admits_and_projects(world: World) -> None:
    secret = (await world.member()).secret
    here, there = (gateway_world.Caller(channel, secret) for channel in world.channels)
    made = await there.create()
    streams = [caller.watch(made.video_id) for caller in (here, there)]
    for stream in streams:
        assert (await anext(aiter(stream))).video.revision == 1
    # Either of them projects it: the event goes to one consumer that both share.
    await end(world, made)
    for stream in streams:
        told = await until_settled(stream, made.video_id)
        revisions = [response.video.revision for response in told if response.HasField("video")]
        assert revisions == sorted(set(revisions))
        assert COMPLETED in [response.video.state for response in told]


@pytest.mark.parametrize("replica", [0, 1])
async def test_a_watch_goes_on_at_the_other_replica_when_its_own_is_killed(
    world: World, replica: int
) -> None:
    member = await world.member()
    first, second = await member.create(), await member.create()
    victim, other = world.services[replica], world.services[1 - replica]
    # The first that answers has all calls of this channel, until it is gone.
    ports = [service.child.env["GATEWAY_LISTEN"] for service in (victim, other)]
    seen: list[Any] = []
    async with client.Client(f"ipv4:{','.join(ports)}", member.secret) as target:
        watching = asyncio.create_task(_note(target, [first.video_id, second.video_id], seen))
        await end(world, first)
        await eventually(lambda: any(video.is_settled for video in seen))
        await victim.kill()
        await end(world, second)
        await asyncio.wait_for(watching, 30)
    settled = [video.video_id for video in seen if video.is_settled]
    assert settled == [first.video_id, second.video_id], "each end once, none skipped"
    await victim.start()
