"""A bad network between the generator and each of its four neighbours, while videos are made."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from tests import invariants
from tests import proxy as proxies
from tests import system as systems
from tests.fault import orders
from tests.waiting import eventually

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(600)]

LINKS = ("postgres", "nats", "storage", "provider")
FAULTS = ("cut", "refuse", "half_close", "silence", "delay", "drip")
STRIKES = 3
LONGEST_SECONDS = 3.0
"""Of a fault: past every lease. A create that was held back so long still arrives: the settle time covers it."""
BEFORE_POST_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Net:
    """The system, its generator behind a proxy on each side."""

    system: systems.System
    proxies: dict[str, proxies.Proxy]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def net(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Net]:
    folder = tmp_path_factory.mktemp("network")
    changed = orders.overrides(folder, settle_seconds=LONGEST_SECONDS * systems.TIME_FACTOR)
    async with (
        systems.running(folder / "system", changed) as system,
        AsyncExitStack() as stack,
    ):
        urls = {
            "postgres": system.stack.addresses.database_url("generator"),
            "nats": system.stack.addresses.nats_url,
            "storage": f"//{system.stack.addresses.listen['storage']}",
            "provider": system.stack.addresses.provider_base_url,
            "azure": system.stack.addresses.azure_base_url,
        }
        servers = {name: urlsplit(url).netloc.rpartition("@")[2] for name, url in urls.items()}
        assert servers["azure"] == servers["provider"], "one simulator speaks both dialects"
        made = {
            link: await stack.enter_async_context(proxies.running(servers[link], f"{link}-proxy"))
            for link in LINKS
        }

        def through(name: str, link: str) -> str:
            return urls[name].replace(servers[link], made[link].address).removeprefix("//")

        env = {
            "GENERATOR_DATABASE_URL": through("postgres", "postgres"),
            "GENERATOR_NATS_URL": through("nats", "nats"),
            "GENERATOR_STORAGE_ADDRESS": through("storage", "storage"),
            "GENERATOR_PROVIDER_BASE_URL": through("provider", "provider"),
            "GENERATOR_AZURE_BASE_URL": through("azure", "provider"),
        }
        await system.supervisor.restart("generator", env=env)
        async with await system.account(1000) as client:
            await orders.Desk(system, random.Random(0), client).sentinels()
        assert all(proxy.accepted for proxy in made.values()), "somebody goes round a proxy"
        yield Net(system, made)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("link", LINKS)
async def test_bad_line(net: Net, link: str, fault: str, tmp_path: Path) -> None:
    """Just before a create is sent, then twice amid other steps; then all is well, and so are the videos."""
    dice = orders.dice(f"{link} {fault}")
    proxy = net.proxies[link]
    async with await net.system.account(1000) as client:
        desk = orders.Desk(net.system, dice, client)
        met_work = 0
        for strike in range(STRIKES):
            if strike == 0:
                net.system.arm("generator.submit.after_commit", f"sleep:{BEFORE_POST_SECONDS}")
            for dialect in orders.MODELS:
                await desk.ask(dialect)
            if strike == 0:
                await eventually(lambda: net.system.armed() == "", within_seconds=60)
            else:
                await _some_steps(net.system, dice.randint(0, 4))
            met_work += await orders.under_way(net.system)
            try:
                await _spoil(proxy, fault, dice)
                await orders.database_clock(net.system, dice.uniform(0.3, LONGEST_SECONDS))
            finally:
                await proxy.heal()
        assert met_work >= 2, "the line was bad while nothing was done"
        assert await desk.check(desk.orders, tmp_path) == []
    await net.system.quiet()
    assert net.system.supervisor.get("generator").running, "no bad line ends the process"


async def test_every_invariant_holds_after_all_bad_lines(net: Net) -> None:
    await net.system.quiet()
    assert await invariants.violations(net.system) == []


async def _spoil(proxy: proxies.Proxy, fault: str, dice: random.Random) -> None:
    match fault:
        case "cut":
            proxy.cut()
        case "refuse":
            await proxy.refuse()
        case "half_close":
            proxy.half_close()
        case "silence":
            proxy.silence()
        case "delay":
            proxy.delay(dice.uniform(0.05, 1.0))
        case "drip":
            proxy.drip(dice.choice((7, 97, 997)), 0.01)
        case _:
            raise ValueError(fault)


async def _some_steps(system: systems.System, count: int) -> None:
    """Until attempts have changed their states so often; where fewer changes are left, that is good as well."""
    start = await orders.moves(system)

    async def gone_on() -> bool:
        return await orders.moves(system) >= start + count

    with contextlib.suppress(AssertionError):
        await eventually(gone_on, within_seconds=5)
