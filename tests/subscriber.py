"""Another service of the company, which hears of videos by the event SDK and is away for long."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Sequence

import nats
from nats.js import errors as js_errors

from framewire import events, subjects
from framewire.events.types import Event
from tests import system as systems
from tests.waiting import eventually

ENDS = {"completed": "COMPLETED", "failed": "FAILED", "cancelled": "CANCELLED"}


async def catch_up(system: systems.System, durable: str, within_seconds: float = 60) -> list[Event]:
    """Comes up, takes everything that it has not taken yet, and goes down again."""
    url, taken = system.stack.addresses.nats_url, list[Event]()

    async def take() -> None:
        async with contextlib.aclosing(events.subscribe(url, durable=durable)) as feed:
            async for event in feed:
                taken.append(event)

    connection = await nats.connect(url)
    taking = asyncio.create_task(take())

    async def all_taken() -> bool:
        if taking.done():
            return True
        try:
            info = await connection.jetstream().consumer_info(subjects.EVENTS_STREAM, durable)
        except js_errors.NotFoundError:  # it is coming up for the first time
            return False
        return info.num_pending == 0 and info.num_ack_pending == 0

    try:
        await eventually(all_taken, within_seconds=within_seconds, every_seconds=0.1)
    finally:
        taking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await taking
        await connection.close()
    return taken


async def amiss(system: systems.System, told: Sequence[Event]) -> list[str]:
    """What is wrong with what was told of the videos: an end that is missing or came twice, a gap, another order."""
    async with system.database("gateway") as database:
        rows = await database.fetch(
            "SELECT video_id, state FROM videos WHERE state IN ('COMPLETED', 'FAILED', 'CANCELLED')"
        )
    ends = {row["video_id"]: [row["state"]] for row in rows}
    heard: dict[str, list[str]] = collections.defaultdict(list)
    order: dict[str, list[int]] = collections.defaultdict(list)
    for event in told:
        if event.kind in ENDS:
            heard[event.video_id].append(ENDS[event.kind])
        if event.seq:
            order[event.video_id].append(event.seq)
    found = [
        f"{video_id} is {ends.get(video_id)} and was told as {heard.get(video_id)}"
        for video_id in ends.keys() | heard.keys()
        if ends.get(video_id) != heard.get(video_id)
    ]
    return found + [
        f"events of {video_id} came as {seqs}"
        for video_id, seqs in order.items()
        if seqs != list(range(1, len(seqs) + 1))
    ]
