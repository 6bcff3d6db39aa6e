"""Who calls and how much they may: keys and tokens at two replicas, members, and every limit."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf import timestamp_pb2

from framewire import errors as public_errors
from framewire.gateway.v1 import account_pb2, operator_pb2, upload_pb2, video_pb2
from tests import gateway_world
from tests.gateway_world import Caller, World, new_id, wanted
from tests.issuer import AUDIENCE, Issuer, tampered
from tests.waiting import eventually


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def issuer() -> AsyncIterator[Issuer]:
    made = Issuer()
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Two replicas on one database; each test makes accounts of its own."""
    settings = {"GATEWAY_OIDC_ISSUERS": json.dumps([issuer.configured()])}
    data_dir = tmp_path_factory.mktemp("access")
    async with gateway_world.running(data_dir, settings, replicas=2) as running:
        yield running


def everywhere(world: World, secret: str, account_id: str = "") -> list[Caller]:
    return [Caller(channel, secret, account_id) for channel in world.channels]


async def new_key(member: Caller, **fields: Any) -> Any:
    request = account_pb2.CreateApiKeyRequest(request_id=new_id(), **fields)
    return await member.call("CreateApiKey", request)


async def works(caller: Caller) -> bool:
    request = account_pb2.GetBalanceRequest(account_id=caller.account_id)
    try:
        await caller.call("GetBalance", request)
    except public_errors.FramewireError as error:
        if error.reason != "CREDENTIALS_INVALID":
            raise
        return False
    return True


async def refused_everywhere(callers: list[Caller]) -> bool:
    return not any([await works(caller) for caller in callers])


async def test_a_revoked_key_is_refused_by_every_replica_within_five_seconds(world: World) -> None:
    member = await world.member()
    made = await new_key(member)
    callers = everywhere(world, made.secret)
    assert [await works(caller) for caller in callers] == [True, True]
    await member.call("RevokeApiKey", account_pb2.RevokeApiKeyRequest(key_id=made.key.key_id))
    await eventually(lambda: refused_everywhere(callers), within_seconds=5)


async def test_a_key_ends_by_itself(world: World) -> None:
    member = await world.member()
    past = timestamp_pb2.Timestamp(seconds=int(time.time()) - 1)
    late = account_pb2.CreateApiKeyRequest(request_id=new_id(), expires_at=past)
    assert (await member.refused("CreateApiKey", late)).reason == "INVALID_FIELD"
    soon = timestamp_pb2.Timestamp(seconds=int(time.time()) + 3600)
    made = await new_key(member, expires_at=soon)
    assert made.key.expires_at == soon
    callers = everywhere(world, made.secret)
    assert await works(callers[0])
    await world.pool.execute(
        "UPDATE api_keys SET expires_at = clock_timestamp() WHERE key_id = $1", made.key.key_id
    )
    await eventually(lambda: refused_everywhere(callers), within_seconds=5)


async def test_rotation_leaves_limits_and_a_grace(world: World) -> None:
    member = await world.member()
    old = await new_key(member, display_name="ci")
    limits = account_pb2.Limits(max_in_flight=3)
    setting = operator_pb2.SetLimitsRequest(
        account_id=member.account_id, key_id=old.key.key_id, limits=limits
    )
    assert await world.operator.call("SetLimits", setting) == limits
    rotation = account_pb2.RotateApiKeyRequest(
        request_id=new_id(), key_id=old.key.key_id, grace_seconds=3600
    )
    stranger = await world.member()
    assert (await stranger.refused("RotateApiKey", rotation)).reason == "KEY_NOT_FOUND"
    new = await member.call("RotateApiKey", rotation)
    assert (new.key.display_name, new.key.account_id) == ("ci", member.account_id)
    assert (await member.call("RotateApiKey", rotation)).secret == ""
    listed = await member.call("ListApiKeys", account_pb2.ListApiKeysRequest())
    keys = {key.key_id: key for key in listed.keys}
    assert keys[new.key.key_id].limits == limits
    assert keys[old.key.key_id].HasField("expires_at")
    assert await works(everywhere(world, old.secret)[0])
    at_once = account_pb2.RotateApiKeyRequest(request_id=new_id(), key_id=old.key.key_id)
    newest = await member.call("RotateApiKey", at_once)
    await eventually(lambda: refused_everywhere(everywhere(world, old.secret)), within_seconds=5)
    assert await works(everywhere(world, new.secret)[1])
    replayed = await member.call("RotateApiKey", at_once)
    assert (replayed.key.key_id, replayed.secret) == (newest.key.key_id, ""), "though it has ended"
    assert (await stranger.refused("RotateApiKey", at_once)).reason == "KEY_NOT_FOUND"
    again = account_pb2.RotateApiKeyRequest(request_id=new_id(), key_id=old.key.key_id)
    assert (await member.refused("RotateApiKey", again)).reason == "KEY_NOT_FOUND"


