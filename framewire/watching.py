"""Watching many videos on one stream, also over broken connections."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from framewire import transport, types
from framewire.decode import decode
from framewire.gateway.v1 import video_pb2, video_pb2_grpc


class Stream:
    """What was seen of each video, and how to go on from there."""

    def __init__(self, account_id: str, video_ids: Iterable[str]) -> None:
        self._account_id = account_id
        self._last: dict[str, types.Video] = {}
        self._left = dict.fromkeys(video_ids)
        self._named = bool(self._left)
        self._cursor = ""

    def request(self) -> video_pb2.WatchVideosRequest:
        """What to ask for, now or after a break."""
        return video_pb2.WatchVideosRequest(
            account_id=self._account_id,
            cursor=self._cursor,
            videos=[
                video_pb2.WatchedVideo(
                    video_id=video_id,
                    after_revision=self._last[video_id].revision if video_id in self._last else 0,
                )
                for video_id in self._left
            ],
        )

    def news(self, response: Any) -> types.Video | None:
        """The video that was told of, where it was not told of before."""
        self._cursor = response.cursor or self._cursor
        if not response.HasField("video"):
            return None
        video = decode(types.Video, response.video)
        before = self._last.get(video.video_id)
        if before is not None and (video == before or video.revision < before.revision):
            return None
        self._last[video.video_id] = video
        if video.is_settled:
            self._left.pop(video.video_id, None)
            if len(self._last) > 20_000:  # of a stream without an end, what ended long ago
                self._last.pop(next(iter(self._last)))
        return video

    @property
    def over(self) -> bool:
        """Whether every video that was named is done."""
        return self._named and not self._left


async def many(
    opened: transport.Transport, account_id: str, video_ids: Iterable[str]
) -> AsyncGenerator[types.Video, None]:
    """These videos, or all of the account: the state of each now, then each change."""
    state = Stream(account_id, video_ids)
    stub = video_pb2_grpc.VideoServiceStub(opened.channel)
    stream = opened.watch(stub.WatchVideos, state.request)
    async with contextlib.aclosing(stream):
        async for response in stream:
            if response is not None and (video := state.news(response)) is not None:
                yield video
            if state.over:
                return
