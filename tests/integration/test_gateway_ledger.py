"""What the gateway passes on to ledger and storage: who asked is its own word; an operator's act is on record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import account_pb2, operator_pb2, video_pb2
from kit import errors, ids
from tests import gateway_world
from tests.gateway_world import World, new_id
from tests.waiting import eventually

YAML = "version: two"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with gateway_world.running(tmp_path_factory.mktemp("gateway")) as running:
        yield running


async def test_a_video_is_reserved_for_the_key_that_asked(world: World) -> None:
    member = await world.member()
    keys = await member.call("ListApiKeys", account_pb2.ListApiKeysRequest())
    video = await member.create()
    assert world.behind.requests[video.video_id].key_id == keys.keys[0].key_id


async def test_statement_and_usage_are_asked_for_the_callers_account_alone(world: World) -> None:
    member, stranger = await world.member(), await world.member()
    request = account_pb2.ListEntriesRequest(
        page_token="t", video_id="v" * 26, kinds=["TRANSFER_KIND_REFUND"]
    )
    getattr(request, "from").seconds = 5
    assert (await member.call("ListEntries", request)).next_page_token == "more"
    sent = world.behind.sent["ListEntries"]
    assert (sent.account_id, sent.page_token, sent.video_id) == (member.account_id, "t", "v" * 26)
    assert (list(sent.kinds), getattr(sent, "from").seconds, sent.HasField("to")) == ([5], 5, False)
    asked = account_pb2.GetUsageRequest(group_by=["USAGE_GROUP_LABEL"], label="team")
    asked.to.seconds = 9
    (line,) = (await member.call("GetUsage", asked)).lines
    assert (line.month, line.key_id, line.label_value) == ("2026-11", "k", "red")
    assert (line.credits, line.refunded_credits) == (7, 2)
    sent = world.behind.sent["GetUsage"]
    assert (sent.account_id, sent.label, sent.to.seconds) == (member.account_id, "team", 9)
    for method, foreign in (("ListEntries", request), ("GetUsage", asked)):
        foreign.account_id = stranger.account_id
        assert (await member.refused(method, foreign)).reason == "ACCOUNT_NOT_FOUND"
    world.behind.refuse[f"ListEntries {member.account_id}"] = errors.InvalidArgument(
        "PAGE_TOKEN_INVALID", "no"
    )
    request.account_id = ""
    assert (await member.refused("ListEntries", request)).reason == "PAGE_TOKEN_INVALID"


def acts(account_id: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each act with what its audit row must say."""
    grant = ledger_pb2.GrantRequest(
        account_id=account_id, request_id=new_id(), credits=5, source=1, operator="somebody else"
    )
    refund = ledger_pb2.RefundRequest(
        hold_id="h" * 26, request_id=new_id(), credits=3, operator="somebody else", taken_from=2
    )
    frozen = ledger_pb2.SetFrozenRequest(account_id=account_id, frozen=True)
    cap = ledger_pb2.SetDailyCapRequest(account_id=account_id, credits=9)
    add = ledger_pb2.AddRulebookRequest(kind=1, yaml=YAML, operator="somebody else")
    activate = ledger_pb2.ActivateRulebookRequest(
        kind=2, version="2", content_hash="a" * 64, operator="somebody else"
    )
    activate.effective_from.seconds = 1_800_000_000
    why = {"why": "because"}
    return {
        "Grant": (operator_pb2.GrantRequest(grant=grant, **why), {"credits": 5}),
        "Refund": (operator_pb2.RefundRequest(refund=refund, **why), {"taken_from": "LOSS"}),
        "SetFrozen": (operator_pb2.SetFrozenRequest(request=frozen, **why), {"frozen": True}),
        "SetDailyCap": (operator_pb2.SetDailyCapRequest(request=cap, **why), {"credits": 9}),
        "AddRulebook": (
            operator_pb2.AddRulebookRequest(request=add, **why),
            {"kind": "PRICE_BOOK", "yaml_sha256": hashlib.sha256(YAML.encode()).hexdigest()},
        ),
        "ActivateRulebook": (
            operator_pb2.ActivateRulebookRequest(request=activate, **why),
            {"version": "2", "effective_from": "2027-01-15T08:00:00+00:00"},
        ),
    }