async def test_a_key_that_rotates_itself_can_ask_again(world: World) -> None:
    member = await world.member()
    old = await new_key(member)
    mine = everywhere(world, old.secret)
    request = account_pb2.RotateApiKeyRequest(request_id=new_id(), key_id=old.key.key_id)
    new = await mine[0].call("RotateApiKey", request)
    listed = await member.call("ListApiKeys", account_pb2.ListApiKeysRequest())
    ends = {key.key_id: key.expires_at.ToDatetime(UTC) for key in listed.keys}[old.key.key_id]
    assert timedelta(minutes=4) < ends - datetime.now(UTC) <= timedelta(minutes=5)
    again = await mine[1].call("RotateApiKey", request)
    assert (again.key.key_id, again.secret) == (new.key.key_id, "")
    # The first answer was lost: the key that it made is rotated in its turn, and is of no use to whoever found it.
    lost = account_pb2.RotateApiKeyRequest(request_id=new_id(), key_id=new.key.key_id)
    newest = await mine[1].call("RotateApiKey", lost)
    assert await works(everywhere(world, newest.secret)[0])
    await eventually(lambda: refused_everywhere(everywhere(world, new.secret)), within_seconds=5)


async def add(world: World, issuer: Issuer, account_id: str = "", **fields: Any) -> Any:
    request = operator_pb2.AddMemberRequest(issuer=issuer.url, account_id=account_id, **fields)
    return await world.operator.call("AddMember", request)


async def test_a_token_stands_for_its_members_accounts(world: World, issuer: Issuer) -> None:
    first, second = await world.member(), await world.member()
    caller = Caller(world.channel, issuer.token("ann"))
    ask = account_pb2.GetBalanceRequest()
    assert (await caller.refused("GetBalance", ask)).reason == "NOT_A_MEMBER"
    added = await add(world, issuer, first.account_id, subject="ann")
    assert added == await add(world, issuer, first.account_id, subject="ann")
    video = await caller.create()
    assert video.account_id == first.account_id
    await add(world, issuer, second.account_id, subject="ann")
    both = Caller(world.channel, issuer.token("ann", nonce="2"))
    assert (await both.refused("CreateVideo", wanted())).reason == "ACCOUNT_REQUIRED"
    assert (await both.create(account_id=second.account_id)).account_id == second.account_id
    assert (await both.video(video.video_id)).video_id == video.video_id
    other = wanted(account_id=(await world.member()).account_id)
    assert (await both.refused("CreateVideo", other)).reason == "ACCOUNT_NOT_FOUND"
    for account in (first, second):
        removal = operator_pb2.RemoveMemberRequest(
            principal_id=added.principal_id, account_id=account.account_id
        )
        assert (await world.operator.call("RemoveMember", removal)).removed == 1
        assert (await world.operator.call("RemoveMember", removal)).removed == 0

    async def out() -> bool:
        return (await both.refused("GetBalance", ask)).reason == "NOT_A_MEMBER"

    await eventually(out, within_seconds=5)


