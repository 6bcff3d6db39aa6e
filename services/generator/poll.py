"""Asks providers how the renders are: one pass over the list per account, single questions only for what it misses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

from kit import loops, telemetry
from kit.failpoints import failpoint
from services.generator import attempts, catalogue, config, pools, progress, quota
from services.generator.providers import contract
from services.generator.store import Store, rows, videos

log = telemetry.logger(__name__)

MAX_PAGES = 200
LOST_COUNT = 5
REFUSED_CODES = ("moderation", "sentinel", "content_policy", "safety")


class Poller:
    """The loop over provider accounts."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        pools_: pools.Pools,
        teller: progress.Teller,
        fetcher: loops.Wake,
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._teller = teller
        self._fetcher = fetcher
        self._quota = quota.Quota(store.queue)

    async def run(self, stopping: asyncio.Event) -> None:
        """Polls until told to stop."""
        await loops.every("poller", self._settings.loop_seconds, self.run_once, stopping)

    async def run_once(self) -> None:
        """One pass over each account that is due."""
        lease = timedelta(seconds=self._settings.pass_lease_seconds)
        for account in self._pools.accounts.values():
            if not await self._store.renders.claim_poll(account.name, lease):
                continue
            interval = timedelta(seconds=account.poll_interval_seconds)
            try:
                await self._pass(account)
            except contract.ProviderTrouble as trouble:
                log.warning("poll_failed", provider_account=account.name, error=str(trouble))
                interval = max(interval, timedelta(seconds=trouble.retry_after_seconds or 0))
            finally:
                await self._store.renders.end_poll(account.name, interval)

    async def _pass(self, account: catalogue.ProviderAccount) -> None:
        waiting = {
            attempt.provider_job_id: attempt
            for attempt in await self._store.renders.in_flight(account.name)
        }
        if not waiting:
            return
        oldest = min(attempt.submitted_at for attempt in waiting.values() if attempt.submitted_at)
        since = oldest - timedelta(seconds=account.clock_skew_seconds)
        sibling = False
        async for job in self._listed(account, since):
            attempt = waiting.pop(job.provider_job_id, None)
            if attempt is not None:
                sibling = True
                await self._seen(account, attempt, job)
        provider = self._pools.providers[account.name]
        for provider_job_id, attempt in waiting.items():
            assert provider_job_id is not None
            await self._quota.take(account)
            try:
                job = await provider.get(provider_job_id)
            except contract.ProviderTrouble as trouble:
                log.warning("get_failed", attempt_id=attempt.attempt_id, error=str(trouble))
                continue
            if job is None:
                await self._missing(account, attempt, sibling)
            else:
                await self._seen(account, attempt, job)

    async def _listed(
        self, account: catalogue.ProviderAccount, since: datetime
    ) -> AsyncIterator[contract.Job]:
        """The list, newest first, back to the oldest that we wait for. Where it fails single questions are left."""
        provider = self._pools.providers[account.name]
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            await self._quota.take(account)
            try:
                page, cursor = await provider.list_page(cursor)
            except contract.ProviderTrouble as trouble:
                log.warning("list_failed", provider_account=account.name, error=str(trouble))
                return
            for job in page:
                yield job
            if cursor is None or (page and page[-1].created_at < since):
                return

    async def _seen(
        self, account: catalogue.ProviderAccount, attempt: rows.Attempt, job: contract.Job
    ) -> None:
        if job.status is contract.Status.DONE:
            retention = timedelta(seconds=account.retention_seconds)
            expires = job.expires_at or datetime.now(UTC) + retention
            await failpoint("generator.poll.before_finished")
            if await self._store.renders.finished(attempt, expires):
                await self._teller.stage(attempt, attempts.State.FETCHING)
                self._fetcher.ring()
        elif job.status is contract.Status.FAILED:
            await self._failed(account, attempt, job)
        else:
            await self._running(attempt, job)

    async def _running(self, attempt: rows.Attempt, job: contract.Job) -> None:
        since = None
        if attempt.progress_at is not None:
            since = (datetime.now(UTC) - attempt.progress_at).total_seconds()
        found_again = attempt.not_found_count > 0  # those before do not count any more
        if found_again or attempts.worth_telling(
            attempt.progress_percent, job.progress_percent, since
        ):
            told = await self._store.renders.progress(attempt, job.progress_percent)
            if told is not None:
                await self._teller.send(told)

    async def _failed(
        self, account: catalogue.ProviderAccount, attempt: rows.Attempt, job: contract.Job
    ) -> None:
        """The provider's verdict. A failure of theirs that is not billed gets one further attempt, on the same hold."""
        code = job.error_code.lower()
        refused = any(word in code for word in REFUSED_CODES)
        inputs = "input" in f"{code} {job.error_message.lower()}"
        cause = ("INPUT_REFUSED" if inputs else "OUTPUT_REFUSED") if refused else "PROVIDER_ERROR"
        reason = job.error_message or job.error_code or "no reason given"
        message = f"the provider could not make it: {reason}"
        another = not refused and attempt.number < account.max_attempts
        verdict = videos.Verdict(cause, message[:300], retryable=not refused)
        if await self._store.videos.fail(attempt, verdict, another_try=another):
            log.info(
                "render_failed", attempt_id=attempt.attempt_id, cause=cause, another_try=another
            )

    async def _missing(
        self, account: catalogue.ProviderAccount, attempt: rows.Attempt, sibling: bool
    ) -> None:
        """A definite 404: counted; a verdict only after many, over a long time, while another job of ours is there."""
        count, seconds = await self._store.renders.not_found(attempt)
        if count >= LOST_COUNT and seconds >= account.lost_after_seconds and sibling:
            verdict = videos.Verdict(
                "PROVIDER_LOST",
                "the provider does not know the job any more",
                True,
                billed=None,
                look_back=timedelta(seconds=account.retention_seconds),
            )
            await self._store.videos.fail(attempt, verdict, another_try=False)
