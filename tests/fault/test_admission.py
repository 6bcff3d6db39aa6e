"""Admission struck at each of its points, beside another gateway: a video is queued once or given up, never both.

The first gateway speaks to the ledger through a proxy and is the one that is struck; the second one takes over.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest
import pytest_asyncio

from framewire import client as clients
from framewire import errors, types
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import video_pb2
from services.local import process
from tests import gateway_world, invariants, observed, pictures
from tests import proxy as proxies
from tests import system as systems
from tests.fault import kills, orders
from tests.waiting import eventually

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(180)]

FIRST, SECOND = "gateway", "gateway-2"
POINTS = [point for point in kills.MATRIX["gateway"] if ".admit." in point]
COMMITTED = POINTS.index("gateway.admit.after_commit")
BEFORE, AFTER = POINTS[:COMMITTED], POINTS[COMMITTED:]
LONGER = {"gateway": {"GATEWAY_SWEEP_GRACE_SECONDS": "3"}}
"""So that a call that comes again takes an admission over before it is given up, on a slow machine, too."""
SLEEP_SECONDS = 1.5
"""Of an admission whose caller hangs up meanwhile: shorter than an admission may take."""
CREDITS = 100
_LEDGER = "/framewire.credits.v1.LedgerService/"


@dataclass(frozen=True, slots=True)
class Stand:
    """Two gateways, and the line of the first one to the ledger."""

    system: systems.System
    ledger_line: proxies.Proxy
    addresses: dict[str, str]
    channels: dict[str, grpc.aio.Channel]

    @asynccontextmanager
    async def customer(self) -> AsyncIterator[Customer]:
        """Of an account of its own. Whatever is still bad afterwards is made good, for the next one."""
        async with await self.system.account(CREDITS) as anywhere:
            key = await anywhere.create_api_key(display_name="both")
            image = await anywhere.upload_image(pictures.plain((10, 90, 170)))
        account_id, secret = anywhere.account_id, key.secret
        callers = [
            gateway_world.Caller(self.channels[name], secret, account_id)
            for name in (FIRST, SECOND)
        ]
        try:
            async with clients.Client(
                self.addresses[SECOND], secret, account_id=account_id
            ) as client:
                yield Customer(self.system, client, *callers, image.image_id)
        finally:
            for name in (FIRST, SECOND):
                self.system.supervisor.resume(name)
            self.system.disarm()
            await self.ledger_line.heal()

    async def stopped(
        self, customer: Customer, point: str
    ) -> tuple[asyncio.Task[video_pb2.Video | errors.FramewireError], str]:
        """The first gateway, stopped at this point of what the customer asks: that call, and the video's id."""
        self.system.arm(point, "stop")
        asking = customer.asks_first()
        await eventually(lambda: self.system.is_stopped(FIRST))
        video_id, _ = await customer.row()
        return asking, video_id


