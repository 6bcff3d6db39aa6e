"""kill -9 of gateway, credits and storage at every crash point: one billed job, one charge, nothing adrift."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from framewire import events
from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import vocabulary_pb2
from kit import auth, errors, rpc
from tests import subscriber
from tests import system as systems
from tests.fault import kills

ROOT = Path(__file__).parents[2]
AWAY = "away"
"""A subscriber that was up before the first kill, and is down until after the last one."""
pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

CASES = kills.cases("gateway", "credits", "storage")


@pytest.fixture(scope="module")
def before() -> list[events.Event]:
    """What the subscriber took before the first kill."""
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile(
    tmp_path_factory: pytest.TempPathFactory, before: list[events.Event]
) -> AsyncIterator[systems.System]:
    async with kills.fragile(tmp_path_factory.mktemp("others")) as running:
        before.extend(await subscriber.catch_up(running, AWAY))
        yield running


@pytest.mark.parametrize(("service", "point"), CASES, ids=[point for _, point in CASES])
async def test_kill(fragile: systems.System, service: str, point: str, tmp_path: Path) -> None:
    await kills.kill_and_check(fragile, service, point, tmp_path / "film.mp4")


@pytest.mark.parametrize("point", kills.LEDGER)
async def test_kill_in_an_operators_call(fragile: systems.System, point: str) -> None:
    """Grant, capture and refund, called again with the same ids after the crash, move their credits once."""
    method = point.split(".")[1]
    async with await fragile.account(0) as client:
        await fragile.operator.grant(client.account_id, 10)
        hold = ledger_pb2.ReserveRequest(
            hold_id=uuid.uuid4().hex[:26],
            account_id=client.account_id,
            item=ledger_pb2.Item(
                model="sora-2", width=1280, height=720, seconds=6, variants=1,
                lane=vocabulary_pb2.LANE_STANDARD,
            ),
        )  # fmt: skip
        hold.not_after.FromJsonString("2100-01-01T00:00:00Z")
        grant, refund = str(uuid.uuid4()), str(uuid.uuid4())
        secret = fragile.stack.addresses.service_token_secret
        tokens = auth.ServiceTokens("gateway", secret)
        async with rpc.channel(fragile.stack.addresses.listen["credits"], tokens) as channel:
            ledger = ledger_pb2_grpc.LedgerServiceStub(channel)
            reserved = (await ledger.Reserve(hold, timeout=5)).reserved_credits
            capture = ledger_pb2.CaptureRequest(
                hold_id=hold.hold_id, credits=reserved, cause=vocabulary_pb2.CAUSE_NONE
            )
            back = ledger_pb2.RefundRequest(
                hold_id=hold.hold_id, request_id=refund, credits=1, note=""
            )

            async def operate() -> None:
                await fragile.operator.grant(client.account_id, 5, request_id=grant)
                await _until_done(lambda: ledger.Capture(capture, timeout=5))
                await _until_done(lambda: ledger.Refund(back, timeout=5))

            fragile.arm(point)
            await asyncio.wait_for(asyncio.gather(operate(), fragile.revive("credits")), 60)
        balance = await client.balance()
    assert method in ("grant", "capture", "refund")
    assert (balance.available_credits, balance.held_credits) == (10 + 5 - reserved + 1, 0)


@pytest.mark.parametrize("point", kills.RULES)
async def test_kill_while_an_operator_sets_a_rule(fragile: systems.System, point: str) -> None:
    """Called again after the crash, each act is done once and wholly."""
    operations, version = fragile.operator.operations, f"killed-{uuid.uuid4().hex[:8]}"
    text = (ROOT / "services" / "credits" / "prices.yaml").read_text()
    text = re.sub(r"(?m)^version: .*$", f'version: "{version}"', text)
    async with await fragile.account(0) as client:

        async def operate() -> None:
            await operations.set_frozen(client.account_id, True)
            added = await operations.add_rulebook("PRICE_BOOK", text)
            await operations.activate_rulebook("PRICE_BOOK", version, added.content_hash)

        fragile.arm(point)
        await asyncio.wait_for(asyncio.gather(operate(), fragile.revive("credits")), 60)
        rules = await operations.set_daily_cap(client.account_id, 7)
    assert (rules.frozen, rules.daily_cap_credits) == (True, 7)
    found = await operations.rulebooks("PRICE_BOOK")
    assert [one.in_force for one in found if one.version == version] == [True]


async def _until_done(call) -> None:
    """Calls again, with the same ids, while the service is away."""
    while True:
        try:
            await call()
            return
        except errors.Unavailable:
            await asyncio.sleep(0)


async def test_every_invariant_holds_after_all_kills(fragile: systems.System) -> None:
    await kills.check_all(fragile)


async def test_a_subscriber_that_was_away_is_told_of_everything_once(
    fragile: systems.System, before: list[events.Event]
) -> None:
    """In order per video; what it had acknowledged before it went does not come again."""
    since = await subscriber.catch_up(fragile, AWAY)
    assert {event.event_id for event in before} & {event.event_id for event in since} == set()
    assert await subscriber.amiss(fragile, [*before, *since]) == []
    assert before
    assert len({event.video_id for event in since if event.kind == "completed"}) >= len(CASES)
    assert await subscriber.catch_up(fragile, AWAY) == []


def test_every_crash_point_is_in_the_matrix() -> None:
    """A failpoint that no test kills at proves nothing."""
    sources = [*ROOT.glob("services/**/*.py"), *ROOT.glob("kit/*.py")]
    marked = {
        name
        for source in sources
        for name in re.findall(r'failpoint\(\s*"([a-z_]+\.[a-z_.]+)"', source.read_text())
        if name != "service.point"  # the example in kit.failpoints
    }
    tested = (
        {point for _, point in kills.cases(*kills.MATRIX)} | kills.ELSEWHERE | set(kills.LEDGER)
    ) | set(kills.RULES)
    tested |= {point for _, point in kills.storage_cases(*kills.STORAGE)}
    assert marked - tested == set(), "crash points that no test kills at"
    assert tested - marked == set(), "crash points that are not in the code any more"
