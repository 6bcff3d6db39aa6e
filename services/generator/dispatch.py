"""Gives attempts their turn and sends them: the one place that makes paid requests.

The order is the safety: turn, PREPARE (whole body built), quota, SUBMITTING committed on the connection that holds the
worker's lock, then the POST within SEND_WITHIN_SECONDS or not at all, then the provider's job id, unfenced, before
anything else.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Sequence
from datetime import timedelta

from kit import errors, loops, telemetry
from kit.failpoints import failpoint
from services.generator import (
    assets,
    attempts,
    catalogue,
    config,
    measures,
    pools,
    progress,
    quota,
    spool,
    standings,
    turns,
    worker,
)
from services.generator.providers import contract
from services.generator.store import Store, rows, videos

log = telemetry.logger(__name__)

SEND_WITHIN_SECONDS = 2.0
PREPARE_RETRY = timedelta(seconds=2)
TWIN_RETRY = timedelta(seconds=1)
NOT_ACCEPTED_SECONDS = 2.0
DOUBTS_IN_A_ROW = 3
"""So many creates without an answer one after the other, and no more are sent for a while."""
RECORD_RETRY_SECONDS = 0.5
FRUITLESS_SECONDS = 0.02
"""After a turn that found nothing to give: a burst of jobs before a closed account is one look, not one each."""
REFUSED_INPUTS = frozenset({"ASSET_NOT_FOUND", "NOT_AN_IMAGE", "NOT_A_VIDEO", "TOO_LARGE"})


class Bells(loops.Wake):
    """One bell per pool; whoever rings, rings all."""

    def __init__(self, pool_names: Sequence[str]) -> None:
        super().__init__()
        self.of = {name: loops.Wake() for name in pool_names}

    def ring(self) -> None:
        """Wakes the waiters of all pools."""
        for bell in self.of.values():
            bell.ring()


class Dispatcher:
    """One per process; turns are given by one process at a time, sending is done by whoever was given them."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        pools_: pools.Pools,
        assets_: assets.Assets,
        worker_: worker.Worker,
        teller: progress.Teller,
        quota_: quota.Quota,
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._assets = assets_
        self._worker = worker_
        self._teller = teller
        self._quota = quota_
        self._spool = spool.Spool(settings.spool_dir)
        self._running: dict[str, set[asyncio.Task[None]]] = {name: set() for name in pools_.names}
        self._doubts: dict[str, int] = {}
        self.wake = Bells(pools_.names)

    async def run(self, stopping: asyncio.Event) -> None:
        """Dispatches until told to stop, then lets what was begun come to its end. No pool waits for another."""
        seconds = self._settings.loop_seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(loops.every("unspooler", seconds, self._unspool, stopping))
            for pool in self._pools.names:
                turn = functools.partial(self.turn, pool)
                bell = self.wake.of[pool]
                group.create_task(loops.every("dispatcher", seconds, turn, stopping, bell))
        if running := set[asyncio.Task[None]]().union(*self._running.values()):
            await asyncio.wait(running)

    async def turn(self, pool: str) -> bool:
        """Gives one turn in a pool; true when there may be more to give."""
        running = self._running[pool]
        at_once = self._settings.concurrent_submits
        if len(running) >= at_once:
            return False
        accounts = self._pools.of_pool(pool)
        lease = self._settings.prepare_lease_seconds
        most = {
            name: standings.most_preparing(account, lease, at_once)
            for name, account in accounts.items()
        }
        attempt = await self._store.queue.pick(
            pool, accounts, most, turns.LANE_WEIGHTS, timedelta(seconds=lease)
        )
        if attempt is None:
            await asyncio.sleep(FRUITLESS_SECONDS)
            return False
        task = asyncio.create_task(self._guarded(attempt))
        running.add(task)
        task.add_done_callback(functools.partial(self._ended, pool))
        return True

    def _ended(self, pool: str, task: asyncio.Task[None]) -> None:
        self._running[pool].discard(task)
        self.wake.ring()

    async def _guarded(self, attempt: rows.Attempt) -> None:
        """A submission that fails in an unforeseen way leaves its lease to run out, which is always safe."""
        try:
            with telemetry.joined("submit", attempt.traceparent):
                await self.submit(attempt)
        except Exception as error:
            log.error(
                "submission_failed", attempt_id=attempt.attempt_id, error=repr(error), exc_info=True
            )
        await self._done_sending(attempt)

    async def _done_sending(self, attempt: rows.Attempt) -> None:
        """However it ended, this task sends no more; without our word our lock would say for ever that it might."""
        while True:
            try:
                submission = attempt.submissions + 1
                await self._store.submissions.sender_done(attempt, self._worker.key, submission)
                return
            except Exception as error:
                log.warning("sender_not_released", error=repr(error))
                await asyncio.sleep(RECORD_RETRY_SECONDS)

    async def submit(self, attempt: rows.Attempt) -> None:
        """Prepares and sends one attempt."""
        assert attempt.provider_account is not None
        account = self._pools.accounts[attempt.provider_account]
        provider = self._pools.providers[account.name]
        await self._teller.stage(attempt, attempts.State.PREPARING)
        body = await self._prepare(attempt, provider)
        if body is None:
            return
        # Well before the lease is over: who comes late with a request taken has lost it.
        seconds = self._settings.prepare_lease_seconds / 2
        rate = 1 / account.quota.requests.interval
        last = await self._store.queue.are_last(attempt, rate)
        if not await self._quota.take(account, quota.Use.SUBMIT, seconds, last=last):
            await self._put_back(attempt, timedelta(0), "its request was not free in time")
            return
        sent = await self._send(attempt, account, provider, body)
        if sent is not None:
            await self._record(attempt, account, sent)

    async def _prepare(
        self, attempt: rows.Attempt, provider: contract.Provider
    ) -> contract.Body | None:
        try:
            inputs = await self._inputs(attempt)
            await failpoint("generator.prepare.after_fit")
            body = provider.build(attempt.job.spec, inputs, attempt.attempt_id)
        except errors.ServiceError as error:
            if error.reason in REFUSED_INPUTS and not attempt.key_pinned:
                await self._cannot_be_sent(attempt, f"an input is not usable: {error.message}")
            else:
                log.warning("prepare_failed", attempt_id=attempt.attempt_id, reason=error.reason)
                await self._put_back(attempt, PREPARE_RETRY, "storage did not answer")
            return None
        except contract.CannotSend as error:
            log.error("input_not_taken", provider_account=attempt.provider_account, why=str(error))
            await self._cannot_be_sent(attempt, str(error))
            return None
        if attempt.key_pinned and attempt.body_sha256 not in (None, _sha256(body)):
            # The same key with another body would be another job, or an error that says nothing. Its lease runs out,
            # again and again, until resolve_by.
            log.error("body_changed", attempt_id=attempt.attempt_id)
            return None
        return body

    async def _inputs(self, attempt: rows.Attempt) -> Sequence[contract.Input]:
        """To bring a video to a size takes longer than a lease: it is renewed meanwhile."""
        lease = self._settings.prepare_lease_seconds
        fetching = asyncio.ensure_future(self._assets.inputs(attempt))
        try:
            while not (await asyncio.wait({fetching}, timeout=lease / 3))[0]:
                await self._store.queue.renew(attempt, timedelta(seconds=lease))
            return fetching.result()
        finally:
            fetching.cancel()

    async def _cannot_be_sent(self, attempt: rows.Attempt, why: str) -> None:
        verdict = videos.Verdict("REQUEST_INVALID", why, False)
        await self._store.videos.fail(attempt, verdict, another_try=False)

    async def _put_back(self, attempt: rows.Attempt, delay: timedelta, message: str) -> None:
        await self._store.queue.put_back(attempt, delay, message, key_pinned=attempt.key_pinned)

    async def _send(
        self,
        attempt: rows.Attempt,
        account: catalogue.ProviderAccount,
        provider: contract.Provider,
        body: contract.Body,
    ) -> contract.CreateOutcome | None:
        """The write-ahead and the one POST. None when nothing was sent."""
        margin = self._settings.submit_lease_margin_seconds
        spec = attempt.job.spec
        await failpoint("generator.submit.before_commit")
        async with self._worker.session() as (connection, key):
            # Before the commit: we may be stopped between it and the next line of ours.
            started = time.monotonic()
            begun = await self._store.submissions.begin(
                connection,
                attempt,
                key,
                lease=timedelta(seconds=account.post_timeout_seconds + margin),
                resolve_after=timedelta(seconds=account.resolve_seconds),
                render_limit=timedelta(seconds=account.max_render_seconds),
                body_sha256=_sha256(body),
                fingerprint=provider.shown(spec),
                key_good_for=timedelta(seconds=account.key_ttl_seconds / 2),
                cost_micros=standings.price(account, spec),
            )
        if not begun:
            await self._put_back(attempt, TWIN_RETRY, "a twin is undecided")
            return None
        await failpoint("generator.submit.after_commit")
        keyed = account.evidence is attempts.Evidence.KEYED
        if time.monotonic() - started > SEND_WITHIN_SECONDS:
            # Somebody may have taken us for dead meanwhile. Not to send is the one safe thing; we alone can say so.
            await self._store.submissions.unsent(attempt, key, attempt.submissions + 1)
            log.warning("not_sent_in_time", attempt_id=attempt.attempt_id)
            return None
        outcome = await provider.create(body, attempt.attempt_id if keyed else None)
        await failpoint("generator.submit.after_post")
        return outcome

    async def _record(
        self,
        attempt: rows.Attempt,
        account: catalogue.ProviderAccount,
        outcome: contract.CreateOutcome,
    ) -> None:
        log.info("create_answered", attempt_id=attempt.attempt_id, outcome=type(outcome).__name__)
        if attempt.key_pinned and isinstance(outcome, contract.RefusedRequest):
            # The first send under this key may have been accepted: this refusal says nothing of that.
            outcome = contract.Ambiguous(outcome.message)
        match outcome:
            case contract.Accepted(provider_job_id):
                await self._accepted(attempt, provider_job_id)
                model = attempt.job.spec.model
                price = standings.price(account, attempt.job.spec)
                measures.COMMITTED.labels(account.name, model).inc(price)
            case contract.RefusedRequest(cause, message):
                verdict = videos.Verdict(
                    cause, f"the provider refused the request: {message}", False
                )
                await self._store.videos.fail(attempt, verdict, another_try=False)
            case contract.RefusedUs(message) | contract.NotAccepted(message):
                # Nothing was made: it goes back unharmed, and may go to another account.
                await self._close(account, attempt, outcome)
                await self._put_back(attempt, timedelta(0), message)
                self.wake.ring()
            case contract.Ambiguous(message):
                shown = attempts.without_prompt(message, attempt.job.spec.prompt)
                log.warning("create_ambiguous", attempt_id=attempt.attempt_id, message=shown)
                await self._store.submissions.unknown(attempt, message)
        await self._judge(account, outcome)

    async def _judge(
        self, account: catalogue.ProviderAccount, outcome: contract.CreateOutcome
    ) -> None:
        """What the outcome says of the account itself, where nothing was refused."""
        doubts = self._doubts.pop(account.name, 0)
        if isinstance(outcome, contract.Accepted | contract.RefusedRequest):
            await self._store.accounts.went_well(account.name)
        if isinstance(outcome, contract.Ambiguous):
            self._doubts[account.name] = doubts + 1
            if doubts + 1 >= DOUBTS_IN_A_ROW:
                await self._trouble(account, "its creates are not answered", account.closed_seconds)
        await self._quota.hear(account)

    async def _close(
        self,
        account: catalogue.ProviderAccount,
        attempt: rows.Attempt,
        outcome: contract.RefusedUs | contract.NotAccepted,
    ) -> None:
        """Closes the account for as long as what it said is worth, and remembers what was learnt of its limits."""
        message = attempts.without_prompt(outcome.message, attempt.job.spec.prompt)
        if isinstance(outcome, contract.RefusedUs):
            log.error("provider_account_closed", provider_account=account.name, message=message)
            await self._trouble(account, message, account.closed_seconds)
            return
        pause = NOT_ACCEPTED_SECONDS
        if outcome.limit == "requests":
            await self._quota.hear(account, refused=True)
        elif outcome.limit == "jobs":
            quota.REFUSALS.labels(account.name, "jobs").inc()
            learnt = await self._store.accounts.too_many_jobs(
                account.name,
                attempt.attempt_id,
                timedelta(seconds=account.probe_seconds),
                timedelta(seconds=account.max_closed_seconds),
            )
            log.warning("provider_slots_learnt", provider_account=account.name, jobs=learnt)
        elif outcome.limit == "day":
            quota.REFUSALS.labels(account.name, "day").inc()
            pause = account.closed_seconds
        await self._trouble(account, message, pause, outcome.retry_after_seconds)

    async def _trouble(
        self,
        account: catalogue.ProviderAccount,
        message: str,
        pause: float,
        said: float | None = None,
    ) -> None:
        # A refusal of us is worth minutes; a provider that could not be reached may be there the next moment.
        refused = pause >= account.closed_seconds
        most = account.max_closed_seconds if refused else account.closed_seconds
        await self._store.accounts.trouble(
            account.name,
            message,
            timedelta(seconds=pause),
            timedelta(seconds=max(pause, most)),
            timedelta(seconds=said or 0),
        )

    async def _accepted(self, attempt: rows.Attempt, provider_job_id: str) -> None:
        """The id first, whatever it takes: it is the only proof of a paid job."""
        assert attempt.provider_account is not None
        job = (attempt.attempt_id, attempt.provider_account, provider_job_id, attempt.fence)
        kept = None
        while True:
            try:
                await self._store.submissions.add_job(*job)
                break
            except Exception as error:
                log.warning("provider_job_not_stored", error=repr(error), job=job)
                if kept is None:
                    kept = self._spool.keep(*job)
                await asyncio.sleep(RECORD_RETRY_SECONDS)
        if kept is not None:
            kept.unlink(missing_ok=True)
        await failpoint("generator.submit.after_job_row")
        await self._store.submissions.accepted(attempt, provider_job_id)
        await failpoint("generator.submit.after_accepted")
        await self._teller.stage(attempt, attempts.State.RENDERING)

    async def _unspool(self) -> None:
        """Stores what an earlier process could not, or one of our tasks has not yet: to do both changes nothing."""
        for path, attempt_id, account, job, fence in self._spool.kept():
            await self._store.submissions.add_job(attempt_id, account, job, fence)
            path.unlink(missing_ok=True)


def _sha256(body: contract.Body) -> str:
    return hashlib.sha256(body.data).hexdigest()
