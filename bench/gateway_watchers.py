"""Two thousand watchers of one gateway process: how long an event takes to reach its own, and what each costs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import grpc
import nats
import psutil
from google.protobuf import json_format

from bench import frame
from framewire import subjects
from framewire.events.v1 import event_pb2
from framewire.gateway.v1 import video_pb2, video_pb2_grpc
from services.local import stack
from tests.waiting import eventually

WATCHERS = int(os.environ.get("WATCHERS", "2000"))
OPENED_A_SECOND = 200
VIDEOS = 40
CHANNELS = 20
EVENTS = 100

Create = Callable[[], Awaitable[video_pb2.Video]]
Metadata = tuple[tuple[str, str], ...]


class Watchers:
    """Streams, and when each has seen which state of its video."""

    def __init__(self, stubs: list[video_pb2_grpc.VideoServiceStub], metadata: Metadata) -> None:
        self._stubs = stubs
        self._metadata = metadata
        self.seen: dict[str, list[float]] = {}
        self.opened = 0
        self.tasks: list[asyncio.Task[None]] = []

    async def open(self, videos: list[video_pb2.Video], count: int) -> None:
        """So many streams, evenly over the videos, at most 200 a second."""
        for number in range(count):
            video = videos[number % len(videos)]
            stub = self._stubs[number % len(self._stubs)]
            self.tasks.append(asyncio.create_task(self._watch(stub, video)))
            await asyncio.sleep(1 / OPENED_A_SECOND)
        await eventually(lambda: self.opened >= count, within_seconds=60, what="all streams open")

    async def _watch(self, stub: video_pb2_grpc.VideoServiceStub, video: video_pb2.Video) -> None:
        request = video_pb2.WatchVideoRequest(video_id=video.video_id)
        call = stub.WatchVideo(request, metadata=self._metadata)
        first = True
        async for _ in call:
            if first:
                self.opened, first = self.opened + 1, False
            else:
                self.seen.setdefault(video.video_id, []).append(time.perf_counter())

    async def close(self) -> None:
        """Ends all streams."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def measure(whole: stack.Stack, create: Create, metadata: Metadata) -> list[frame.Measured]:
    """Both ways to spread them: over 40 videos, and all on one."""
    pid = next(one.pid for one in whole.supervisor.status() if one.name == "gateway")
    gateway = psutil.Process(pid)
    measured: list[frame.Measured] = []
    async with AsyncExitStack() as stack_:
        client = await nats.connect(whole.addresses.nats_url)
        stack_.push_async_callback(client.close)
        stubs: list[video_pb2_grpc.VideoServiceStub] = []
        for number in range(CHANNELS):
            options = [("grpc.use_local_subchannel_pool", 1), ("bench.channel", number)]
            channel = grpc.aio.insecure_channel(whole.gateway_address, options=options)
            stubs.append(video_pb2_grpc.VideoServiceStub(await stack_.enter_async_context(channel)))
        for count, goal in ((VIDEOS, 100.0), (1, None)):
            videos = [await create() for _ in range(count)]
            watchers = Watchers(stubs, metadata)
            before = gateway.memory_info().rss
            await watchers.open(videos, WATCHERS)
            each_kb = (gateway.memory_info().rss - before) / WATCHERS / 1000
            try:
                delays = await _events(client, videos, watchers, WATCHERS // count)
            finally:
                await watchers.close()
            name = f"{WATCHERS} watchers on {count} video{'s' if count > 1 else ''}"
            load = frame.Load(0, tuple(delays))
            last = load.percentile(0.99)
            measured.append(
                frame.alone(f"{name}: event to watcher, p50", load.percentile(0.5), "ms")
            )
            measured.append(frame.alone(f"{name}: event to watcher, p99", last, "ms", at_most=goal))
            if goal:  # the second time they are opened, memory of the first is used again
                measured.append(frame.alone(f"{name}: memory each", each_kb, "kB", at_most=40))
    return measured


async def _events(
    client: nats.NATS, videos: list[video_pb2.Video], watchers: Watchers, each: int
) -> list[float]:
    """One event after the other, each awaited by all of its watchers; how long each took, in seconds."""
    delays: list[float] = []
    stream = client.jetstream()
    rounds = max(1, min(EVENTS, EVENTS // len(videos) or 1)) if len(videos) > 1 else 10
    for number in range(rounds):
        for video in videos:
            watchers.seen[video.video_id] = []
            event = event_pb2.Event(
                video_id=video.video_id,
                account_id=video.account_id,
                seq=number + 1,
                kind=event_pb2.EVENT_KIND_STARTED,
                started=event_pb2.Started(attempt=number + 1, provider_account="bench"),
            )
            event.occurred_at.GetCurrentTime()
            began = time.perf_counter()
            await stream.publish(
                f"framewire.events.v1.{video.account_id}.started",
                json_format.MessageToJson(event).encode(),
                headers={"Nats-Msg-Id": f"{video.video_id}:{number + 1}"},
                stream=subjects.EVENTS_STREAM,
            )
            seen = watchers.seen[video.video_id]
            with suppress(TimeoutError):
                await eventually(
                    lambda seen=seen: len(seen) >= each, within_seconds=30, every_seconds=0.005
                )
            if len(seen) < each:
                raise SystemExit(f"only {len(seen)} of {each} watchers saw an event")
            delays += [at - began for at in seen]
    return delays
