"""Takes jobs over from the bus: the attempt's row first, then the ack. From there Postgres carries the job."""

from __future__ import annotations

import re

from google.protobuf import message as protobuf_message
from nats.aio.msg import Msg

from framewire import subjects
from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import job_pb2
from kit import bus, telemetry
from kit.failpoints import failpoint
from services.generator import dispatch, pools
from services.generator.store import videos

log = telemetry.logger(__name__)

LANES = (vocabulary_pb2.LANE_VIP, vocabulary_pb2.LANE_STANDARD, vocabulary_pb2.LANE_BATCH)
AT_ONCE = 8
NEWER_SCHEMA_RETRY_SECONDS = 30.0
_ID = re.compile(r"[a-z0-9]{26}")


class Intake:
    """The consumer of JOBS."""

    def __init__(
        self, store: videos.VideoStore, pools_: pools.Pools, accepted: dispatch.Bells
    ) -> None:
        self._store = store
        self._pools = pools_
        self._accepted = accepted

    def loop(self, bus_: bus.Bus) -> bus.PullLoop:
        """The durable consumer that feeds this."""
        return bus.PullLoop(
            bus_,
            subjects.JOBS_STREAM,
            "generator",
            [subjects.JOBS_SUBJECT],
            self.handle,
            workers=AT_ONCE,
        )

    async def handle(self, message: Msg) -> None:
        """Accepts one job. A repeat changes nothing; bytes that are no job fail the video where it is not known."""
        job = _decode(message.data)
        if job is None:
            await self._refuse(message)
            return
        pool = self._pools.pool_of(job.spec.model)
        if pool is None or job.lane not in LANES:
            # A newer gateway may know more than we do: a rollout is no reason to fail a good job.
            log.warning("job_not_understood", video_id=job.video_id, model=job.spec.model)
            raise bus.Retry(NEWER_SCHEMA_RETRY_SECONDS)
        fingerprint = self._pools.fingerprint(job.spec)
        if await self._store.accept(job, pool, fingerprint):
            log.info("job_accepted", video_id=job.video_id)
        self._accepted.of[pool].ring()
        await failpoint("generator.accept.before_ack")

    async def _refuse(self, message: Msg) -> None:
        headers = message.headers or {}
        video_id, account_id = _ids(headers.get(subjects.VIDEO_HEADER, ""))
        log.error("job_poison", video_id=video_id, size_bytes=len(message.data))
        if video_id:
            await self._store.refuse_poison(
                video_id, account_id, "its job message could not be read; send the request again"
            )


def _ids(header: str) -> tuple[str, str]:
    video_id, _, account_id = header.partition(" ")
    good = all(_ID.fullmatch(part) for part in (video_id, account_id))
    return (video_id, account_id) if good else ("", "")


def _decode(data: bytes) -> job_pb2.Job | None:
    try:
        job = job_pb2.Job.FromString(data)
    except protobuf_message.DecodeError:
        return None
    ids_good = all(_ID.fullmatch(part) for part in (job.video_id, job.account_id))
    return job if ids_good and job.HasField("spec") else None
