"""A gateway for tests: a real process, real Postgres and NATS. The services behind are stand-ins that are told what to
refuse, delay and count; the tests of the whole system use the real ones."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import grpc
import nats as nats_client
import pytest
from google.protobuf import json_format, message_factory

from framewire import errors as public_errors
from framewire import subjects
from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import (
    account_pb2,
    account_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
    template_pb2_grpc,
    upload_pb2_grpc,
    video_pb2,
    video_pb2_grpc,
    webhook_pb2_grpc,
)
from framewire.generator.v1 import attempt_pb2, attempt_pb2_grpc, job_pb2
from framewire.storage.v1 import storage_pb2, storage_pb2_grpc
from kit import errors, rpc
from services.local import environment, nats, places, probes, process
from tests import containers
from tests.waiting import eventually

BOOTSTRAP = "fw_" + "b" * 40
IMAGE = "i" * 26
PRICE = 10
PICTURE = storage_pb2.Asset(kind=storage_pb2.ASSET_KIND_INPUT_IMAGE, media_type="image/png")
SETTINGS = {
    "GATEWAY_BOOTSTRAP_KEY": BOOTSTRAP,
    "GATEWAY_SERVICE_TOKEN_SECRET": "s" * 32,
    "GATEWAY_ADMIT_SECONDS": "2",
    "GATEWAY_SWEEP_SECONDS": "0.1",
    "GATEWAY_SWEEP_GRACE_SECONDS": "1",
    "GATEWAY_SWEEP_UNACCEPTED_SECONDS": "0.5",
    "GATEWAY_SWEEP_OVERDUE_SECONDS": "1",
    "GATEWAY_SWEEP_RETRY_SECONDS": "0.2",
    "GATEWAY_WATCH_FLOOR_SECONDS": "1",
}


T = TypeVar("T")


@dataclass
class Behind:
    """What the stand-ins do and saw, by account or video."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    refuse: dict[str, errors.ServiceError] = field(default_factory=dict)
    hold_up: dict[str, asyncio.Event] = field(default_factory=dict)
    outcomes: dict[str, event_pb2.Event] = field(default_factory=dict)
    requests: dict[str, ledger_pb2.ReserveRequest] = field(default_factory=dict)
    sent: dict[str, Any] = field(default_factory=dict)
    estimates: list[attempt_pb2.ModelEstimate] = field(default_factory=list)
    needed: dict[str, int] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    def holds(self, account_id: str) -> list[str]:
        """Which holds were asked for."""
        return [key for key, asked in self.requests.items() if asked.account_id == account_id]

    async def enter(self, method: str, key: str) -> None:
        self.calls[method, key] += 1
        if key in self.hold_up:
            await self.hold_up[key].wait()
        if (refusal := self.refuse.get(f"{method} {key}")) is not None:
            raise refusal


def answering(service: Any) -> Callable[[type[T]], type[T]]:
    """What a stand-in has no words for it answers with an empty message, or no message at all."""

    def complete(kind: type[T]) -> type[T]:
        for method in service.methods:
            if method.name not in vars(kind):
                setattr(kind, method.name, _empty(method))
        return kind

    return complete


def _empty(method: Any) -> Any:
    answer = message_factory.GetMessageClass(method.output_type)

    async def one(_self: Any, _request: Any, _context: Any) -> Any:
        return answer()

    async def none(_self: Any, _request: Any, _context: Any) -> AsyncIterator[Any]:
        for nothing in ():
            yield nothing

    return none if method.server_streaming else one


