"""deploy/compose/front.py: one address before several gateways. `make test-compose` has real ones behind it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest

from services.local import places
from tests.waiting import eventually

FILE = Path(__file__).parents[2] / "deploy" / "compose" / "front.py"
ADDRESSES = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
ANSWER_SECONDS = 30.0
MUCH = b"0123456789abcdef" * 500_000


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("front", FILE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Gateways:
    """What stands behind: each says who it is, and after the caller's end sends back all that came."""

    def __init__(self) -> None:
        self.port = places.free_port("gateways")
        self.addresses = list(ADDRESSES)
        self.servers: dict[str, asyncio.Server] = {}

    async def find(self) -> list[str]:
        return self.addresses

    async def start(self, address: str) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(f"{address}\n".encode())
            writer.write(await reader.read())
            writer.close()

        self.servers[address] = await asyncio.start_server(answer, address, self.port)


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Gateways, str]]:
    """Three gateways, and the address of what is before them."""
    gateways = Gateways()
    listen = f"{places.HOST}:{places.free_port('front')}"
    for address in ADDRESSES:
        await gateways.start(address)
    stopping = asyncio.Event()
    front = module().Front(gateways.find, gateways.port)
    async with asyncio.TaskGroup() as group:
        group.create_task(front.serve(listen, stopping))

        async def listening() -> bool:
            with contextlib.suppress(OSError):
                return await asked(listen) != ""
            return False

        await eventually(listening)
        yield gateways, listen
        stopping.set()
    for server in gateways.servers.values():
        server.close()


async def asked(listen: str, body: bytes = b"") -> str:
    """Who answered; all that was sent came back."""
    host, _, port = listen.partition(":")
    async with asyncio.timeout(ANSWER_SECONDS):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(body)
            writer.write_eof()
            who = (await reader.readline()).decode().strip()
            assert await reader.read() == body
            return who
        finally:
            writer.close()


async def test_connections_go_to_each_gateway_in_turn() -> None:
    async with running() as (_, listen):
        who = [await asked(listen) for _ in range(6)]
        assert sorted(who) == sorted(ADDRESSES * 2)
        assert who[:3] == who[3:]


async def test_what_is_sent_comes_whole_both_ways_at_once() -> None:
    async with running() as (_, listen):
        who = await asyncio.gather(*(asked(listen, MUCH) for _ in range(6)))
        assert set(who) == set(ADDRESSES)


async def test_a_gateway_that_does_not_answer_is_passed_over() -> None:
    async with running() as (gateways, listen):
        gateways.servers[ADDRESSES[0]].close()
        who = [await asked(listen) for _ in range(6)]
        assert set(who) == set(ADDRESSES[1:])


async def test_a_new_gateway_is_found_and_a_removed_one_left_alone() -> None:
    async with running() as (gateways, listen):
        gateways.addresses[:] = ["127.0.0.5", ADDRESSES[0]]
        await gateways.start("127.0.0.5")
        assert {await asked(listen) for _ in range(4)} == {"127.0.0.5", ADDRESSES[0]}


@pytest.mark.parametrize("left", [[], ["127.0.0.9"]])
async def test_without_any_gateway_callers_are_told_at_once(left: list[str]) -> None:
    async with running() as (gateways, listen):
        gateways.addresses[:] = left
        with contextlib.suppress(ConnectionError):
            assert await asked(listen) == ""
        gateways.addresses[:] = ADDRESSES
        assert await asked(listen) in ADDRESSES
