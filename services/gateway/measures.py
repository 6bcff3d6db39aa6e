"""What operators see of the gateway's videos, read from its database. Each replica shows the same."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from prometheus_client import Counter, Gauge, Histogram

from kit import loops
from services.gateway import reconciliation, store, videos

LIVE = Gauge(
    "framewire_videos", "Videos that have not ended, by state and stage.", ["state", "stage"]
)
OLDEST = Gauge("framewire_videos_oldest_seconds", "Age of the oldest video in a state.", ["state"])
UNHEARD_OF = Gauge(
    "framewire_videos_unheard_of",
    "Videos admitted a minute ago or longer that the generator has not been heard of.",
)
UNDO = Gauge(
    "framewire_videos_undo_waiting", "Ended videos whose hold or input is still to be let go."
)
PAUSED = Gauge("framewire_admission_paused", "1 while an operator has admission paused, else 0.")
ENDED = Counter(
    "framewire_videos_ended",
    "Videos that this replica saw end, by state and cause.",
    ["state", "cause"],
)
CONFIRMED = Gauge(
    "framewire_gateway_findings_confirmed",
    "Findings that two reconciliations have shown and the last one still did, by kind.",
    ["kind"],
)
CREDITS = Counter(
    "framewire_video_credits",
    "Credits of settled videos, captured and released, by why the video ended.",
    ["outcome", "cause"],
)
LIVE_STATES = ("ADMITTING", "PENDING", "PROCESSING")
SECONDS = Histogram(
    "framewire_video_seconds",
    "Time of videos that ended: waiting for their turn, being made, and both.",
    ["phase", "lane"],
    buckets=(1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 21600, 86400),
)


_ENDS = (videos.Kind.COMPLETED, videos.Kind.FAILED, videos.Kind.CANCELLED)


def projected(video: videos.Video, kind: videos.Kind) -> None:
    """Counts a video when its end or its settlement was just projected."""
    cause = video.failure_cause or "NONE"
    if kind is videos.Kind.SETTLED:
        CREDITS.labels("captured", cause).inc(video.captured_credits)
        CREDITS.labels("released", cause).inc(video.released_credits)
    if kind not in _ENDS:
        return
    ENDED.labels(video.state, cause).inc()
    if video.finished_at is None:
        return
    started = video.started_at or video.finished_at
    phases = {
        "waiting": started - video.created_at,
        "making": video.finished_at - started,
        "whole": video.finished_at - video.created_at,
    }
    for phase, time in phases.items():
        SECONDS.labels(phase, video.lane).observe(max(0.0, time.total_seconds()))


class Measures:
    """The loop that reads them."""

    def __init__(self, store_: store.MeasureStore) -> None:
        self._store = store_

    async def run(self, stopping: asyncio.Event) -> None:
        """Reads until told to stop."""
        await loops.every("measures", loops.MEASURE_SECONDS, self.run_once, stopping)

    async def run_once(self) -> None:
        """Reads once."""
        found = await self._store.read()
        oldest: dict[str, float] = defaultdict(float)
        LIVE.clear()
        for row in found.live:
            LIVE.labels(row.state, row.stage).set(row.count)
            oldest[row.state] = max(oldest[row.state], row.oldest_seconds)
        for state in LIVE_STATES:
            OLDEST.labels(state).set(oldest[state])
        UNHEARD_OF.set(found.unheard_of)
        UNDO.set(found.undo)
        for kind in reconciliation.Kind:
            CONFIRMED.labels(kind).set(found.confirmed.get(kind, 0))
        PAUSED.set(found.admission_paused)
