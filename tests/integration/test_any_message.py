"""Any message at every RPC of the gateway, by every kind of caller: an answer, or a refusal that says why; no fault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import pytest
import pytest_asyncio
from google.protobuf import descriptor, message_factory
from hypothesis import strategies as st

from framewire import errors as public_errors
from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import reason_pb2, vocabulary_pb2
from framewire.gateway.v1 import (
    account_pb2,
    operator_pb2,
    template_pb2,
    upload_pb2,
    video_pb2,
    webhook_pb2,
)
from services.gateway import auth
from services.local import process
from tests import any_message, gateway_world
from tests import system as systems
from tests.gateway_world import BOOTSTRAP, IMAGE, Caller, new_id

FILES = (video_pb2, template_pb2, upload_pb2, account_pb2, webhook_pb2, operator_pb2)
METHODS: Mapping[str, descriptor.MethodDescriptor] = {
    f"{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
REASONS = {name.removeprefix("ERROR_REASON_") for name in reason_pb2.ErrorReason.keys()[1:]}
MANY = dict.fromkeys(("requests_per_minute", "videos_per_hour", "max_in_flight"), 10**9)
WORDS: Mapping[str, Sequence[Any]] = {
    "input_image_id": ("", IMAGE),
    "image_id": (IMAGE,),
    "sha256": ("", "0" * 64),
    "name": ("cat", "shared/cat", "mood"),
    "template": ("cat", "shared/cat"),
    "key": ("mood", "seed", "team"),
    "prompt": ("a cat", "a {mood} cat", "a cat", ""),
    "string_value": ("calm", "", "{mood}"),
    "model": ("", "sora-2", "", "sora-1"),
    "url": ("https://127.0.0.1/a.png", "https://no.invalid/a.png", "http://a/"),
    "spec": (),
    "width": (0,),
    "height": (0,),
    "seconds": (0, 4),
    "variants": (0, 1),
    "version": (0, 1),
    "template_version": (0, 1),
    "page_size": (0, 1, 50),
    "keep_seconds": (60,),
    "credits": (1, 50),
    "yaml": ("version: 2", "- [", "&a [*a]"),
}
"""What callers say in fields of these names; the rest is drawn by the contract's rules."""
ROLES = ("MEMBER", "SERVICE", "OPERATOR")
EXAMPLES, EXAMPLES_LONG = 20, 150
DEEP = ("CreateVideo", "QuoteVideo", "CreateTemplate")
"""What has most to be drawn is drawn four times as often."""
SECONDS = 10.0
STREAM_SECONDS = 0.15
FAULT = b"rpc_failed"
"""What a service logs where it answers INTERNAL."""
pytestmark = pytest.mark.slow


@dataclass
class Callers:
    """Who calls, and what is known here. The keys that call are in nobody's messages."""

    address: str
    keys: dict[str, str]
    messages: any_message.Messages
    programs: Sequence[process.Program]
    answered: set[str] = field(default_factory=set)

    def faults(self) -> list[str]:
        """What the services behind it say of faults of their own."""
        return [
            line.decode(errors="replace")
            for program in self.programs
            for line in program.log_path.read_bytes().splitlines()
            if FAULT in line
        ]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def callers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Callers]:
    """A real gateway before stand-ins."""
    settings = {"GATEWAY_SWEEP_SECONDS": "5"}
    async with gateway_world.running(tmp_path_factory.mktemp("any"), settings) as world:
        yield await populated(world.channel, BOOTSTRAP, world.address, world.services)


