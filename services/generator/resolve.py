"""Finds out what became of creates whose answer was lost: adopt, send again, or go on looking until resolve_by."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from kit import loops, telemetry
from kit.failpoints import failpoint
from services.generator import attempts, catalogue, config, pools, quota
from services.generator.providers import contract
from services.generator.store import Store, rows, submissions

log = telemetry.logger(__name__)

PASS_LEASE = timedelta(seconds=30)
BATCH = 50
MAX_PAGES = 50


class Resolver:
    """The loop over undecided attempts."""

    def __init__(
        self, settings: config.Settings, store: Store, pools_: pools.Pools, dispatch: loops.Wake
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._quota = quota.Quota(store.queue)
        self._dispatch = dispatch

    async def run(self, stopping: asyncio.Event) -> None:
        """Resolves until told to stop."""
        await loops.every("resolver", self._settings.loop_seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One look at every undecided attempt that is due."""
        await self._store.submissions.expire_leases()
        undecided = await self._store.submissions.undecided(PASS_LEASE, BATCH)
        for attempt in undecided:
            await self._resolve(attempt)
        return len(undecided) == BATCH

    async def _resolve(self, attempt: rows.Attempt) -> None:
        assert attempt.provider_account is not None
        assert attempt.submitted_at is not None
        account = self._pools.accounts[attempt.provider_account]
        # Before the list is read, not after: whoever could still send when we looked may send after it.
        around = await self._store.submissions.surroundings(attempt)
        seen: attempts.ListPass | None = None
        if account.evidence is attempts.Evidence.SEARCHABLE:
            try:
                since = attempt.submitted_at - timedelta(seconds=account.clock_skew_seconds)
                seen = await self._list(account, since, around.known_job_ids)
            except contract.ProviderTrouble as trouble:
                log.warning("list_failed", provider_account=account.name, error=str(trouble))
                pause = timedelta(
                    seconds=trouble.retry_after_seconds or account.poll_interval_seconds
                )
                await self._store.submissions.wait(attempt, pause, absent=False, unresolved=False)
                return
        decision = attempts.decide(
            self._undecided(attempt, account, around), seen, datetime.now(UTC)
        )
        await self._act(attempt, decision)

    def _undecided(
        self,
        attempt: rows.Attempt,
        account: catalogue.ProviderAccount,
        around: submissions.Surroundings,
    ) -> attempts.Undecided:
        assert attempt.submitted_at is not None
        return attempts.Undecided(
            evidence=account.evidence,
            fingerprint=attempt.fingerprint,
            submitted_at=attempt.submitted_at,
            post_timeout=timedelta(seconds=account.post_timeout_seconds),
            settle_time=timedelta(seconds=account.settle_seconds),
            clock_skew=timedelta(seconds=account.clock_skew_seconds),
            key_ttl=timedelta(seconds=account.key_ttl_seconds),
            sender_gone=around.sender_gone,
            claimants=around.claimants,
            absent_since=attempt.absent_since,
        )

    async def _act(self, attempt: rows.Attempt, decision: attempts.Decision) -> None:
        match decision:
            case attempts.Adopt(provider_job_id):
                owner = await self._store.submissions.add_job(
                    attempt, provider_job_id, adopted=True
                )
                await failpoint("generator.resolve.after_adopt")
                if owner == attempt.attempt_id:
                    await self._store.submissions.accepted(attempt, provider_job_id)
                    log.info("job_adopted", attempt_id=attempt.attempt_id)
            case attempts.SendAgain(same_key):
                log.info("job_sent_again", attempt_id=attempt.attempt_id, same_key=same_key)
                await failpoint("generator.resolve.before_put_back")
                await self._store.queue.put_back(
                    attempt, timedelta(0), "sent again after proof", key_pinned=same_key
                )
                self._dispatch.ring()
            case attempts.Wait(seconds, absent, unresolved):
                await self._store.submissions.wait(
                    attempt, timedelta(seconds=seconds), absent=absent, unresolved=unresolved
                )

    async def _list(
        self, account: catalogue.ProviderAccount, since: datetime, known: frozenset[str]
    ) -> attempts.ListPass:
        """Reads the list back to before `since`."""
        provider = self._pools.providers[account.name]
        unknown: list[attempts.ListedJob] = []
        sentinel = reached = False
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            await self._quota.take(account)
            page, cursor = await provider.list_page(cursor)
            for job in page:
                if job.provider_job_id in known:
                    sentinel = True
                elif job.fingerprint is not None:
                    unknown.append(
                        attempts.ListedJob(job.provider_job_id, job.fingerprint, job.created_at)
                    )
            reached = cursor is None or (bool(page) and page[-1].created_at < since)
            if reached:
                break
        return attempts.ListPass(tuple(unknown), reached, sentinel, datetime.now(UTC))
