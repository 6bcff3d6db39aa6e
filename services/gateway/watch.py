"""Watchers: told that a video may have changed, they get it as it is now; what is in between may be skipped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from nats.aio.msg import Msg

from kit import bus, errors, loops, telemetry
from services.gateway import store, videos

log = telemetry.logger(__name__)

NUDGE_SUBJECT = "framewire.nudge.v1"
BATCH = 500
RETRY_SECONDS = 0.5
MOST_WAITING = 5000
MARGIN = timedelta(seconds=30)
"""How long after its `revised_at` a change may become visible: "since then" is read from so much earlier."""


class Watcher:
    """One watcher's slot: the latest row of each video, however slowly they are taken."""

    def __init__(self, *, marked: bool = False) -> None:
        self.marked = marked
        """Whether it wants to know of each pass over everything."""
        self._latest: dict[str, videos.Video] = {}
        self._as_of: datetime | None = None
        self._ready = asyncio.Event()
        self._closed = ""

    def put(self, video: videos.Video) -> None:
        """Replaces what was not taken yet. Who leaves too much behind is sent away, to come back from where it was."""
        self._latest[video.video_id] = video
        if len(self._latest) > MOST_WAITING:
            self.close("too much has changed that was not taken")
        self._ready.set()

    def mark(self, as_of: datetime) -> None:
        """All that was changed until then was put."""
        self._as_of = as_of
        self._ready.set()

    def close(self, why: str = "this server is going away") -> None:
        """There will be no more."""
        self._closed = self._closed or why
        self._latest.clear()
        self._ready.set()

    async def next(self) -> tuple[list[videos.Video], datetime | None]:
        """The rows that were not taken, once there are some; until when that is all. Raises Unavailable at the end."""
        await self._ready.wait()
        self._ready.clear()
        if self._closed:
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE",
                f"{self._closed}; watch again from where you are",
                retry_after_seconds=0.1,
            )
        taken, as_of = list(self._latest.values()), self._as_of
        self._latest, self._as_of = {}, None
        return taken, as_of


class Hub:
    """The watchers of this replica, of single videos and of whole accounts."""

    def __init__(self, videos_: store.VideoStore, bus_: bus.Bus, floor_seconds: float) -> None:
        self._videos = videos_
        self._bus = bus_
        self._floor_seconds = floor_seconds
        self._of_video: dict[str, set[Watcher]] = {}
        self._of_account: dict[str, set[Watcher]] = {}
        self._floor: datetime | None = None
        self._dirty: set[str] = set()
        self._bell = loops.Wake()
        self._closed = False

    @contextmanager
    def watch(self, video_ids: Iterable[str], *, marked: bool = False) -> Iterator[Watcher]:
        """A watcher of these videos."""
        with self._watching(self._of_video, video_ids, marked) as watcher:
            yield watcher

    @contextmanager
    def watch_account(self, account_id: str) -> Iterator[Watcher]:
        """A watcher of all videos of an account."""
        with self._watching(self._of_account, (account_id,), True) as watcher:
            yield watcher

    @contextmanager
    def _watching(
        self, watchers: dict[str, set[Watcher]], keys: Iterable[str], marked: bool
    ) -> Iterator[Watcher]:
        watcher, mine = Watcher(marked=marked), set(keys)
        if self._closed:
            watcher.close()
        for key in mine:
            watchers.setdefault(key, set()).add(watcher)
        try:
            yield watcher
        finally:
            for key in mine:
                watchers[key].discard(watcher)
                if not watchers[key]:
                    del watchers[key]

    async def tell(self, video_id: str, account_id: str) -> None:
        """A row was changed: tells the watchers here at once, and the other replicas. Never raises."""
        self.nudge(video_id, account_id)
        await self._bus.tell(NUDGE_SUBJECT, f"{video_id} {account_id}".encode())

    def nudge(self, video_id: str, account_id: str) -> None:
        """A row may have changed."""
        if video_id in self._of_video or account_id in self._of_account:
            self._dirty.add(video_id)
            self._bell.ring()

    async def run(self, stopping: asyncio.Event) -> None:
        """Reads changed rows for their watchers, and all watched ones every now and then."""
        read_all_at = time.monotonic() + self._floor_seconds
        try:
            while not stopping.is_set():
                await self._bell.wait(max(0.0, read_all_at - time.monotonic()), stopping)
                wanted, self._dirty = self._dirty, set()
                everything = time.monotonic() >= read_all_at
                if everything:
                    wanted |= set(self._of_video)
                    read_all_at = time.monotonic() + self._floor_seconds
                await self._read(wanted, everything)
        finally:
            self._closed = True
            for watchers in (*self._of_video.values(), *self._of_account.values()):
                for watcher in watchers:
                    watcher.close()

    async def _read(self, video_ids: set[str], everything: bool) -> None:
        ordered = sorted(video_ids)
        try:
            for start in range(0, len(ordered), BATCH):
                for video in await self._videos.many(ordered[start : start + BATCH]):
                    self._put(video)
            if everything:
                await self._read_all()
        except Exception as error:
            log.warning("watch_read_failed", error=repr(error))
            self._dirty |= video_ids
            await asyncio.sleep(RETRY_SECONDS)
            self._bell.ring()

    async def _read_all(self) -> None:
        """What changed in the watched accounts since the last time; whoever watches learns how far that goes."""
        marked = {
            watcher
            for watchers in (*self._of_video.values(), *self._of_account.values())
            for watcher in watchers
            if watcher.marked
        }
        if not marked:
            self._floor = None
            return
        as_of = await self._videos.now()
        since, place = (self._floor or as_of) - MARGIN, None
        accounts = list(self._of_account)
        while accounts:
            page = await self._videos.revised(accounts, since, place, BATCH)
            for video in page:
                self._put(video)
            if len(page) < BATCH:
                break
            place = page[-1].revised_at, page[-1].video_id
        self._floor = as_of
        for watcher in marked:
            watcher.mark(as_of)

    def _put(self, video: videos.Video) -> None:
        for watcher in self._of_video.get(video.video_id, ()):
            watcher.put(video)
        if video.state not in videos.HIDDEN:
            for watcher in self._of_account.get(video.account_id, ()):
                watcher.put(video)


class Nudges:
    """Listens to the other replicas."""

    def __init__(self, bus_: bus.Bus, hub: Hub) -> None:
        self._bus = bus_
        self._hub = hub

    async def run(self, stopping: asyncio.Event) -> None:
        """Listens until told to stop."""

        async def heard(message: Msg) -> None:
            video_id, _, account_id = message.data.decode(errors="replace").partition(" ")
            self._hub.nudge(video_id, account_id)

        await self._bus.listen(NUDGE_SUBJECT, heard, stopping)
