"""Postgres and NATS going down while videos are made, and job messages that come twice and in another order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio

from framewire import subjects
from tests import invariants
from tests import system as systems
from tests.fault import orders
from tests.waiting import eventually

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(600)]

REPEATS = 5


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    folder = tmp_path_factory.mktemp("servers")
    async with systems.running(folder / "system", orders.overrides(folder)) as running:
        async with await running.account(100) as client:
            await orders.Desk(running, orders.dice("sentinels"), client).sentinels()
        yield running


@pytest.mark.parametrize("away_seconds", [0.0, 4.0], ids=["back at once", "away past every lease"])
@pytest.mark.parametrize("server", ["postgres", "nats"])
async def test_server_killed(
    fragile: systems.System, server: str, away_seconds: float, tmp_path: Path
) -> None:
    """kill -9 of everybody's database, or of the bus, three times amid the work; all goes on by itself."""
    dice = orders.dice(f"{server} away for {away_seconds} s")
    victim = {"postgres": fragile.postgres, "nats": fragile.bus}[server]
    async with await fragile.account(1000) as client:
        desk = orders.Desk(fragile, dice, client)
        for _ in range(3):
            for dialect in orders.MODELS:
                await desk.ask(dialect)
            start, steps = await orders.moves(fragile), dice.randint(0, 4)
            await eventually(lambda: _moved(fragile, start + steps))  # noqa: B023 - awaited here
            await victim.kill()
            await _monotonic(away_seconds)
            await victim.start()
        assert await desk.check(desk.orders, tmp_path) == []
    await fragile.quiet(within_seconds=120)
    for name in ("gateway", "credits", "generator", "storage"):
        assert fragile.supervisor.get(name).running, f"{name} did not outlive {server}"


async def test_jobs_come_many_times_and_in_another_order(
    fragile: systems.System, tmp_path: Path
) -> None:
    """Each message five times over, shuffled, to two generators; and all of them again when the videos are done."""
    dice = orders.dice("jobs repeated")
    await fragile.supervisor.stop("generator")
    bus = await nats.connect(fragile.stack.addresses.nats_url)
    name = ""
    try:
        async with await fragile.account(1000) as client:
            desk = orders.Desk(fragile, dice, client)
            for number in range(8):
                await desk.ask(list(orders.MODELS)[number % 2])
            stream = bus.jetstream()
            waiting = await _jobs(stream, {order.video_id for order in desk.orders})
            assert len(waiting) == len(desk.orders)
            repeated = [one for one in waiting for _ in range(REPEATS)]
            await _publish(stream, dice.sample(repeated, len(repeated)))
            await fragile.supervisor.start("generator")
            name = await orders.second_generator(fragile)
            assert await desk.check(desk.orders, tmp_path) == []
            await _publish(stream, dice.sample(waiting, len(waiting)))

            async def all_taken() -> bool:
                return (await stream.stream_info(subjects.JOBS_STREAM)).state.messages == 0

            await eventually(all_taken, within_seconds=90)
            async with fragile.database("generator") as database:
                attempts = await database.fetchval(
                    "SELECT count(*) FROM attempts WHERE video_id = ANY($1)",
                    [order.video_id for order in desk.orders],
                )
            assert attempts == len(desk.orders), "one attempt a video"
            assert await desk.check(desk.orders, tmp_path) == []
    finally:
        await bus.close()
        if name:
            await fragile.supervisor.stop(name)
        await fragile.supervisor.start("generator")


async def test_every_invariant_holds_after_all(fragile: systems.System) -> None:
    await fragile.quiet()
    assert await invariants.violations(fragile) == []


async def _moved(system: systems.System, until: int) -> bool:
    return await orders.moves(system) >= until


async def _monotonic(seconds: float) -> None:
    """Time goes by while there is no database whose clock could say so."""
    clock = asyncio.get_running_loop()
    until = clock.time() + seconds
    await eventually(lambda: clock.time() >= until, within_seconds=seconds + 10)


async def _jobs(stream: Any, video_ids: set[str]) -> list[tuple[bytes, dict[str, str]]]:
    """A message of each of these videos: what waits in the work queue."""
    state = (await stream.stream_info(subjects.JOBS_STREAM)).state
    found: dict[str, tuple[bytes, dict[str, str]]] = {}
    for sequence in range(state.first_seq, state.last_seq + 1):
        try:
            message = await stream.get_msg(subjects.JOBS_STREAM, sequence)
        except nats.js.errors.NotFoundError:
            continue
        headers = message.headers or {}
        video_id = headers[subjects.VIDEO_HEADER].split()[0]
        if video_id in video_ids:
            plain = {subjects.VIDEO_HEADER: headers[subjects.VIDEO_HEADER]}
            found[video_id] = (message.data, plain)
    return list(found.values())


async def _publish(stream: Any, messages: list[tuple[bytes, dict[str, str]]]) -> None:
    """Without the message's id: the bus itself must not be what keeps repeats out."""
    for data, headers in messages:
        await stream.publish(subjects.JOBS_SUBJECT, data, headers=headers)
