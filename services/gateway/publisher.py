"""Rings the generator: the job of a PENDING video, on the bus. A doorbell: that it fails costs time, nothing else."""

from __future__ import annotations

import asyncio

from framewire import subjects
from kit import bus, telemetry
from services.gateway import messages, videos

log = telemetry.logger(__name__)


class Publisher:
    """Publishes jobs."""

    def __init__(self, bus_: bus.Bus, seconds: float) -> None:
        self._bus = bus_
        self._seconds = seconds

    async def ring(self, video: videos.Video) -> bool:
        """Whether the bus has it for certain. Never raises for the bus' sake, and never takes longer than its time."""
        assert video.state is videos.State.PENDING, "only a PENDING video is ever published"
        if not self._bus.client.is_connected:
            return False
        try:
            async with asyncio.timeout(self._seconds):
                await self._bus.publish(
                    subjects.JOBS_SUBJECT,
                    messages.job(video).SerializeToString(),
                    {subjects.VIDEO_HEADER: f"{video.video_id} {video.account_id}"},
                    f"{video.video_id}:{video.publishes}",
                    self._seconds,
                )
        except bus.BusError as error:
            log.warning("job_not_rung", video_id=video.video_id, error=repr(error))
            return False
        return True