async def populated(
    channel: grpc.aio.Channel, key: str, address: str, programs: Sequence[process.Program]
) -> Callers:
    """Words and ids that stand for something: an account, one of somebody else, a key, videos, templates."""
    operator = Caller(channel, key)
    accounts = [
        await operator.call(
            "CreateAccount",
            operator_pb2.CreateAccountRequest(request_id=new_id(), display_name="t", **MANY),
        )
        for _ in range(2)
    ]
    account_id, other_id = (account.account_id for account in accounts)
    grant = ledger_pb2.GrantRequest(
        account_id=account_id,
        request_id=new_id(),
        credits=10**6,
        source=ledger_pb2.LOT_SOURCE_PROMOTION,
    )
    await operator.call("Grant", operator_pb2.GrantRequest(grant=grant))
    keys = {"OPERATOR": key, "NONE": ""}
    for role, of_account in (("MEMBER", account_id), ("SERVICE", ""), ("spare", other_id)):
        request = account_pb2.CreateApiKeyRequest(
            request_id=new_id(),
            role=account_pb2.ROLE_SERVICE if role == "SERVICE" else account_pb2.ROLE_MEMBER,
            account_id=of_account,
        )
        made = await operator.call("CreateApiKey", request)
        keys[role] = made.secret if role != "spare" else made.key.key_id
    spare = keys.pop("spare")
    member = Caller(channel, keys["MEMBER"], account_id)
    live, gone = await member.create(), await member.create()
    removal = video_pb2.DeleteVideoRequest(video_id=gone.video_id, cancel=True)
    await member.call("DeleteVideo", removal)
    await make_templates(operator, member)
    page = await member.call("ListVideos", video_pb2.ListVideosRequest(page_size=1))
    known = dict(WORDS) | {
        "account_id": (account_id, account_id, other_id, ""),
        "video_id": (live.video_id, live.video_id, gone.video_id, ""),
        "key_id": (spare, ""),
        "page_token": ("", page.next_page_token, "bm9uZQ=="),
        "cursor": ("", page.next_page_token),
    }
    ids = [account_id, other_id, live.video_id, gone.video_id, spare, IMAGE, "0" * 26]
    return Callers(address, keys, any_message.Messages(known, ids), programs)


async def make_templates(operator: Caller, member: Caller) -> None:
    variable = template_pb2.TemplateVariable(
        name="mood", type=template_pb2.VARIABLE_TYPE_STRING, max_length=20
    )
    spec = vocabulary_pb2.VideoSpec(prompt="a {mood} cat")
    for caller, name in ((member, "cat"), (operator, "shared/cat")):
        template = template_pb2.CreateTemplateRequest(
            request_id=new_id(), name=name, spec=spec, variables=[variable]
        )
        await caller.call("CreateTemplate", template)


def messages(callers: Callers, method: descriptor.MethodDescriptor) -> st.SearchStrategy[Any]:
    one = callers.messages.of(method.input_type)
    return st.lists(one, max_size=3) if method.client_streaming else one


def send(channel: grpc.Channel, method: descriptor.MethodDescriptor, sent: Any, key: str) -> None:
    """Calls; of a stream that comes back two messages are taken, or what comes within a moment."""
    kinds = [
        "stream" if yes else "unary" for yes in (method.client_streaming, method.server_streaming)
    ]
    call = getattr(channel, "_".join(kinds))(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    given = iter(sent) if method.client_streaming else sent
    if not method.server_streaming:
        call(given, metadata=metadata, timeout=SECONDS)
        return
    stream = call(given, metadata=metadata, timeout=STREAM_SECONDS)
    count = 0
    try:
        for _ in stream:
            count += 1
            if count == 2:
                stream.cancel()
                return
    except grpc.RpcError:
        if not count or stream.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise


def check(name: str, role: str, streams: bool, error: Any) -> None:
    """A refusal has a reason that the contract knows; who may not call is told so, whatever was sent."""
    code, told = error.code(), public_errors.from_rpc(error)
    if streams and code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return  # ours
    assert told.reason in REASONS, f"{code}: {told}"
    assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), f"{code}: {told}"
    assert told.message
    # Nothing is away: who is told to wait would wait for ever. Of the stand-ins none says that it has recovered.
    waits = code is grpc.StatusCode.UNAVAILABLE and told.reason == "DEPENDENCY_UNAVAILABLE"
    assert not waits or name.endswith("/Recover"), f"{code}: {told}"
    if role == "NONE":
        assert code is grpc.StatusCode.UNAUTHENTICATED
    elif role not in auth.ROLES[name]:
        assert told.reason == "ROLE_NOT_ALLOWED"


