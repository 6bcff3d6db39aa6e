"""Webhooks as accounts and receivers meet them: two real gateways, Postgres, NATS, and receivers on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats as nats_client
import pytest
import pytest_asyncio

from framewire import errors, subjects
from framewire.events.v1 import event_pb2
from framewire.gateway.v1 import webhook_pb2
from tests import gateway_world, picture_server, webhook_receiver
from tests.gateway_world import Caller, World, new_id
from tests.waiting import eventually
from tests.webhook_receiver import Receiver, came, signed

PENDING = webhook_pb2.DELIVERY_STATE_PENDING
DELIVERED = webhook_pb2.DELIVERY_STATE_DELIVERED
FAILED = webhook_pb2.DELIVERY_STATE_FAILED
FAILED_KIND, SETTLED_KIND = event_pb2.EVENT_KIND_FAILED, event_pb2.EVENT_KIND_SETTLED
NO_ONE_S = "z" * 26


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("webhooks")
    settings = {
        "GATEWAY_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "GATEWAY_WEBHOOK_CA_FILE": str(picture_server.certificate(folder)),
        "GATEWAY_WEBHOOK_TIMEOUT_SECONDS": "1",
        "GATEWAY_WEBHOOK_POLL_SECONDS": "0.1",
        "GATEWAY_WEBHOOK_RETRY_SECONDS": "0.1",
        "GATEWAY_WEBHOOK_DISABLE_SECONDS": "0.3",
        "FRAMEWIRE_FAILPOINTS": str(folder / "failpoints"),
    }
    async with gateway_world.running(folder, settings, replicas=2) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def receiver() -> AsyncIterator[Receiver]:
    async with webhook_receiver.running() as running:
        yield running


async def endpoint(caller: Caller, url: str, *kinds: Any, request_id: str = "") -> Any:
    request = webhook_pb2.CreateEndpointRequest(
        request_id=request_id or new_id(), url=url, kinds=kinds
    )
    return await caller.call("CreateEndpoint", request)


async def deliveries(caller: Caller, made: Any, state: Any = 0) -> list[Any]:
    asked = webhook_pb2.ListDeliveriesRequest(
        endpoint_id=made.endpoint.endpoint_id, state=state, page_size=200
    )
    return list((await caller.call("ListDeliveries", asked)).deliveries)


async def failed_video(world: World, caller: Caller) -> Any:
    """A video that ends."""
    video = await caller.create()
    await world.tell(video, "failed", 1, message="it broke")
    return video


async def test_an_event_is_posted_once_signed_and_as_it_is_on_the_bus(
    world: World, receiver: Receiver
) -> None:
    member = await world.member()
    made = await endpoint(member, f"{receiver.url}/once?x=1")
    video = await failed_video(world, member)
    (post,) = await came(receiver, "/once?x=1")
    assert made.secret.startswith("whsec_")
    assert signed(post, made.secret)
    assert not signed(post, "whsec_" + base64.b64encode(b"x" * 32).decode())
    assert post.event_id == f"{video.video_id}:1" == post.headers["ce-id"]
    told = json.loads(post.body)
    assert (told["videoId"], told["seq"], told["kind"]) == (
        video.video_id,
        "1",
        "EVENT_KIND_FAILED",
    )
    assert post.body == await _on_the_bus(world, post.event_id)

    async def settled() -> Any:
        return await deliveries(member, made, DELIVERED)

    (delivery,) = await eventually(settled)
    assert (delivery.event_id, delivery.video_id) == (post.event_id, video.video_id)
    assert (delivery.attempts, delivery.kind) == (1, FAILED_KIND)
    assert [(each.status, each.error) for each in delivery.tries] == [(204, "")]


async def _on_the_bus(world: World, event_id: str) -> bytes:
    client = await nats_client.connect(world.bus.url)
    try:
        jetstream = client.jetstream()
        info = (await jetstream.stream_info(subjects.EVENTS_STREAM)).state
        for sequence in range(max(1, info.first_seq), info.last_seq + 1):
            message = await jetstream.get_msg(subjects.EVENTS_STREAM, sequence)
            if (message.headers or {}).get("ce-id") == event_id:
                return message.data or b""
    finally:
        await client.close()
    raise AssertionError(f"{event_id} is not on the bus")


async def test_two_replicas_deliver_each_event_once(world: World, receiver: Receiver) -> None:
    member = await world.member()
    made = await endpoint(member, f"{receiver.url}/shared", FAILED_KIND)
    videos = [await failed_video(world, member) for _ in range(30)]

    async def done() -> Any:
        return len(await deliveries(member, made, DELIVERED)) == 30

    await eventually(done)
    ids = sorted(post.event_id for post in receiver.posts["/shared"])
    assert ids == sorted(f"{video.video_id}:1" for video in videos)


async def test_a_filter_takes_its_kinds_only(world: World, receiver: Receiver) -> None:
    member = await world.member()
    made = await endpoint(member, f"{receiver.url}/settled", SETTLED_KIND)
    video = await failed_video(world, member)
    await world.tell(video, "settled", 0, released_credits=10)
    (post,) = await came(receiver, "/settled")
    assert json.loads(post.body)["kind"] == "EVENT_KIND_SETTLED"
    assert [one.kind for one in await deliveries(member, made)] == [SETTLED_KIND]


async def test_failures_are_tried_again_and_logged(world: World, receiver: Receiver) -> None:
    receiver.answers["/retry"] = [
        "500 Oops",
        "302 Found\nlocation: /elsewhere",
        "503 Busy\ndate: Fri, 27 Nov 2026 10:00:00 GMT\nretry-after: Fri, 27 Nov 2026 10:00:02 GMT",
    ]
    member = await world.member()
    made = await endpoint(member, f"{receiver.url}/retry")
    await failed_video(world, member)
    posts = await came(receiver, "/retry", 4)
    assert len({post.event_id for post in posts}) == 1
    assert not receiver.posts["/elsewhere"]

    async def settled() -> Any:
        return await deliveries(member, made, DELIVERED)

    (delivery,) = await eventually(settled)
    tries = [(each.status, each.error) for each in delivery.tries]
    assert tries == [
        (500, "it answered 500"),
        (302, "it answered 302; redirects are not followed"),
        (503, "it answered 503"),
        (204, ""),
    ]
    busy, last = delivery.tries[2:]
    assert last.at.ToMilliseconds() - busy.at.ToMilliseconds() >= 2000
    found = await _get(member, made)
    assert (found.enabled, found.HasField("failing_since")) == (True, False)


async def _get(caller: Caller, made: Any) -> Any:
    asked = webhook_pb2.GetEndpointRequest(endpoint_id=made.endpoint.endpoint_id)
    return await caller.call("GetEndpoint", asked)


async def test_what_is_tried_for_too_long_is_given_up(world: World, receiver: Receiver) -> None:
    receiver.always["/never"] = "500 Oops"
    member = await world.member()
    made = await endpoint(member, f"{receiver.url}/never")
    await failed_video(world, member)
    await came(receiver, "/never")
    await world.pool.execute(
        "UPDATE webhook_deliveries SET give_up_at = clock_timestamp() WHERE endpoint_id = $1",
        made.endpoint.endpoint_id,
    )

    async def given_up() -> Any:
        return await deliveries(member, made, FAILED)

    (delivery,) = await eventually(given_up)
    assert delivery.tries[-1].status == 500
    assert not delivery.HasField("next_attempt_at")


async def test_a_slow_endpoint_delays_no_other(world: World, receiver: Receiver) -> None:
    receiver.stuck.add("/slow")
    member = await world.member()
    slow = await endpoint(member, f"{receiver.url}/slow", SETTLED_KIND)
    videos = [await member.create() for _ in range(12)]
    for video in videos:
        await world.tell(video, "settled", 0)
    await came(receiver, "/slow")
    await endpoint(member, f"{receiver.url}/fast", FAILED_KIND)
    await world.tell(videos[0], "failed", 1)
    await came(receiver, "/fast")
    assert len(receiver.posts["/slow"]) < 12  # it has not got them all, and the other has its one

    async def logged() -> Any:
        return [one for one in await deliveries(member, slow) if one.tries]

    first = (await eventually(logged))[0].tries[0]
    assert (first.status, first.error) == (0, "no answer within 1 s")


async def test_a_result_that_comes_too_late_does_not_count(
    world: World, receiver: Receiver
) -> None:
    receiver.stuck.add("/late")
    member = await world.member()
    made = await endpoint(member, f"{receiver.url}/late", FAILED_KIND)
    overtaken = await failed_video(world, member)
    await came(receiver, "/late")
    await world.pool.execute(  # as if its lease had ended, and another had taken it
        """
        UPDATE webhook_deliveries SET epoch = epoch + 1, leased_until = NULL,
            next_attempt_at = clock_timestamp() + interval '1 hour' WHERE endpoint_id = $1
        """,
        made.endpoint.endpoint_id,
    )
    later = await failed_video(world, member)  # its try begins later, and so ends later

    async def logged() -> Any:
        found = {one.video_id: one for one in await deliveries(member, made)}
        return found if later.video_id in found and found[later.video_id].tries else None

    found = await eventually(logged)
    assert list(found[overtaken.video_id].tries) == []


async def test_gone_disables_at_once_and_is_told(world: World, receiver: Receiver) -> None:
    receiver.answers["/gone"] = ["410 Gone"]
    member = await world.member()
    gone = await endpoint(member, f"{receiver.url}/gone", FAILED_KIND)
    await endpoint(member, f"{receiver.url}/other", event_pb2.EVENT_KIND_WEBHOOK_DISABLED)
    await failed_video(world, member)
    (told,) = await came(receiver, "/other")
    event = json.loads(told.body)
    assert event["webhookDisabled"] == {"endpointId": gone.endpoint.endpoint_id, "why": "GONE"}
    found = await _get(member, gone)
    assert (found.enabled, found.disabled_why) == (False, "GONE")
    for name, request in (
        ("SendTest", webhook_pb2.SendTestRequest(request_id=new_id())),
        ("Replay", webhook_pb2.ReplayRequest()),
    ):
        request.endpoint_id = gone.endpoint.endpoint_id
        if name == "Replay":
            getattr(request, "from").GetCurrentTime()
        assert (await member.refused(name, request)).reason == "WEBHOOK_DISABLED"


async def test_nothing_but_failures_disables_and_what_was_missed_is_replayed(
    world: World, receiver: Receiver
) -> None:
    receiver.always["/broken"] = "500 Oops"
    member = await world.member()
    made = await endpoint(member, f"{receiver.url}/broken", FAILED_KIND)
    videos = [await failed_video(world, member) for _ in range(6)]

    async def disabled() -> Any:
        return (await _get(member, made)).disabled_why == "FAILING"

    await eventually(disabled)
    videos.append(await failed_video(world, member))

    async def recorded() -> Any:
        return await world.pool.fetchval(
            "SELECT EXISTS (SELECT FROM webhook_events WHERE video_id = $1)", videos[-1].video_id
        )

    await eventually(recorded)
    assert videos[-1].video_id not in {one.video_id for one in await deliveries(member, made)}
    receiver.always["/broken"] = "200 OK"
    change = webhook_pb2.UpdateEndpointRequest(
        endpoint_id=made.endpoint.endpoint_id, enabled=True, description="mended"
    )
    changed = await member.call("UpdateEndpoint", change)
    assert (changed.enabled, changed.description, changed.disabled_why) == (True, "mended", "")
    assert list(changed.kinds) == [FAILED_KIND]
    replay = webhook_pb2.ReplayRequest(endpoint_id=made.endpoint.endpoint_id)
    getattr(replay, "from").CopyFrom(made.endpoint.created_at)
    assert (await member.call("Replay", replay)).events == 7

    async def all_of_them() -> Any:
        found = await deliveries(member, made, DELIVERED)
        return {one.video_id for one in found} == {video.video_id for video in videos}

    await eventually(all_of_them)
    before = len(receiver.posts["/broken"])
    assert (await member.call("Replay", replay)).events == 7  # also what was delivered
    await came(receiver, "/broken", before + 7)


async def test_during_a_rotation_both_secrets_sign(world: World, receiver: Receiver) -> None:
    member = await world.member()
    request_id = new_id()
    made = await endpoint(member, f"{receiver.url}/rotated", request_id=request_id)
    rotation = webhook_pb2.RotateSecretRequest(
        request_id=new_id(), endpoint_id=made.endpoint.endpoint_id, grace_seconds=3600
    )
    rotated = await member.call("RotateSecret", rotation)
    assert rotated.secret != made.secret
    assert (await member.call("RotateSecret", rotation)).secret == rotated.secret
    again = await endpoint(member, f"{receiver.url}/rotated", request_id=request_id)
    assert (again.endpoint.endpoint_id, again.secret) == (made.endpoint.endpoint_id, "")
    await failed_video(world, member)
    (post,) = await came(receiver, "/rotated")
    assert signed(post, made.secret)
    assert signed(post, rotated.secret)
    rotation.request_id, rotation.grace_seconds = new_id(), 0
    last = await member.call("RotateSecret", rotation)
    await failed_video(world, member)
    post = (await came(receiver, "/rotated", 2))[1]
    assert [signed(post, each.secret) for each in (made, rotated, last)] == [False, False, True]
    rotation.grace_seconds = 1
    assert (await member.refused("RotateSecret", rotation)).reason == "REQUEST_ID_REUSED"


async def test_a_test_and_a_delivery_again(world: World, receiver: Receiver) -> None:
    member = await world.member()
    made = await endpoint(member, f"{receiver.url}/tested", FAILED_KIND)
    test = webhook_pb2.SendTestRequest(request_id=new_id(), endpoint_id=made.endpoint.endpoint_id)
    delivery = await member.call("SendTest", test)
    assert delivery.kind == event_pb2.EVENT_KIND_TEST
    (post,) = await came(receiver, "/tested")
    assert signed(post, made.secret)
    assert (await member.call("SendTest", test)).delivery_id == delivery.delivery_id
    again = webhook_pb2.RedeliverDeliveryRequest(delivery_id=delivery.delivery_id)
    assert (await member.call("RedeliverDelivery", again)).delivery_id == delivery.delivery_id
    posts = await came(receiver, "/tested", 2)
    assert {each.event_id for each in posts} == {delivery.event_id}


async def test_by_tls_too(world: World, tmp_path: Path) -> None:
    member = await world.member()
    known = world.services[0].child.env["GATEWAY_WEBHOOK_CA_FILE"]
    async with (
        webhook_receiver.running(Path(known)) as trusted,
        webhook_receiver.running(picture_server.certificate(tmp_path)) as stranger,
    ):
        made = await endpoint(member, f"{trusted.url}/in")
        strange = await endpoint(member, f"{stranger.url}/in")
        await failed_video(world, member)
        assert signed((await came(trusted, "/in"))[0], made.secret)

        async def logged() -> Any:
            return [one for one in await deliveries(member, strange) if one.tries]

        assert "TLS" in (await eventually(logged))[0].tries[0].error
        assert not stranger.posts["/in"]


@pytest.mark.parametrize(
    ("point", "least"),
    [("gateway.webhook.before_settle", 2), ("gateway.webhook.after_record", 1)],
)
async def test_a_killed_gateway_loses_no_delivery(
    world: World, receiver: Receiver, point: str, least: int
) -> None:
    await _nothing_else_to_send(world)
    member = await world.member()
    path = f"/{point}"
    made = await endpoint(member, f"{receiver.url}{path}", FAILED_KIND)
    armed = Path(world.services[0].child.env["FRAMEWIRE_FAILPOINTS"])
    armed.write_text(f"{point}=kill\n")
    video = await failed_video(world, member)
    posts = await came(receiver, path, least)
    assert {post.event_id for post in posts} == {f"{video.video_id}:1"}
    await eventually(lambda: not armed.read_text())
    for gateway in world.services:
        if not gateway.running:
            await gateway.start()

    async def settled() -> Any:
        try:
            return [one.attempts for one in await deliveries(member, made, DELIVERED)]
        except errors.Unavailable as error:  # the channel has not noticed yet that it is back
            raise AssertionError from error

    assert await eventually(settled) == [least]


async def _nothing_else_to_send(world: World) -> None:
    """The next crash is to be this test's."""
    await world.pool.execute("UPDATE webhook_endpoints SET deleted_at = clock_timestamp()")
    leased = "SELECT count(*) FROM webhook_deliveries WHERE leased_until > clock_timestamp()"

    async def quiet() -> bool:
        return await world.pool.fetchval(leased) == 0

    await eventually(quiet)