@dataclass(frozen=True, slots=True)
class Customer:
    """Somebody who wants one video, from an image. The callers try once; the client, at the second gateway, insists."""

    system: systems.System
    client: clients.Client
    first: gateway_world.Caller
    second: gateway_world.Caller
    image_id: str
    request_id: str = field(default_factory=clients.new_request_id)
    prompt: str = field(default_factory=lambda: f"admitted {uuid.uuid4().hex}")

    def wanted(self) -> video_pb2.CreateVideoRequest:
        spec = vocabulary_pb2.VideoSpec(
            prompt=self.prompt, input_image_id=self.image_id, **kills.TINY
        )
        return video_pb2.CreateVideoRequest(
            request_id=self.request_id, account_id=self.first.account_id, spec=spec
        )

    def asks_first(self) -> asyncio.Task[video_pb2.Video | errors.FramewireError]:
        """Asks the first gateway, once."""

        async def ask() -> video_pb2.Video | errors.FramewireError:
            try:
                return await self.first.call("CreateVideo", self.wanted(), timeout=60)
            except errors.FramewireError as error:
                return error

        return asyncio.create_task(ask())

    async def insists(self) -> types.Video:
        """What the second gateway answers to the same request in the end."""
        return await self.client.create_video(
            self.prompt, request_id=self.request_id, image_id=self.image_id, **kills.TINY
        )

    async def cancels(self, video_id: str) -> None:
        """Has the second gateway cancel what the first one admits."""
        cancelling = video_pb2.CancelVideoRequest(video_id=video_id)
        cancelled = await self.second.call("CancelVideo", cancelling)
        assert cancelled.state == vocabulary_pb2.VIDEO_STATE_CANCELLED

    async def row(self) -> tuple[str, str]:
        """Id and state of the newest video of the account, as soon as there is one."""
        query = """
            SELECT video_id, state FROM videos WHERE account_id = $1 ORDER BY created_at DESC LIMIT 1
        """
        async with self.system.database("gateway") as database:

            async def there() -> tuple[str, str]:
                row = await database.fetchrow(query, self.first.account_id)
                assert row is not None, "no video yet"
                return row["video_id"], row["state"]

            return await eventually(there)

    async def given_up(self, video_id: str) -> None:
        """Waits until an admission was given up and undone."""
        query = "SELECT state, release_due, unpin_due FROM videos WHERE video_id = $1"
        async with self.system.database("gateway") as database:

            async def undone() -> bool:
                row = await database.fetchrow(query, video_id)
                assert row is not None
                assert tuple(row) == ("ABANDONED", False, False), tuple(row)
                return True

            await eventually(undone, every_seconds=0.1)

    async def left_nothing(self, video_id: str, *holds: str) -> None:
        """Of what was given up: nothing queued, paid, held or kept; its hold ended in one of these states."""
        assert await self.hold(video_id) in holds
        async with self.system.database("generator") as database:
            known = "SELECT count(*) FROM videos WHERE video_id = $1"
            assert await database.fetchval(known, video_id) == 0, "it was queued"
        assert await self.system.paid_jobs(self.prompt) == []
        await self.lets_go(video_id)
        balance = await self.client.balance()
        assert (balance.available_credits, balance.held_credits) == (CREDITS, 0)

    async def hold(self, video_id: str) -> str:
        """The state of a video's hold."""
        async with self.system.database("credits") as database:
            query = "SELECT state FROM holds WHERE hold_id = $1"
            return await database.fetchval(query, video_id)

    async def lets_go(self, video_id: str) -> None:
        """Waits until the image is not kept for a video any more."""
        async with self.system.database("storage") as database:

            async def unpinned() -> bool:
                query = "SELECT count(*) FROM pins WHERE owner = $1"
                return await database.fetchval(query, video_id) == 0

            await eventually(unpinned, what="the image is let go of")

    async def gets_one(self, video_id: str) -> None:
        """This video and no other: completed, paid to the provider once, charged once; the request answers it."""
        watched = [video async for video in self.client.watch_video(video_id)]
        assert watched[-1].state == "COMPLETED", watched[-1].failure
        again = await self.insists()
        assert (again.video_id, again.state) == (video_id, "COMPLETED")
        assert len(await self.system.paid_jobs(self.prompt)) == 1
        await self.lets_go(video_id)
        balance, paid = await self.client.balance(), again.credits.captured
        assert paid == again.credits.reserved > 0
        assert (balance.available_credits, balance.held_credits) == (CREDITS - paid, 0)
        async with self.system.database("gateway") as database:
            query = """
                SELECT count(*) FROM videos WHERE account_id = $1 AND state NOT IN ('ABANDONED', 'REJECTED')
            """
            assert await database.fetchval(query, self.first.account_id) == 1


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stand(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stand]:
    folder = tmp_path_factory.mktemp("admission")
    async with contextlib.AsyncExitStack() as stack:
        system = await stack.enter_async_context(systems.running(folder, LONGER))
        # It is never struck itself.
        await orders.second_replica(system, FIRST, {"FRAMEWIRE_FAILPOINTS": ""})
        listens = system.stack.addresses.listen
        line = await stack.enter_async_context(proxies.running(listens["credits"], "ledger-line"))
        await system.supervisor.restart(FIRST, env={"GATEWAY_CREDITS_ADDRESS": line.address})
        second = system.supervisor.get(SECOND)
        assert isinstance(second, process.Service)
        addresses = {
            FIRST: system.stack.gateway_address,
            SECOND: second.child.env["GATEWAY_LISTEN"],
        }
        channels = {
            name: await stack.enter_async_context(grpc.aio.insecure_channel(address))
            for name, address in addresses.items()
        }
        async with await system.account(CREDITS) as client:
            # A finished job of ours in the provider's list: without one, absence can never be proved.
            await client.generate(f"sentinel {uuid.uuid4().hex}", **kills.TINY)
        assert line.accepted, "the gateway goes round the proxy"
        yield Stand(system, line, addresses, channels)


