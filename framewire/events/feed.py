"""How events are read from JetStream: a pull consumer that comes back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import grpc
import nats
import nats.errors
from google.protobuf import json_format
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from nats.js import errors as js_errors

from framewire import errors, subjects, transport
from framewire.decode import decode, moment
from framewire.events import types
from framewire.events.v1 import event_pb2

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
FETCH_SECONDS = 5.0
HEARTBEAT_SECONDS = 1.0
ACK_WAIT_SECONDS = 60.0
IDLE_SECONDS = 300.0
SEEN_VIDEOS = 50_000

_Trouble = (nats.errors.Error, js_errors.Error, OSError, asyncio.TimeoutError)
_DETAILS: dict[str, type[Any]] = {
    "queued": types.Queued,
    "started": types.Started,
    "completed": types.Completed,
    "failed": types.Failed,
    "cancelled": types.Cancelled,
    "settled": types.Settled,
    "recovered": types.Recovered,
    "deleted": types.Deleted,
    "expired": types.Expired,
    "balance_low": types.BalanceLow,
    "webhook_disabled": types.WebhookDisabled,
}


class Seen:
    """What was passed already: the last `seq` of each video, ids of events without one. The oldest are forgotten."""

    def __init__(self, limit: int = SEEN_VIDEOS) -> None:
        self._limit = limit
        self._last: OrderedDict[str, int] = OrderedDict()

    def passes(self, event: types.Event) -> bool:
        """Whether the event is new; it is passed from now on."""
        numbered = event.seq > 0 and event.video_id != ""
        key, seq = (event.video_id, event.seq) if numbered else (f"id:{event.event_id}", 1)
        if self._last.get(key, 0) >= seq:
            return False
        self._last[key] = seq
        self._last.move_to_end(key)
        if len(self._last) > self._limit:
            self._last.popitem(last=False)
        return True


def read(subject: str, headers: dict[str, str], data: bytes) -> types.Event:
    """A message as an event. Raises ValueError when it is none; fields and values not known here are ignored."""
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise TypeError("a JSON object is wanted")
        source = json_format.ParseDict(content, event_pb2.Event(), ignore_unknown_fields=True)
    except (ValueError, TypeError, json_format.ParseError) as error:
        raise ValueError(f"no event: {error}") from error
    kind = subject.rpartition(".")[2]
    detail = source.WhichOneof("detail")
    known = _DETAILS.get(detail or "")
    return types.Event(
        event_id=headers.get("ce-id") or headers.get("Nats-Msg-Id", ""),
        kind=kind,
        video_id=source.video_id,
        account_id=source.account_id,
        seq=source.seq,
        occurred_at=moment(source.occurred_at) if source.HasField("occurred_at") else None,
        detail=decode(known, getattr(source, detail)) if known and detail else None,
    )


class Feed:
    """One subscription."""

    def __init__(
        self,
        nats_url: str,
        account_id: str,
        kinds: tuple[str, ...],
        durable: str | None,
        since: datetime | None,
    ) -> None:
        if unknown := [kind for kind in kinds if kind not in _DETAILS]:
            known = ", ".join(_DETAILS)
            message = f"kinds: there is no {unknown[0]!r}; there are: {known}"
            raise transport.failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message)
        self._url = nats_url
        self._filters = [subjects.event_subject(account_id, kind) for kind in kinds or ("*",)]
        self._durable = durable
        self._since = since
        self._seen = Seen()
        self._stream_created: datetime | None = None
        self._next_sequence = 0
        self._not_before: datetime | None = None
        self._last_error: Exception | None = None

    async def events(self) -> AsyncGenerator[types.Event, None]:
        """Each new event. What was taken is acknowledged when the next one is asked for."""
        client = await self._connect()
        try:
            jetstream = client.jetstream(timeout=5)
            messages = self._messages(jetstream)
            async with contextlib.aclosing(messages):
                async for message in messages:
                    event = _readable(message)
                    if event is not None and self._wanted(event):
                        yield event
                    await self._done(message)
        finally:
            await client.close()

    async def _connect(self) -> Any:
        try:
            # With endless reconnects, nats-py also tries endlessly to connect the first time.
            return await asyncio.wait_for(
                nats.connect(
                    self._url,
                    name="framewire.events",
                    connect_timeout=2,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.25,
                    error_cb=self._reported,
                ),
                CONNECT_SECONDS,
            )
        except _Trouble as error:
            why = self._last_error or error
            raise _unavailable(
                f"cannot reach NATS at {urlsplit(self._url).hostname}: {why}"
            ) from error

    async def _reported(self, error: Exception) -> None:
        self._last_error = error
        log.info("events: %r", error)

    async def _messages(self, jetstream: JetStreamContext) -> AsyncGenerator[Msg, None]:
        """Messages of one subscription after the other; a silent or broken one is made anew."""
        first = True
        while True:
            try:
                subscription = await self._subscribe(jetstream)
                first = False
            except _Trouble as error:
                if first:
                    raise _unavailable(f"cannot subscribe to events: {error}") from error
                log.warning("events: subscribing again: %r", error)
                await asyncio.sleep(random.uniform(0.3, 0.7))
                continue
            try:
                while True:
                    if (message := await _fetched(subscription)) is not None:
                        yield message
            except _Trouble as error:
                log.info("events: subscription renewed: %r", error)
            finally:
                with contextlib.suppress(*_Trouble):
                    await subscription.unsubscribe()

    async def _subscribe(self, jetstream: JetStreamContext) -> Any:
        await self._look_at_stream(jetstream)
        name = self._durable
        if name is None:
            name = await self._make_ephemeral(jetstream)
        else:
            await self._make_durable(jetstream, name)
        return await jetstream.pull_subscribe_bind(name, subjects.EVENTS_STREAM)

    def _wanted(self, event: types.Event) -> bool:
        old = self._not_before and event.occurred_at and event.occurred_at < self._not_before
        return not old and self._seen.passes(event)

    async def _look_at_stream(self, jetstream: JetStreamContext) -> None:
        """Finds out where to begin. On a stream made anew everything is told again, under the same ids."""
        info = await jetstream.stream_info(subjects.EVENTS_STREAM)
        if self._stream_created is None:
            if self._durable is None and self._since is None:
                self._since = datetime.now(UTC)
                self._next_sequence = info.state.last_seq + 1
        elif self._stream_created != info.created:
            self._next_sequence = 1
            self._not_before = self._since
        self._stream_created = info.created

    async def _make_ephemeral(self, jetstream: JetStreamContext) -> str:
        """Keeps its place itself, so nothing is acknowledged; the broker drops it when it is left alone."""
        config = api.ConsumerConfig(
            filter_subjects=self._filters,
            ack_policy=api.AckPolicy.NONE,
            inactive_threshold=IDLE_SECONDS,
            mem_storage=True,
            **self._start(),
        )
        info = await jetstream.add_consumer(subjects.EVENTS_STREAM, config)
        return info.name

    async def _make_durable(self, jetstream: JetStreamContext, name: str) -> None:
        try:
            info = await jetstream.consumer_info(subjects.EVENTS_STREAM, name)
        except js_errors.NotFoundError:
            config = api.ConsumerConfig(
                durable_name=name,
                filter_subjects=self._filters,
                ack_policy=api.AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT_SECONDS,
                max_deliver=-1,
                max_ack_pending=1,  # one at a time: a redelivery never comes after its successor
                **self._start(),
            )
            await jetstream.add_consumer(subjects.EVENTS_STREAM, config)
        else:
            found = info.config.filter_subjects or [info.config.filter_subject]
            if sorted(filter(None, found)) != sorted(self._filters):
                changed = info.config.evolve(filter_subject=None, filter_subjects=self._filters)
                await jetstream.add_consumer(subjects.EVENTS_STREAM, changed)

    def _start(self) -> dict[str, Any]:
        if self._next_sequence and self._durable is None:
            return {
                "deliver_policy": api.DeliverPolicy.BY_START_SEQUENCE,
                "opt_start_seq": self._next_sequence,
            }
        if self._since is None:
            return {"deliver_policy": api.DeliverPolicy.ALL}
        return {
            "deliver_policy": api.DeliverPolicy.BY_START_TIME,
            "opt_start_time": self._since.astimezone(UTC),
        }

    async def _done(self, message: Msg) -> None:
        """An acknowledgement that is lost costs a redelivery, which is left out."""
        self._next_sequence = message.metadata.sequence.stream + 1
        if self._durable is not None:
            with contextlib.suppress(*_Trouble):
                await message.ack_sync(timeout=5)


async def _fetched(subscription: Any) -> Msg | None:
    """The next message; None from a quiet stream. A silent one misses heartbeats, raises TimeoutError, is renewed."""
    try:
        return (await subscription.fetch(1, FETCH_SECONDS, HEARTBEAT_SECONDS))[0]
    except js_errors.FetchTimeoutError:
        return None


def _readable(message: Msg) -> types.Event | None:
    try:
        return read(message.subject, dict(message.headers or {}), message.data)
    except ValueError as error:
        log.warning("events: left out a message on %s: %s", message.subject, error)
        return None


def _unavailable(message: str) -> errors.FramewireError:
    return transport.failure(grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE", message)
