"""One HTTPS GET from an address that was judged, in threads, that can be cut off at any moment."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from kit import egress
from services.storage import threads

T = TypeVar("T")

STALL_SECONDS = 5.0
READ_BYTES = 256 * 1024


class Fetch:
    """A connection to that address and nothing else; the certificate must be the name's.

    A server that sends a byte now and then satisfies every timeout of a socket: leaving the block shuts the socket, and
    the thread that waits for it is free again.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        target: egress.Target,
        address: str,
        trust: ssl.SSLContext,
    ) -> None:
        self._pool = pool
        self._target = target
        self._address = address
        self._trust = trust
        self._socket: ssl.SSLSocket | None = None
        self._answer: http.client.HTTPResponse | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._cut()
        if self._answer is not None:
            self._answer.close()
        if self._socket is not None:
            self._socket.close()

    async def ask(self) -> http.client.HTTPResponse:
        """Sends the request; status and headers of the answer."""
        self._answer = await self._run(self._ask)
        return self._answer

    async def read(self) -> bytes:
        """Some of the bytes that came; none: this is the end, and all came that were announced."""
        answer = self._answer
        assert answer is not None
        piece = await self._run(lambda: answer.read1(READ_BYTES))
        if not piece and answer.length:
            raise http.client.IncompleteRead(b"", answer.length)
        return piece

    async def _run(self, call: Callable[[], T]) -> T:
        try:
            return await threads.run(self._pool, call, self._cut)
        except TimeoutError as error:
            raise ConnectionError("the server stalls") from error

    def _cut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                # Not SSLSocket's own, which takes the session from under the thread that reads.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _ask(self) -> http.client.HTTPResponse:
        target = self._target
        plain = socket.create_connection((self._address, target.port), STALL_SECONDS)
        self._socket = self._trust.wrap_socket(
            plain, server_hostname=target.host, do_handshake_on_connect=False
        )
        self._socket.do_handshake()
        connection = http.client.HTTPSConnection(target.host, target.port)
        connection.sock = self._socket
        headers = {
            "accept": "image/jpeg, image/png, image/webp, image/avif",
            "connection": "close",
            "user-agent": "framewire-import",
        }
        connection.request("GET", target.path, headers=headers)
        return connection.getresponse()
