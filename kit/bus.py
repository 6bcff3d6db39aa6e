"""The bus: NATS JetStream behind one small face.

Postgres is the truth; everything here may be lost and is rung again.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from nats.js import errors as js_errors
from opentelemetry.trace import SpanKind

from framewire import subjects
from kit import loops, telemetry

log = telemetry.logger(__name__)

ACK_WAIT_SECONDS = 30
FETCH_SECONDS = 5.0
HEARTBEAT_SECONDS = 1.0
RENEW_SECONDS = 0.5
RECONNECT_SECONDS = 0.25
MONITOR_SECONDS = 10.0
MAX_ACK_PENDING = 256

BusError = (nats.errors.Error, js_errors.Error, OSError, asyncio.TimeoutError)
"""What an operation on the bus may raise while the bus is away."""


class Bus:
    """One connection, which comes back by itself. While it is away operations raise one of BusError, at once."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.opened = asyncio.Event()
        self.jetstream: JetStreamContext = client.jetstream(timeout=5)

    async def ensure_streams(self) -> None:
        """Makes the declared streams where they are missing. Idempotent; also heals a bus that lost its disk."""
        self._require()
        for stream in subjects.STREAMS:
            config = api.StreamConfig(
                name=stream.name,
                subjects=list(stream.subjects),
                retention=api.RetentionPolicy.WORK_QUEUE
                if stream.work_queue
                else api.RetentionPolicy.LIMITS,
                storage=api.StorageType.FILE,
                max_age=stream.max_age_seconds,
                duplicate_window=120,
            )
            try:
                await self.jetstream.stream_info(stream.name)
            except js_errors.NotFoundError:
                await self.jetstream.add_stream(config)

    async def stream_created(self, stream: str) -> str:
        """When the stream was made: another time than before means that it is another stream."""
        info = await self.jetstream.stream_info(stream)
        return info.created.isoformat() if info.created else ""

    async def publish(
        self,
        subject: str,
        data: bytes,
        headers: Mapping[str, str],
        message_id: str,
        timeout_seconds: float = 5.0,
    ) -> int:
        """Publishes durably and returns the stream's sequence. Raises one of BusError when that is not certain."""
        self._require()
        sent = {**telemetry.trace_headers(), **headers, "Nats-Msg-Id": message_id}
        try:
            ack = await self.jetstream.publish(subject, data, timeout=timeout_seconds, headers=sent)
        except js_errors.NoStreamResponseError:
            await self.ensure_streams()
            ack = await self.jetstream.publish(subject, data, timeout=timeout_seconds, headers=sent)
        return ack.seq

    async def tell(self, subject: str, data: bytes) -> None:
        """Publishes by core NATS: at most once, not stored. Never raises: nobody depends on it."""
        try:
            self._require()
            await self.client.publish(subject, data)
        except BusError as error:
            log.debug("tell_failed", subject=subject, error=repr(error))

    async def listen(
        self,
        subject: str,
        heard: Callable[[Msg], Awaitable[None]],
        stopping: asyncio.Event,
        queue: str = "",
    ) -> None:
        """Hears core NATS until told to stop; the client subscribes again by itself after an outage."""
        if await self.until_open(stopping):
            subscription = await self.client.subscribe(subject, queue=queue, cb=heard)
            await stopping.wait()
            await _quietly(subscription.unsubscribe())

    async def until_open(self, stopping: asyncio.Event) -> bool:
        """Waits for the first connection; false when told to stop before."""
        opened = asyncio.ensure_future(self.opened.wait())
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait({opened, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
            stop.cancel()
        return self.opened.is_set()

    def _require(self) -> None:
        if not self.client.is_connected:
            raise nats.errors.ConnectionReconnectingError


@asynccontextmanager
async def connect(url: str, name: str) -> AsyncIterator[Bus]:
    """A connection that keeps trying for ever. Opens at once, also while NATS is away: nobody waits for a doorbell."""

    async def reported(error: Exception) -> None:
        log.warning("bus_error", error=repr(error))

    client = Client()
    connected = Bus(client)
    telemetry.BUS_CONNECTED.set_function(lambda: float(client.is_connected))

    async def opening() -> None:
        await client.connect(
            [url],
            name=name,
            connect_timeout=2,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_SECONDS,  # pyright: ignore[reportArgumentType]
            error_cb=reported,
            pending_size=8 * 1024 * 1024,
        )
        connected.opened.set()

    attempt = asyncio.create_task(opening())
    try:
        yield connected
    finally:
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
        if connected.opened.is_set():
            await client.close()


@dataclass(frozen=True, slots=True)
class Server:
    """What a NATS server tells of its JetStream."""

    sync_always: bool
    stored_bytes: int
    may_store_bytes: int


def ask_server(monitor_url: str) -> Server:
    """By the monitoring port. Blocks; raises OSError or ValueError."""
    url = f"{monitor_url.rstrip('/')}/varz"
    with urllib.request.urlopen(url, timeout=MONITOR_SECONDS) as answer:  # noqa: S310 - ours
        told = json.load(answer).get("jetstream", {})
    config, stats = told.get("config", {}), told.get("stats", {})
    return Server(
        sync_always=bool(config.get("sync_always")),
        stored_bytes=int(stats.get("storage", 0)),
        may_store_bytes=int(config.get("max_storage", 0)),
    )


class ServerWatch:
    """Shows whether NATS still runs with `sync_interval: always`, and how full it is.

    A doorbell that forgets, or takes nothing more, is heard of too late.
    """

    def __init__(self, monitor_url: str) -> None:
        self._monitor_url = monitor_url

    async def run(self, stopping: asyncio.Event) -> None:
        """Looks until told to stop."""
        seconds = loops.MEASURE_SECONDS
        await loops.every("bus_watch", seconds, self.run_once, stopping)

    async def run_once(self) -> None:
        """Asks once; a server that does not answer counts as one that does not sync."""
        shown = telemetry.BUS_SYNC_ALWAYS.labels(self._monitor_url)
        try:
            server = await asyncio.to_thread(ask_server, self._monitor_url)
        except (OSError, ValueError):
            shown.set(0)
            raise
        shown.set(server.sync_always)
        telemetry.BUS_STORED.labels(self._monitor_url).set(server.stored_bytes)
        telemetry.BUS_MAY_STORE.labels(self._monitor_url).set(server.may_store_bytes)


class Retry(Exception):
    """Raised by a handler: deliver this again after so many seconds."""

    def __init__(self, delay_seconds: float) -> None:
        super().__init__(delay_seconds)
        self.delay_seconds = delay_seconds


class PullLoop:
    """A durable consumer that handles `workers` messages at a time.

    Each is fetched by itself: a fetch of several would wait for the whole batch, and a lone message with it. It
    returns: acknowledged. It raises `Retry` or anything else: delivered again later. Transport trouble never counts
    against a message (`max_deliver` is unlimited). A subscription that goes silent is made anew: missing heartbeats are
    noticed within FETCH_SECONDS.
    """

    def __init__(
        self,
        bus: Bus,
        stream: str,
        durable: str,
        filter_subjects: Sequence[str],
        handle: Callable[[Msg], Awaitable[None]],
        *,
        workers: int = 4,
        retry_seconds: float = 1.0,
        ack_wait_seconds: float = ACK_WAIT_SECONDS,
    ) -> None:
        self._bus = bus
        self._stream = stream
        self._durable = durable
        self._filters = list(filter_subjects)
        self._handle = handle
        self._workers = workers
        self._retry_seconds = retry_seconds
        self._ack_wait_seconds = ack_wait_seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Pulls until told to stop; what was pulled by then is handled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work(stopping))
            name, seconds = f"{self._durable}_lag", loops.MEASURE_SECONDS
            group.create_task(loops.every(name, seconds, self._measure, stopping))

    async def _measure(self) -> None:
        """Shows how far the consumer is behind; the numbers are those of all its replicas together."""
        try:
            info = await self._bus.jetstream.consumer_info(self._stream, self._durable)
        except BusError as error:  # not there yet, or the bus is away: other gauges say so
            log.debug("consumer_not_measured", consumer=self._durable, error=repr(error))
            return
        telemetry.CONSUMER_PENDING.labels(self._durable).set(info.num_pending or 0)
        telemetry.CONSUMER_UNACKNOWLEDGED.labels(self._durable).set(info.num_ack_pending or 0)

    async def _work(self, stopping: asyncio.Event) -> None:
        await self._bus.until_open(stopping)
        while not stopping.is_set():
            try:
                subscription = await self._subscribe()
                await self._pull(subscription, stopping)
            except BusError as error:
                log.warning("consumer_renewed", consumer=self._durable, error=repr(error))
                await loops.Wake().wait(RENEW_SECONDS, stopping)

    async def _subscribe(self) -> Any:
        await self._bus.ensure_streams()
        config = api.ConsumerConfig(
            durable_name=self._durable,
            filter_subjects=self._filters,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=self._ack_wait_seconds,
            max_deliver=-1,
            max_ack_pending=MAX_ACK_PENDING,
        )
        await self._bus.jetstream.add_consumer(self._stream, config)
        return await self._bus.jetstream.pull_subscribe_bind(self._durable, self._stream)

    async def _pull(self, subscription: Any, stopping: asyncio.Event) -> None:
        stop = asyncio.ensure_future(stopping.wait())
        try:
            while not stopping.is_set():
                fetch = asyncio.ensure_future(
                    subscription.fetch(1, FETCH_SECONDS, HEARTBEAT_SECONDS)
                )
                await asyncio.wait({fetch, stop}, return_when=asyncio.FIRST_COMPLETED)
                if not fetch.done():
                    fetch.cancel()
                    return
                for message in await _messages(fetch):
                    await self._handled(message)
        finally:
            stop.cancel()
            await _quietly(subscription.unsubscribe())

    async def _handled(self, message: Msg) -> None:
        with telemetry.span(f"{self._durable} handle", SpanKind.CONSUMER, message.headers):
            try:
                await self._handle(message)
            except asyncio.CancelledError:
                raise
            except Retry as retry:
                telemetry.MESSAGES.labels(self._durable, "retried").inc()
                await _quietly(message.nak(delay=retry.delay_seconds))
            except Exception as error:
                telemetry.MESSAGES.labels(self._durable, "failed").inc()
                log.warning(
                    "message_failed", consumer=self._durable, error=repr(error), exc_info=True
                )
                await _quietly(message.nak(delay=self._retry_seconds))
            else:
                telemetry.MESSAGES.labels(self._durable, "handled").inc()
                await _quietly(message.ack())


async def _messages(fetch: asyncio.Future[list[Msg]]) -> list[Msg]:
    try:
        return await fetch
    except js_errors.FetchTimeoutError:
        # A quiet stream sends heartbeats and then nothing; a silent one misses them: TimeoutError, and it is renewed.
        return []


async def _quietly(operation: Awaitable[object]) -> None:
    """An ack or nak that is lost costs a redelivery, which changes nothing."""
    try:
        await operation
    except BusError as error:
        log.debug("ack_lost", error=repr(error))
