"""The proxy of the network faults does what each fault says: a fault that does nothing would prove nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.local import places
from tests import proxy as proxies
from tests.waiting import eventually


@pytest.fixture
def heard() -> list[bytes]:
    """The lines that came to the server behind the proxy."""
    return []


@pytest.fixture
async def proxy(heard: list[bytes]) -> AsyncIterator[proxies.Proxy]:
    """Before a server that says everything back in capitals."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                heard.append(line)
                writer.write(line.upper())
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, places.HOST, 0, limit=1_000_000)
    port = server.sockets[0].getsockname()[1]
    async with proxies.running(f"{places.HOST}:{port}", "echo") as running:
        yield running
    server.close()


class Caller:
    """A client of the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def of(cls, proxy: proxies.Proxy) -> AsyncIterator[Caller]:
        host, _, port = proxy.address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1_000_000)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def say(self, text: bytes) -> None:
        self.writer.write(text + b"\n")

    async def hear(self, within_seconds: float = 5) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), within_seconds)


async def test_a_good_line_passes_everything_on(proxy: proxies.Proxy) -> None:
    async with Caller.of(proxy) as caller:
        caller.say(b"a" * 300_000)
        assert len(await caller.hear()) == 300_001
        caller.writer.write_eof()
        assert await caller.hear() == b""


async def test_cut_and_refused(proxy: proxies.Proxy) -> None:
    async with Caller.of(proxy) as caller:
        caller.say(b"one")
        assert await caller.hear() == b"ONE\n"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await caller.hear()
    await proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        async with Caller.of(proxy):
            pass
    await proxy.heal()
    async with Caller.of(proxy) as again:
        again.say(b"two")
        assert await again.hear() == b"TWO\n"


async def test_half_closed_what_is_said_arrives_and_no_answer_comes(
    proxy: proxies.Proxy, heard: list[bytes]
) -> None:
    async with Caller.of(proxy) as caller:
        caller.say(b"one")
        assert await caller.hear() == b"ONE\n"
        proxy.half_close()
        assert await caller.hear() == b""
        caller.say(b"two")
        await eventually(lambda: b"two\n" in heard)
        assert await caller.hear() == b""


async def test_silent_until_healed(proxy: proxies.Proxy) -> None:
    async with Caller.of(proxy) as caller:
        proxy.silence()
        caller.say(b"one")
        with pytest.raises(TimeoutError):
            await caller.hear(within_seconds=0.1)
        assert proxy.held_bytes == len(b"one\n")
        await proxy.heal()
        assert await caller.hear() == b"ONE\n"
        assert proxy.held_bytes == 0


async def test_slow_and_dripping(proxy: proxies.Proxy) -> None:
    async with Caller.of(proxy) as caller:
        proxy.delay(0.05)
        started = time.monotonic()
        caller.say(b"one")
        assert await caller.hear() == b"ONE\n"
        assert time.monotonic() - started >= 0.1, "the way there and the way back"
        proxy.drip(1, 0.01)
        started = time.monotonic()
        caller.say(b"12345")
        assert await caller.hear() == b"12345\n"
        assert time.monotonic() - started >= 0.12, "six bytes each way"


async def test_ends_with_all_its_lines_also_when_silent(proxy: proxies.Proxy) -> None:
    proxy.silence()
    async with Caller.of(proxy) as caller:
        caller.say(b"one")
        await eventually(lambda: proxy.accepted == 1)
        await proxy.stop()
        with pytest.raises(ConnectionResetError):
            await caller.hear()