@answering(ledger_pb2.DESCRIPTOR.services_by_name["LedgerService"])
class Credits(ledger_pb2_grpc.LedgerServiceServicer):
    def __init__(self, behind: Behind) -> None:
        self.behind = behind

    async def OpenAccount(self, request: Any, context: Any) -> Any:
        await self.behind.enter("OpenAccount", request.account_id)
        return ledger_pb2.Balance(account_id=request.account_id)

    async def Reserve(self, request: Any, context: Any) -> Any:
        self.behind.requests[request.hold_id] = request
        await self.behind.enter("Reserve", request.account_id)
        return ledger_pb2.Hold(
            hold_id=request.hold_id, reserved_credits=PRICE, price_version="1", policy_version="1"
        )

    async def Release(self, request: Any, context: Any) -> Any:
        await self.behind.enter("Release", request.account_id)
        return ledger_pb2.Hold(hold_id=request.hold_id)

    async def Quote(self, request: Any, context: Any) -> Any:
        return ledger_pb2.PriceQuote(quote_id="q", credits=PRICE)

    async def GetBalance(self, request: Any, context: Any) -> Any:
        return ledger_pb2.Balance(account_id=request.account_id, available_credits=100)

    async def Grant(self, request: Any, context: Any) -> Any:
        await self.enter("Grant", request, request.account_id)
        return ledger_pb2.GrantResponse(lot_id="l")

    async def CheckBooks(self, request: Any, context: Any) -> Any:
        return ledger_pb2.CheckBooksResponse(balanced=True)

    async def ListEntries(self, request: Any, context: Any) -> Any:
        await self.enter("ListEntries", request, request.account_id)
        return ledger_pb2.ListEntriesResponse(next_page_token="more")

    async def GetUsage(self, request: Any, context: Any) -> Any:
        await self.enter("GetUsage", request, request.account_id)
        line = ledger_pb2.UsageLine(
            month="2026-11", key_id="k", label_value="red", captured_credits=7, refunded_credits=2
        )
        return ledger_pb2.GetUsageResponse(lines=[line])

    async def Refund(self, request: Any, context: Any) -> Any:
        await self.enter("Refund", request, request.hold_id)
        return ledger_pb2.RefundResponse(lot_id="l")

    async def SetFrozen(self, request: Any, context: Any) -> Any:
        await self.enter("SetFrozen", request, request.account_id)
        return ledger_pb2.AccountRules(account_id=request.account_id, frozen=request.frozen)

    async def ForgetLabels(self, request: Any, context: Any) -> Any:
        await self.enter("ForgetLabels", request, request.account_id)
        return ledger_pb2.ForgetLabelsResponse(next_page_token="" if request.page_token else "more")

    async def SetDailyCap(self, request: Any, context: Any) -> Any:
        await self.enter("SetDailyCap", request, request.account_id)
        return ledger_pb2.AccountRules(account_id=request.account_id)

    async def AddRulebook(self, request: Any, context: Any) -> Any:
        await self.enter("AddRulebook", request, "")
        return ledger_pb2.Rulebook(version="2")

    async def ListRulebooks(self, request: Any, context: Any) -> Any:
        return ledger_pb2.ListRulebooksResponse(rulebooks=[ledger_pb2.Rulebook(version="2")])

    async def ActivateRulebook(self, request: Any, context: Any) -> Any:
        await self.enter("ActivateRulebook", request, request.version)
        return ledger_pb2.Rulebook(version=request.version, in_force=True)

    async def enter(self, method: str, request: Any, key: str) -> None:
        """Remembers what the gateway sent last."""
        self.behind.sent[method] = request
        await self.behind.enter(method, key)


@answering(storage_pb2.DESCRIPTOR.services_by_name["StorageService"])
class Storage(storage_pb2_grpc.StorageServiceServicer):
    def __init__(self, behind: Behind) -> None:
        self.behind = behind

    async def Pin(self, request: Any, context: Any) -> Any:
        await self.behind.enter("Pin", request.account_id)
        await self.behind.enter("Pin", request.asset_id)
        return storage_pb2.PinResponse(asset=self.behind.stats.get(request.asset_id, PICTURE))

    async def Unpin(self, request: Any, context: Any) -> Any:
        await self.behind.enter("Unpin", request.owner)
        return storage_pb2.UnpinResponse(dropped=1)

    async def Stat(self, request: Any, context: Any) -> Any:
        return self.behind.stats.get(request.asset_id, PICTURE)

    async def EraseAccount(self, request: Any, context: Any) -> Any:
        await self.behind.enter("EraseAccount", request.account_id)
        return storage_pb2.EraseAccountResponse(
            still_needed=self.behind.needed.get(request.account_id, 0)
        )

    async def Delete(self, request: Any, context: Any) -> Any:
        await self.behind.enter("Delete", request.asset_id)
        return storage_pb2.Asset(asset_id=request.asset_id)

    async def SignUrl(self, request: Any, context: Any) -> Any:
        return storage_pb2.SignUrlResponse(url=f"http://s3/{request.asset_id}/{request.file_name}")

    async def Put(self, request_iterator: Any, context: Any) -> Any:
        parts = [part async for part in request_iterator]
        header, size = parts[0].header, sum(len(part.chunk) for part in parts)
        await self.behind.enter("Put", header.owner)
        return storage_pb2.Asset(
            asset_id=IMAGE, account_id=header.account_id, size_bytes=size, media_type="image/png"
        )


