"""Asks providers how the renders are: one pass over the list per account, single questions only for what it misses.

A pass costs as many requests as the list has pages back to the oldest job that we wait for. One that hangs for an hour
would make every pass long: where it is cheaper, the oldest few are asked for singly and the list is read less far.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from kit import loops, telemetry
from kit.failpoints import failpoint
from services.generator import attempts, catalogue, config, pools, progress, quota
from services.generator.providers import contract
from services.generator.store import Store, renders, videos

log = telemetry.logger(__name__)

MAX_PAGES = 200
PAGE_JOBS = 100
OLDEST_ASKED_SINGLY = 10
FEWEST_SINGLY = 5
WITHOUT_LIST_SHARE = 0.2
"""Of the interval: how often it is looked who is to be asked, where there is no list."""
TIMER_SECONDS = 0.002
"""What a timer may be early."""
PUNCTUAL_SHARE = 0.97
"""Of the interval, so that a pass whose pages come a little late still shows each job within the interval."""
LOST_COUNT = 5
REFUSED_CODES = ("moderation", "sentinel", "content_policy", "safety", "asset.invalid")


@dataclass(slots=True)
class Pass:
    """One pass over an account."""

    held_until: datetime
    waiting: dict[str, renders.Render]
    """By the provider's id, those not seen yet."""
    sibling: bool = False
    """A job of ours was seen."""
    unwanted: list[renders.Render] = field(default_factory=list[renders.Render])
    """Still being rendered, and their owners have cancelled them."""
    began: float = field(default_factory=time.monotonic)
    missing: list[renders.Render] = field(default_factory=list[renders.Render])


def cut(submitted: Sequence[datetime], sent_since: Sequence[int]) -> int:
    """How many of the oldest are better asked for singly, so that the pass costs the fewest requests.

    `submitted`: when the oldest were sent, in order; `sent_since`: jobs of the account since each of these moments.
    """
    costs = [singly + math.ceil(jobs / PAGE_JOBS) for singly, jobs in enumerate(sent_since)]
    return costs.index(min(costs)) if submitted else 0


class LostPassError(Exception):
    """Another replica has the pass meanwhile."""