def drive(callers: Callers, name: str, examples: int, *, same: bool) -> None:
    """So many messages at one RPC. `same`: the same ones each time."""
    method = METHODS[name]
    examples *= 4 if method.name in DEEP else 1
    allowed = [role for role in ROLES if role in auth.ROLES[name]]
    roles = st.sampled_from([*allowed * 3, *ROLES, "NONE"])

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=same,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(role=roles, sent=messages(callers, method))
    def tried(role: str, sent: Any) -> None:
        if name.endswith("/EraseAccount") and sent.account_id:
            sent.account_id = "0" * 26  # ours are called for by all the others
        try:
            send(channel, method, sent, callers.keys[role])
        except grpc.RpcError as error:
            check(name, role, method.server_streaming, error)
        else:
            assert role in auth.ROLES[name]
            callers.answered.add(name)
        if name.endswith("/SetAdmission"):
            request = operator_pb2.SetAdmissionRequest()
            send(channel, method, request, callers.keys["OPERATOR"])

    with grpc.insecure_channel(callers.address) as channel:
        tried()


@pytest.mark.parametrize("name", METHODS)
async def test_any_message_is_answered_or_refused_with_a_reason(
    callers: Callers, name: str
) -> None:
    pids = [program.pid for program in callers.programs]
    await asyncio.to_thread(drive, callers, name, EXAMPLES, same=True)
    assert callers.faults() == []
    assert [program.pid for program in callers.programs if program.running] == pids


def test_messages_reach_what_they_are_for(callers: Callers) -> None:
    """Were all refused at the door, nothing would have been tried. No endpoint of webhooks can be made offline."""
    reached = [name for name in METHODS if "WebhookService" not in name]
    assert len(callers.answered.intersection(reached)) > len(reached) * 2 / 3, sorted(
        METHODS.keys() - callers.answered
    )


NUL: list[tuple[str, str, Any]] = [
    ("VideoService/ListVideos", "MEMBER", video_pb2.ListVideosRequest(client_reference="a\0")),
    ("VideoService/ListVideos", "MEMBER", video_pb2.ListVideosRequest(labels={"a": "\0"})),
    (
        "AccountService/CreateApiKey",
        "MEMBER",
        account_pb2.CreateApiKeyRequest(request_id=new_id(), display_name="\0"),
    ),
    ("OperatorService/SetAdmission", "OPERATOR", operator_pb2.SetAdmissionRequest(why="\0")),
    (
        "OperatorService/CreateAccount",
        "OPERATOR",
        operator_pb2.CreateAccountRequest(request_id=new_id(), display_name="a\0b"),
    ),
]


@pytest.mark.parametrize(("name", "role", "sent"), NUL, ids=[str(one) for one in range(len(NUL))])
def test_what_postgres_cannot_keep_is_the_callers_mistake(
    callers: Callers, name: str, role: str, sent: Any
) -> None:
    with grpc.insecure_channel(callers.address) as channel, pytest.raises(grpc.RpcError) as told:
        send(channel, METHODS[f"framewire.gateway.v1.{name}"], sent, callers.keys[role])
    refused: Any = told.value
    reason = public_errors.from_rpc(refused).reason
    assert (refused.code(), reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


@pytest.mark.long
async def test_any_message_and_the_whole_system(tmp_path: Path) -> None:
    async with systems.running(tmp_path) as system:
        address = system.stack.gateway_address
        programs = [system.supervisor.get(name) for name in system.stack.services]
        async with grpc.aio.insecure_channel(address) as channel:
            callers = await populated(channel, system.stack.operator_key, address, programs)
        pids = [program.pid for program in programs]
        for name in METHODS:
            await asyncio.to_thread(drive, callers, name, EXAMPLES_LONG, same=False)
            assert callers.faults() == []
            assert [program.pid for program in programs if program.running] == pids
        assert (await system.check_books()).balanced
