"""Watchers: told that a video may have changed, they get it as it is now; what is in between may be skipped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nats.aio.msg import Msg

from kit import bus, errors, loops, telemetry
from services.gateway import store, videos

log = telemetry.logger(__name__)

NUDGE_SUBJECT = "framewire.nudge.v1"
BATCH = 500
RETRY_SECONDS = 0.5


class Watcher:
    """One watcher's slot: the latest row, however slowly it is taken."""

    def __init__(self) -> None:
        self._latest: videos.Video | None = None
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, video: videos.Video) -> None:
        """Replaces what was not taken yet."""
        self._latest = video
        self._ready.set()

    def close(self) -> None:
        """The process is going away."""
        self._closed = True
        self._ready.set()

    async def next(self) -> videos.Video:
        """The latest row, once there is one that was not taken. Raises Unavailable when the process goes away."""
        await self._ready.wait()
        self._ready.clear()
        if self._closed or self._latest is None:
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE",
                "this server is going away; watch again from the last revision",
                retry_after_seconds=0.1,
            )
        return self._latest


class Hub:
    """The watchers of this replica."""

    def __init__(self, videos_: store.VideoStore, bus_: bus.Bus, floor_seconds: float) -> None:
        self._videos = videos_
        self._bus = bus_
        self._floor_seconds = floor_seconds
        self._watchers: dict[str, set[Watcher]] = {}
        self._dirty: set[str] = set()
        self._bell = loops.Wake()
        self._closed = False

    @contextmanager
    def watch(self, video_id: str) -> Iterator[Watcher]:
        """A watcher of a video."""
        watcher = Watcher()
        if self._closed:
            watcher.close()
        self._watchers.setdefault(video_id, set()).add(watcher)
        try:
            yield watcher
        finally:
            mine = self._watchers[video_id]
            mine.discard(watcher)
            if not mine:
                del self._watchers[video_id]

    async def tell(self, video_id: str) -> None:
        """A row was changed: tells the watchers here at once, and the other replicas. Never raises."""
        self.nudge(video_id)
        await self._bus.tell(NUDGE_SUBJECT, video_id.encode())

    def nudge(self, video_id: str) -> None:
        """A row may have changed."""
        if video_id in self._watchers:
            self._dirty.add(video_id)
            self._bell.ring()

    async def run(self, stopping: asyncio.Event) -> None:
        """Reads changed rows for their watchers, and all watched ones every now and then."""
        read_all_at = time.monotonic() + self._floor_seconds
        try:
            while not stopping.is_set():
                await self._bell.wait(max(0.0, read_all_at - time.monotonic()), stopping)
                wanted, self._dirty = self._dirty, set()
                if time.monotonic() >= read_all_at:
                    wanted = set(self._watchers)
                    read_all_at = time.monotonic() + self._floor_seconds
                await self._read(wanted)
        finally:
            self._closed = True
            for watchers in self._watchers.values():
                for watcher in watchers:
                    watcher.close()

    async def _read(self, video_ids: set[str]) -> None:
        ordered = sorted(video_ids)
        try:
            for start in range(0, len(ordered), BATCH):
                for video in await self._videos.many(ordered[start : start + BATCH]):
                    for watcher in self._watchers.get(video.video_id, ()):
                        watcher.put(video)
        except Exception as error:
            log.warning("watch_read_failed", error=repr(error))
            self._dirty |= video_ids
            await asyncio.sleep(RETRY_SECONDS)
            self._bell.ring()


class Nudges:
    """Listens to the other replicas."""

    def __init__(self, bus_: bus.Bus, hub: Hub) -> None:
        self._bus = bus_
        self._hub = hub

    async def run(self, stopping: asyncio.Event) -> None:
        """Listens until told to stop."""

        async def heard(message: Msg) -> None:
            self._hub.nudge(message.data.decode(errors="replace"))

        await self._bus.listen(NUDGE_SUBJECT, heard, stopping)