class Poller:
    """A loop per provider account: a slow one keeps no other waiting."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        pools_: pools.Pools,
        teller: progress.Teller,
        fetcher: loops.Wake,
        quota_: quota.Quota,
    ) -> None:
        self._lease = timedelta(seconds=settings.pass_lease_seconds)
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._teller = teller
        self._fetcher = fetcher
        self._quota = quota_
        self._due = {name: loops.Wake() for name in pools_.accounts}

    async def run(self, stopping: asyncio.Event) -> None:
        """Polls until told to stop."""
        async with asyncio.TaskGroup() as group:
            pause = self._settings.loop_seconds
            for name, account in self._pools.accounts.items():
                run_once = functools.partial(self.run_once, account)
                group.create_task(loops.every("poller", pause, run_once, stopping, self._due[name]))

    async def run_once(self, account: catalogue.ProviderAccount) -> None:
        """One pass over the account, if it is due."""
        held_until = await self._store.renders.claim_poll(account.name, self._lease)
        if held_until is None:
            return
        seconds = account.poll_interval_seconds
        interval = timedelta(seconds=seconds)
        waiting = await self._store.renders.in_flight(account.name, interval)
        this = Pass(held_until, {render.provider_job_id: render for render in waiting})
        try:
            seconds = await self._pass(account, this) if waiting else seconds
        except LostPassError:
            log.warning("poll_pass_lost", provider_account=account.name)
        finally:
            due_in = await self._store.renders.end_poll(
                account.name,
                this.held_until,
                timedelta(seconds=seconds),
                timedelta(seconds=account.poll_interval_with_webhooks_seconds),
            )
            if due_in is not None:
                # To the moment: by what the loop's pause is late, every completion would be seen late.
                wake = self._due[account.name]
                asyncio.get_running_loop().call_later(due_in + TIMER_SECONDS, wake.ring)

    async def _pass(self, account: catalogue.ProviderAccount, this: Pass) -> float:
        """Answers the interval at which the account is to be polled, as this pass turned out."""
        interval = account.poll_interval_seconds
        has_list = self._pools.providers[account.name].has_list
        if has_list:
            await self._list(account, this)
        all_asked = await self._singly(account, this)
        for render in this.missing:
            await self._missing(account, render, this.sibling)
        if account.cancel != "none":
            for render in this.unwanted[: self._most_singly(account)]:
                await self._stop(account, this, render)
        if not has_list:
            return interval * WITHOUT_LIST_SHARE if all_asked else 0.0
        # Where others want the quota, the pass has waited for each page until it was the polls' turn.
        said = self._quota.poll_after_seconds(account)
        if said:
            return max(interval, time.monotonic() - this.began + said)
        return interval * PUNCTUAL_SHARE

    async def _list(self, account: catalogue.ProviderAccount, this: Pass) -> None:
        """The list, newest first, back to the oldest that it is read for. Where it fails single questions are left."""
        submitted = [render.submitted_at for render in this.waiting.values()]
        oldest = submitted[:OLDEST_ASKED_SINGLY]
        singly = cut(oldest, await self._store.renders.sent_since(account.name, oldest))
        since = submitted[singly] - timedelta(seconds=account.clock_skew_seconds)
        provider = self._pools.providers[account.name]
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            await self._ask(account, this)
            try:
                page, cursor = await provider.list_page(cursor)
            except contract.ProviderTrouble as trouble:
                log.warning("list_failed", provider_account=account.name, error=str(trouble))
                await self._hear(account, trouble)
                return
            await self._hear(account)
            await self._seen(account, this, page)
            if cursor is None or (page and page[-1].created_at < since):
                return

    async def _singly(self, account: catalogue.ProviderAccount, this: Pass) -> bool:
        """Asks for those that no list has shown, who have waited longest first; false when some are left for later."""
        provider = self._pools.providers[account.name]
        interval = account.poll_interval_seconds
        due = [render for render in this.waiting.values() if render.ask_after_seconds <= 0]
        due.sort(key=lambda render: render.ask_after_seconds)
        most = self._most_singly(account)
        for render in due[:most]:
            await self._ask(account, this)
            trouble: contract.ProviderTrouble | None = None
            try:
                job = await provider.get(render.provider_job_id)
            except contract.ProviderTrouble as met:
                log.warning("get_failed", attempt_id=render.attempt_id, error=str(met))
                trouble = met
            else:
                if job is None:
                    this.missing.append(render)
                else:
                    await self._seen(account, this, (job,))
            await self._hear(account, trouble)
            delay = max(interval, self._quota.poll_after_seconds(account))
            delay *= random.uniform(0.8, 1.2)
            await self._store.renders.asked(render.attempt_id, timedelta(seconds=delay))
        return len(due) <= most

    def _most_singly(self, account: catalogue.ProviderAccount) -> int:
        """So many jobs of a pass are asked for by themselves; the others wait for the next."""
        return max(
            FEWEST_SINGLY, int(account.poll_interval_seconds / account.quota.requests.interval)
        )

    async def _stop(
        self, account: catalogue.ProviderAccount, this: Pass, render: renders.Render
    ) -> None:
        """Has a render stopped that its owner does not want. One that was finished first stays, and is fetched."""
        provider = self._pools.providers[account.name]
        if not await self._store.renders.begin_cancel(render):
            return
        await failpoint("generator.stop.before_cancel")
        job: contract.Job | None = None
        try:
            await self._ask(account, this)  # what shows whether it still runs
            await self._ask(account, this)
            if not await provider.cancel(render.provider_job_id):
                return
            await failpoint("generator.stop.after_cancel")
            await self._ask(account, this)
            job = await provider.get(render.provider_job_id)
        except contract.ProviderTrouble as trouble:
            log.warning("cancel_failed", attempt_id=render.attempt_id, error=str(trouble))
            await self._hear(account, trouble)
            return
        if job is None or job.status is contract.Status.FAILED:
            await self._stopped(render)

    async def _stopped(self, render: renders.Render) -> None:
        attempt = await self._store.renders.load(render.attempt_id)
        if await self._store.videos.stopped(attempt):
            log.info("render_stopped", attempt_id=render.attempt_id)

    async def _ask(self, account: catalogue.ProviderAccount, this: Pass) -> None:
        """Takes a request, and keeps the pass meanwhile. Raises LostPassError."""
        while not await self._quota.take(account, quota.Use.POLL, self._lease.total_seconds() / 3):
            await self._renew(account, this)
        await self._renew(account, this)

    async def _renew(self, account: catalogue.ProviderAccount, this: Pass) -> None:
        held_until = await self._store.renders.renew_poll(
            account.name, this.held_until, self._lease
        )
        if held_until is None:
            raise LostPassError
        this.held_until = held_until

    async def _hear(
        self, account: catalogue.ProviderAccount, trouble: contract.ProviderTrouble | None = None
    ) -> None:
        await self._quota.hear(account, refused=trouble is not None and trouble.too_early)

    async def _seen(
        self, account: catalogue.ProviderAccount, this: Pass, jobs: Sequence[contract.Job]
    ) -> None:
        """Takes over what is shown of those that we wait for; the progress of all of them in one write."""
        moved: list[tuple[renders.Render, int]] = []
        for job in jobs:
            render = this.waiting.pop(job.provider_job_id, None)
            if render is None:
                continue
            this.sibling = True
            if job.status is contract.Status.DONE:
                await self._done(account, render, job)
                continue
            if job.status is contract.Status.FAILED:
                await self._failed(account, render, job)
                continue
            if render.cancel_requested:
                this.unwanted.append(render)
            # Found again: the times before that it was not there do not count any more.
            if render.not_found_count > 0 or attempts.worth_telling(
                render.progress_percent, job.progress_percent, render.progress_age_seconds
            ):
                moved.append((render, job.progress_percent))
        if moved:
            for told in await self._store.renders.progress(moved):
                await self._teller.send(told)

    async def _done(
        self, account: catalogue.ProviderAccount, render: renders.Render, job: contract.Job
    ) -> None:
        retention = timedelta(seconds=account.retention_seconds)
        expires = job.expires_at or datetime.now(UTC) + retention
        await failpoint("generator.poll.before_finished")
        if await self._store.renders.finished(render, expires):
            await self._teller.stage(render, attempts.State.FETCHING)
            self._fetcher.ring()

    async def _failed(
        self, account: catalogue.ProviderAccount, render: renders.Render, job: contract.Job
    ) -> None:
        """The provider's verdict. A failure of theirs that is not billed gets one further attempt, on the same hold."""
        code = job.error_code.lower()
        if render.cancel_sent and "cancel" in code:
            await self._stopped(render)
            return
        attempt = await self._store.renders.load(render.attempt_id)
        refused = any(word in code for word in REFUSED_CODES)
        inputs = "input" in f"{code} {job.error_message.lower()}"
        cause = ("INPUT_REFUSED" if inputs else "OUTPUT_REFUSED") if refused else "PROVIDER_ERROR"
        reason = job.error_message or job.error_code or "no reason given"
        message = f"the provider could not make it: {reason}"
        another = not refused and not job.billed and attempt.number < account.max_attempts
        verdict = videos.Verdict(cause, message[:300], retryable=not refused, billed=job.billed)
        if await self._store.videos.fail(attempt, verdict, another_try=another):
            log.info(
                "render_failed", attempt_id=attempt.attempt_id, cause=cause, another_try=another
            )

    async def _missing(
        self, account: catalogue.ProviderAccount, render: renders.Render, sibling: bool
    ) -> None:
        """A definite 404: counted; a verdict only after many, over a long time, while another job of ours is there.

        Of one that we asked to be stopped it is the answer.
        """
        if render.cancel_sent:
            await self._stopped(render)
            return
        count, seconds = await self._store.renders.not_found(render)
        if count >= LOST_COUNT and seconds >= account.lost_after_seconds and sibling:
            verdict = videos.Verdict(
                "PROVIDER_LOST",
                "the provider does not know the job any more",
                True,
                billed=None,
                look_back=timedelta(seconds=account.retention_seconds),
            )
            attempt = await self._store.renders.load(render.attempt_id)
            await self._store.videos.fail(attempt, verdict, another_try=False)
