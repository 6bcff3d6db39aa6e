"""One address for all gateways of docker-compose.yml, however many there are.

Hands each connection to one replica, in turn, as bytes: it reads no calls and knows no secrets. Clients that lose a
replica connect again and get another one; a gateway renews its connections every two minutes, so new replicas get
their share. From the environment: FRONT_LISTEN and FRONT_GATEWAYS, `host:port` each.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
from collections.abc import Awaitable, Callable

CONNECT_SECONDS = 2.0
IDLE_SECONDS = 60
CONNECTIONS = 2000
PIECE_BYTES = 64 * 1024


class Front:
    """Connections in, connections out, to whatever addresses are found at that moment."""

    def __init__(self, find: Callable[[], Awaitable[list[str]]], port: int) -> None:
        self._find = find
        self._port = port
        self._turn = itertools.count()
        self._open = 0

    async def serve(self, listen: str, stopping: asyncio.Event) -> None:
        """Until it is told to end; what is open then is cut, and callers try again."""
        host, _, port = listen.rpartition(":")
        server = await asyncio.start_server(self._take, host, int(port), limit=PIECE_BYTES)
        await stopping.wait()
        server.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= CONNECTIONS:
                await self._join(reader, writer)
        except OSError:
            pass  # one of both went away
        finally:
            self._open -= 1
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asks = await self._gateway()
        try:
            _keep_alive(writer)
            _keep_alive(asks)
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, asks))
                group.create_task(_copy(answers, writer))
        except* OSError:
            pass
        finally:
            asks.transport.abort()

    async def _gateway(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the replica whose turn it is, or to the next one that answers. Raises OSError."""
        async with asyncio.timeout(CONNECT_SECONDS):
            addresses = await self._find()
        first = next(self._turn)
        for number in range(len(addresses)):
            address = addresses[(first + number) % len(addresses)]
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await asyncio.open_connection(address, self._port, limit=PIECE_BYTES)
            except OSError:
                continue
        raise ConnectionError("no gateway answers")


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As fast as the slower side; its end is passed on."""
    while piece := await reader.read(PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    writer.write_eof()


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    """A peer that vanished without a word is noticed."""
    found = writer.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)


def main() -> None:
    host, _, port = os.environ["FRONT_GATEWAYS"].rpartition(":")

    async def find() -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        return sorted({str(one[4][0]) for one in found})

    async def serve() -> None:
        stopping = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, stopping.set)
        await Front(find, int(port)).serve(os.environ["FRONT_LISTEN"], stopping)

    asyncio.run(serve())


if __name__ == "__main__":
    main()
