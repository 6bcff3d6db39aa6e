"""Is it up? Asked in the real protocol, answered with yes or no, within a timeout."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit

import asyncpg
import grpc
import nats as nats_client
import nats.errors as nats_errors
from grpc_health.v1 import health_pb2

from services.local import errors


async def http_status(host: str, port: int, path: str = "/", timeout_seconds: float = 2.0) -> int:
    """The status of a plain GET; 0 when nobody answers in HTTP."""
    with contextlib.suppress(OSError, TimeoutError, ValueError, IndexError):
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
                writer.write(request.encode())
                line = await reader.readline()
                return int(line.split()[1])
            finally:
                writer.close()
    return 0


async def http_answers(endpoint: str) -> bool:
    """Any answer below 500 from `host:port` or a URL: S3 refuses the unsigned, but it is there."""
    parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    default = 443 if parts.scheme == "https" else 80
    if (
        parts.scheme == "https"
    ):  # only an outer server; that it accepts connections is all we can ask cheaply
        return await tcp_accepts(parts.hostname or "", parts.port or default)
    status = await http_status(parts.hostname or "", parts.port or default, parts.path or "/")
    return 0 < status < 500


async def tcp_accepts(host: str, port: int, timeout_seconds: float = 2.0) -> bool:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return True
    return False


async def postgres_answers(url: str, timeout_seconds: float = 2.0) -> bool:
    """Raises LocalError when it is up and refuses our password: waiting would not help."""
    try:
        connection = await asyncpg.connect(url, timeout=timeout_seconds)
        try:
            return await connection.fetchval("SELECT 1", timeout=timeout_seconds) == 1
        finally:
            await connection.close(timeout=timeout_seconds)
    except asyncpg.InvalidAuthorizationSpecificationError as error:
        raise errors.LocalError(f"Postgres refuses the login: {error}") from error
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return False


async def _ignore(_: Exception) -> None:
    """The client would log every refused connection of a server that is still starting."""


async def nats_answers(url: str, timeout_seconds: float = 2.0) -> bool:
    """JetStream answers, not just the port."""
    try:
        async with asyncio.timeout(timeout_seconds):
            client = await nats_client.connect(url, allow_reconnect=False, error_cb=_ignore)
            try:
                await client.jetstream().account_info()
            finally:
                await client.close()
    except (OSError, TimeoutError, nats_errors.Error):
        return False
    return True


async def grpc_serving(address: str, timeout_seconds: float = 2.0) -> bool:
    """grpc.health.v1 says SERVING for the whole server."""
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        # Not the generated stub: it carries no types.
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING
