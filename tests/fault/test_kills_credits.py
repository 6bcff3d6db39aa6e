"""Two replicas of the ledger under load, one of them killed (-9) again and again: what was acknowledged is there, once.

Sixty-four clients on three accounts; a replica is killed 200 ms after it serves. The run states a floor of work done.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import timestamp_pb2

from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import vocabulary_pb2
from kit import errors, ids, postgres, rpc
from services.credits.store import Store
from tests import containers, credits_process
from tests.waiting import eventually

pytestmark = [
    pytest.mark.fault,
    pytest.mark.long,
    pytest.mark.timeout(240),
    pytest.mark.skipif(containers.IN_DOCKER, reason="kills processes of its own"),
]

CLIENTS, ACCOUNTS = 64, 3
SECONDS, KILL_AFTER_SECONDS = 20.0, 0.2
KILLS, ACKNOWLEDGED = 15, 10_000
LOST = (errors.Unavailable, errors.DeadlineExceeded, errors.Aborted)
"""What a client meets when a replica dies: whether it was posted is not known, so it asks again, with the same id."""


@dataclass
class Acknowledged:
    """What clients were told, by hold and by request."""

    holds: dict[str, ledger_pb2.Hold] = field(default_factory=dict)
    lots: dict[str, tuple[str, int]] = field(default_factory=dict)
    operations: int = 0
    repeated: int = 0


class Client:
    """One client: it goes to whichever replica answers, and never gives an operation up."""

    def __init__(self, stubs: list[Any], account_id: str, told: Acknowledged) -> None:
        self._stubs = itertools.cycle(random.sample(stubs, len(stubs)))
        self._stub = next(self._stubs)
        self._account_id = account_id
        self._told = told

    async def run(self, until: float) -> None:
        """Lives of holds, one after the other."""
        while time.monotonic() < until:
            hold_id = ids.new_id()
            if random.random() < 0.05:
                await self._grant(random.randint(1, 50))
            if random.random() < 0.05:
                # Released before it was reserved.
                await self._end(hold_id, "Release")
            if await self._reserve(hold_id) and random.random() < 0.9:
                await self._end(hold_id, random.choice(("Capture", "Release")))

    async def _reserve(self, hold_id: str) -> bool:
        """Whether something is held."""
        wanted = self._wanted(hold_id)
        try:
            self._heard(await self._call(lambda stub: stub.Reserve(wanted, timeout=5)))
        except errors.FailedPrecondition as refused:
            if refused.reason not in ("INSUFFICIENT_CREDITS", "HOLD_RELEASED"):
                raise
            self._told.operations += 1
            return False
        return True

    async def _grant(self, credits_: int) -> None:
        request = ledger_pb2.GrantRequest(
            account_id=self._account_id,
            request_id=str(uuid.uuid4()),
            credits=credits_,
            source=ledger_pb2.LOT_SOURCE_PURCHASE,
        )
        given = await self._call(lambda stub: stub.Grant(request, timeout=5))
        assert given.lot_id not in self._told.lots, "two grants have one lot"
        self._told.lots[given.lot_id] = (self._account_id, credits_)
        self._told.operations += 1

    async def _end(self, hold_id: str, method: str) -> None:
        cause = vocabulary_pb2.CAUSE_NONE
        if method == "Capture":
            request: Any = ledger_pb2.CaptureRequest(
                hold_id=hold_id, credits=random.randint(0, 1), cause=cause
            )
        else:
            request = ledger_pb2.ReleaseRequest(
                hold_id=hold_id, account_id=self._account_id, cause=cause
            )
        self._heard(await self._call(lambda stub: getattr(stub, method)(request, timeout=5)))

    def _wanted(self, hold_id: str) -> ledger_pb2.ReserveRequest:
        item = ledger_pb2.Item(
            model="sora-2", width=320, height=180, seconds=1, variants=1,
            lane=vocabulary_pb2.LANE_STANDARD,
        )  # fmt: skip
        far = timestamp_pb2.Timestamp()
        far.FromJsonString("2100-01-01T00:00:00Z")
        return ledger_pb2.ReserveRequest(
            hold_id=hold_id, account_id=self._account_id, item=item, not_after=far
        )

    def _heard(self, hold: ledger_pb2.Hold) -> None:
        self._told.holds[hold.hold_id] = hold
        self._told.operations += 1

    async def _call(self, call: Callable[[Any], Awaitable[Any]]) -> Any:
        """The same request until it is answered."""
        while True:
            try:
                return await call(self._stub)
            except LOST:
                self._told.repeated += 1
                self._stub = next(self._stubs)
                await asyncio.sleep(0)


async def _kill_again_and_again(replicas: list[credits_process.Replica], until: float) -> int:
    """One after the other is killed 200 ms after it serves, and started again; answers how often."""
    for kills in itertools.count():
        if time.monotonic() > until:
            return kills
        replica, served = replicas[kills % len(replicas)], time.monotonic()
        await eventually(functools.partial(_passed, served + KILL_AFTER_SECONDS))
        await replica.kill()
        await replica.start()
    raise AssertionError


async def _passed(moment: float) -> bool:
    return time.monotonic() > moment


async def test_replicas_killed_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    told = Acknowledged()
    accounts = [ids.new_id() for _ in range(ACCOUNTS)]
    async with credits_process.running(tmp_path) as servers:
        replicas = [servers.replica(name) for name in ("one", "two")]
        try:
            await asyncio.gather(*(replica.start() for replica in replicas))
            one, two = (rpc.channel(each.address, credits_process.TOKENS) for each in replicas)
            async with one, two, postgres.pool(servers.url, "test", 4) as pool:
                stubs = [ledger_pb2_grpc.LedgerServiceStub(channel) for channel in (one, two)]
                for account_id in accounts:
                    await stubs[0].OpenAccount(
                        ledger_pb2.OpenAccountRequest(account_id=account_id), timeout=5
                    )
                kills = await _load_and_kill(stubs, replicas, accounts, told, pool)
                await _check(pool, told)
        finally:
            await asyncio.gather(*(replica.kill() for replica in replicas))
    print(f"kills {kills}, acknowledged {told.operations}, calls repeated {told.repeated}")
    assert kills >= KILLS
    assert told.operations >= ACKNOWLEDGED
    assert told.repeated > kills, "no call was under way when a replica died"


async def _load_and_kill(
    stubs: list[Any],
    replicas: list[credits_process.Replica],
    accounts: list[str],
    told: Acknowledged,
    pool: postgres.Pool,
) -> int:
    """Load and kills for 20 s, and on a slow machine until the floor of work is done, at most eight times as long."""
    started = time.monotonic()
    kills = 0
    while time.monotonic() < started + SECONDS or (
        (kills < KILLS or told.operations < ACKNOWLEDGED)
        and time.monotonic() < started + 8 * SECONDS
    ):
        until = time.monotonic() + SECONDS / 4
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                client = Client(stubs, accounts[number % ACCOUNTS], told)
                group.create_task(client.run(until))
            killing = group.create_task(_kill_again_and_again(replicas, until))
        kills += killing.result()
        negative = await pool.fetchval("SELECT count(*) FROM lots WHERE available < 0 OR held < 0")
        assert negative == 0
    return kills


async def _check(pool: postgres.Pool, told: Acknowledged) -> None:
    """The books balance, and every acknowledged operation is in them, as it was told, once."""
    assert (await Store(pool).statements.check_books()).findings == ()
    names = {"HELD", "CAPTURED", "RELEASED", "VOID"}
    rows = await pool.fetch("SELECT hold_id, account_id, state, captured FROM holds")
    kept = {row["hold_id"]: row for row in rows}
    for hold_id, hold in told.holds.items():
        row = kept[hold_id]
        state = ledger_pb2.HoldState.Name(hold.state).removeprefix("HOLD_STATE_")
        assert state in names
        assert (row["account_id"], row["state"], row["captured"]) == (
            *(hold.account_id, state, hold.captured_credits),
        )
    moved = Counter(
        (row["hold_id"], row["kind"])
        for row in await pool.fetch("SELECT hold_id, kind FROM transfers WHERE hold_id IS NOT NULL")
    )
    assert set(moved.values()) == {1}, "something was posted twice"
    given = await pool.fetch(
        "SELECT r.lot_id, l.account_id, l.granted FROM requests r JOIN lots l USING (lot_id)"
    )
    found = {row["lot_id"]: (row["account_id"], row["granted"]) for row in given}
    assert found == told.lots, "grants are not those that were acknowledged, each once"
