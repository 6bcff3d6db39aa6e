"""Finds out what became of creates whose answer was lost: adopt, send again, or go on looking until resolve_by."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from kit import loops, telemetry
from kit.failpoints import failpoint
from services.generator import attempts, catalogue, config, pools, quota
from services.generator.providers import contract
from services.generator.store import Store, rows, submissions

log = telemetry.logger(__name__)

BATCH = 50
MAX_PAGES = 50


class Resolver:
    """The loop over undecided attempts."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        pools_: pools.Pools,
        quota_: quota.Quota,
        dispatch: loops.Wake,
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._quota = quota_
        self._dispatch = dispatch

    async def run(self, stopping: asyncio.Event) -> None:
        """Resolves until told to stop."""
        await loops.every("resolver", self._settings.loop_seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One look at every undecided attempt that is due, with one reading of each provider account's list."""
        await self._store.submissions.expire_leases()
        lease = timedelta(seconds=self._settings.pass_lease_seconds)
        undecided = await self._store.submissions.undecided(lease, BATCH)
        by_account: dict[str, list[rows.Attempt]] = {}
        for attempt in undecided:
            by_account.setdefault(attempt.provider_account or "", []).append(attempt)
        for name, of_account in by_account.items():
            account = self._pools.accounts.get(name)
            if account is None:
                # Left out of the catalogue: they wait for it, or for their resolve_by.
                log.error("provider_account_unknown", provider_account=name)
                continue
            await self._resolve(account, of_account)
        return len(undecided) == BATCH

    async def _resolve(
        self, account: catalogue.ProviderAccount, undecided: list[rows.Attempt]
    ) -> None:
        # Before the list is read, not after: who could still send when we looked may send after it. The moment is of
        # the database's clock, as all that it is compared with.
        now, gone = await self._store.submissions.senders_gone(undecided)
        try:
            listed = await Listed.read(self._pools, self._quota, account, undecided)
        except contract.ProviderTrouble as trouble:
            log.warning("list_failed", provider_account=account.name, error=str(trouble))
            seconds = trouble.retry_after_seconds or account.poll_interval_seconds
            for attempt in undecided:
                await self._store.submissions.wait(
                    attempt, timedelta(seconds=seconds), absent=False, unresolved=False
                )
            return
        for attempt in undecided:
            around = await self._store.submissions.surroundings(attempt, listed.job_ids)
            sender_gone = attempt.attempt_id in gone
            await self._act(attempt, listed.decide(attempt, around, now, sender_gone=sender_gone))

    async def _act(self, attempt: rows.Attempt, decision: attempts.Decision) -> None:
        match decision:
            case attempts.Adopt(provider_job_id):
                adopted = await self._store.submissions.adopt(attempt, provider_job_id)
                await failpoint("generator.resolve.after_adopt")
                if adopted:
                    await self._store.submissions.accepted(attempt, provider_job_id)
                    log.info("job_adopted", attempt_id=attempt.attempt_id)
            case attempts.SendAgain() if attempt.suspects:
                shown = self._pools.providers[attempt.suspects[0]].shown(attempt.job.spec)
                await self._store.submissions.suspect_next(attempt, shown)
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


@dataclass(frozen=True, slots=True)
class Listed:
    """One reading of an account's list, for all its attempts of which it is not known what became of them."""

    account: catalogue.ProviderAccount
    provider: contract.Provider
    jobs: tuple[contract.Job, ...] | None
    """None where a list proves nothing."""
    reached_start: bool

    @classmethod
    async def read(
        cls,
        pools_: pools.Pools,
        quota_: quota.Quota,
        account: catalogue.ProviderAccount,
        undecided: Sequence[rows.Attempt],
    ) -> Listed:
        """Reads the list back to before the oldest of them was sent. Raises ProviderTrouble."""
        provider = pools_.providers[account.name]
        if account.evidence is not attempts.Evidence.SEARCHABLE:
            return cls(account, provider, None, False)
        sent = [attempt.submitted_at for attempt in undecided if attempt.submitted_at]
        since = min(sent) - timedelta(seconds=account.clock_skew_seconds)
        jobs: list[contract.Job] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            await quota_.take(account, quota.Use.POLL)
            page, cursor = await provider.list_page(cursor)
            jobs += page
            if cursor is None or (page and page[-1].created_at < since):
                return cls(account, provider, tuple(jobs), True)
        return cls(account, provider, tuple(jobs), False)

    @property
    def job_ids(self) -> list[str]:
        """Everything that it shows."""
        return [job.provider_job_id for job in self.jobs or ()]

    def decide(
        self,
        attempt: rows.Attempt,
        around: submissions.Surroundings,
        now: datetime,
        *,
        sender_gone: bool,
    ) -> attempts.Decision:
        """What it means for one of them."""
        marker = self.provider.shown_marker(attempt.job.spec, attempt.attempt_id)
        undecided = _undecided(attempt, self.account, around, sender_gone, marker)
        listed = None
        if self.jobs is not None:
            listed = _pass(self.jobs, self.reached_start, around.known_job_ids, now)
        return attempts.decide(undecided, listed, now)


def _pass(
    jobs: tuple[contract.Job, ...], reached: bool, known: frozenset[str], at: datetime
) -> attempts.ListPass:
    unknown = [job for job in jobs if job.provider_job_id not in known]
    return attempts.ListPass(
        jobs=tuple(
            attempts.ListedJob(
                job.provider_job_id, job.fingerprint or "", job.created_at, job.marker
            )
            for job in unknown
            if job.fingerprint is not None or job.marker
        ),
        # A job of which too little is shown could be anybody's, ours too: then the list proves nothing.
        reached_start=reached and all(job.fingerprint is not None for job in unknown),
        sentinel_seen=len(unknown) < len(jobs),
        at=at,
    )


def _undecided(
    attempt: rows.Attempt,
    account: catalogue.ProviderAccount,
    around: submissions.Surroundings,
    sender_gone: bool,
    marker: str,
) -> attempts.Undecided:
    assert attempt.submitted_at is not None
    # A second send under the key would be harmless at this account only.
    keyed = account.evidence is attempts.Evidence.KEYED and bool(attempt.suspects)
    return attempts.Undecided(
        evidence=attempts.Evidence.BLIND if keyed else account.evidence,
        fingerprint=attempt.fingerprint,
        submitted_at=attempt.submitted_at,
        post_timeout=timedelta(seconds=account.post_timeout_seconds),
        settle_time=timedelta(seconds=account.settle_seconds),
        clock_skew=timedelta(seconds=account.clock_skew_seconds),
        key_ttl=timedelta(seconds=account.key_ttl_seconds),
        sender_gone=sender_gone,
        claimants=around.claimants,
        absent_since=attempt.absent_since,
        marker=marker,
        sent_until=attempt.sent_until,
    )