# Stopped past every lease, and woken up again


@pytest.mark.parametrize("point", BEFORE)
async def test_stopped_before_the_commit_it_is_given_up(stand: Stand, point: str) -> None:
    """By the other gateway. Who wakes up queues nothing, holds nothing, keeps nothing; the same request starts anew."""
    async with stand.customer() as customer:
        asking, video_id = await stand.stopped(customer, point)
        await customer.given_up(video_id)
        stand.system.supervisor.resume(FIRST)
        refused = await asking
        assert isinstance(refused, errors.FramewireError), refused
        assert refused.code is grpc.StatusCode.UNAVAILABLE, refused
        await customer.left_nothing(video_id, _undone(point))
        again = await customer.insists()
        assert again.video_id != video_id
        await customer.gets_one(again.video_id)
        await customer.given_up(video_id)


@pytest.mark.parametrize("point", BEFORE)
async def test_stopped_before_the_commit_it_is_taken_over(stand: Stand, point: str) -> None:
    """By the same request at the other gateway: that one admits this very video; who wakes up finds it admitted."""
    async with stand.customer() as customer:
        asking, video_id = await stand.stopped(customer, point)
        assert (await customer.insists()).video_id == video_id
        stand.system.supervisor.resume(FIRST)
        answer = await asking
        if isinstance(answer, errors.FramewireError):
            assert answer.code is grpc.StatusCode.UNAVAILABLE, answer
        else:
            assert answer.video_id == video_id
        await customer.gets_one(video_id)


@pytest.mark.parametrize("point", AFTER)
async def test_stopped_after_the_commit_it_is_made(stand: Stand, point: str) -> None:
    """The other gateway rings where nobody did. That the one that wakes up rings, too, changes nothing."""
    async with stand.customer() as customer:
        asking, video_id = await stand.stopped(customer, point)
        watched = [video async for video in customer.client.watch_video(video_id)]
        assert watched[-1].state == "COMPLETED"
        stand.system.supervisor.resume(FIRST)
        await asking
        await customer.gets_one(video_id)


@pytest.mark.parametrize("point", BEFORE)
async def test_cancelled_amid_its_admission_it_is_given_up(stand: Stand, point: str) -> None:
    """At the other gateway, which undoes it; the admission goes on after that, and what it does then is undone, too."""
    async with stand.customer() as customer:
        stand.system.arm(point, f"sleep:{SLEEP_SECONDS}")
        asking = customer.asks_first()
        await eventually(lambda: stand.system.armed() == "")
        video_id, _ = await customer.row()
        await customer.cancels(video_id)
        await customer.given_up(video_id)
        refused = await asking
        assert isinstance(refused, errors.FramewireError), refused
        assert refused.code is grpc.StatusCode.UNAVAILABLE, refused
        await customer.left_nothing(video_id, _undone(point))


