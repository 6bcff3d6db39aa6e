"""The event feed: what it makes of messages, and its promises against a real NATS."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js import JetStreamContext, api

from framewire import errors, events, subjects
from framewire.events import feed, types
from services.local import nats as local_nats
from services.local import supervisor

VIDEO, OTHER, ACCOUNT = "v" * 26, "w" * 26, "a" * 26


def body(seq: int, video_id: str = VIDEO, **more: Any) -> dict[str, Any]:
    return {"videoId": video_id, "accountId": ACCOUNT, "seq": str(seq), **more}


def event(event_id: str, seq: int, video_id: str = VIDEO) -> types.Event:
    return types.Event(event_id, "started", video_id, ACCOUNT, seq, None, None)


def test_an_event_is_read_with_its_detail() -> None:
    content = body(
        3,
        kind="EVENT_KIND_COMPLETED",
        occurredAt="2026-11-20T10:00:00.5Z",
        completed={"outputs": [{"assetId": "o", "durationMs": "4000"}], "model": "sora-2"},
        aFieldOfTomorrow={"x": 1},
    )
    subject = subjects.event_subject(ACCOUNT, "completed")
    found = feed.read(subject, {"ce-id": f"{VIDEO}:3"}, json.dumps(content).encode())
    assert (found.event_id, found.kind, found.seq) == (f"{VIDEO}:3", "completed", 3)
    assert found.occurred_at == datetime(2026, 11, 20, 10, 0, 0, 500_000, tzinfo=UTC)
    assert isinstance(found.detail, types.Completed)
    assert found.detail.outputs[0].duration_ms == 4000


def test_a_kind_of_tomorrow_is_passed_on_without_detail() -> None:
    content = body(4, kind="EVENT_KIND_TOMORROW", tomorrow={"x": 1})
    subject = subjects.event_subject(ACCOUNT, "tomorrow")
    found = feed.read(subject, {"ce-id": "x"}, json.dumps(content).encode())
    assert (found.kind, found.seq, found.detail) == ("tomorrow", 4, None)


@pytest.mark.parametrize("data", [b"\xff", b"[]", b'{"seq": {}}', b"1"])
def test_bytes_that_are_no_event_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="no event"):
        feed.read("framewire.events.v1.a.queued", {}, data)


def test_what_was_passed_is_left_out_and_forgotten_in_bounds() -> None:
    seen = feed.Seen(limit=2)
    assert seen.passes(event("1", 1))
    assert seen.passes(event("3", 3))
    assert not seen.passes(event("2", 2))
    assert not seen.passes(event("3", 3))
    assert seen.passes(event("settled", 0))
    assert not seen.passes(event("settled", 0))
    assert not seen.passes(event("2", 2)), "an event without a number does not touch the numbers"
    assert seen.passes(event("other", 1, OTHER))
    assert len(seen._last) == 2
    assert seen.passes(event("1", 1)), "the oldest was forgotten"


# Against a real NATS


class Bus:
    """A server and a publisher."""

    def __init__(self, url: str, jetstream: JetStreamContext, programs: Any) -> None:
        self.url = url
        self.jetstream = jetstream
        self.programs = programs

    async def tell(self, kind: str, seq: int, video_id: str = VIDEO) -> None:
        event_id = f"{video_id}:{seq}"
        await self.jetstream.publish(
            subjects.event_subject(ACCOUNT, kind),
            json.dumps(body(seq, video_id)).encode(),
            headers={"ce-id": event_id},
        )

    async def make_stream(self) -> None:
        await self.jetstream.add_stream(
            api.StreamConfig(name=subjects.EVENTS_STREAM, subjects=[subjects.EVENTS_SUBJECTS])
        )


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    (tmp_path / "log").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "ports").mkdir()
    server = local_nats.Nats(tmp_path)
    programs = supervisor.Supervisor(tmp_path)
    programs.add(server)
    async with programs:
        connection = await nats.connect(server.url, max_reconnect_attempts=-1)
        try:
            made = Bus(server.url, connection.jetstream(timeout=5), programs)
            await made.make_stream()
            yield made
        finally:
            await connection.close()


async def took(found: Any, count: int) -> list[tuple[str, int]]:
    """So many events; what comes after is not asked for."""
    taken: list[tuple[str, int]] = []
    async with asyncio.timeout(20):
        while len(taken) < count:
            one = await anext(found)
            taken.append((one.kind, one.seq))
    return taken


async def test_events_come_in_order_once_and_from_a_time(bus: Bus) -> None:
    for kind, seq in [("queued", 1), ("started", 2), ("started", 2), ("queued", 1)]:
        await bus.tell(kind, seq)
    await bus.tell("completed", 3)
    past = datetime.now(UTC) - timedelta(minutes=1)
    async with contextlib.aclosing(events.subscribe(bus.url, since=past)) as found:
        assert await took(found, 3) == [("queued", 1), ("started", 2), ("completed", 3)]
        await bus.tell("queued", 1, OTHER)
        assert await took(found, 1) == [("queued", 1)]
    only = events.subscribe(bus.url, ACCOUNT, kinds=("completed", "queued"), since=past)
    async with contextlib.aclosing(only) as found:
        assert await took(found, 2) == [("queued", 1), ("completed", 3)]


async def test_a_durable_goes_on_with_what_was_not_done(bus: Bus) -> None:
    for seq in (1, 2, 3):
        await bus.tell("started", seq)
    async with contextlib.aclosing(events.subscribe(bus.url, durable="mail")) as found:
        assert await took(found, 2) == [("started", 1), ("started", 2)]
    info = await bus.jetstream.consumer_info(subjects.EVENTS_STREAM, "mail")
    assert info.ack_floor is not None
    assert info.ack_floor.stream_seq == 1, "the second was being handled when we left"
    # Another list of kinds changes the consumer and keeps its place.
    again = events.subscribe(bus.url, durable="mail", kinds=("started", "failed"))
    async with contextlib.aclosing(again) as found, asyncio.timeout(5):
        await bus.jetstream.add_consumer(subjects.EVENTS_STREAM, info.config.evolve(ack_wait=1.0))
        assert await took(found, 1) == [("started", 2)]


async def test_a_feed_outlives_its_server_and_its_stream(bus: Bus) -> None:
    past = datetime.now(UTC) - timedelta(minutes=1)
    await bus.tell("queued", 1)
    async with contextlib.aclosing(events.subscribe(bus.url, since=past)) as found:
        assert await took(found, 1) == [("queued", 1)]
        await bus.programs.restart("nats")
        await bus.tell("started", 2)
        assert await took(found, 1) == [("started", 2)]
        await bus.jetstream.delete_stream(subjects.EVENTS_STREAM)
        await bus.make_stream()
        for seq in (1, 2, 3):  # all is told again, under the same ids
            await bus.tell("completed" if seq == 3 else "started", seq)
        assert await took(found, 1) == [("completed", 3)]


async def test_a_subscription_that_cannot_be_is_said(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.FramewireError, match="'done'"):
        events.subscribe(bus.url, kinds=("done",))
    await bus.jetstream.delete_stream(subjects.EVENTS_STREAM)
    with pytest.raises(errors.FramewireError, match="cannot subscribe"):
        await anext(events.subscribe(bus.url))
    monkeypatch.setattr(feed, "CONNECT_SECONDS", 0.3)
    with pytest.raises(errors.FramewireError, match="cannot reach NATS at 127"):
        await anext(events.subscribe("nats://secret:word@127.0.0.1:1"))
