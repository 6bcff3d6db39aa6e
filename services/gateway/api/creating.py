"""How a request for a video is taken: by CreateVideo, as an item of a batch, or for a video that failed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import video_pb2
from kit import errors, ids, incarnation, pages
from services.gateway import (
    admission,
    auth,
    catalogue,
    limits,
    messages,
    peers,
    store,
    videos,
    watch,
)
from services.gateway.api import filling
from services.gateway.store import rows


@dataclass(frozen=True, slots=True)
class Parts:
    """What VideoService works with."""

    store: store.Store
    admission: admission.Admission
    peers: peers.Peers
    models: catalogue.Catalogue
    hub: watch.Hub
    limiter: limits.Limiter
    pages: pages.Pages
    check_after_seconds: float
    life: incarnation.Incarnation


class Creator:
    """From a caller's request to the admitted video."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._store = parts.store

    async def create(
        self,
        request: video_pb2.CreateVideoRequest,
        caller: auth.Caller,
        patience: float,
        retried: videos.Video | None = None,
        fingerprint: bytes = b"",
    ) -> video_pb2.Video:
        """Admits a video. Order: who, replay, limits, validity, saga; a replay costs nothing.

        `fingerprint`: of what the caller really sent, where that is not this request.
        """
        account_id = caller.account(request.account_id)
        fingerprint = fingerprint or videos.fingerprint(messages.own_fields(request))
        request_id = "" if request.validate_only else request.request_id
        standing = await self.standing(account_id, caller.scope, request_id)
        if standing.earlier is not None:
            video = await self._parts.admission.replay(standing.earlier, fingerprint, patience)
            return messages.video_message(video)
        self._parts.life.require()
        if patience <= 0:
            raise errors.DeadlineExceeded(
                "DEADLINE_EXCEEDED",
                "the deadline is over before the work began; try again with more time",
            )
        await self._parts.limiter.take(_limits(caller, standing))
        _check_limits(standing)
        if retried is not None:
            _check_retried(retried)
        asked = await filling.asked(self._store.templates, request, standing.account.account_id)
        if retried is not None:
            asked = replace(
                asked,
                template_name=retried.template_name,
                template_version=retried.template_version,
            )
        new = self._new(request, asked, caller, standing, fingerprint, retried)
        if request.validate_only:
            return await self._validated(request, new, standing.account.max_in_flight)
        video = await self._parts.admission.admit(new, patience)
        return messages.video_message(video)

    async def retry(
        self,
        request: video_pb2.RetryVideoRequest,
        failed: videos.Video,
        caller: auth.Caller,
        patience: float,
    ) -> video_pb2.Video:
        """A video like the one that failed, with a price and a hold of its own."""
        again = video_pb2.CreateVideoRequest(
            request_id=request.request_id,
            account_id=failed.account_id,
            spec=messages.stored_spec(failed),
            lane=messages.lane_number(failed.lane),
            max_credits=request.max_credits
            if request.HasField("max_credits")
            else failed.max_credits,
            start_by=request.start_by if request.HasField("start_by") else None,
            labels=failed.labels,
            client_reference=failed.client_reference,
        )
        fingerprint = videos.fingerprint(messages.own_fields(request))
        return await self.create(again, caller, patience, failed, fingerprint)

    async def standing(
        self, account_id: str, scope: str = "", request_id: str = ""
    ) -> rows.Standing:
        """The account, and what the request_id stands for already. Raises NotFound/ACCOUNT_NOT_FOUND."""
        standing = await self._store.admissions.standing(account_id, scope, request_id)
        if standing is None:
            raise auth.account_not_found()
        return standing

    def _new(
        self,
        request: video_pb2.CreateVideoRequest,
        asked: filling.Asked,
        caller: auth.Caller,
        standing: rows.Standing,
        fingerprint: bytes,
        retried: videos.Video | None,
    ) -> videos.NewVideo:
        account = standing.account
        lane = messages.lane(request.lane)
        if lane not in account.lanes:
            raise errors.PermissionDenied(
                "LANE_NOT_ALLOWED",
                f"the account may not use the lane {lane}; it may use: {', '.join(account.lanes)}",
            )
        spec = videos.normalise(asked.spec, self._parts.models, standing.now)
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
            model=spec.model,
            retry_of=retried.video_id if retried else "",
            reject_duplicates_seconds=_seconds(request),
            template_name=asked.template_name,
            template_version=asked.template_version,
        )

    async def _validated(
        self, request: video_pb2.CreateVideoRequest, new: videos.NewVideo, max_in_flight: int
    ) -> video_pb2.Video:
        """Everything that CreateVideo would refuse, checked; nothing is stored."""
        if await self._store.admissions.in_flight(new.account_id) >= max_in_flight:
            found = rows.AtLimit("TOO_MANY_IN_FLIGHT", "account", max_in_flight, 10)
            raise limits.of_admission(found)
        spec = vocabulary_pb2.VideoSpec.FromString(new.spec)
        lane = messages.lane_number(new.lane)
        try:
            given = messages.spec_inputs(spec)
            await self._parts.peers.stat_inputs(new.account_id, spec.model, given)
            price = (await self._parts.peers.price(spec, lane)).credits
            available = (await self._parts.peers.balance(new.account_id)).available_credits
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        if new.max_credits is not None and price > new.max_credits:
            raise errors.FailedPrecondition(
                "PRICE_CHANGED",
                f"the video costs {price} credits, above max_credits {new.max_credits}: raise it",
                credits=price,
            )
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
            template=messages.template_version(new.template_name, new.template_version),
        )


def _limits(caller: auth.Caller, standing: rows.Standing) -> tuple[limits.Limit, ...]:
    """The caller's own, and the account's where the caller acts for many."""
    account = standing.account
    if any(limit.subject == account.account_id for limit in caller.limits):
        return caller.limits
    of_account = limits.Limit("account", account.account_id, account.requests_per_minute)
    return (*caller.limits, of_account)


def _check_limits(standing: rows.Standing) -> None:
    """What refuses before anything is looked at. Videos are counted when the row is inserted."""
    if standing.admission_paused:
        why = f": {standing.paused_why}" if standing.paused_why else ""
        raise errors.Unavailable(
            "ADMISSION_PAUSED",
            f"no videos are taken at the moment{why}",
            retry_after_seconds=30,
        )


def _check_retried(video: videos.Video) -> None:
    """Whether a video may be made anew."""
    if not video.terminal:
        raise errors.FailedPrecondition(
            "VIDEO_NOT_TERMINAL", f"the video is {video.state}: it may still succeed; wait for it"
        )
    if video.state is videos.State.COMPLETED:
        raise errors.FailedPrecondition(
            "VIDEO_NOT_FAILED", "the video was made: ask for another one by CreateVideo"
        )
    if video.deleted_at is not None:
        raise errors.FailedPrecondition(
            "VIDEO_DELETED", "the video was deleted, its prompt too: ask for it by CreateVideo"
        )


def _seconds(request: video_pb2.CreateVideoRequest) -> float:
    within = request.reject_duplicates_within
    return within.seconds + within.nanos / 1e9