async def test_another_accounts_endpoint_is_not_found(world: World, receiver: Receiver) -> None:
    owner, other = await world.member(), await world.member()
    made = await endpoint(owner, f"{receiver.url}/mine")
    test = webhook_pb2.SendTestRequest(request_id=new_id(), endpoint_id=made.endpoint.endpoint_id)
    delivery = await owner.call("SendTest", test)
    replay = webhook_pb2.ReplayRequest()
    getattr(replay, "from").GetCurrentTime()
    for name, request in (
        ("GetEndpoint", webhook_pb2.GetEndpointRequest()),
        ("UpdateEndpoint", webhook_pb2.UpdateEndpointRequest(enabled=False)),
        ("DeleteEndpoint", webhook_pb2.DeleteEndpointRequest()),
        ("RotateSecret", webhook_pb2.RotateSecretRequest(request_id=new_id())),
        ("ListDeliveries", webhook_pb2.ListDeliveriesRequest()),
        ("Replay", replay),
        ("SendTest", webhook_pb2.SendTestRequest(request_id=new_id())),
    ):
        for which in (made.endpoint.endpoint_id, NO_ONE_S):
            request.endpoint_id = which
            assert (await other.refused(name, request)).reason == "WEBHOOK_NOT_FOUND", name
    for which in (delivery.delivery_id, NO_ONE_S):
        again = webhook_pb2.RedeliverDeliveryRequest(delivery_id=which)
        assert (await other.refused("RedeliverDelivery", again)).reason == "WEBHOOK_NOT_FOUND"
    listed = await other.call("ListEndpoints", webhook_pb2.ListEndpointsRequest())
    assert list(listed.endpoints) == []
    assert (await _get(owner, made)).enabled


