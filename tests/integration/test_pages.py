"""Page tokens through the gateway of a whole system: another account's is refused, in every listing that has them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio

from framewire import errors as public_errors
from framewire.gateway.v1 import (
    account_pb2,
    operator_pb2,
    template_pb2,
    upload_pb2,
    video_pb2,
    webhook_pb2,
)
from tests import system as systems
from tests.gateway_world import Caller, new_id

TINY = {"model": "sora-2", "width": 320, "height": 180, "seconds": 1}
NOWHERE = "http://127.0.0.1:9/"
CONTRACTS = (account_pb2, operator_pb2, template_pb2, upload_pb2, video_pb2, webhook_pb2)


@dataclass(frozen=True, slots=True)
class Customer:
    """An account with two of everything that is listed."""

    caller: Caller
    endpoint_id: str

    @property
    def account_id(self) -> str:
        return self.caller.account_id


@dataclass(frozen=True, slots=True)
class Office:
    """Two accounts, and an operator."""

    one: Customer
    other: Customer
    operator: Caller

    def caller(self, listing: str, customer: Customer) -> Caller:
        """Who may ask for it."""
        return self.operator if listing in FOR_OPERATORS else customer.caller


LISTINGS: dict[str, Callable[[Customer], Any]] = {
    "ListVideos": lambda customer: video_pb2.ListVideosRequest(account_id=customer.account_id),
    "ListEntries": lambda customer: account_pb2.ListEntriesRequest(account_id=customer.account_id),
    "ListTemplates": lambda customer: template_pb2.ListTemplatesRequest(
        account_id=customer.account_id
    ),
    "ListDeliveries": lambda customer: webhook_pb2.ListDeliveriesRequest(
        endpoint_id=customer.endpoint_id
    ),
    "ListQuarantined": lambda customer: operator_pb2.ListQuarantinedRequest(
        account_id=customer.account_id
    ),
}
FOR_OPERATORS = {"ListQuarantined"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def office(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Office]:
    changed = {"gateway": {"GATEWAY_WEBHOOK_NETWORKS": "127.0.0.0/8"}}
    async with (
        systems.running(tmp_path_factory.mktemp("pages"), changed) as system,
        grpc.aio.insecure_channel(system.stack.gateway_address) as channel,
    ):
        yield Office(
            one=await customer(system, channel),
            other=await customer(system, channel),
            operator=Caller(channel, system.stack.operator_key),
        )


async def customer(system: systems.System, channel: grpc.aio.Channel) -> Customer:
    """Two videos, of which the provider made nothing usable; with them two grants, templates and deliveries."""
    async with await system.account(100) as client:
        await system.operator.grant(client.account_id, 1)
        broken = [
            await client.create_video(f"broken {new_id()} [fault:content_corrupt=9]", **TINY)
            for _ in range(2)
        ]
        for name in ("cat", "dog"):
            await client.create_template(name, "an animal", **TINY)
        key = await client.create_api_key()
        for video in broken:
            ended = [state async for state in client.watch_video(video.video_id)][-1]
            assert ended.failure is not None
            assert ended.failure.cause == "OUTPUT_UNUSABLE"
    caller = Caller(channel, key.secret, client.account_id)
    endpoint = await caller.call(
        "CreateEndpoint", webhook_pb2.CreateEndpointRequest(request_id=new_id(), url=NOWHERE)
    )
    endpoint_id = endpoint.endpoint.endpoint_id
    for _ in range(2):
        test = webhook_pb2.SendTestRequest(request_id=new_id(), endpoint_id=endpoint_id)
        await caller.call("SendTest", test)
    return Customer(caller, endpoint_id)


def test_no_listing_is_left_out() -> None:
    """A request with a page token belongs to a listing that is tried here."""
    methods = {
        method.name
        for contract in CONTRACTS
        for service in contract.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if "page_token" in method.input_type.fields_by_name
    }
    assert methods == set(LISTINGS)


@pytest.mark.parametrize("listing", LISTINGS)
async def test_a_page_token_of_another_account_is_refused(office: Office, listing: str) -> None:
    """Whoever asks with it; in its own listing it goes on."""
    asked = LISTINGS[listing](office.one)
    asked.page_size = 1
    mine, theirs = office.caller(listing, office.one), office.caller(listing, office.other)
    first = await mine.call(listing, asked)
    assert first.next_page_token, "one page holds them all"
    foreign = LISTINGS[listing](office.other)
    foreign.page_size = 1
    assert (await theirs.call(listing, foreign)).next_page_token not in ("", first.next_page_token)
    foreign.page_token = first.next_page_token
    refused = await theirs.refused(listing, foreign)
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "PAGE_TOKEN_INVALID",
    )
    asked.page_token = first.next_page_token
    second = await mine.call(listing, asked)
    rows = [value for field, value in second.ListFields() if field.is_repeated]
    assert [len(each) for each in rows] == [1]
    assert rows[0][0] not in next(v for f, v in first.ListFields() if f.is_repeated)
    if listing not in FOR_OPERATORS:
        assert (await theirs.refused(listing, asked)).code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("listing", LISTINGS)
async def test_a_page_token_that_was_changed_is_refused(office: Office, listing: str) -> None:
    asked, caller = LISTINGS[listing](office.one), office.caller(listing, office.one)
    asked.page_size = 1
    token = (await caller.call(listing, asked)).next_page_token
    place = len(token) // 2
    asked.page_token = f"{token[:place]}{'A' if token[place] != 'A' else 'B'}{token[place + 1 :]}"
    assert (await caller.refused(listing, asked)).reason == "PAGE_TOKEN_INVALID"


async def test_a_cursor_of_another_account_is_refused(office: Office) -> None:
    """WatchVideos goes on from a cursor, which is as good as a page token."""
    watching = office.one.caller.watch_many()
    async for response in watching:
        if response.cursor:
            break
    watching.cancel()
    own = office.one.caller.watch_many(cursor=response.cursor)
    assert (await anext(aiter(own))).ByteSize()
    own.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(office.other.caller.watch_many(cursor=response.cursor)))
    refused = public_errors.from_rpc(caught.value)
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "PAGE_TOKEN_INVALID",
    )
