"""What must come to its end although a process died or an event was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kit import errors, loops, telemetry
from kit.failpoints import failpoint
from services.gateway import measures, messages, peers, publisher, removal, store, videos, watch

log = telemetry.logger(__name__)

AT_ONCE = 16
PURGE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Ages:
    """When the sweeper acts, in seconds."""

    every: float
    grace: float
    unaccepted: float
    overdue: float
    retry: float


class Sweeper:
    """Gives up overdue admissions, undoes what they did, and asks the generator about silent videos."""

    def __init__(
        self,
        store_: store.Store,
        peers_: peers.Peers,
        publisher_: publisher.Publisher,
        hub: watch.Hub,
        ages: Ages,
    ) -> None:
        self._store = store_
        self._peers = peers_
        self._publisher = publisher_
        self._hub = hub
        self._ages = ages
        self._removal = removal.Removal(store_, peers_)

    async def run(self, stopping: asyncio.Event) -> None:
        """Sweeps until told to stop."""
        await loops.every("sweeper", self._ages.every, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One pass; true when there is more."""
        abandoned = await self._store.sweeping.abandon(self._ages.grace)
        for video in abandoned:
            log.warning("admission_abandoned", video_id=video.video_id)
        undone = await self._store.sweeping.take_undo(self._ages.retry)
        await self._each(undone, self._undo)
        silent = await self._store.sweeping.take_silent(self._ages.retry)
        await self._each(silent, self._ask)
        return bool(abandoned)

    async def _each(
        self, found: Sequence[videos.Video], work: Callable[[videos.Video], Awaitable[None]]
    ) -> None:
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(video: videos.Video) -> None:
            async with slots:
                try:
                    await work(video)
                except errors.ServiceError as error:  # tried again when it is next due
                    log.warning("sweep_failed", video_id=video.video_id, error=repr(error))

        async with asyncio.TaskGroup() as group:
            for video in found:
                group.create_task(one(video))

    async def _undo(self, video: videos.Video) -> None:
        """Release first: a customer's credits are more urgent than an image."""
        if video.release_due:
            await failpoint("gateway.abandon.before_release")
            await self._peers.release(video)
            await self._store.sweeping.released(video.video_id)
        if video.delete_due:
            await self._removal.remove(video)
        elif video.unpin_due:
            await self._peers.unpin(video)
            await self._store.sweeping.unpinned(video.video_id)

    async def _ask(self, video: videos.Video) -> None:
        event = await self._peers.outcome(video)
        if event is None:
            await self._unheard_of(video)
            return
        fact = messages.fact(event)
        changed = fact and await self._store.videos.project(
            video.video_id, fact, self._ages.overdue
        )
        if fact and changed:
            measures.projected(changed, fact.kind)
            log.info("projected_from_generator", video_id=video.video_id, state=changed.state)
            await self._hub.tell(video.video_id, video.account_id)
        else:
            await self._store.sweeping.heard_of(video.video_id, self._ages.overdue)

    async def _unheard_of(self, video: videos.Video) -> None:
        again = await self._store.sweeping.ring_again(video.video_id, self._ages.unaccepted)
        if again is not None:
            log.info("job_rung_again", video_id=video.video_id, publishes=again.publishes)
            await self._publisher.ring(again)
        else:
            # It had it and lost it: an operator's matter (recovery after a restore), not one of ringing again.
            log.error("generator_forgot_video", video_id=video.video_id)


class Purge:
    """Removes what nobody needs any more."""

    def __init__(self, store_: store.Store) -> None:
        self._store = store_

    async def run(self, stopping: asyncio.Event) -> None:
        """Purges until told to stop."""
        await loops.every("purge", PURGE_SECONDS, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One pass; true when there may be more."""
        return await self._store.sweeping.purge() >= 1000
