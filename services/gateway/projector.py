"""Turns what the bus tells into what callers see: events durably, progress as it comes."""

from __future__ import annotations

import asyncio
from datetime import UTC

from google.protobuf import json_format, message
from nats.aio.msg import Msg

from framewire import subjects
from framewire.events.v1 import event_pb2, vocabulary_pb2
from kit import bus, telemetry
from services.gateway import measures, messages, store, watch
from services.gateway.store import videos as video_store

log = telemetry.logger(__name__)

DURABLE = "gateway-projector"
AT_ONCE = 8
PROGRESS_QUEUE = "gateway-progress"


class Projector:
    """The consumer of EVENTS, one for all replicas."""

    def __init__(
        self, videos: store.VideoStore, hub: watch.Hub, check_after_seconds: float
    ) -> None:
        self._videos = videos
        self._hub = hub
        self._check_after_seconds = check_after_seconds

    def loop(self, bus_: bus.Bus) -> bus.PullLoop:
        """The durable consumer that feeds this."""
        return bus.PullLoop(
            bus_,
            subjects.EVENTS_STREAM,
            DURABLE,
            [subjects.EVENTS_SUBJECTS],
            self.handle,
            workers=AT_ONCE,
        )

    async def handle(self, received: Msg) -> None:
        """Projects one event; commits before it is acknowledged. A repeat changes nothing."""
        try:
            event = json_format.Parse(received.data, event_pb2.Event(), ignore_unknown_fields=True)
            fact = messages.fact(event)
        except (json_format.ParseError, UnicodeDecodeError, ValueError, OverflowError) as error:
            # Nothing to be had from it, now or later; the sweeper asks the generator about its video.
            telemetry.MESSAGES.labels(DURABLE, "unreadable").inc()
            log.error("event_unreadable", subject=received.subject, error=repr(error))
            return
        if fact is None:
            return
        changed = await self._videos.project(event.video_id, fact, self._check_after_seconds)
        if changed is None:
            # A repeat, or a video of another environment: a row is always there before its job is.
            telemetry.MESSAGES.labels(DURABLE, "unchanged").inc()
            return
        measures.projected(changed, fact.kind)
        await self._hub.tell(event.video_id, changed.account_id)


class ProgressListener:
    """Writes how far videos are; one replica takes each message, a lost one is made good by the next."""

    def __init__(self, videos: store.VideoStore, bus_: bus.Bus, hub: watch.Hub) -> None:
        self._videos = videos
        self._bus = bus_
        self._hub = hub

    async def run(self, stopping: asyncio.Event) -> None:
        """Listens until told to stop."""
        subject = subjects.progress_subject("*")
        await self._bus.listen(subject, self.heard, stopping, PROGRESS_QUEUE)

    async def heard(self, received: Msg) -> None:
        """Writes one message. Never raises: progress is worth nothing a second later."""
        try:
            progress = event_pb2.Progress.FromString(received.data)
            if await self._videos.progress(_progress(progress)):
                await self._hub.tell(progress.video_id, progress.account_id)
        except message.DecodeError:
            log.warning("progress_unreadable", size_bytes=len(received.data))
        except Exception as error:
            log.warning("progress_lost", error=repr(error))


def _progress(progress: event_pb2.Progress) -> video_store.Progress:
    known = progress.stage in vocabulary_pb2.VideoStage.values()
    stage = vocabulary_pb2.VideoStage.Name(progress.stage) if known else "UNSPECIFIED"
    return video_store.Progress(
        video_id=progress.video_id,
        version=progress.version,
        stage=stage.removeprefix("VIDEO_STAGE_"),
        progress_percent=max(0, min(100, progress.progress_percent)),
        queue_position=max(0, progress.queue_position),
        expected_at=progress.expected_at.ToDatetime(tzinfo=UTC)
        if progress.HasField("expected_at")
        else None,
    )