@pytest.mark.parametrize(
    "url",
    [
        "https://10.0.0.1/in",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/in",
        "https://[::ffff:10.0.0.1]/in",
        "https://0xa.1/in",
        "https://167772161/in",
        "https://93.184.216.34:8443/in",
        "http://93.184.216.34/in",
        "ftp://127.0.0.1/in",
        "https://me:secret@127.0.0.1/in",
        "https://127.0.0.1/a b",
        "nonsense",
    ],
)
async def test_urls_that_lead_inside_are_refused(world: World, url: str) -> None:
    member = await world.member()
    request = webhook_pb2.CreateEndpointRequest(request_id=new_id(), url=url)
    assert (await member.refused("CreateEndpoint", request)).reason == "URL_NOT_ALLOWED"
    made = await endpoint(member, "http://127.0.0.1:9/in")
    change = webhook_pb2.UpdateEndpointRequest(endpoint_id=made.endpoint.endpoint_id, url=url)
    assert (await member.refused("UpdateEndpoint", change)).reason == "URL_NOT_ALLOWED"


async def test_a_name_that_comes_to_lead_inside_is_not_called(world: World) -> None:
    member = await world.member()
    made = await endpoint(member, "http://127.0.0.1:9/in")
    await world.pool.execute(
        "UPDATE webhook_endpoints SET url = 'https://10.0.0.1/in' WHERE endpoint_id = $1",
        made.endpoint.endpoint_id,
    )
    await failed_video(world, member)

    async def logged() -> Any:
        return [one for one in await deliveries(member, made) if one.tries]

    (delivery,) = await eventually(logged)
    assert delivery.tries[0].status == 0
    assert "is not public" in delivery.tries[0].error
    assert "10.0.0.1" not in delivery.tries[0].error


