"""Fetches finished renders, those first whose content expires first, and ends their videos."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import timedelta

from kit import errors, loops, telemetry
from kit.failpoints import failpoint
from services.generator import attempts, config, download, pools, progress
from services.generator.store import Store, rows, videos

log = telemetry.logger(__name__)

RENDITION_RETRY_SECONDS = 2.0


class Fetcher:
    """The loop over finished renders."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        pools_: pools.Pools,
        downloads: download.Downloads,
        teller: progress.Teller,
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._downloads = downloads
        self._teller = teller
        self._running: set[asyncio.Task[None]] = set()
        self._lease = timedelta(seconds=settings.fetch_lease_seconds)
        self.wake = loops.Wake()

    async def run(self, stopping: asyncio.Event) -> None:
        """Fetches until told to stop; then what was begun gets the rest of the grace time, and is given back."""
        try:
            await loops.every(
                "fetcher", self._settings.loop_seconds, self.run_once, stopping, self.wake
            )
            if self._running:
                await asyncio.wait(self._running)
        except asyncio.CancelledError:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            raise

    async def run_once(self) -> None:
        """Begins to fetch what is due, as far as there is room; a slow one holds nobody else up."""
        room = self._settings.concurrent_fetches - len(self._running)
        if room <= 0:
            return
        for attempt in await self._store.renders.claim_fetch(self._lease, room):
            task = asyncio.create_task(self._guarded(attempt))
            self._running.add(task)
            task.add_done_callback(self._ended)
        await self._downloads.drop_unneeded()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.wake.ring()

    async def _guarded(self, attempt: rows.Attempt) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                renewing = group.create_task(self._renew(attempt))
                with telemetry.joined("fetch", attempt.traceparent):
                    await self._fetch(attempt)
                renewing.cancel()
        except* asyncio.CancelledError:
            await self._again(attempt, 0, "its worker was told to stop")
            raise
        except* Exception as group_error:
            error = repr(group_error.exceptions)
            log.error("fetch_failed", attempt_id=attempt.attempt_id, error=error, exc_info=True)

    async def _renew(self, attempt: rows.Attempt) -> None:
        while True:
            await asyncio.sleep(self._lease.total_seconds() / 3)
            await self._store.renders.renew_fetch(attempt, self._lease)

    async def _fetch(self, attempt: rows.Attempt) -> None:
        assert attempt.provider_account is not None
        assert attempt.provider_job_id is not None
        assert attempt.content_expires_at is not None
        render = download.Render(
            attempt,
            self._pools.accounts[attempt.provider_account],
            attempt.provider_job_id,
            attempt.content_expires_at,
            attempt.fetch_tries,
            attempt.not_found_count,
            attempt.not_found_seconds,
        )
        await failpoint("generator.fetch.before_put")

        async def begun() -> None:
            await self._teller.stage(attempt, attempts.State.FETCHING)

        passed = await self._downloads.once(render, begun)
        ended = passed.ended
        if ended is None:
            await self._again(attempt, passed.again_seconds, passed.message, gone=passed.unlisted)
        elif ended.variants:
            await failpoint("generator.fetch.after_put")
            outputs = {variant: passed.stored[variant] for variant in ended.variants}
            try:
                smaller = await self._downloads.renditions(render, outputs)
            except errors.ServiceError as error:
                await self._again(attempt, RENDITION_RETRY_SECONDS, f"rendition: {error.message}")
                return
            if await self._store.videos.complete(attempt, outputs, smaller):
                log.info(
                    "video_completed",
                    video_id=attempt.video_id,
                    outputs=len(outputs),
                    **asdict(passed.spent),
                )
        else:
            verdict = videos.Verdict(ended.cause, ended.message, True, billed=True)
            await self._store.videos.fail(attempt, verdict, another_try=False)

    async def _again(
        self, attempt: rows.Attempt, seconds: float, message: str, *, gone: bool = False
    ) -> None:
        log.warning("fetch_again", attempt_id=attempt.attempt_id, message=message)
        await self._store.renders.fetch_again(
            attempt, timedelta(seconds=seconds), message[:300], gone=gone
        )
