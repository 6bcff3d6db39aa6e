"""Hundreds of kills at random moments under hundreds of videos and two generators: nothing paid twice, nothing lost.

FRAMEWIRE_KILLS, FRAMEWIRE_JOBS and FRAMEWIRE_SEED change the size and replay a run.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests import invariants, subscriber
from tests import system as systems
from tests.fault import orders
from tests.waiting import eventually

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(5400)]

KILLS = orders.number("FRAMEWIRE_KILLS", 300)
JOBS = orders.number("FRAMEWIRE_JOBS", 500)
UNDER_WAY = 24
CUSTOMERS = 5
QUIET_KILL_SECONDS = 2.0
BOTH_AT_ONCE = 0.1


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    folder = tmp_path_factory.mktemp("random")
    async with systems.running(folder / "system", orders.overrides(folder)) as running:
        yield running


async def test_random_kills(fragile: systems.System, tmp_path: Path) -> None:
    """Videos are asked for at the pace of the kills, so that each kill finds work; each is checked like any other."""
    dice = orders.dice("random kills")
    desks = [orders.Desk(fragile, dice, await fragile.account(100_000)) for _ in range(CUSTOMERS)]
    try:
        await desks[0].sentinels()
        told = await subscriber.catch_up(fragile, "away")  # then it is down until all is over
        second = await orders.second_generator(fragile)
        rush = _Rush(fragile, desks)
        met_work = 0
        async with asyncio.TaskGroup() as group:
            group.create_task(rush.feed())
            victims = _Victims(fragile, group, second)
            for kill in range(KILLS):
                rush.allow(JOBS * (kill + 1) // KILLS)
                await _a_random_while(fragile, dice.randint(1, 12))
                met_work += await orders.under_way(fragile)
                await victims.kill(dice)
        everything = [order for desk in desks for order in desk.orders]
        for desk in desks:
            assert await desk.check(desk.orders, tmp_path) == []
        assert len(everything) == JOBS + len(orders.MODELS)
        # The floor: a run whose kills met nobody at work proves nothing.
        assert met_work >= KILLS * 0.8, f"only {met_work} of {KILLS} kills found videos under way"
        await fragile.quiet(within_seconds=120)
        assert await invariants.violations(fragile) == []
        told += await subscriber.catch_up(fragile, "away", within_seconds=600)
        assert await subscriber.amiss(fragile, told) == []
        print(f"{KILLS} kills, {met_work} of them amid work, {JOBS} videos: nothing amiss")
    finally:
        for desk in desks:
            await desk.client.aclose()


class _Rush:
    """Asks for videos, never more at once than UNDER_WAY, never more in all than the kills so far allow."""

    def __init__(self, system: systems.System, desks: list[orders.Desk]) -> None:
        self._desks = desks
        self._allowed = asyncio.Semaphore(0)
        self._allowed_count = 0
        self._room = asyncio.Semaphore(UNDER_WAY)

    def allow(self, count: int) -> None:
        """So many videos in all by now."""
        for _ in range(count - self._allowed_count):
            self._allowed.release()
        self._allowed_count = max(count, self._allowed_count)

    async def feed(self) -> None:
        """Until all JOBS have ended."""
        async with asyncio.TaskGroup() as group:
            for number in range(JOBS):
                await self._allowed.acquire()
                await self._room.acquire()
                dialect = list(orders.MODELS)[number % len(orders.MODELS)]
                desk = self._desks[number % len(self._desks)]
                group.create_task(self._one(await desk.ask(dialect)))

    async def _one(self, order: orders.Order) -> None:
        try:
            await order.ended(within_seconds=600)
        finally:
            self._room.release()


async def _a_random_while(system: systems.System, changes: int) -> None:
    """Until attempts have changed their states so many times.

    Counted in changes, not in seconds: a slow machine is struck at as many different places as a fast one.
    """
    start = await orders.moves(system)
    async with system.database("generator") as database:
        until = await database.fetchval(
            "SELECT clock_timestamp() + make_interval(secs => $1)", QUIET_KILL_SECONDS
        )

        async def come() -> bool:
            over = await database.fetchval("SELECT clock_timestamp() > $1", until)
            return over or await orders.moves(system) >= start + changes

        await eventually(come, within_seconds=60)


class _Victims:
    """Two replicas. The next kill does not wait for who was killed before, as long as somebody is at work."""

    def __init__(self, system: systems.System, group: asyncio.TaskGroup, second: str) -> None:
        self._supervisor = system.supervisor
        self._group = group
        self._starting = {name: self._start(name) for name in ("generator", second)}

    async def kill(self, dice: random.Random) -> None:
        """SIGKILL, at whatever it was doing; then it is started again. Now and then nobody is left meanwhile."""
        if dice.random() < BOTH_AT_ONCE:
            await asyncio.wait(self._starting.values())
            struck = list(self._starting)
        else:
            await asyncio.wait(self._starting.values(), return_when=asyncio.FIRST_COMPLETED)
            struck = [dice.choice([name for name, task in self._starting.items() if task.done()])]
        for name in struck:
            program = self._supervisor.get(name)
            assert program.running, program.death_notice()
            await self._supervisor.kill(name)
            assert program.exit_code == -signal.SIGKILL
        for name in struck:
            self._starting[name] = self._start(name)

    def _start(self, name: str) -> asyncio.Task[None]:
        return self._group.create_task(self._supervisor.start(name))