async def test_stopped_before_it_releases_another_one_does(stand: Stand) -> None:
    """Woken up it releases once more, which changes nothing."""
    supervisor = stand.system.supervisor
    async with stand.customer() as customer:
        supervisor.pause(SECOND)
        stand.system.arm("gateway.admit.after_reserve", "error")
        stand.system.arm("gateway.abandon.before_release", "stop")
        assert isinstance(await customer.asks_first(), errors.FramewireError)
        video_id, _ = await customer.row()
        await eventually(lambda: stand.system.is_stopped(FIRST))
        assert await customer.hold(video_id) == "HELD"
        supervisor.resume(SECOND)
        await customer.given_up(video_id)
        released = await _served(stand.system, "Release")
        supervisor.resume(FIRST)

        async def released_again() -> bool:
            return await _served(stand.system, "Release") > released

        await eventually(released_again)
        await customer.left_nothing(video_id, "RELEASED")
        await customer.gets_one((await customer.insists()).video_id)


# A Reserve that comes after its Release


@pytest.mark.parametrize("why", ["cancelled", "given up"])
async def test_a_reserve_that_comes_after_its_release_takes_nothing(stand: Stand, why: str) -> None:
    """The line holds it until the other gateway has released: the ledger has noted that, and refuses it for ever."""
    system = stand.system
    async with stand.customer() as customer:
        quote = video_pb2.QuoteVideoRequest(spec=customer.wanted().spec)
        await customer.first.call("QuoteVideo", quote)  # so that there is a line
        stand.ledger_line.silence()
        asking = customer.asks_first()
        video_id, state = await customer.row()
        assert state == "ADMITTING"
        await eventually(lambda: stand.ledger_line.held_bytes > 0)
        system.supervisor.pause(
            FIRST
        )  # else it would take back what it asked for when its time is over
        if why == "cancelled":
            await customer.cancels(video_id)
        await customer.given_up(video_id)
        assert await customer.hold(video_id) == "VOID"
        refused = await _refused(system, "HOLD_RELEASED")
        await stand.ledger_line.heal()

        async def came() -> bool:
            return await _refused(system, "HOLD_RELEASED") == refused + 1

        await eventually(came, what="the late Reserve")
        await customer.left_nothing(video_id, "VOID")
        system.supervisor.resume(FIRST)
        answer = await asking
        assert isinstance(answer, errors.FramewireError), answer
        assert answer.code is grpc.StatusCode.UNAVAILABLE
        await customer.left_nothing(video_id, "VOID")
        async with system.database("credits") as database:
            moved = "SELECT count(*) FROM transfers WHERE hold_id = $1"
            assert await database.fetchval(moved, video_id) == 0
        assert (await system.check_books()).balanced


# Callers that hang up


@pytest.mark.parametrize("point", POINTS)
async def test_a_caller_who_hangs_up_gets_the_video(stand: Stand, point: str) -> None:
    """The admission goes on; nobody asks again, and the video is made. Asked for again, it is this one."""
    async with stand.customer() as customer:
        stand.system.arm(point, f"sleep:{SLEEP_SECONDS}")
        asking = customer.asks_first()
        await eventually(lambda: stand.system.armed() == "")
        await _hang_up(asking)
        video_id, _ = await customer.row()
        await _completed(customer, video_id)
        await customer.gets_one(video_id)


async def test_a_caller_who_hangs_up_while_the_ledger_is_asked_gets_the_video(
    stand: Stand,
) -> None:
    async with stand.customer() as customer:
        quote = video_pb2.QuoteVideoRequest(spec=customer.wanted().spec)
        await customer.first.call("QuoteVideo", quote)
        stand.ledger_line.silence()
        asking = customer.asks_first()
        await eventually(lambda: stand.ledger_line.held_bytes > 0)
        await _hang_up(asking)
        await stand.ledger_line.heal()
        video_id, _ = await customer.row()
        await _completed(customer, video_id)
        await customer.gets_one(video_id)