async def test_deletion_bounds_and_pages(world: World, receiver: Receiver) -> None:
    member = await world.member()
    silent = await failed_video(world, member)  # of an account without endpoints: nothing is kept
    made = [await endpoint(member, f"{receiver.url}/many{number}") for number in range(10)]
    request = webhook_pb2.CreateEndpointRequest(request_id=new_id(), url=receiver.url)
    assert (await member.refused("CreateEndpoint", request)).reason == "TOO_MANY_WEBHOOKS"
    gone = webhook_pb2.DeleteEndpointRequest(endpoint_id=made[9].endpoint.endpoint_id)
    await member.call("DeleteEndpoint", gone)
    await member.call("DeleteEndpoint", gone)
    await member.call("CreateEndpoint", request)
    tests = [
        webhook_pb2.SendTestRequest(request_id=new_id(), endpoint_id=made[0].endpoint.endpoint_id)
        for _ in range(3)
    ]
    sent = await asyncio.gather(*(member.call("SendTest", each) for each in tests))
    asked = webhook_pb2.ListDeliveriesRequest(endpoint_id=made[0].endpoint.endpoint_id, page_size=2)
    first = await member.call("ListDeliveries", asked)
    asked.page_token = first.next_page_token
    second = await member.call("ListDeliveries", asked)
    found = [one.delivery_id for page in (first, second) for one in page.deliveries]
    assert sorted(found) == sorted(one.delivery_id for one in sent)
    assert second.next_page_token == ""
    kept = "SELECT count(*) FROM webhook_events WHERE video_id = $1"
    assert await world.pool.fetchval(kept, silent.video_id) == 0
