"""VideoService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import video_pb2, video_pb2_grpc
from framewire.storage.v1 import storage_pb2
from kit import errors, ids, incarnation, pages
from services.gateway import (
    admission,
    auth,
    catalogue,
    inputs,
    messages,
    peers,
    store,
    videos,
    watch,
)
from services.gateway.api import common
from services.gateway.store import rows

SIGNED_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Parts:
    """What VideoService works with."""

    store: store.Store
    admission: admission.Admission
    peers: peers.Peers
    models: catalogue.Catalogue
    hub: watch.Hub
    pages: pages.Pages
    check_after_seconds: float
    life: incarnation.Incarnation


class VideoApi(video_pb2_grpc.VideoServiceServicer):
    """Videos, served."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._store = parts.store

    async def CreateVideo(
        self, request: video_pb2.CreateVideoRequest, context: Any
    ) -> video_pb2.Video:
        """Admits a video. Order: who, replay, limits, validity, saga; a replay costs nothing."""
        caller = common.caller()
        account_id = caller.account(request.account_id)
        fingerprint = videos.fingerprint(messages.own_fields(request))
        request_id = "" if request.validate_only else request.request_id
        standing = await self._standing(account_id, caller.scope, request_id)
        patience = _patience(context)
        if standing.earlier is not None:
            video = await self._parts.admission.replay(standing.earlier, fingerprint, patience)
            return messages.video_message(video)
        await self._check_limits(standing)
        new = self._new(request, caller, standing, fingerprint)
        if request.validate_only:
            return await self._validated(request, new)
        video = await self._parts.admission.admit(new, standing.account.max_in_flight, patience)
        return messages.video_message(video)

    async def _standing(self, account_id: str, scope: str, request_id: str) -> rows.Standing:
        standing = await self._store.admissions.standing(account_id, scope, request_id)
        if standing is None:
            raise auth.account_not_found()
        return standing

    async def _check_limits(self, standing: rows.Standing) -> None:
        """What refuses before anything is looked at. Videos in flight are counted when the row is inserted."""
        self._parts.life.require()
        if standing.admission_paused:
            why = f": {standing.paused_why}" if standing.paused_why else ""
            raise errors.Unavailable(
                "ADMISSION_PAUSED",
                f"no videos are taken at the moment{why}",
                retry_after_seconds=30,
            )

    def _new(
        self,
        request: video_pb2.CreateVideoRequest,
        caller: auth.Caller,
        standing: rows.Standing,
        fingerprint: bytes,
    ) -> videos.NewVideo:
        account = standing.account
        lane = messages.lane(request.lane)
        if lane not in account.lanes:
            raise errors.PermissionDenied(
                "LANE_NOT_ALLOWED",
                f"the account may not use the lane {lane}; it may use: {', '.join(account.lanes)}",
            )
        spec = videos.normalise(messages.asked_spec(request.spec), self._parts.models, standing.now)
        return videos.NewVideo(
            video_id=ids.new_id(),
            account_id=account.account_id,
            key_id=caller.key_id,
            principal=caller.scope,
            request_id=request.request_id,
            fingerprint=fingerprint,
            spec=messages.spec_message(spec).SerializeToString(),
            lane=lane,
            weight=account.weight,
            start_by=videos.start_by(messages.moment(request, "start_by"), lane, standing.now),
            input_image_id=spec.input_image_id,
            has_inputs=bool(spec.inputs),
            quote_id=request.quote_id,
            max_credits=request.max_credits if request.HasField("max_credits") else None,
            labels=dict(request.labels),
            client_reference=request.client_reference,
        )

    async def _validated(
        self, request: video_pb2.CreateVideoRequest, new: videos.NewVideo
    ) -> video_pb2.Video:
        """Everything that CreateVideo would refuse, checked; nothing is stored."""
        spec = vocabulary_pb2.VideoSpec.FromString(new.spec)
        lane = messages.lane_number(new.lane)
        given = messages.spec_inputs(spec)
        await self._parts.peers.stat_inputs(new.account_id, spec.model, given)
        price = (await self._parts.peers.price(spec, lane)).credits
        if new.max_credits is not None and price > new.max_credits:
            raise errors.FailedPrecondition(
                "PRICE_CHANGED",
                f"the video costs {price} credits, above max_credits {new.max_credits}: raise it",
                credits=price,
            )
        available = (await self._parts.peers.balance(new.account_id)).available_credits
        if available < price:
            raise errors.FailedPrecondition(
                "INSUFFICIENT_CREDITS",
                f"the video costs {price} credits, the account has {available}: add credits",
                needed=price,
                available=available,
            )
        return video_pb2.Video(
            account_id=new.account_id,
            spec=spec,
            lane=lane,
            credits=video_pb2.VideoCredits(quoted=price),
            labels=request.labels,
            client_reference=request.client_reference,
            start_by=messages.timestamp(new.start_by),
        )

    async def BatchCreateVideos(self, request: Any, context: Any) -> Any:
        """Not built yet."""
        raise common.not_implemented("BatchCreateVideos")

    async def GetVideo(self, request: video_pb2.GetVideoRequest, context: Any) -> video_pb2.Video:
        """A video as it is now."""
        return messages.video_message(await common.visible(self._store.videos, request.video_id))

    async def ListVideos(
        self, request: video_pb2.ListVideosRequest, context: Any
    ) -> video_pb2.ListVideosResponse:
        """The account's videos, newest first."""
        account_id = common.caller().account(request.account_id)
        await self._standing(account_id, "", "")
        size = request.page_size or pages.DEFAULT_SIZE
        state = (
            vocabulary_pb2.VideoState.Name(request.state).removeprefix("VIDEO_STATE_")
            if request.state
            else ""
        )
        listing = ("videos", account_id, state)
        found = await self._store.videos.listing(
            account_id, state, self._parts.pages.place(listing, request.page_token), size + 1
        )
        token = ""
        if len(found) > size:
            last = found[size - 1]
            token = self._parts.pages.token(listing, last.created_at, last.video_id)
        return video_pb2.ListVideosResponse(
            videos=[messages.video_message(video) for video in found[:size]],
            next_page_token=token,
        )

    async def CancelVideo(
        self, request: video_pb2.CancelVideoRequest, context: Any
    ) -> video_pb2.Video:
        """Asks for the end of a video. What is noted here reaches the generator, at the latest by the sweeper."""
        video = await self._store.videos.get(request.video_id)
        if video is None or not common.caller().sees(video):
            raise common.video_not_found()
        if video.state is videos.State.ADMITTING:
            self._parts.life.require()
            abandoned = await self._store.admissions.cancel(video.video_id)
            if abandoned is not None:
                return messages.video_message(abandoned)
        if video.state in (videos.State.REJECTED, videos.State.ABANDONED):
            raise common.video_not_found()
        if await self._store.videos.request_cancel(video.video_id) is not None:
            await self._parts.hub.tell(video.video_id)
        now = await common.visible(self._store.videos, request.video_id)
        return messages.video_message(now if now.terminal else await self._cancel(now))

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
        await self._parts.hub.tell(video.video_id)
        return changed

    async def DeleteVideo(self, request: Any, context: Any) -> Any:
        """Not built yet."""
        raise common.not_implemented("DeleteVideo")

    async def WatchVideo(
        self, request: video_pb2.WatchVideoRequest, context: Any
    ) -> AsyncIterator[video_pb2.WatchVideoResponse]:
        """The video now, if newer, then each later state, until it is terminal and settled."""
        with self._parts.hub.watch(request.video_id) as watcher:
            # Read after the watcher is there: what changes from here on is not missed.
            video = await common.visible(self._store.videos, request.video_id)
            seen = request.after_revision
            sent: videos.Video | None = None
            while True:
                if video.revision > seen or (sent is not None and _moved(sent, video)):
                    yield video_pb2.WatchVideoResponse(video=messages.video_message(video))
                    seen, sent = video.revision, video
                elif sent is None:
                    sent = video
                if video.finished:
                    return
                video = await watcher.next()

    async def QuoteVideo(
        self, request: video_pb2.QuoteVideoRequest, context: Any
    ) -> video_pb2.QuoteVideoResponse:
        """The price of a video, without making it."""
        standing = await self._standing(common.caller().account(request.account_id), "", "")
        asked = messages.asked_spec(request.spec)
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
        standing = await self._standing(common.caller().account(request.account_id), "", "")
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
            url_expires_at=signed.expires_at,
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
            url=signed.url, expires_at=signed.expires_at, output=output
        )


def _asset_id(output: event_pb2.Output, request: video_pb2.GetDownloadUrlRequest) -> str:
    """What is asked for of an output; empty where it has none."""
    if request.poster:
        return output.poster_asset_id
    if not request.rendition_height:
        return output.asset_id
    made = {each.height: each.asset_id for each in output.renditions}
    return made.get(request.rendition_height, "")


def _patience(context: Any) -> float:
    """How long the caller still waits."""
    left = context.time_remaining()
    return admission.WAIT_SECONDS if left is None else left - 0.1


def _moved(before: videos.Video, now: videos.Video) -> bool:
    return _place(before) != _place(now)


def _place(video: videos.Video) -> tuple[str, int, int, datetime | None]:
    return video.stage, video.progress_percent, video.queue_position, video.expected_at