@pytest.mark.parametrize("point", POINTS)
async def test_a_caller_who_hangs_up_on_a_gateway_that_dies(stand: Stand, point: str) -> None:
    """Before the commit nobody asks for the video any more: it is given up. After it, it is made."""
    async with stand.customer() as customer:
        stand.system.arm(point, "kill")
        asking = customer.asks_first()
        await stand.system.supervisor.wait_exit(FIRST)
        await _hang_up(asking)
        video_id, _ = await customer.row()
        if point in AFTER:
            await _completed(customer, video_id)
        else:
            await customer.given_up(video_id)
            await customer.left_nothing(video_id, "VOID", "RELEASED")
        await stand.system.supervisor.start(FIRST)
        again = await customer.insists()
        assert (again.video_id == video_id) == (point in AFTER)
        await customer.gets_one(again.video_id)


# Without the bus, and without the ledger


async def test_without_the_bus_a_video_is_admitted_and_queued_later(stand: Stand) -> None:
    async with stand.customer() as customer:
        await stand.system.bus.kill()
        try:
            video = await customer.first.call("CreateVideo", customer.wanted(), timeout=10)
            assert video.state == vocabulary_pb2.VIDEO_STATE_PENDING
            replayed = await customer.insists()
            assert (replayed.video_id, replayed.state) == (video.video_id, "PENDING")
        finally:
            await stand.system.bus.start()
        await customer.gets_one(video.video_id)


async def test_without_the_ledger_nothing_is_half_done(stand: Stand) -> None:
    """The caller is told so, and when to ask again; what had begun is undone when the ledger is back."""
    async with stand.customer() as customer:
        await stand.system.supervisor.stop("credits")
        try:
            refused = await customer.asks_first()
        finally:
            await stand.system.supervisor.start("credits")
        assert isinstance(refused, errors.FramewireError)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.UNAVAILABLE,
            "DEPENDENCY_UNAVAILABLE",
        )
        assert refused.retry_after_seconds
        video_id, _ = await customer.row()
        await customer.given_up(video_id)
        await customer.left_nothing(video_id, "VOID")
        await customer.gets_one((await customer.insists()).video_id)


async def test_every_invariant_holds_after_all_of_it(stand: Stand) -> None:
    await stand.system.quiet()
    assert await invariants.violations(stand.system) == []
    found = await stand.system.operator.operations.reconcile()
    assert [one.kind for one in found.findings] == []


def _undone(point: str) -> str:
    """How the hold of an admission ends that was given up there: before it was made, it is noted as void."""
    return "RELEASED" if point in BEFORE[BEFORE.index("gateway.admit.after_reserve") :] else "VOID"


async def _completed(customer: Customer, video_id: str) -> None:
    """Waits, without asking for it, until a video was made."""
    query = "SELECT state FROM videos WHERE video_id = $1"
    async with customer.system.database("gateway") as database:

        async def made() -> bool:
            state = await database.fetchval(query, video_id)
            assert state == "COMPLETED", state
            return True

        await eventually(made, within_seconds=60, every_seconds=0.1)


async def _hang_up(asking: asyncio.Task[video_pb2.Video | errors.FramewireError]) -> None:
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


async def _served(system: systems.System, method: str) -> float:
    """How many calls of the ledger went well, of both gateways."""
    scraped = await observed.scrape(system.stack.addresses.metrics_listen["credits"])
    labels = {"side": "server", "code": "OK", "method": f"{_LEDGER}{method}"}
    return scraped.values.get(("framewire_rpc_seconds_count", frozenset(labels.items())), 0)


async def _refused(system: systems.System, reason: str) -> float:
    """How many Reserves the ledger has refused with a reason."""
    scraped = await observed.scrape(system.stack.addresses.metrics_listen["credits"])
    labels = {"method": f"{_LEDGER}Reserve", "reason": reason}
    return scraped.values.get(("framewire_rpc_refusals_total", frozenset(labels.items())), 0)
