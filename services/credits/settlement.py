"""Settlement: each terminal event turns its video's hold into captured and released credits, once.

Order does not matter, nor does repetition. An event that nobody can read is parked, and its hold is left to the floor.
"""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime

from google.protobuf import json_format
from nats.aio.msg import Msg
from prometheus_client import Counter

from framewire import subjects
from framewire.events.v1 import event_pb2, vocabulary_pb2
from kit import bus, errors, telemetry
from services.credits import rules, store

log = telemetry.logger(__name__)

DURABLE = "credits-settlement"
FILTERS = tuple(subjects.event_subject("*", kind) for kind in subjects.TERMINAL_KINDS)

_ID = re.compile(r"[a-z0-9]{26}")

SETTLED = Counter("framewire_credits_settled", "Terminal events met, by outcome.", ["outcome"])
PARKED = Counter("framewire_credits_parked", "Events that could not be settled by.", ["reason"])


class UnreadableError(Exception):
    """The bytes are no terminal event of a video."""


def decode(data: bytes) -> rules.Verdict:
    """Reads an event from the bus. Raises UnreadableError."""
    event = event_pb2.Event()
    try:
        # Newer writers may add fields, and kinds that we do not settle by.
        json_format.Parse(data.decode(), event, ignore_unknown_fields=True)
    except (UnicodeDecodeError, json_format.ParseError) as error:
        raise UnreadableError(f"not an Event: {type(error).__name__}") from error
    return verdict(event)


def verdict(event: event_pb2.Event) -> rules.Verdict:
    """What a terminal event means for money. A cause that is newer than we are counts as our fault: nothing is taken.

    Raises UnreadableError when it is no terminal event.
    """
    if not (_ID.fullmatch(event.video_id) and _ID.fullmatch(event.account_id)):
        raise UnreadableError("it names no video or no account")
    detail = event.WhichOneof("detail")
    if detail == "completed":
        durations = tuple(max(0, output.duration_ms) for output in event.completed.outputs)
        cause, stage = rules.Cause.NONE, rules.Stage.DONE
        return rules.Verdict(event.video_id, event.account_id, cause, stage, durations)
    if detail not in ("failed", "cancelled"):
        raise UnreadableError(f"it is not terminal: {detail}")
    ended = event.failed if detail == "failed" else event.cancelled
    cause = _cause(ended.cause)
    if cause is rules.Cause.NONE:
        # A failure without a cause must not be charged as a success.
        cause = rules.Cause.INTERNAL
    return rules.Verdict(event.video_id, event.account_id, cause, _stage(ended.stage))


def _cause(number: vocabulary_pb2.Cause.ValueType) -> rules.Cause:
    try:
        return rules.Cause(vocabulary_pb2.Cause.Name(number).removeprefix("CAUSE_"))
    except ValueError:
        return rules.Cause.INTERNAL


def _stage(number: vocabulary_pb2.VideoStage.ValueType) -> rules.Stage:
    try:
        return rules.Stage(vocabulary_pb2.VideoStage.Name(number).removeprefix("VIDEO_STAGE_"))
    except ValueError:
        return rules.Stage.DONE


class Settlement:
    """The consumer of terminal events."""

    def __init__(
        self,
        books: store.Store,
        *,
        unsettled_after_seconds: float,
        unsettled_retry_seconds: float,
    ) -> None:
        self._books = books
        self._unsettled_after_seconds = unsettled_after_seconds
        self._unsettled_retry_seconds = unsettled_retry_seconds

    async def handle(self, message: Msg) -> None:
        """Settles by one message; returns when it may be acknowledged. Raises bus.Retry while its hold is not known."""
        metadata = message.metadata
        try:
            found = decode(message.data)
            known = await self.settle(found)
        except (UnreadableError, errors.AlreadyExists) as error:
            await self._park(message, error)
            return
        if known:
            return
        # Reserve commits before a job can exist, so this is a hold of another ledger, or one that a restore lost.
        age = (datetime.now(UTC) - metadata.timestamp).total_seconds()
        if age < self._unsettled_after_seconds:
            SETTLED.labels("no_hold_yet").inc()
            raise bus.Retry(self._unsettled_retry_seconds)
        if await self._books.waiting.keep_unsettled(found):
            SETTLED.labels("unsettled").inc()
            log.warning("unsettled_event_kept", video_id=found.video_id, cause=found.cause)
        else:
            await self._books.ledger.settle(found)

    async def settle(self, found: rules.Verdict) -> bool:
        """Settles by one verdict; false when there is no such hold. Raises AlreadyExists: it is another's."""
        hold = await self._books.ledger.settle(found)
        if hold is None:
            return False
        SETTLED.labels(hold.state.lower()).inc()
        return True

    async def _park(self, message: Msg, error: Exception) -> None:
        sequence = message.metadata.sequence.stream
        reason = str(error)
        await self._books.waiting.park(message.subject, sequence, reason, message.data)
        PARKED.labels(type(error).__name__).inc()
        log.error("event_parked", subject=message.subject, sequence=sequence, reason=reason)


class Consumer:
    """The loop that pulls terminal events for settlement."""

    def __init__(self, bus_: bus.Bus, settlement: Settlement) -> None:
        self._pull = bus.PullLoop(bus_, subjects.EVENTS_STREAM, DURABLE, FILTERS, settlement.handle)

    async def run(self, stopping: asyncio.Event) -> None:
        """Settles until told to stop."""
        await self._pull.run(stopping)
