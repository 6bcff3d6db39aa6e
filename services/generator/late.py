"""Looks for renders of attempts that were given up, keeps what turns up, free of charge, and tells their owners.

The verdict stands: a video that FAILED stays FAILED and its credits are given back; the provider may have been paid.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from kit import loops, telemetry
from services.generator import attempts, catalogue, config, download, pools, quota, resolve
from services.generator.providers import contract
from services.generator.store import Store, rows

log = telemetry.logger(__name__)

BATCH = 20
AT_ONCE = 2
AGE_PART = 8.0
"""Looks become rarer with time: the next comes after this part of the time since the verdict."""


class LateRenders:
    """The loop over given-up attempts."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        pools_: pools.Pools,
        downloads: download.Downloads,
        quota_: quota.Quota,
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._downloads = downloads
        self._quota = quota_
        self._lease = timedelta(seconds=settings.fetch_lease_seconds)

    async def run(self, stopping: asyncio.Event) -> None:
        """Looks until told to stop."""
        await loops.every("late", self._settings.loop_seconds * 4, self.run_once, stopping)

    async def run_once(self) -> None:
        """One look at everything that is due."""
        await self._store.late.turned_up()
        given_up = await self._store.late.give_up()
        if given_up:
            log.warning("late_renders_given_up", count=given_up)
        by_account: dict[str, list[rows.LateRender]] = {}
        for late in await self._store.late.claim("LOOKING", self._lease, BATCH):
            by_account.setdefault(late.attempt.provider_account or "", []).append(late)
        for name, of_account in by_account.items():
            account = self._pools.accounts.get(name)
            if account is None:
                # Left out of the catalogue: who could be asked is gone, until it is put back.
                for late in of_account:
                    await self._store.late.again(late, timedelta(minutes=5), "account unknown")
            else:
                await self._look(account, of_account)
        for late in await self._store.late.claim("FETCHING", self._lease, AT_ONCE):
            await self._fetch(late)

    async def _look(self, account: catalogue.ProviderAccount, lates: list[rows.LateRender]) -> None:
        nameless = [late for late in lates if late.provider_job_id is None]
        try:
            for late in lates:
                if late.provider_job_id is not None:
                    await self._ask(account, late, late.provider_job_id)
            if nameless and account.evidence is attempts.Evidence.SEARCHABLE:
                await self._search(account, nameless)
        except contract.ProviderTrouble as trouble:
            log.warning("late_look_failed", provider_account=account.name, error=str(trouble))
        least = max(account.settle_seconds, account.poll_interval_seconds)
        for late in lates:
            # Those of which something was found are somewhere else by now, and stay as they are.
            seconds = max(least, late.age_seconds / AGE_PART)
            await self._store.late.again(late, timedelta(seconds=seconds), "still looking")

    async def _ask(
        self, account: catalogue.ProviderAccount, late: rows.LateRender, provider_job_id: str
    ) -> None:
        await self._quota.take(account, quota.Use.RETRY)
        job = await self._pools.providers[account.name].get(provider_job_id)
        if job is None or job.status is contract.Status.RUNNING:
            return  # a job may be lost, and back
        if job.status is contract.Status.FAILED:
            await self._store.late.gone(late, f"the provider failed: {job.error_code}"[:300])
            return
        retention = timedelta(seconds=account.retention_seconds)
        if await self._store.late.finished(late, job.expires_at or datetime.now(UTC) + retention):
            log.warning("late_render_found", attempt_id=late.attempt.attempt_id)

    async def _search(
        self, account: catalogue.ProviderAccount, lates: list[rows.LateRender]
    ) -> None:
        """One reading of the list for all of them; adoption by the same rule as in time."""
        undecided = [late.attempt for late in lates]
        listed = await resolve.Listed.read(self._pools, self._quota, account, undecided)
        now, _ = await self._store.submissions.senders_gone([])
        for late in lates:
            around = await self._store.submissions.surroundings(late.attempt, listed.job_ids)
            decision = listed.decide(late.attempt, around, now, sender_gone=True)
            if isinstance(decision, attempts.Adopt) and await self._store.late.adopt(
                late, decision.provider_job_id
            ):
                log.warning("late_render_adopted", attempt_id=late.attempt.attempt_id)

    async def _fetch(self, late: rows.LateRender) -> None:
        attempt = late.attempt
        account = self._pools.accounts.get(attempt.provider_account or "")
        if account is None:
            await self._store.late.again(late, timedelta(minutes=5), "account unknown")
            return
        assert late.provider_job_id is not None
        assert late.content_expires_at is not None
        render = download.Render(
            attempt, account, late.provider_job_id, late.content_expires_at, late.fence, 0, 0.0
        )
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(self._renew(late))
            passed = await self._downloads.once(render, _nothing)
            renewing.cancel()
        if passed.ended is None:
            delay = timedelta(seconds=passed.again_seconds)
            await self._store.late.again(late, delay, passed.message[:300])
        elif passed.ended.variants:
            outputs = {variant: passed.stored[variant] for variant in passed.ended.variants}
            if await self._store.videos.recovered(late, outputs):
                log.warning("video_recovered", video_id=attempt.video_id, outputs=len(outputs))
        else:
            await self._store.late.gone(late, passed.ended.message)

    async def _renew(self, late: rows.LateRender) -> None:
        while True:
            await asyncio.sleep(self._lease.total_seconds() / 3)
            await self._store.late.renew(late, self._lease)


async def _nothing() -> None:
    """Nobody follows the progress of a video that has failed."""
