"""How the SDK speaks to the gateway: one channel, credentials, and retries of what is safe to send again."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from framewire import errors

T = TypeVar("T")

STREAM_SECONDS = 600.0
"""A stream is opened anew after so long, so that none waits for ever on a dead server."""
_STEADY_SECONDS = 5.0
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED)
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024


class Transport:
    """A channel. Calls raise FramewireError; those that are idempotent are tried again for `retry_seconds`."""

    def __init__(self, address: str, api_key: str, retry_seconds: float) -> None:
        if not (api_key.isascii() and api_key.isprintable()):
            message = "the API key has characters that no key has; check it"
            raise failure(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID", message)
        self.address = address
        self._retry_seconds = retry_seconds
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        self.channel = _channel(address)

    async def close(self) -> None:
        """Ends what is under way."""
        await self.channel.close()

    async def unary(self, send: Callable[..., Awaitable[T]], request: object) -> T:
        """One idempotent call, with retries of the same request within the deadline."""
        return await self._retried(
            lambda left: send(request, metadata=self._metadata, timeout=left)
        )

    async def collect(
        self, send: Callable[..., Any], request: object, *, once: bool = False
    ) -> list[Any]:
        """One idempotent server stream that ends by itself, whole; begun anew where it breaks off, unless `once`."""

        async def whole(_: float) -> list[Any]:
            call = send(request, metadata=self._metadata, timeout=STREAM_SECONDS)
            return [response async for response in call]

        return await self._retried(whole, 0.0 if once else None)

    async def upload(
        self, send: Callable[..., Awaitable[T]], requests: Callable[[], AsyncIterator[object]]
    ) -> T:
        """One idempotent client stream; `requests` makes the same stream for each try."""
        return await self._retried(
            lambda left: send(requests(), metadata=self._metadata, timeout=left)
        )

    async def _retried(
        self, attempt: Callable[[float], Awaitable[T]], retry_seconds: float | None = None
    ) -> T:
        patience = Patience(self._retry_seconds if retry_seconds is None else retry_seconds)
        while True:
            try:
                return await attempt(patience.left())
            except grpc.aio.AioRpcError as error:
                await patience.wait_after(errors.from_rpc(error))

    async def watch(
        self, send: Callable[..., Any], next_request: Callable[[], object]
    ) -> AsyncGenerator[Any, None]:
        """A server stream without end: opened again with `next_request()` whenever it breaks.

        None in it: the server ended it in good order. Who thinks so too stops taking.
        """
        patience = Patience(self._retry_seconds)
        while True:
            opened = time.monotonic()
            call = send(next_request(), metadata=self._metadata, timeout=STREAM_SECONDS)
            try:
                async for response in call:
                    patience.renew()
                    yield response
                yield None
                broken = _ended()
            except grpc.aio.AioRpcError as error:
                broken = errors.from_rpc(error)
            finally:
                call.cancel()
            if time.monotonic() - opened > _STEADY_SECONDS:
                patience.renew()
            if not _renewal(broken, time.monotonic() - opened):
                await patience.wait_after(broken)


class Patience:
    """How long one thing is tried, and the pauses between, with jitter."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """It works again: the time starts anew."""
        self._until = time.monotonic() + self._seconds
        self._tries = 0

    def left(self) -> float:
        """Seconds that a try may take."""
        return max(0.001, self._until - time.monotonic())

    async def wait_after(self, error: errors.FramewireError) -> None:
        """Sleeps until the next try; raises the error when none is to be made."""
        exhausted = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        again = error.code in _AGAIN or (exhausted and error.retry_after_seconds is not None)
        # An operator's pause, and a recovery, do not pass in seconds.
        again &= error.reason not in ("ADMISSION_PAUSED", "RECOVERY")
        ceiling = min(2.0, 0.1 * 2**self._tries)
        # Full jitter would let a crowd of watchers come back at once too often: half of it is fixed.
        pause = max(ceiling * random.uniform(0.5, 1.0), error.retry_after_seconds or 0.0)
        if not again or time.monotonic() + pause >= self._until:
            raise error from None
        self._tries += 1
        await asyncio.sleep(pause)


def _renewal(error: errors.FramewireError, age_seconds: float) -> bool:
    """Our own limit on a stream's age, which is no trouble."""
    return error.code is grpc.StatusCode.DEADLINE_EXCEEDED and age_seconds >= STREAM_SECONDS - 1.0


def _ended() -> errors.FramewireError:
    message = "the server ended the stream before the video was settled"
    return failure(grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE", message)


def failure(
    code: grpc.StatusCode, reason: str, message: str, **metadata: object
) -> errors.FramewireError:
    """A failure on our side of the wire, as callers know failures."""
    texts = {name: str(value) for name, value in metadata.items()}
    return errors.FramewireError(code, reason, message, texts, (), None)


def _channel(address: str) -> grpc.aio.Channel:
    """`https://host` is TLS with the system's roots; `host:port` and `http://host` are plain."""
    scheme, _, rest = address.rpartition("://")
    target = rest.rstrip("/")
    config = {"loadBalancingConfig": [{"round_robin": {}}]}
    options: list[tuple[str, str | int]] = [
        ("grpc.primary_user_agent", "framewire-python"),
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", 0),  # ours know which calls are safe and honour RetryInfo
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ]
    if is_loopback(target.rpartition(":")[0] or target):
        options.append(("grpc.enable_http_proxy", 0))  # a company proxy cannot reach us here
    if scheme == "https":
        if ":" not in target:
            target += ":443"
        return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options)
    if scheme not in ("", "http"):
        message = f"address {address!r}: give host:port, or https://host for TLS"
        raise failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message)
    return grpc.aio.insecure_channel(target, options)


def is_loopback(host: str) -> bool:
    """Whether this names our own machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
