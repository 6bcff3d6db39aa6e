"""The synchronous face of the SDK: the same methods, the same answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import grpc
import pytest

from framewire import client as clients
from framewire import errors, sync
from framewire.gateway.v1 import video_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import UNAVAILABLE, VIDEO, Gateway, Refusal, video


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with gateways.running() as running:
        yield running


def test_every_call_of_the_client_is_there() -> None:
    public = {
        name
        for name, method in inspect.getmembers(clients.Client, callable)
        if not name.startswith("_") and name != "aclose"
    }
    assert public - {name for name in dir(sync.Client) if not name.startswith("_")} == set()


def test_calls_answer_retry_and_raise(gateway: Gateway) -> None:
    gateway.on("CreateVideo", UNAVAILABLE, video())
    gateway.on("GetVideo", Refusal(grpc.StatusCode.NOT_FOUND, "VIDEO_NOT_FOUND"))
    with sync.Client(gateway.address, "fw_key") as client:
        assert client.create_video("a rocket", seconds=4).video_id == VIDEO
        assert len(gateway.requests("CreateVideo")) == 2
        with pytest.raises(errors.FramewireError) as raised:
            client.get_video(VIDEO)
        assert raised.value.reason == "VIDEO_NOT_FOUND"


def test_pages_come_as_they_are_taken_and_an_iterator_may_be_left(gateway: Gateway) -> None:
    page = video_pb2.ListVideosResponse(videos=[video(), video()], next_page_token="more")
    gateway.on("ListVideos", page, video_pb2.ListVideosResponse(videos=[video()]))
    with sync.Client(gateway.address, "fw_key") as client:
        found = client.list_videos()
        assert next(found).video_id == VIDEO
        assert len(gateway.requests("ListVideos")) == 1
        assert len(list(found)) == 2
        left = client.list_videos()
        next(left)
        del left


async def test_inside_an_event_loop_it_says_what_to_use(gateway: Gateway) -> None:
    client = sync.Client(gateway.address, "fw_key")
    with pytest.raises(RuntimeError, match=r"framewire\.client"):
        client.get_video(VIDEO)
    client.loop.close()
