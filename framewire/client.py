"""The SDK: `async with Client(address, api_key) as client: await client.generate(prompt, image, out=path)`.

Every call is idempotent: what spends or grants carries one `request_id`, made here unless given and kept over retries.
UNAVAILABLE, and RESOURCE_EXHAUSTED with a time to wait, are tried again for `retry_seconds`. Every failure of a call
is a FramewireError; local files raise OSError.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from google.protobuf import message as protobuf

from framewire import (
    access,
    assets,
    attempts,
    downloads,
    encode,
    errors,
    operations,
    outcomes,
    templates,
    transport,
    types,
    uploads,
    watching,
    webhooks,
)
from framewire.credits.v1 import ledger_pb2
from framewire.decode import decode
from framewire.encode import SpecFields, VideoFields
from framewire.gateway.v1 import (
    account_pb2,
    account_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
    video_pb2,
    video_pb2_grpc,
)
from framewire.uploads import new_request_id

_PAGE_SIZE = 100
_DOWNLOAD_TRIES = 5

T = TypeVar("T")
OnProgress = Callable[[types.Video], object]


class Client(uploads.Uploads, templates.Templates):
    """One caller of one gateway. `address`: "host:port", or "https://host" for TLS.

    `account_id` says who pays and whose things are listed; empty: the key's own account. Operators must name one.
    """

    def __init__(
        self, address: str, api_key: str, *, account_id: str = "", retry_seconds: float = 60.0
    ) -> None:
        self.account_id = account_id
        self._address = address
        self._api_key = api_key
        self._retry_seconds = retry_seconds
        self._opened: transport.Transport | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends what is under way. Idempotent."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    @property
    def _transport(self) -> transport.Transport:
        """Opened on the first call."""
        if self._opened is None:
            self._opened = transport.Transport(self._address, self._api_key, self._retry_seconds)
        return self._opened

    @property
    def _videos(self) -> video_pb2_grpc.VideoServiceAsyncStub:
        return video_pb2_grpc.VideoServiceStub(self._transport.channel)

    @property
    def _accounts(self) -> account_pb2_grpc.AccountServiceAsyncStub:
        return account_pb2_grpc.AccountServiceStub(self._transport.channel)

    @property
    def _operators(self) -> operator_pb2_grpc.OperatorServiceAsyncStub:
        return operator_pb2_grpc.OperatorServiceStub(self._transport.channel)

    # Videos

    async def generate(
        self,
        prompt: str = "",
        image: uploads.Source | Mapping[int, uploads.Source] | None = None,
        *,
        video: uploads.Source | None = None,
        fit: str = "",
        crop: types.CropBounds | None = None,
        out: Path | str | None = None,
        on_progress: OnProgress | None = None,
        request_id: str = "",
        **fields: Unpack[VideoFields],
    ) -> types.Video:
        """Uploads the image (or has an https:// URL fetched), makes the video, waits until it is paid for, downloads it
        to `out` (further variants to out-1, out-2, ...).

        Instead of one image: images by frame ({0: "a.jpg", 95: "b.jpg"}), or a `video`; `fit` and `crop` say how they
        are brought to the size. `on_progress` gets each state. A video without an output raises FramewireError, its
        cause as the reason. Called again with the same request_id it goes on where it broke off and pays once.
        """
        request_id = request_id or new_request_id()
        inputs = await self.upload_inputs(image, video, fit=fit, crop=crop, request_id=request_id)
        if len(inputs) == 1 and inputs[0] == types.VideoInput(image_id=inputs[0].image_id):
            fields["image_id"] = inputs[0].image_id
        elif inputs:
            fields["inputs"] = (*inputs, *fields.get("inputs", ()))
        made = await self.create_video(prompt, request_id=request_id, **fields)
        if on_progress is not None:
            on_progress(made)
        async for newer in self.watch_video(made.video_id):
            made = newer
            if on_progress is not None:
                on_progress(made)
        outcomes.require_completed(made)
        if out is not None:
            await self.download_all(made, out)
        return made

    async def create_video(
        self, prompt: str = "", *, request_id: str = "", **fields: Unpack[VideoFields]
    ) -> types.Video:
        """Admits a video: it is priced, its credits are held, and it is queued, durably; or nothing happens."""
        request = encode.wanted(self.account_id, prompt, fields)
        request.request_id = request_id or new_request_id()
        return await self._call(types.Video, self._videos.CreateVideo, request)

    async def create_videos(
        self, wanted: Sequence[tuple[str, VideoFields]], *, request_id: str = ""
    ) -> tuple[types.Verdict, ...]:
        """Admits up to 100 videos, prompt and fields each, and answers a verdict on each, refusals too.

        Sent again with the same request_id, what was not decided is tried again.
        """
        request = video_pb2.BatchCreateVideosRequest(
            request_id=request_id or new_request_id(),
            requests=[encode.wanted(self.account_id, prompt, fields) for prompt, fields in wanted],
        )
        answer = await self._transport.unary(self._videos.BatchCreateVideos, request)
        return tuple(decode(types.Verdict, result) for result in answer.results)

    async def retry_video(self, video_id: str, *, request_id: str = "") -> types.Video:
        """Makes a video that failed anew: another one, with a price and a hold of its own."""
        request = video_pb2.RetryVideoRequest(
            request_id=request_id or new_request_id(), video_id=video_id
        )
        return await self._call(types.Video, self._videos.RetryVideo, request)

    async def get_video(self, video_id: str) -> types.Video:
        """A video as it is now."""
        request = video_pb2.GetVideoRequest(video_id=video_id)
        return await self._call(types.Video, self._videos.GetVideo, request)

    async def list_videos(
        self, *, state: str = "", **filters: Unpack[encode.ListFields]
    ) -> AsyncGenerator[types.Video, None]:
        """The account's videos, newest first unless told, fetched page by page as they are taken."""
        request = encode.listing(self.account_id, state, filters)
        request.page_size = _PAGE_SIZE
        async for page in self._pages(self._videos.ListVideos, request):
            for video in page.videos:
                yield decode(types.Video, video)

    async def watch_video(
        self, video_id: str, *, after_revision: int = 0
    ) -> AsyncGenerator[types.Video, None]:
        """The video now if newer than `after_revision`, then each change, until it is terminal and settled.

        States between may be skipped, the last never is. A broken connection is taken up again after the last revision.
        """
        last: types.Video | None = None
        seen = after_revision or -1  # the first state counts, whatever its number

        def request() -> video_pb2.WatchVideoRequest:
            return video_pb2.WatchVideoRequest(video_id=video_id, after_revision=max(seen, 0))

        stream = self._transport.watch(self._videos.WatchVideo, request)
        async with contextlib.aclosing(stream):
            async for response in stream:
                if response is None:  # the server has no more to say: is there no more?
                    video = await self.get_video(video_id)
                    if not video.is_settled:
                        continue
                else:
                    video = decode(types.Video, response.video)
                if video.revision > seen or (last is not None and _moved(last, video)):
                    last, seen = video, video.revision
                    yield video
                if video.is_settled:
                    return

    async def watch_videos(
        self, video_ids: Iterable[str] = ()
    ) -> AsyncGenerator[types.Video, None]:
        """Many videos on one stream: these, until all are done, or all of the account, without an end."""
        stream = watching.many(self._transport, self.account_id, video_ids)
        async with contextlib.aclosing(stream):
            async for video in stream:
                yield video

    async def cancel_video(self, video_id: str) -> types.Video:
        """Asks for the end of a video; free of charge before it was sent to the provider."""
        request = video_pb2.CancelVideoRequest(video_id=video_id)
        return await self._call(types.Video, self._videos.CancelVideo, request)

    async def delete_video(self, video_id: str, *, cancel: bool = False) -> types.Video:
        """Removes a video and its assets; one that still lives only with `cancel`."""
        request = video_pb2.DeleteVideoRequest(video_id=video_id, cancel=cancel)
        return await self._call(types.Video, self._videos.DeleteVideo, request)

    async def quote_video(
        self,
        prompt: str = "",
        *,
        lane: str = "",
        template: types.TemplateUse | None = None,
        **fields: Unpack[SpecFields],
    ) -> types.Quote:
        """The price of a video, without making it."""
        request = video_pb2.QuoteVideoRequest(
            account_id=self.account_id,
            spec=encode.spec(prompt, fields),
            lane=encode.lane(lane),
            template=encode.template(template),
        )
        return await self._call(types.Quote, self._videos.QuoteVideo, request)

    async def preview_inputs(
        self,
        inputs: Sequence[types.VideoInput],
        *,
        model: str = "",
        width: int = 0,
        height: int = 0,
    ) -> tuple[types.InputPreview, ...]:
        """The inputs exactly as they would be sent to the provider, at that size. Nothing is charged."""
        request = video_pb2.PreviewInputsRequest(
            account_id=self.account_id,
            model=model,
            width=width,
            height=height,
            inputs=[encode.video_input(each) for each in inputs],
        )
        answer = await self._transport.unary(self._videos.PreviewInputs, request)
        return tuple(decode(types.InputPreview, each) for each in answer.previews)

    async def get_download_url(
        self, video_id: str, *, variant: int = 0, poster: bool = False, rendition_height: int = 0
    ) -> types.DownloadUrl:
        """A URL of an output, its poster or a smaller version, good for a short time without other credentials."""
        request = video_pb2.GetDownloadUrlRequest(
            video_id=video_id, variant=variant, poster=poster, rendition_height=rendition_height
        )
        return await self._call(types.DownloadUrl, self._videos.GetDownloadUrl, request)

    async def download(
        self,
        video_id: str,
        path: Path | str,
        *,
        variant: int = 0,
        poster: bool = False,
        rendition_height: int = 0,
    ) -> types.DownloadUrl:
        """Writes an output to `path`, whole and with the promised size and sha256, or not at all."""
        tried = 0
        while True:
            found = await self.get_download_url(
                video_id, variant=variant, poster=poster, rendition_height=rendition_height
            )
            size, sha256 = outcomes.promised(
                found.output, poster=poster, rendition_height=rendition_height
            )
            try:
                await downloads.fetch(found.url, Path(path), size, sha256)
                return found
            except errors.FramewireError as error:
                tried += 1
                if error.code is grpc.StatusCode.DATA_LOSS or tried == _DOWNLOAD_TRIES:
                    raise
            await asyncio.sleep(random.uniform(0.25, 0.5) * 2**tried)

    async def download_all(
        self, video: types.Video, path: Path | str, *, rendition_height: int = 0
    ) -> tuple[Path, ...]:
        """Writes every output: the first to `path`, further variants beside it (out-1.mp4, out-2.mp4, ...)."""
        paths = tuple(outcomes.variant_path(Path(path), output.variant) for output in video.outputs)
        for output, place in zip(video.outputs, paths, strict=True):
            await self.download(
                video.video_id, place, variant=output.variant, rendition_height=rendition_height
            )
        return paths

    # The account

    async def balance(self) -> types.Balance:
        """Credits of the account."""
        request = account_pb2.GetBalanceRequest(account_id=self.account_id)
        return await self._call(types.Balance, self._accounts.GetBalance, request)

    async def entries(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        video_id: str = "",
        kinds: Iterable[str] = (),
    ) -> AsyncGenerator[types.Entry, None]:
        """The account's statement, newest first, fetched page by page as it is taken. Kinds: "GRANT", "CAPTURE", ..."""
        request = account_pb2.ListEntriesRequest(
            account_id=self.account_id,
            page_size=_PAGE_SIZE,
            video_id=video_id,
            kinds=[
                encode.enum_value(ledger_pb2.TransferKind, "TRANSFER_KIND_", kind, "kind")
                for kind in kinds
            ],
            **encode.period(since, until),
        )
        async for page in self._pages(self._accounts.ListEntries, request):
            for entry in page.entries:
                yield decode(types.Entry, entry)

    async def usage(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        group_by: Iterable[str] = (),
        label: str = "",
    ) -> tuple[types.UsageLine, ...]:
        """What the account used, by month; this month's unless told. Groups: "MODEL", "LANE", "KEY", "LABEL"."""
        request = account_pb2.GetUsageRequest(
            account_id=self.account_id,
            group_by=[
                encode.enum_value(ledger_pb2.UsageGroup, "USAGE_GROUP_", group, "group_by")
                for group in group_by
            ],
            label=label,
            **encode.period(since, until),
        )
        answer = await self._transport.unary(self._accounts.GetUsage, request)
        return tuple(decode(types.UsageLine, line) for line in answer.lines)

    async def models(self) -> tuple[types.Model, ...]:
        """What can be asked for, the default model first, and how long it would take for the account."""
        request = account_pb2.ListModelsRequest(account_id=self.account_id)
        answer = await self._transport.unary(self._accounts.ListModels, request)
        return tuple(decode(types.Model, model) for model in answer.models)

    async def create_api_key(
        self,
        *,
        account_id: str = "",
        role: str = "MEMBER",
        display_name: str = "",
        expires_at: datetime | None = None,
        request_id: str = "",
    ) -> types.NewApiKey:
        """Makes a key. Its secret is in the first answer and nowhere else: empty when a given request_id is replayed.

        When the first answer was lost on the way, that key is ended and another one made.
        """
        request = account_pb2.CreateApiKeyRequest(
            request_id=request_id or new_request_id(),
            account_id=account_id or self.account_id,
            role=encode.enum_value(account_pb2.Role, "ROLE_", role, "role"),
            display_name=display_name,
            expires_at=encode.timestamp(expires_at),
        )
        made = await self._call(types.NewApiKey, self._accounts.CreateApiKey, request)
        if made.secret or request_id:
            return made
        lost = account_pb2.RevokeApiKeyRequest(key_id=made.key.key_id)
        await self._transport.unary(self._accounts.RevokeApiKey, lost)
        request.request_id = new_request_id()
        return await self._call(types.NewApiKey, self._accounts.CreateApiKey, request)

    @property
    def access(self) -> access.Access:
        """Keys, members and limits."""
        return access.Access(self._transport, self.account_id)

    @property
    def webhooks(self) -> webhooks.Webhooks:
        """Events by POST."""
        return webhooks.Webhooks(self._transport, self.account_id)

    @property
    def assets(self) -> assets.Assets:
        """What the account has stored."""
        return assets.Assets(self._transport, self.account_id)

    # Operators

    @property
    def attempts(self) -> attempts.Attempts:
        """What operators do to attempts and provider accounts."""
        return attempts.Attempts(self._transport)

    @property
    def operations(self) -> operations.Operations:
        """What operators may do with the ledger."""
        return operations.Operations(self._transport)

    async def create_account(
        self,
        display_name: str,
        *,
        lanes: Iterable[str] = (),
        weight: int = 0,
        max_in_flight: int = 0,
        requests_per_minute: int = 0,
        videos_per_hour: int = 0,
        request_id: str = "",
    ) -> types.Account:
        """Makes an account with its books; lanes: STANDARD and BATCH unless given; 0 is the default. Operators only."""
        request = operator_pb2.CreateAccountRequest(
            request_id=request_id or new_request_id(),
            display_name=display_name,
            lanes=[encode.lane(lane) for lane in lanes],
            weight=weight,
            max_in_flight=max_in_flight,
            requests_per_minute=requests_per_minute,
            videos_per_hour=videos_per_hour,
        )
        return await self._call(types.Account, self._operators.CreateAccount, request)

    async def grant(
        self,
        account_id: str,
        credits: int,
        *,
        source: str = "PROMOTION",
        expires_at: datetime | None = None,
        note: str = "",
        purchase: str = "",
        why: str = "",
        request_id: str = "",
    ) -> types.Grant:
        """Gives credits to an account. Operators only. Sources: PURCHASE, PROMOTION, SUBSCRIPTION, CORRECTION."""
        grant = ledger_pb2.GrantRequest(
            account_id=account_id,
            request_id=request_id or new_request_id(),
            credits=credits,
            source=encode.enum_value(ledger_pb2.LotSource, "LOT_SOURCE_", source, "source"),
            expires_at=encode.timestamp(expires_at),
            note=note,
            purchase=purchase,
        )
        request = operator_pb2.GrantRequest(grant=grant, why=why)
        return await self._call(types.Grant, self._operators.Grant, request)

    async def _call(self, kind: type[T], send: Any, request: protobuf.Message) -> T:
        return decode(kind, await self._transport.unary(send, request))

    async def _pages(self, send: Any, request: Any) -> AsyncGenerator[Any, None]:
        while True:
            page = await self._transport.unary(send, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


def _moved(before: types.Video, now: types.Video) -> bool:
    """Progress changes without a new revision; an older state told again after a break does not count."""
    return now.revision == before.revision and now != before
