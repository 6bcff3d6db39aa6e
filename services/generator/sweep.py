"""Ends what has waited too long: start_by in the queue, a model that goes, resolve_by of what cannot be decided."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from kit import loops, telemetry
from services.generator import config, pools
from services.generator.store import Store, videos

log = telemetry.logger(__name__)

BATCH = 100
LOOK_BACK = timedelta(days=1)
"""For renders of accounts that are not in the catalogue any more; else the provider's retention says how long."""


class Sweeper:
    """The loop over deadlines."""

    def __init__(self, settings: config.Settings, store: Store, pools_: pools.Pools) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
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
        for video_id, account_id in await self._store.videos.cancelled_waiting():
            await self._store.videos.cancel(video_id, account_id)
        for attempt in await self._store.renders.late():
            known = attempt.provider_job_id is not None
            cause = "TIMEOUT" if known else "UNRESOLVED"
            message = (
                "the provider did not finish it in time"
                if known
                else "whether the provider had it could not be told in time"
            )
            account = self._pools.accounts.get(attempt.provider_account or "")
            look_back = timedelta(seconds=account.retention_seconds) if account else LOOK_BACK
            verdict = videos.Verdict(cause, message, True, billed=None, look_back=look_back)
            if await self._store.videos.fail(attempt, verdict, another_try=False):
                log.error("attempt_given_up", attempt_id=attempt.attempt_id, cause=cause)
        return len(overdue) == BATCH
