"""A TCP proxy whose line can be made bad: cut, refused, half closed, silent, slow, dripping."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from services.local import places

CHUNK_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST


class Proxy:
    """One address in front of another. Bad from the call of a fault until `heal`; nothing is lost on a live line."""

    def __init__(self, upstream: str, name: str) -> None:
        self._upstream = upstream
        self._name = name
        self._port = places.free_port(name)
        self._server: asyncio.Server | None = None
        self._lines: set[_Line] = set()
        self._changed = asyncio.Event()
        self.chunk_delay_seconds = 0.0
        self.chunk_bytes = CHUNK_BYTES
        self.silent = False
        self.accepted = 0
        """Lines that were opened since the start."""
        self.held_bytes = 0
        """What was said on lines that are open and has not come through yet."""

    @property
    def address(self) -> str:
        """host:port to be given instead of the real one; the same for all its life."""
        return f"{places.HOST}:{self._port}"

    async def start(self) -> None:
        """Listens."""
        self._server = await asyncio.start_server(self._accepted, places.HOST, self._port)

    async def stop(self) -> None:
        """Cuts everything and listens no more. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        tasks = [line.task for line in self._lines if line.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    # Faults

    def cut(self) -> None:
        """Resets every line, both ways, as a router that forgets its connections does. New ones are let in."""
        for line in tuple(self._lines):
            line.reset()

    async def refuse(self) -> None:
        """Cuts, and refuses new lines."""
        await self.stop()

    def half_close(self) -> None:
        """Each line ends towards the client only: what the client says still arrives, no answer comes any more."""
        for line in tuple(self._lines):
            line.end_answers()

    def silence(self) -> None:
        """A partition: lines stay open and new ones open, nothing comes through; all that was said does when healed."""
        self.silent = True

    def delay(self, seconds: float) -> None:
        """Whatever comes in is passed on so much later."""
        self.chunk_delay_seconds = seconds

    def drip(self, size_bytes: int, seconds: float) -> None:
        """So few bytes at a time, with a pause after each."""
        self.chunk_bytes, self.chunk_delay_seconds = size_bytes, seconds

    async def heal(self) -> None:
        """As good as new. What is on its way comes through at once."""
        self.silent, self.chunk_delay_seconds, self.chunk_bytes = False, 0.0, CHUNK_BYTES
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self._server is None:
            await self.start()

    # Inner works

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        line = _Line(self, writer)
        self._lines.add(line)
        line.task = asyncio.create_task(line.run(reader, self._upstream))
        line.task.add_done_callback(lambda _: self._lines.discard(line))

    @contextlib.contextmanager
    def holding(self, size_bytes: int) -> Iterator[None]:
        """So much waits meanwhile."""
        self.held_bytes += size_bytes
        try:
            yield
        finally:
            self.held_bytes -= size_bytes

    async def weather(self) -> None:
        """Waits as long as the next bytes take to come through."""
        while self.silent:
            await self._changed.wait()
        if self.chunk_delay_seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self.chunk_delay_seconds)


class _Line:
    """One connection through the proxy: the client's socket, ours to the upstream, a pump for each direction."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._upstream: asyncio.StreamWriter | None = None
        self._answers_ended = False
        self.task: asyncio.Task[None] | None = None

    async def run(self, client: asyncio.StreamReader, upstream: str) -> None:
        host, _, port = upstream.partition(":")
        try:
            await self._proxy.weather()
            answers, self._upstream = await asyncio.open_connection(host, int(port))
            await asyncio.gather(
                self._pump(client, self._upstream), self._pump(answers, self._client)
            )
        except OSError:
            self.reset()
        finally:
            for writer in (self._client, self._upstream):
                if writer is not None:
                    writer.close()

    def reset(self) -> None:
        for writer in (self._client, self._upstream):
            opened = writer.get_extra_info("socket") if writer is not None else None
            if writer is not None and opened is not None:
                with contextlib.suppress(OSError):
                    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                writer.transport.abort()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()

    def end_answers(self) -> None:
        self._answers_ended = True
        with contextlib.suppress(OSError, RuntimeError):
            self._client.write_eof()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            while data:
                with self._proxy.holding(len(data)):
                    await self._proxy.weather()
                part, data = data[: self._proxy.chunk_bytes], data[self._proxy.chunk_bytes :]
                if writer is self._client and self._answers_ended:
                    continue
                writer.write(part)
                await writer.drain()
        await self._proxy.weather()
        if not (writer is self._client and self._answers_ended) and writer.can_write_eof():
            writer.write_eof()


@asynccontextmanager
async def running(upstream: str, name: str) -> AsyncIterator[Proxy]:
    """A proxy in front of `upstream` (host:port), good until a fault is called."""
    proxy = Proxy(upstream, name)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
