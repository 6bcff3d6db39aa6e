"""An HTTP front before an S3 server that does what S3 servers do on bad days: refuses, stalls, cuts, drips."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from services.local import places

CHUNK_BYTES = 64 * 1024
HEAD_BYTES = 64 * 1024
EVERY = "HEAD GET PUT POST DELETE"
_XML = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>planted</Message></Error>"
)


@dataclass(slots=True)
class Fault:
    """What is done to requests of these methods whose path matches, the first `times` of them (None: all)."""

    do: Callable[[_Exchange], object]
    methods: str = EVERY
    path: str = ""
    times: int | None = None
    struck: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method not in self.methods.split() or not re.search(self.path, path):
            return False
        if self.times is not None and self.struck >= self.times:
            return False
        self.struck += 1
        return True


@dataclass(slots=True)
class _Exchange:
    """One request, and where its answer goes. Each has a connection of its own."""

    front: Front
    method: str
    head: bytes
    length: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def drop_body(self) -> None:
        left = self.length
        while left and (data := await self.reader.read(min(left, CHUNK_BYTES))):
            left -= len(data)

    async def forward(self, pass_on: Callable[[bytes], object] | None = None) -> None:
        """To the real server; its answer goes to the client, or through `pass_on`."""
        host, _, port = self.front.upstream().partition(":")
        answers, server = await asyncio.open_connection(host, int(port))
        try:
            lines = self.head.split(b"\r\n")
            kept = [line for line in lines if not line.lower().startswith(b"connection:")]
            server.write(b"\r\n".join([kept[0], b"Connection: close", *kept[1:]]))
            sending = asyncio.create_task(self._send_body(server))
            try:
                while data := await answers.read(CHUNK_BYTES):
                    if pass_on is None:
                        self.writer.write(data)
                    else:
                        made = pass_on(data)
                        if asyncio.iscoroutine(made):
                            await made
                    await self.writer.drain()
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        finally:
            server.close()

    async def _send_body(self, server: asyncio.StreamWriter) -> None:
        left = self.length
        while left and (data := await self.reader.read(min(left, CHUNK_BYTES))):
            left -= len(data)
            server.write(data)
            await server.drain()

    def cut(self) -> None:
        self.writer.transport.abort()


@dataclass(slots=True)
class Front:
    """One address before a server. Good until a fault is added; then until `heal`."""

    port: int
    upstream: Callable[[], str] = str
    """host:port of the real one, asked for each time: it may start later."""
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of what was asked."""
    _healed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"{places.HOST}:{self.port}"

    # Faults

    def add(
        self,
        do: Callable[[_Exchange], object],
        methods: str = EVERY,
        path: str = "",
        times: int | None = None,
    ) -> Fault:
        fault = Fault(do, methods, path, times)
        self.faults.append(fault)
        return fault

    def answer(
        self, status: int, code: str, *, date: timedelta = timedelta(), body: bytes | None = None
    ) -> Callable[[_Exchange], object]:
        """Refuses as S3 does: with XML, or with `body`; its clock is ahead by `date`."""

        async def do(exchange: _Exchange) -> None:
            await exchange.drop_body()
            content = _XML.format(code).encode() if body is None else body
            said = b"" if exchange.method == "HEAD" else content
            lines = (
                f"HTTP/1.1 {status} Planted",
                f"Date: {format_datetime(datetime.now(UTC) + date, usegmt=True)}",
                "Content-Type: application/xml",
                f"Content-Length: {len(content)}",
                "Connection: close",
            )
            exchange.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + said)

        return do

    def cut(self, exchange: _Exchange) -> None:
        """Resets the connection instead of an answer; what was asked is not done."""
        exchange.cut()

    async def lose(self, exchange: _Exchange) -> None:
        """Does what was asked and resets the connection instead of the answer."""
        await exchange.forward(lambda data: None)
        exchange.cut()

    async def stall(self, exchange: _Exchange) -> None:
        """Takes the request and says nothing."""
        await self._healed.wait()
        exchange.cut()

    async def halve(self, exchange: _Exchange) -> None:
        """Cuts the answer short."""
        passed = 0

        def some(data: bytes) -> None:
            nonlocal passed
            exchange.writer.write(data[: max(0, 700 - passed)])
            passed += len(data)

        await exchange.forward(some)
        exchange.cut()

    def drip(self, pieces: int, seconds: float) -> Callable[[_Exchange], object]:
        """Gives the answer in so many pieces, with a pause after each."""

        async def do(exchange: _Exchange) -> None:
            async def slowly(data: bytes) -> None:
                step = max(1, len(data) // pieces)
                for start in range(0, len(data), step):
                    exchange.writer.write(data[start : start + step])
                    await exchange.writer.drain()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._healed.wait(), seconds)

            await exchange.forward(slowly)

        return do

    def heal(self) -> None:
        """As good as new; what was held back is cut."""
        self.faults.clear()
        self._healed.set()
        self._healed = asyncio.Event()

    # Inner works

    def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            exchange = _Exchange(self, method, head, int(found[1]) if found else 0, reader, writer)
            self.seen.append((method, path))
            fault = next((one for one in self.faults if one.strikes(method, path)), None)
            made = exchange.forward() if fault is None else fault.do(exchange)
            if asyncio.iscoroutine(made):
                await made
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            writer.close()


@asynccontextmanager
async def running() -> AsyncIterator[Front]:
    """A front; whoever starts the real server says where it is."""
    front = Front(places.free_port("s3-front"))
    server = await asyncio.start_server(front.accepted, places.HOST, front.port, limit=HEAD_BYTES)
    try:
        yield front
    finally:
        server.close()
        await front.end()
