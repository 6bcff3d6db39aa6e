"""WatchVideo and WatchVideos: the state now where it is news, then each later one, the terminal one always."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from framewire.gateway.v1 import video_pb2
from services.gateway import messages, videos, watch
from services.gateway.api import common, creating

REMEMBERED = timedelta(minutes=2)
"""How long an ended video is remembered as told, beyond the time in which it may be read again."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What was last told of a video."""

    revision: int
    place: tuple[str, int, int, datetime | None] | None
    finished: bool
    revised_at: datetime | None


class Seen:
    """What a stream has told: the same is not told twice."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def after(self, video_id: str, revision: int) -> None:
        """The caller knows this revision already."""
        self._told[video_id] = _Told(revision, None, False, None)

    def news(self, video: videos.Video) -> bool:
        """Whether this is news; it is told from now on. Progress is, though it raises no revision."""
        before, place = self._told.get(video.video_id), _place(video)
        moved = before is not None and before.place is not None and before.place != place
        news = before is None or video.revision > before.revision or moved
        if before is None or video.revision >= before.revision:
            self._told[video.video_id] = _Told(
                video.revision, place, video.finished, video.revised_at
            )
        return news and (before is None or video.revision >= before.revision)

    def forget(self, now: datetime) -> None:
        """Forgets videos that ended long ago."""
        self._told = {
            video_id: told
            for video_id, told in self._told.items()
            if not told.finished or (told.revised_at and told.revised_at > now - REMEMBERED)
        }


class Watching:
    """The streams."""

    def __init__(self, parts: creating.Parts) -> None:
        self._hub = parts.hub
        self._videos = parts.store.videos
        self._pages = parts.pages

    async def one(
        self, request: video_pb2.WatchVideoRequest
    ) -> AsyncIterator[video_pb2.WatchVideoResponse]:
        """One video until it is terminal and settled."""
        with self._hub.watch([request.video_id]) as watcher:
            # Read after the watcher is there: what changes from here on is not missed.
            video, seen = await common.visible(self._videos, request.video_id), Seen()
            seen.after(video.video_id, request.after_revision)
            while True:
                if seen.news(video):
                    yield video_pb2.WatchVideoResponse(video=messages.video_message(video))
                if video.finished:
                    return
                changed, _ = await watcher.next()
                video = changed[-1] if changed else video

    async def named(
        self, request: video_pb2.WatchVideosRequest
    ) -> AsyncIterator[video_pb2.WatchVideosResponse]:
        """These videos until all are terminal and settled."""
        asked = {item.video_id: item.after_revision for item in request.videos}
        with self._hub.watch(asked, marked=True) as watcher:
            changed, caller = await self._videos.many(list(asked)), common.caller()
            visible = [v for v in changed if v.state not in videos.HIDDEN and caller.sees(v)]
            if missing := asked.keys() - {video.video_id for video in visible}:
                raise common.video_not_found(min(missing))
            seen, left = Seen(), set(asked)
            for video_id, revision in asked.items():
                seen.after(video_id, revision)
            while True:
                for video in changed:
                    if seen.news(video):
                        yield _response(video)
                    if video.finished:
                        left.discard(video.video_id)
                if not left:
                    return
                changed, as_of = await watcher.next()
                if as_of is not None and not changed:
                    yield video_pb2.WatchVideosResponse()

    async def account(
        self, account_id: str, cursor: str
    ) -> AsyncIterator[video_pb2.WatchVideosResponse]:
        """All of an account: what lives, or what changed since the cursor, then each change."""
        listing = ("watch", account_id)
        place = self._pages.place(listing, cursor)
        with self._hub.watch_account(account_id) as watcher:
            as_of, seen = await self._videos.now(), Seen()
            begun = self._since(account_id, place[0]) if place else self._living(account_id)
            async for video in begun:
                seen.news(video)
                yield _response(video)
            while True:
                if as_of is not None:
                    token = self._pages.token(listing, as_of, "")
                    yield video_pb2.WatchVideosResponse(cursor=token)
                    seen.forget(as_of)
                changed, as_of = await watcher.next()
                for video in changed:
                    if seen.news(video):
                        yield _response(video)

    async def _since(self, account_id: str, moment: datetime) -> AsyncIterator[videos.Video]:
        place = None
        while True:
            page = await self._videos.revised(
                [account_id], moment - watch.MARGIN, place, watch.BATCH
            )
            for video in page:
                yield video
            if len(page) < watch.BATCH:
                return
            place = page[-1].revised_at, page[-1].video_id

    async def _living(self, account_id: str) -> AsyncIterator[videos.Video]:
        after = ""
        while page := await self._videos.unfinished(account_id, after, watch.BATCH):
            for video in page:
                yield video
            after = page[-1].video_id


def _response(video: videos.Video) -> video_pb2.WatchVideosResponse:
    return video_pb2.WatchVideosResponse(video=messages.video_message(video))


def _place(video: videos.Video) -> tuple[str, int, int, datetime | None]:
    return video.stage, video.progress_percent, video.queue_position, video.expected_at
