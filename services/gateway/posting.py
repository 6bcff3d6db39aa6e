"""One POST to a stranger's address: judged, resolved once, connected to as resolved; no redirects, all bounded."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Mapping
from email import utils
from pathlib import Path

import certifi
import h11

from kit import egress, errors
from services.gateway import webhooks

MAX_BODY_BYTES = 4096
MAX_HEAD_BYTES = 16 * 1024
_READ_BYTES = 4096
_CLOSE_SECONDS = 1.0


class Poster:
    """Sends. Networks that are trusted may be private, spoken to without TLS and at any port."""

    def __init__(self, networks: str, ca_file: Path | None, seconds: float) -> None:
        self._networks = egress.networks(networks)
        self._trust = ssl.create_default_context(cafile=str(ca_file or Path(certifi.where())))
        self._trust.set_alpn_protocols(["http/1.1"])
        self._seconds = seconds

    async def judge(self, url: str) -> tuple[egress.Target, str]:
        """What the URL means, and the address to connect to. Raises InvalidArgument/URL_NOT_ALLOWED."""
        target = egress.target(url, plain=bool(self._networks))
        try:
            async with asyncio.timeout(self._seconds):
                found = await egress.resolve(target)
        except (OSError, TimeoutError):
            raise egress.not_allowed("its host is not known") from None
        return target, egress.check(found, target.port, self._networks, tls=target.tls)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> webhooks.Answer:
        """What came of it. Never raises for the endpoint's sake, and never takes longer than its time."""
        began = time.monotonic()
        status, retry_after, why = 0, 0.0, ""
        try:
            async with asyncio.timeout(self._seconds):
                status, retry_after = await self._post(url, headers, body)
        except errors.InvalidArgument as error:
            why = error.message
        except TimeoutError:
            why = f"no answer within {self._seconds:g} s"
        except ssl.SSLError as error:
            why = f"TLS: {error.reason or error}"
        except h11.RemoteProtocolError:
            why = "its answer is not HTTP/1.1"
        except OSError as error:
            why = f"no connection: {error.strerror or type(error).__name__}"
        if status and not 200 <= status < 300:
            redirect = "; redirects are not followed" if 300 <= status < 400 else ""
            why = f"it answered {status}{redirect}"
        duration_ms = int((time.monotonic() - began) * 1000)
        return webhooks.Answer(status, duration_ms, why[: webhooks.MAX_ERROR_CHARS], retry_after)

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, float]:
        target, address = await self.judge(url)
        secure = {"ssl": self._trust, "server_hostname": target.host} if target.tls else {}
        reader, writer = await asyncio.open_connection(
            address, target.port, limit=MAX_HEAD_BYTES, **secure
        )
        try:
            return await _exchange(reader, writer, target, headers, body)
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await writer.wait_closed()


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    target: egress.Target,
    headers: Mapping[str, str],
    body: bytes,
) -> tuple[int, float]:
    """Status and the seconds of Retry-After. The answer's body is of no interest, and read only so far."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
    named = {**headers, "host": _host(target), "content-length": str(len(body))}
    request = h11.Request(
        method="POST",
        target=target.path,
        headers=[*named.items(), ("connection", "close")],
    )
    parts = (connection.send(request), connection.send(h11.Data(body)))
    writer.write(b"".join(part for part in parts if part))
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
    status, retry_after, read = 0, 0.0, 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response):
            status, retry_after = event.status_code, _seconds(event)
        elif isinstance(event, h11.Data):
            read += len(event.data)
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            break
        if status and (read >= MAX_BODY_BYTES or not 200 <= status < 300):
            break
    if not status:
        raise ConnectionResetError("closed without an answer")
    return status, retry_after


def _host(target: egress.Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    usual = egress.HTTPS_PORT if target.tls else 80
    return host if target.port == usual else f"{host}:{target.port}"


def _seconds(response: h11.Response) -> float:
    """Retry-After: in seconds, or a moment, which the answer's own Date makes seconds of: clocks may differ."""
    found = {name: value.decode("ascii", "replace") for name, value in response.headers}
    wanted = found.get(b"retry-after", "")
    if wanted.isdigit() and len(wanted) < 8:
        return float(wanted)
    try:
        until, now = (utils.parsedate_to_datetime(text) for text in (wanted, found[b"date"]))
        return max(0.0, (until - now).total_seconds())
    except (KeyError, TypeError, ValueError):  # none, or one with a zone and one without
        return 0.0
