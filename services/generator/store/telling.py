"""What every change of a video's life writes in its transaction: the event with its number, in the outbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from google.protobuf import json_format

from framewire import subjects
from framewire.events.v1 import event_pb2
from kit import outbox, postgres
from services.generator import events

STATE_OF_KIND = {
    event_pb2.EVENT_KIND_QUEUED: "PENDING",
    event_pb2.EVENT_KIND_STARTED: "PROCESSING",
    event_pb2.EVENT_KIND_COMPLETED: "COMPLETED",
    event_pb2.EVENT_KIND_FAILED: "FAILED",
    event_pb2.EVENT_KIND_CANCELLED: "CANCELLED",
}
TERMINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED")


@dataclass(frozen=True, slots=True)
class LockedVideo:
    """A video's row, locked: whoever holds it is the one writer of its events."""

    video_id: str
    account_id: str
    state: str
    seq: int
    cancel_requested: bool
    traceparent: str


async def lock(connection: postgres.Connection, video_id: str) -> LockedVideo | None:
    """Locks a video. Every transaction that tells of a video takes this lock first, so none can deadlock."""
    row = await connection.fetchrow(
        """
        SELECT video_id, account_id, state, seq, cancel_requested, traceparent
        FROM videos WHERE video_id = $1 FOR UPDATE
        """,
        video_id,
    )
    return LockedVideo(**row) if row else None


async def tell(
    connection: postgres.Connection,
    video: LockedVideo,
    event: event_pb2.Event,
    now: datetime | None = None,
) -> None:
    """Gives the event its number and moment, moves the video to its state and puts it into the outbox.

    `now`: the database's time, where the transaction has just read it.

    A late render changes no state, and the verdict stays the answer to who asks how the video stands.
    """
    if now is None:
        now = await connection.fetchval("SELECT clock_timestamp()")
        assert now is not None
    await tell_all(connection, [(video, event)], now)


async def tell_all(
    connection: postgres.Connection,
    told: Sequence[tuple[LockedVideo, event_pb2.Event]],
    now: datetime,
) -> None:
    """The same for an event each of several videos."""
    late, states, messages = list[tuple[str, int]](), list[tuple[object, ...]](), list[outbox.Row]()
    for video, event in told:
        event.video_id, event.account_id = video.video_id, video.account_id
        event.seq = video.seq + 1
        event.occurred_at.CopyFrom(events.timestamp(now))
        if event.kind == event_pb2.EVENT_KIND_RECOVERED:
            late.append((video.video_id, event.seq))
        else:
            state = STATE_OF_KIND[event.kind]
            finished_at = now if state in TERMINAL_STATES else None
            states.append(
                (video.video_id, event.seq, state, event.SerializeToString(), finished_at)
            )
        # Also where no trace is under way: a poll pass and a sweep are about many videos at once.
        traced = {"traceparent": video.traceparent} if video.traceparent else {}
        row = message(event)
        messages.append(outbox.headed(replace(row, headers={**row.headers, **traced})))
    if late:
        await connection.executemany("UPDATE videos SET seq = $2 WHERE video_id = $1", late)
    if states:
        await connection.executemany(
            """
            UPDATE videos SET seq = $2, state = $3, last_event = $4, finished_at = $5
            WHERE video_id = $1
            """,
            states,
        )
    await outbox.add_all(connection, messages)


def message(event: event_pb2.Event) -> outbox.Row:
    """The event as a CloudEvent in NATS binary mode."""
    kind = events.kind_name(event)
    return outbox.Row(
        ce_id=f"{event.video_id}:{event.seq}",
        ordering_key=event.video_id,
        seq=event.seq,
        subject=subjects.event_subject(event.account_id, kind),
        data=json_format.MessageToJson(event, indent=None).encode(),
        headers=_headers(event, kind),
    )


def _headers(event: event_pb2.Event, kind: str) -> dict[str, Any]:
    return {
        "ce-source": "/framewire/generator",
        "ce-type": f"framewire.events.v1.{kind}",
        "ce-subject": event.video_id,
        "ce-time": event.occurred_at.ToJsonString(),
        "ce-sequence": str(event.seq),
    }