@answering(attempt_pb2.DESCRIPTOR.services_by_name["AttemptService"])
class Generator(attempt_pb2_grpc.AttemptServiceServicer):
    def __init__(self, behind: Behind) -> None:
        self.behind = behind

    async def GetVideoOutcome(self, request: Any, context: Any) -> Any:
        await self.behind.enter("GetVideoOutcome", request.video_id)
        if request.video_id not in self.behind.outcomes:
            raise errors.NotFound("ATTEMPT_NOT_FOUND", "no such job")
        return attempt_pb2.VideoOutcome(last_event=self.behind.outcomes[request.video_id])

    async def CancelAttempt(self, request: Any, context: Any) -> Any:
        await self.behind.enter("CancelAttempt", request.video_id)
        event = event_pb2.Event(kind=event_pb2.EVENT_KIND_CANCELLED, seq=2)
        event.cancelled.cause = vocabulary_pb2.CAUSE_CANCELLED_BEFORE_SUBMIT
        return attempt_pb2.VideoOutcome(last_event=event)

    async def ErasePrompt(self, request: Any, context: Any) -> Any:
        await self.behind.enter("ErasePrompt", request.video_id)
        return attempt_pb2.ErasePromptResponse()

    async def ListAttempts(self, request: Any, context: Any) -> Any:
        return attempt_pb2.ListAttemptsResponse()

    async def EstimateModels(self, request: Any, context: Any) -> Any:
        self.behind.sent["EstimateModels"] = request
        await self.behind.enter("EstimateModels", request.account_id)
        return attempt_pb2.EstimateModelsResponse(models=self.behind.estimates)