async def test_an_email_address_is_bound_to_the_first_subject(world: World, issuer: Issuer) -> None:
    member = await world.member()
    await add(world, issuer, member.account_id, email="Bob@Example.com")
    unverified = Caller(
        world.channel, issuer.token("x", email="bob@example.com", email_verified=False)
    )
    ask = account_pb2.GetBalanceRequest()
    assert (await unverified.refused("GetBalance", ask)).reason == "NOT_A_MEMBER"
    assert await works(Caller(world.channel, issuer.token("bob")))
    taken = Caller(world.channel, issuer.token("y", email="bob@example.com"))
    assert (await taken.refused("GetBalance", ask)).reason == "NOT_A_MEMBER"
    listing = operator_pb2.ListMembersRequest(account_id=member.account_id)
    (listed,) = (await world.operator.call("ListMembers", listing)).members
    assert (listed.subject, listed.email) == ("bob", "bob@example.com")


async def test_roles_without_an_account(world: World, issuer: Issuer) -> None:
    role = account_pb2.ROLE_SERVICE
    added = await add(world, issuer, subject="robot", role=role)
    member = await world.member()
    caller = Caller(world.channel, issuer.token("robot"))
    assert (await caller.create(account_id=member.account_id)).account_id == member.account_id
    differs = operator_pb2.AddMemberRequest(
        issuer=issuer.url, subject="robot", account_id=member.account_id
    )
    assert (await world.operator.refused("AddMember", differs)).reason == "MEMBER_ROLE_DIFFERS"
    found = await world.operator.call("ListMembers", operator_pb2.ListMembersRequest())
    assert added in found.members
    for bad in (
        {"issuer": "https://nobody", "subject": "a", "account_id": member.account_id},
        {"issuer": issuer.url, "subject": "a"},
        {"issuer": issuer.url, "account_id": member.account_id},
    ):
        request = operator_pb2.AddMemberRequest(**bad)
        assert (await world.operator.refused("AddMember", request)).reason == "INVALID_FIELD"
    removal = operator_pb2.RemoveMemberRequest(principal_id=added.principal_id)
    assert (await world.operator.call("RemoveMember", removal)).removed == 1


async def test_tokens_that_are_not_taken(world: World, issuer: Issuer) -> None:
    await add(world, issuer, (await world.member()).account_id, subject="eve")
    good = issuer.token("eve")
    now = int(time.time())
    assert await works(Caller(world.channel, good))
    bad = {
        "tampered": tampered(good, sub="root"),
        "signature cut": good[:-8],
        "alg none": issuer.unsigned("eve"),
        "HS256 by the public key": issuer.by_public_key("eve"),
        "expired": issuer.token("eve", exp=now - 60),
        "not yet": issuer.token("eve", nbf=now + 600),
        "another audience": issuer.token("eve", aud="stranger"),
        "another issuer": issuer.token("eve", iss="https://stranger"),
        "no subject": issuer.token("eve", sub=None),
        "no end": issuer.token("eve", exp=None),
        "another domain": issuer.token("eve", hd="stranger.com"),
        "no domain": issuer.token("eve", hd=None),
        "unknown key": issuer.token("eve", kid="unknown"),
        "no token": "a.b.c",
        "too long": issuer.token("eve", filler="x" * 4800),
    }
    taken = [name for name, token in bad.items() if await works(Caller(world.channel, token))]
    assert taken == []
    skewed = issuer.token("eve", exp=now - 20, iat=now + 20)
    aliased = issuer.token("eve", iss="alias.example.com", aud=[AUDIENCE, "more"])
    for token in (skewed, aliased):
        assert await works(Caller(world.channel, token))


async def test_the_issuers_keys_rotate_and_may_be_out_of_reach(
    world: World, issuer: Issuer
) -> None:
    await add(world, issuer, (await world.member()).account_id, subject="zoe")
    assert await works(Caller(world.channel, issuer.token("zoe", nonce="0")))
    before = issuer.token("zoe", nonce="before")
    for answer in (b"no json", b'{"keys": []}', b"x" * 1_000_000):
        issuer.answer, seen = answer, issuer.fetched

        async def good_although() -> bool:
            token = issuer.token("zoe", nonce=str(time.monotonic()))
            assert await works(Caller(world.channel, token)), "the last good keys are kept"
            return issuer.fetched > seen  # noqa: B023 - looked at in its own turn

        await eventually(good_although, within_seconds=20, every_seconds=0.2)
    issuer.answer = None
    issuer.rotate("second")

    async def new_one_taken() -> bool:
        return await works(Caller(world.channel, issuer.token("zoe", nonce="after")))

    await eventually(new_one_taken, within_seconds=10, every_seconds=0.1)
    assert not await works(Caller(world.channel, before))


