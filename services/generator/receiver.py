"""Where providers' webhooks come in: `POST /webhooks/PROVIDER_ACCOUNT`, one a connection, everything bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import h11

from kit import telemetry
from services.generator import webhooks
from services.generator.store import hints

log = telemetry.logger(__name__)

MAX_BODY_BYTES = 64 * 1024
MAX_HEAD_BYTES = 16 * 1024
MAX_CONNECTIONS = 64
REQUEST_SECONDS = 5.0
_PATH = "/webhooks/"


class Receiver:
    """The loop that serves them. Whoever is not let in learns nothing: not whether an account or a job exists."""

    def __init__(
        self, listen: str, keys: Mapping[str, tuple[bytes, ...]], store: hints.HintStore
    ) -> None:
        host, _, port = listen.rpartition(":")
        self._address = (host, int(port))
        self._keys = keys
        self._store = store
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Serves until told to stop, then lets what is being answered come to its end."""
        server = await asyncio.start_server(self._connected, *self._address, limit=MAX_HEAD_BYTES)
        async with server:
            log.info("webhooks_served", port=server.sockets[0].getsockname()[1])
            await stopping.wait()
            server.close()
            if self._connections:
                await asyncio.wait(self._connections)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._connections) >= MAX_CONNECTIONS:
                return
            self._connections.add(task)
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._serve(reader, writer)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        try:
            request, body = await _read(wire, reader)
            status = 413 if body is None else await self._answer(request, body)
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
        if wire.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [("content-length", "0"), ("connection", "close")]
        response = h11.Response(status_code=status, headers=headers)
        writer.write((wire.send(response) or b"") + (wire.send(h11.EndOfMessage()) or b""))
        await writer.drain()

    async def _answer(self, request: h11.Request, body: bytes) -> int:
        path = request.target.decode().partition("?")[0]
        if request.method != b"POST" or not path.startswith(_PATH):
            return 404
        account = path.removeprefix(_PATH)
        headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
        if not webhooks.signed_by_us(self._keys.get(account), headers, body, time.time()):
            log.warning("webhook_refused")
            return 401
        job_id = webhooks.job_of(body)
        if job_id is None:
            log.info("webhook_about_no_job", provider_account=account)
            return 204
        try:
            new = await self._store.add(account, headers["webhook-id"], job_id)
        except Exception as error:
            # The sender tries again, for days.
            log.warning("webhook_not_stored", provider_account=account, error=repr(error))
            return 503
        log.info("webhook_taken", provider_account=account, new=new)
        return 204


async def _read(
    wire: h11.Connection, reader: asyncio.StreamReader
) -> tuple[h11.Request, bytes | None]:
    """The request and its body; None for one that is too long. Raises RemoteProtocolError, ConnectionError."""
    request, body = None, bytearray()
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(await reader.read(MAX_HEAD_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                assert request is not None
                return request, None
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            return request, bytes(body)
        else:
            raise ConnectionError("the sender hung up")