class Caller:
    """The gateway's services with one key."""

    def __init__(self, channel: grpc.aio.Channel, secret: str, account_id: str = "") -> None:
        self.account_id, self.secret = account_id, secret
        self._metadata = (("authorization", f"Bearer {secret}"),)
        self._stubs = [
            video_pb2_grpc.VideoServiceStub(channel),
            upload_pb2_grpc.UploadServiceStub(channel),
            account_pb2_grpc.AccountServiceStub(channel),
            operator_pb2_grpc.OperatorServiceStub(channel),
            template_pb2_grpc.TemplateServiceStub(channel),
            webhook_pb2_grpc.WebhookServiceStub(channel),
        ]

    def method(self, name: str) -> Any:
        return next(getattr(stub, name) for stub in self._stubs if hasattr(stub, name))

    async def call(self, name: str, request: Any, timeout: float = 10) -> Any:
        try:
            return await self.method(name)(request, metadata=self._metadata, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise public_errors.from_rpc(error) from None

    async def refused(self, name: str, request: Any) -> public_errors.FramewireError:
        with pytest.raises(public_errors.FramewireError) as caught:
            await self.call(name, request)
        return caught.value

    async def insist(self, request_id: str, **fields: Any) -> Any:
        """The verdict on a video, as callers get it: the same request again while the answer is "not now"."""

        async def verdict() -> Any:
            try:
                return await self.create(request_id, **fields)
            except public_errors.FramewireError as error:
                if error.code is grpc.StatusCode.UNAVAILABLE:
                    raise AssertionError(f"not now: {error}") from error
                raise

        return await eventually(verdict, every_seconds=0.2)

    async def create(self, request_id: str = "", timeout: float = 10, **fields: Any) -> Any:
        return await self.call("CreateVideo", wanted(request_id, **fields), timeout)

    async def video(self, video_id: str) -> Any:
        return await self.call("GetVideo", video_pb2.GetVideoRequest(video_id=video_id))

    def watch_many(self, *watched: Any, cursor: str = "") -> Any:
        request = video_pb2.WatchVideosRequest(videos=watched, cursor=cursor)
        return self.method("WatchVideos")(request, metadata=self._metadata, timeout=30)

    def watch(self, video_id: str, after_revision: int = 0) -> Any:
        request = video_pb2.WatchVideoRequest(video_id=video_id, after_revision=after_revision)
        return self.method("WatchVideo")(request, metadata=self._metadata, timeout=20)


def new_id() -> str:
    return str(uuid.uuid4())


def wanted(request_id: str = "", *, image: str = "", **fields: Any) -> Any:
    spec = vocabulary_pb2.VideoSpec(prompt="a cat", input_image_id=image)
    return video_pb2.CreateVideoRequest(request_id=request_id or new_id(), spec=spec, **fields)


class World:
    """The running gateway and everything around it."""

    def __init__(self) -> None:
        self.behind = Behind()
        self.bus: containers.Nats | nats.Nats
        self.pool: asyncpg.Pool
        self.channel: grpc.aio.Channel
        self.channels: list[grpc.aio.Channel] = []
        self.services: list[process.Service] = []
        self.address = ""

    @property
    def operator(self) -> Caller:
        return Caller(self.channel, BOOTSTRAP)

    async def member(self, **account: Any) -> Caller:
        """A new account's key."""
        made = await self.operator.call(
            "CreateAccount",
            operator_pb2.CreateAccountRequest(request_id=new_id(), display_name="t", **account),
        )
        return await self.key_of(made.account_id)

    async def key_of(self, account_id: str) -> Caller:
        key = await self.operator.call(
            "CreateApiKey",
            account_pb2.CreateApiKeyRequest(request_id=new_id(), account_id=account_id),
        )
        return Caller(self.channel, key.secret, account_id)

    async def tell(self, video: Any, kind: str, seq: int, **detail: Any) -> None:
        """Publishes an event as generator and credits do."""
        event = event_pb2.Event(
            video_id=video.video_id,
            account_id=video.account_id,
            seq=seq,
            kind=event_pb2.EventKind.Value(f"EVENT_KIND_{kind.upper()}"),
        )
        event.occurred_at.GetCurrentTime()
        getattr(event, kind).SetInParent()
        for name, value in detail.items():
            target = getattr(getattr(event, kind), name)
            target.extend(value) if isinstance(value, list) else setattr(
                getattr(event, kind), name, value
            )
        client = await nats_client.connect(self.bus.url)
        try:
            subject = subjects.event_subject(video.account_id, kind)
            data = json_format.MessageToJson(event).encode()
            headers = {"ce-id": f"{video.video_id}:{seq or kind}"}
            await client.jetstream().publish(subject, data, headers=headers)
        finally:
            await client.close()

    async def jobs(self, video_id: str) -> list[job_pb2.Job]:
        """What the bus has for a video."""
        client = await nats_client.connect(self.bus.url)
        try:
            jetstream = client.jetstream()
            info = (await jetstream.stream_info(subjects.JOBS_STREAM)).state
            found = []
            # A stream that was killed while empty says that it begins at 0; nothing is there.
            for sequence in range(max(1, info.first_seq), info.last_seq + 1):
                message = await jetstream.get_msg(subjects.JOBS_STREAM, sequence)
                assert message.headers is not None
                if message.headers[subjects.VIDEO_HEADER].startswith(video_id):
                    found.append(job_pb2.Job.FromString(message.data or b""))
            return found
        finally:
            await client.close()


@contextlib.asynccontextmanager
async def running(
    data_dir: Path, settings: Mapping[str, str] | None = None, replicas: int = 1
) -> AsyncIterator[World]:
    """Gateways on servers of their own; `channel` is the first one's."""
    made = World()
    places.prepare(data_dir)
    database, made.bus = containers.postgres(data_dir), containers.nats(data_dir)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(database.destroy)
        stack.push_async_callback(made.bus.stop)
        await asyncio.gather(database.start(), made.bus.start())
        await database.create_database("gateway")
        peers = grpc.aio.server(interceptors=[rpc.ServerInterceptor(anyone)])
        stack.push_async_callback(peers.stop, 0)
        ledger_pb2_grpc.add_LedgerServiceServicer_to_server(Credits(made.behind), peers)
        storage_pb2_grpc.add_StorageServiceServicer_to_server(Storage(made.behind), peers)
        attempt_pb2_grpc.add_AttemptServiceServicer_to_server(Generator(made.behind), peers)
        address = f"127.0.0.1:{peers.add_insecure_port('127.0.0.1:0')}"
        await peers.start()
        url = database.database_url("gateway")
        env = environment.inherited() | SETTINGS | (settings or {})
        env |= {f"GATEWAY_{name}_ADDRESS": address for name in ("CREDITS", "STORAGE", "GENERATOR")}
        env |= {"GATEWAY_DATABASE_URL": url, "GATEWAY_NATS_URL": made.bus.url}
        migration = environment.command("gateway", "migrate")
        await process.run_to_end(process.Child("migrate", migration, env), data_dir)
        for number in range(replicas):
            name = f"gateway{number or ''}"
            listen = f"127.0.0.1:{places.choose_port(data_dir, name)}"
            serving = functools.partial(probes.grpc_serving, listen)
            child = process.Child(
                name, environment.command("gateway"), env | {"GATEWAY_LISTEN": listen}, serving
            )
            gateway = process.Service(child, data_dir)
            stack.push_async_callback(gateway.stop)
            await gateway.start()
            made.services.append(gateway)
            made.address = made.address or listen
            made.channels.append(await stack.enter_async_context(grpc.aio.insecure_channel(listen)))
        made.channel = made.channels[0]
        made.pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=1))
        yield made


async def anyone(*_: object) -> str:
    return "gateway"