async def test_each_act_of_an_operator_is_on_record_under_the_operators_key(world: World) -> None:
    member = await world.member()
    rows = await world.pool.fetch("SELECT key_id FROM api_keys WHERE role = 'OPERATOR'")
    operator = rows[0]["key_id"]
    for method, (request, says) in acts(member.account_id).items():
        assert (await member.refused(method, request)).reason == "ROLE_NOT_ALLOWED"
        await world.operator.call(method, request)
        assert getattr(world.behind.sent[method], "operator", operator) == operator
        audit = await world.pool.fetchrow(
            "SELECT principal, why, detail::text, outcome FROM audit WHERE method = $1"
            " ORDER BY created_at DESC LIMIT 1",
            method,
        )
        assert audit is not None
        assert (audit["principal"], audit["why"], audit["outcome"]) == (operator, "because", "OK")
        for name, value in says.items():
            assert f'"{name}": {json.dumps(value)}' in audit["detail"], method
    listed = await world.operator.call(
        "ListRulebooks",
        operator_pb2.ListRulebooksRequest(request=ledger_pb2.ListRulebooksRequest(kind=1)),
    )
    assert listed.rulebooks[0].version == "2"


async def test_what_the_ledger_refuses_is_told_and_recorded(world: World) -> None:
    request, _ = acts("a" * 26)["ActivateRulebook"]
    request.request.version = "missing"
    world.behind.refuse["ActivateRulebook missing"] = errors.NotFound("RULEBOOK_NOT_FOUND", "no")
    assert (
        await world.operator.refused("ActivateRulebook", request)
    ).reason == "RULEBOOK_NOT_FOUND"
    outcome = await world.pool.fetchval(
        "SELECT outcome FROM audit WHERE detail ->> 'version' = 'missing'"
    )
    assert outcome == "RULEBOOK_NOT_FOUND"
    request.request.effective_from.seconds = 2**60
    assert (await world.operator.refused("ActivateRulebook", request)).reason == "INVALID_FIELD"


async def test_a_reached_cap_refuses_the_video_and_frees_its_request_id(world: World) -> None:
    member, request_id = await world.member(), new_id()
    world.behind.refuse[f"Reserve {member.account_id}"] = errors.ResourceExhausted(
        "CREDIT_CAP_REACHED", "wait until tomorrow", left=3
    )
    request = gateway_world.wanted(request_id)
    refused = await member.refused("CreateVideo", request)
    assert (refused.reason, refused.metadata["left"]) == ("CREDIT_CAP_REACHED", "3")
    del world.behind.refuse[f"Reserve {member.account_id}"]
    assert (await member.call("CreateVideo", request)).video_id


async def test_every_input_is_pinned_or_none_is(world: World) -> None:
    """Before anything is held; one that is not there lets go of the others."""
    member = await world.member()
    one, other = ids.new_id(), ids.new_id()
    spec = vocabulary_pb2.VideoSpec(
        prompt="a cat",
        model="sora-1",
        inputs=[
            vocabulary_pb2.VideoInput(image_id=one),
            vocabulary_pb2.VideoInput(image_id=other, frame_index=23),
        ],
    )
    asked = video_pb2.CreateVideoRequest(request_id=new_id(), spec=spec)
    video = await member.call("CreateVideo", asked)
    assert [each.image_id for each in video.spec.inputs] == [one, other]
    assert (world.behind.calls["Pin", one], world.behind.calls["Pin", other]) == (1, 1)
    world.behind.refuse[f"Pin {other}"] = errors.NotFound("ASSET_NOT_FOUND", "not there")
    asked.request_id = new_id()
    assert (await member.refused("CreateVideo", asked)).reason == "ASSET_NOT_FOUND"
    refused_id = await world.pool.fetchval(
        "SELECT video_id FROM videos WHERE account_id = $1 AND state = 'REJECTED'",
        member.account_id,
    )

    async def unpinned() -> bool:
        return world.behind.calls["Unpin", refused_id] >= 1

    await eventually(unpinned)
    assert world.behind.calls["Reserve", member.account_id] == 1
