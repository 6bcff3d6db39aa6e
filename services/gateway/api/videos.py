"""VideoService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import timestamp_pb2

from framewire.events.v1 import event_pb2
from framewire.gateway.v1 import video_pb2, video_pb2_grpc
from framewire.storage.v1 import storage_pb2
from kit import errors, pages, telemetry
from services.gateway import admission, inputs, messages, peers, removal, videos
from services.gateway.api import batches, common, creating, filling, watching

log = telemetry.logger(__name__)

SIGNED_SECONDS = 900


class VideoApi(video_pb2_grpc.VideoServiceServicer):
    """Videos, served."""

    def __init__(self, parts: creating.Parts) -> None:
        self._parts = parts
        self._store = parts.store
        self._creator = creating.Creator(parts)
        self._batches = batches.Batches(self._creator, parts.store)
        self._removal = removal.Removal(parts.store, parts.peers)
        self._watching = watching.Watching(parts)

    async def CreateVideo(
        self, request: video_pb2.CreateVideoRequest, context: Any
    ) -> video_pb2.Video:
        """Admits a video."""
        return await self._creator.create(request, common.caller(), patience(context))

    async def BatchCreateVideos(
        self, request: video_pb2.BatchCreateVideosRequest, context: Any
    ) -> video_pb2.BatchCreateVideosResponse:
        """Admits many videos, each by itself."""
        return await self._batches.create(request, common.caller(), patience(context))

    async def RetryVideo(
        self, request: video_pb2.RetryVideoRequest, context: Any
    ) -> video_pb2.Video:
        """Makes a video that failed anew, from what was stored of it: a changed catalogue may refuse that."""
        failed = await common.visible(self._store.videos, request.video_id)
        return await self._creator.retry(request, failed, common.caller(), patience(context))

    async def GetVideo(self, request: video_pb2.GetVideoRequest, context: Any) -> video_pb2.Video:
        """A video as it is now."""
        return messages.video_message(await common.visible(self._store.videos, request.video_id))

    async def ListVideos(
        self, request: video_pb2.ListVideosRequest, context: Any
    ) -> video_pb2.ListVideosResponse:
        """The account's videos, a page of them."""
        account_id = common.caller().account(request.account_id)
        await self._creator.standing(account_id)
        size = request.page_size or pages.DEFAULT_SIZE
        listing = messages.listing(request, account_id)
        place = self._parts.pages.place(listing.key(), request.page_token)
        found = await self._store.videos.listing(listing, place, size + 1)
        token = ""
        if len(found) > size:
            last = found[size - 1]
            token = self._parts.pages.token(listing.key(), last.created_at, last.video_id)
        return video_pb2.ListVideosResponse(
            videos=[messages.video_message(video) for video in found[:size]],
            next_page_token=token,
        )

    async def CancelVideo(
        self, request: video_pb2.CancelVideoRequest, context: Any
    ) -> video_pb2.Video:
        """Asks for the end of a video. What is noted here reaches the generator, at the latest by the sweeper."""
        return messages.video_message(await self._cancelled(await self._owned(request.video_id)))

    async def DeleteVideo(
        self, request: video_pb2.DeleteVideoRequest, context: Any
    ) -> video_pb2.Video:
        """Removes a video, or has it removed when it has ended. What is noted is done, at the latest by the sweeper."""
        video = await self._owned(request.video_id)
        if not video.terminal:
            if not request.cancel:
                raise errors.FailedPrecondition(
                    "VIDEO_NOT_TERMINAL",
                    f"the video is {video.state}: cancel it first, or delete it with cancel, which does both",
                )
            await self._store.removals.when_terminal(video.video_id)
            video = await self._cancelled(video)
        if video.terminal and video.deleted_at is None:
            await self._store.removals.delete(video.video_id)
            video = await common.visible(self._store.videos, video.video_id)
            await self._parts.hub.tell(video.video_id, video.account_id)
        if video.delete_due:
            try:
                await self._removal.remove(video)
            except errors.ServiceError as error:  # the sweeper sees to it
                log.warning("removal_failed", video_id=video.video_id, error=repr(error))
        return messages.video_message(video)

    async def _owned(self, video_id: str) -> videos.Video:
        """A video of the caller's that was not refused, also one whose admission is under way."""
        video = await self._store.videos.get(video_id)
        refused = (videos.State.REJECTED, videos.State.ABANDONED)
        if video is None or not common.caller().sees(video) or video.state in refused:
            raise common.video_not_found()
        return video

    async def _cancelled(self, video: videos.Video) -> videos.Video:
        if video.state is videos.State.ADMITTING:
            self._parts.life.require()
            abandoned = await self._store.admissions.cancel(video.video_id)
            if abandoned is not None:
                return abandoned
        if await self._store.videos.request_cancel(video.video_id) is not None:
            await self._parts.hub.tell(video.video_id, video.account_id)
        now = await common.visible(self._store.videos, video.video_id)
        return now if now.terminal else await self._cancel(now)

    async def _cancel(self, video: videos.Video) -> videos.Video:
        try:
            outcome = await self._parts.peers.cancel(video)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        fact = messages.fact(outcome.last_event)
        changed = fact and await self._store.videos.project(
            video.video_id, fact, self._parts.check_after_seconds
        )
        if not changed:
            return await common.visible(self._store.videos, video.video_id)
        await self._parts.hub.tell(changed.video_id, changed.account_id)
        return changed

    async def WatchVideo(
        self, request: video_pb2.WatchVideoRequest, context: Any
    ) -> AsyncIterator[video_pb2.WatchVideoResponse]:
        """The video now, if newer, then each later state, until it is terminal and settled."""
        async for response in self._watching.one(request):
            yield response

    async def WatchVideos(
        self, request: video_pb2.WatchVideosRequest, context: Any
    ) -> AsyncIterator[video_pb2.WatchVideosResponse]:
        """Many videos, as WatchVideo."""
        if request.videos:
            stream = self._watching.named(request)
        else:
            account_id = common.caller().account(request.account_id)
            await self._creator.standing(account_id)
            stream = self._watching.account(account_id, request.cursor)
        async for response in stream:
            yield response

    async def QuoteVideo(
        self, request: video_pb2.QuoteVideoRequest, context: Any
    ) -> video_pb2.QuoteVideoResponse:
        """The price of a video, without making it."""
        standing = await self._creator.standing(common.caller().account(request.account_id))
        account_id = standing.account.account_id
        asked = (await filling.asked(self._store.templates, request, account_id)).spec
        spec = messages.spec_message(videos.normalise(asked, self._parts.models, standing.now))
        lane = messages.lane_number(messages.lane(request.lane))
        try:
            quote = await self._parts.peers.price(spec, lane)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        return video_pb2.QuoteVideoResponse(
            quote_id=quote.quote_id, credits=quote.credits, expires_at=quote.expires_at, spec=spec
        )

    async def PreviewInputs(
        self, request: video_pb2.PreviewInputsRequest, context: Any
    ) -> video_pb2.PreviewInputsResponse:
        """The inputs as they will be sent."""
        standing = await self._creator.standing(common.caller().account(request.account_id))
        account_id = standing.account.account_id
        model = videos.living(request.model, self._parts.models, standing.now)
        size = videos.size(request.width, request.height, model)
        given = messages.asked_inputs(request.inputs)
        inputs.check(given, model)
        try:
            await self._parts.peers.stat_inputs(account_id, model.name, given)
            previews = [await self._preview(account_id, each, size) for each in given]
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        return video_pb2.PreviewInputsResponse(previews=previews)

    async def _preview(
        self, account_id: str, each: inputs.Input, size: tuple[int, int]
    ) -> video_pb2.InputPreview:
        made = await self._parts.peers.fit(account_id, each, size)
        signed = await self._sign(account_id, made.asset_id, "")
        return video_pb2.InputPreview(
            asset_id=made.asset_id,
            media_type=made.media_type,
            width=made.width,
            height=made.height,
            sha256=made.sha256,
            size_bytes=made.size_bytes,
            url=signed.url,
            url_expires_at=_end(signed),
        )

    async def _sign(
        self, account_id: str, asset_id: str, file_name: str
    ) -> storage_pb2.SignUrlResponse:
        request = storage_pb2.SignUrlRequest(
            account_id=account_id,
            asset_id=asset_id,
            expires_in_seconds=SIGNED_SECONDS,
            file_name=file_name,
        )
        return await self._parts.peers.stubs.storage.SignUrl(request, timeout=peers.TIMEOUT_SECONDS)

    async def GetDownloadUrl(
        self, request: video_pb2.GetDownloadUrlRequest, context: Any
    ) -> video_pb2.GetDownloadUrlResponse:
        """A URL of an output, its poster or a smaller version."""
        video = await common.visible(self._store.videos, request.video_id)
        if request.poster and request.rendition_height:
            rule = "a poster has no smaller versions"
            raise errors.InvalidArgument(
                "INVALID_FIELD",
                f"rendition_height: {rule}",
                violations=[("rendition_height", rule)],
            )
        # A late render has no place among the outputs: its video has failed, or a later try of it has made them.
        for output in (*messages.outputs(video), *messages.late_outputs(video)):
            asset_id = _asset_id(output, request)
            if output.variant == request.variant and asset_id:
                break
        else:
            raise errors.FailedPrecondition(
                "OUTPUT_NOT_READY", f"the video is {video.state} and has no such output"
            )
        height = f"-{request.rendition_height}p" if request.rendition_height else ""
        extension = "jpg" if request.poster else "mp4"
        name = f"{video.video_id}-{request.variant}{height}.{extension}"
        try:
            signed = await self._sign(video.account_id, asset_id, name)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        return video_pb2.GetDownloadUrlResponse(
            url=signed.url, expires_at=_end(signed), output=output
        )


def _end(signed: storage_pb2.SignUrlResponse) -> timestamp_pb2.Timestamp | None:
    """Not set where the URL has no end: handing on the empty one would say 1970."""
    return signed.expires_at if signed.HasField("expires_at") else None


def _asset_id(output: event_pb2.Output, request: video_pb2.GetDownloadUrlRequest) -> str:
    """What is asked for of an output; empty where it has none."""
    if request.poster:
        return output.poster_asset_id
    if not request.rendition_height:
        return output.asset_id
    made = {each.height: each.asset_id for each in output.renditions}
    return made.get(request.rendition_height, "")


def patience(context: Any) -> float:
    """How long the caller still waits."""
    left = context.time_remaining()
    return admission.WAIT_SECONDS if left is None else left - 0.1