async def test_requests_per_minute_are_exact_over_replicas(world: World) -> None:
    member = await world.member(requests_per_minute=60)
    key = await new_key(member)
    callers = everywhere(world, key.secret)
    request, answered = account_pb2.GetBalanceRequest(), 0
    refused: list[public_errors.FramewireError] = []
    started = time.monotonic()
    while len(refused) < 2:
        for caller in callers:
            try:
                await caller.call("GetBalance", request)
                answered += 1
            except public_errors.FramewireError as error:
                refused.append(error)
    # 59 are left after the key was made; more only as time goes by, one a second.
    assert 57 <= answered <= 60 + time.monotonic() - started
    error = refused[0]
    assert (error.reason, error.code.name) == ("RATE_LIMITED", "RESOURCE_EXHAUSTED")
    assert 0 < (error.retry_after_seconds or 0) <= 1.1
    assert error.metadata == {
        "limit": "requests_per_minute",
        "whose": "account",
        "allowed": "60",
        "left": "0",
    }


async def test_replays_cost_nothing(world: World) -> None:
    member, request_id = await world.member(requests_per_minute=60, videos_per_hour=1), new_id()
    video = await member.create(request_id)
    refused = await member.refused("CreateVideo", wanted())
    assert (refused.reason, refused.metadata["limit"]) == ("RATE_LIMITED", "videos_per_hour")
    assert 0 < (refused.retry_after_seconds or 0) <= 3600
    while True:
        try:
            await member.video(video.video_id)
        except public_errors.FramewireError as error:
            if error.reason != "RATE_LIMITED":
                raise
            break
    again = await asyncio.gather(*(member.create(request_id) for _ in range(10)))
    assert {each.video_id for each in again} == {video.video_id}


async def test_a_refused_video_is_not_counted(world: World) -> None:
    member = await world.member(videos_per_hour=2)
    gateway_world_errors = gateway_world.errors.FailedPrecondition("INSUFFICIENT_CREDITS", "no")
    world.behind.refuse[f"Reserve {member.account_id}"] = gateway_world_errors
    for _ in range(3):
        assert (await member.refused("CreateVideo", wanted())).reason == "INSUFFICIENT_CREDITS"
    del world.behind.refuse[f"Reserve {member.account_id}"]
    for _ in range(2):
        await member.create()
    assert (await member.refused("CreateVideo", wanted())).reason == "RATE_LIMITED"


async def set_limits(world: World, account_id: str, key_id: str = "", **limits: int) -> Any:
    request = operator_pb2.SetLimitsRequest(
        account_id=account_id, key_id=key_id, limits=account_pb2.Limits(**limits)
    )
    return await world.operator.call("SetLimits", request)


async def test_a_key_has_limits_of_its_own(world: World) -> None:
    member = await world.member()
    key = await new_key(member)
    caller = Caller(world.channel, key.secret)
    set_to = await set_limits(
        world, member.account_id, key.key.key_id, max_in_flight=1, videos_per_hour=2
    )
    assert (set_to.max_in_flight, set_to.HasField("requests_per_minute")) == (1, False)
    first = await caller.create()
    refused = await caller.refused("CreateVideo", wanted())
    assert (refused.reason, refused.metadata["whose"]) == ("TOO_MANY_IN_FLIGHT", "key")
    await member.create()
    await member.call("CancelVideo", video_pb2.CancelVideoRequest(video_id=first.video_id))
    await set_limits(world, member.account_id, key.key.key_id, max_in_flight=0)
    await caller.create()
    refused = await caller.refused("CreateVideo", wanted())
    assert (refused.reason, refused.metadata["whose"]) == ("RATE_LIMITED", "key")
    await set_limits(world, member.account_id, key.key.key_id, requests_per_minute=1)
    nobodys = operator_pb2.SetLimitsRequest(
        account_id=(await world.member()).account_id,
        key_id=key.key.key_id,
        limits=account_pb2.Limits(max_in_flight=1),
    )
    assert (await world.operator.refused("SetLimits", nobodys)).reason == "KEY_NOT_FOUND"
    nobodys.key_id, nobodys.account_id = "", "z" * 26
    assert (await world.operator.refused("SetLimits", nobodys)).reason == "ACCOUNT_NOT_FOUND"
    nobodys.limits.max_in_flight = 0
    assert (await world.operator.refused("SetLimits", nobodys)).reason == "INVALID_FIELD"


