"""Admission: a request becomes a video whose credits are held and whose job is durable, or nothing at all.

The one commit point is the compare-and-set ADMITTING -> PENDING, after Reserve and before the first publication. Only
a PENDING video is ever published; only an ADMITTING one may be given up, and whoever gives it up releases.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from kit import errors, telemetry
from kit.failpoints import failpoint
from services.gateway import limits, peers, publisher, store, tasks, videos
from services.gateway.store import rows

log = telemetry.logger(__name__)

WAIT_SECONDS = 5.0
REREAD_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things may take."""

    admit_seconds: float
    check_after_seconds: float
    """When the sweeper first asks whether the generator has the job."""


class Admission:
    """The saga, and what calls with a request_id that is already known get."""

    def __init__(
        self,
        store_: store.Store,
        peers_: peers.Peers,
        publisher_: publisher.Publisher,
        shielded: tasks.Shielded,
        timing: Timing,
    ) -> None:
        self._store = store_
        self._peers = peers_
        self._publisher = publisher_
        self._shielded = shielded
        self._timing = timing

    async def admit(self, new: videos.NewVideo, patience_seconds: float) -> videos.Video:
        """The admitted video. Once begun it goes on to its end, whether or not the caller waits for it."""
        begun = await self._shielded.run(self._begin(new))
        if isinstance(begun, rows.Request):
            return await self.replay(begun, new.fingerprint, patience_seconds)
        return begun

    async def replay(
        self, earlier: rows.Request, fingerprint: bytes, patience_seconds: float
    ) -> videos.Video:
        """What a request_id answers that is known: its video as it is now, once that is decided."""
        if earlier.fingerprint != fingerprint:
            raise errors.AlreadyExists(
                "REQUEST_ID_REUSED",
                "this request_id was used with another request; make a new one for a new video",
            )
        return await self._decided(earlier.resource_id, patience_seconds)

    async def _begin(self, new: videos.NewVideo) -> videos.Video | rows.Request:
        begun = await self._store.admissions.begin(new, self._timing.admit_seconds)
        if isinstance(begun, rows.AtLimit):
            raise limits.of_admission(begun)
        if isinstance(begun, rows.Duplicate):
            raise errors.AlreadyExists(
                "DUPLICATE_VIDEO",
                f"video {begun.video_id} was just asked for by the same request; look at that one, or leave "
                "reject_duplicates_within out to make another",
                video_id=begun.video_id,
            )
        if isinstance(begun, rows.Request):
            return begun
        await failpoint("gateway.admit.after_insert")
        return await self._saga(begun)

    async def _decided(self, video_id: str, patience_seconds: float) -> videos.Video:
        """Waits for a row to leave ADMITTING; takes it over when whoever had it has let it go overdue."""
        until = time.monotonic() + min(WAIT_SECONDS, patience_seconds)
        while True:
            found = await self._store.videos.admitting(video_id)
            if found is None:
                raise peers.unavailable()
            video, overdue = found
            if video.state is not videos.State.ADMITTING:
                return _as_decided(video)
            if overdue:
                mine = await self._store.admissions.take_over(
                    video_id, video.admit_epoch, self._timing.admit_seconds
                )
                if mine is not None:
                    log.info("admission_taken_over", video_id=video_id, epoch=mine.admit_epoch)
                    return await self._shielded.run(self._saga(mine))
            if time.monotonic() >= until:
                raise errors.Unavailable(
                    "REQUEST_IN_PROGRESS",
                    "a call with this request_id is under way; try again with the same request_id",
                    retry_after_seconds=1,
                )
            await asyncio.sleep(REREAD_SECONDS)

    async def _saga(self, video: videos.Video) -> videos.Video:
        try:
            hold = await self._secure(video)
        except errors.ServiceError as error:
            raise await self._not_secured(video, error) from error
        await failpoint("gateway.admit.before_commit")
        admitted = await self._store.admissions.commit(
            video.video_id, video.admit_epoch, hold, self._timing.check_after_seconds
        )
        if admitted is None:
            return await self._overtaken(video)
        await failpoint("gateway.admit.after_commit")
        rung = await self._publisher.ring(admitted)
        await failpoint("gateway.admit.after_publish")
        log.info("video_admitted", video_id=video.video_id, rung=rung)
        return admitted

    async def _secure(self, video: videos.Video) -> rows.Hold:
        """Everything that a render needs: its image is kept, its credits are held."""
        if video.input_image_id or video.has_inputs:
            await self._peers.pin(video)
        await failpoint("gateway.admit.after_pin")
        hold = await self._peers.reserve(video)
        await failpoint("gateway.admit.after_reserve")
        return hold

    async def _not_secured(
        self, video: videos.Video, error: errors.ServiceError
    ) -> errors.ServiceError:
        """A refusal ends the admission and frees its request_id; anything else leaves it to a retry or the sweeper."""
        answer = peers.for_caller(error)
        if not peers.is_refusal(error):
            log.warning("admission_undecided", video_id=video.video_id, error=repr(error))
            await self._store.admissions.give_way(video.video_id, video.admit_epoch)
            await self._store.sweeping.unpin_again(video.video_id)
            return answer
        log.info("admission_refused", video_id=video.video_id, reason=error.reason)
        rejected = await self._store.admissions.reject(video, _refusal(answer))
        if rejected is None:
            await self._store.sweeping.unpin_again(video.video_id)
        elif rejected.unpin_due:
            await self._unpin(rejected)
        return answer

    async def _unpin(self, video: videos.Video) -> None:
        try:
            await self._peers.unpin(video)
        except errors.ServiceError as error:  # the sweeper sees to it
            log.warning("unpin_failed", video_id=video.video_id, error=repr(error))
        else:
            await self._store.sweeping.unpinned(video.video_id)

    async def _overtaken(self, video: videos.Video) -> videos.Video:
        """The row was decided, given up or taken over while we worked: what it says now counts."""
        await self._store.sweeping.unpin_again(video.video_id)
        now = await self._store.videos.get(video.video_id)
        if now is None or now.state is videos.State.ADMITTING:
            raise peers.unavailable()
        return _as_decided(now)


def _refusal(error: errors.ServiceError) -> dict[str, Any]:
    return {
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "retry_after_seconds": error.retry_after_seconds,
    }


def _as_decided(video: videos.Video) -> videos.Video:
    """The video where it was admitted; raises what the refused or abandoned one was answered."""
    if video.refusal is not None:
        known = video.refusal
        raise errors.BY_CODE[known["code"]](
            known["reason"],
            known["message"],
            retry_after_seconds=known["retry_after_seconds"],
            **known["metadata"],
        )
    if video.state in videos.HIDDEN:
        raise peers.unavailable()
    return video
