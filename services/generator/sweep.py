"""Ends what has waited too long: start_by in the queue, a model that goes, resolve_by of what cannot be decided."""

from __future__ import annotations

import asyncio

from kit import loops, telemetry
from services.generator import config, pools
from services.generator.store import Store, videos

log = telemetry.logger(__name__)

BATCH = 100


class Sweeper:
    """The loop over deadlines."""

    def __init__(self, settings: config.Settings, store: Store, pools_: pools.Pools) -> None:
        self._settings = settings
        self._store = store
        self._ends = pools_.ends()

    async def run(self, stopping: asyncio.Event) -> None:
        """Sweeps until told to stop."""
        await loops.every("sweeper", self._settings.loop_seconds * 4, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One look at every deadline."""
        overdue = await self._store.queue.overdue(BATCH)
        for attempt in overdue:
            verdict = videos.Verdict("QUEUE_TIMEOUT", "its turn did not come before start_by", True)
            await self._store.videos.fail(attempt, verdict, another_try=False)
        for attempt in await self._store.queue.outlived(self._ends, BATCH):
            message = f"nobody serves {attempt.job.spec.model} long enough any more; ask for another model"
            verdict = videos.Verdict("MODEL_RETIRED", message, False)
            await self._store.videos.fail(attempt, verdict, another_try=False)
        for attempt in await self._store.renders.late():
            known = attempt.provider_job_id is not None
            cause = "TIMEOUT" if known else "UNRESOLVED"
            message = (
                "the provider did not finish it in time"
                if known
                else "whether the provider had it could not be told in time"
            )
            verdict = videos.Verdict(cause, message, True, billed=None)
            if await self._store.videos.fail(attempt, verdict, another_try=False):
                log.error("attempt_given_up", attempt_id=attempt.attempt_id, cause=cause)
        return len(overdue) == BATCH