async def test_upload_bytes_per_day(world: World) -> None:
    member = await world.member()
    await set_limits(world, member.account_id, upload_bytes_per_day=100)

    async def upload(size: int, request_id: str, told: int = 0) -> Any:
        async def parts() -> AsyncIterator[Any]:
            header = upload_pb2.UploadImageHeader(request_id=request_id, size_bytes=told)
            yield upload_pb2.UploadImageRequest(header=header)
            yield upload_pb2.UploadImageRequest(chunk=b"x" * size)

        return await member.call("UploadImage", parts())

    first = new_id()
    await upload(100, first)
    await upload(100, first)
    with pytest.raises(public_errors.FramewireError) as told:
        await upload(1, new_id())
    assert (told.value.reason, told.value.metadata["limit"]) == (
        "RATE_LIMITED",
        "upload_bytes_per_day",
    )
    assert 0 < (told.value.retry_after_seconds or 0) <= 86400
    await set_limits(world, member.account_id, upload_bytes_per_day=150)
    with pytest.raises(public_errors.FramewireError) as told:
        await upload(60, new_id(), told=60)
    assert told.value.metadata["left"] == "50"
    await upload(40, new_id(), told=40)


@pytest.mark.parametrize(("limit", "hours"), [("hour", 0.5), ("day", 20)])
async def test_moderation_refusals(world: World, limit: str, hours: float) -> None:
    member = await world.member()
    name = f"moderation_refusals_per_{limit}"
    await set_limits(world, member.account_id, **{name: 2})
    for _ in range(2):
        video = await member.create()
        await world.tell(video, "failed", 1, cause=2)

        async def failed(video: Any = video) -> bool:
            return (await member.video(video.video_id)).failure.cause == 2

        await eventually(failed)
    await world.pool.execute(
        "UPDATE videos SET finished_at = finished_at - make_interval(secs => $2) WHERE account_id = $1",
        member.account_id,
        hours * 3600,
    )
    refused = await member.refused("CreateVideo", wanted())
    assert (refused.reason, refused.metadata["limit"]) == ("MODERATION_LIMIT", name)
    left = (1 if limit == "hour" else 24) - hours
    assert abs((refused.retry_after_seconds or 0) - left * 3600) < 60
    await set_limits(world, member.account_id, **{name: 3})
    await member.create()


async def test_lanes_and_weight(world: World) -> None:
    member = await world.member()
    vip = wanted(lane=1)
    assert (await member.refused("CreateVideo", vip)).reason == "LANE_NOT_ALLOWED"
    setting = operator_pb2.SetAccountRequest(
        account_id=member.account_id, lanes=[1], weight=700, why="pays more"
    )
    account = await world.operator.call("SetAccount", setting)
    assert (list(account.lanes), account.weight) == ([1], 700)
    video = await member.call("CreateVideo", vip)
    (job,) = await world.jobs(video.video_id)
    assert job.weight == 700
    setting.account_id = "z" * 26
    assert (await world.operator.refused("SetAccount", setting)).reason == "ACCOUNT_NOT_FOUND"
    audit = await world.pool.fetchrow(
        "SELECT why, outcome FROM audit WHERE method = 'SetAccount' AND account_id = $1",
        member.account_id,
    )
    assert audit is not None
    assert tuple(audit) == ("pays more", "OK")
