"""Gives attempts their turn and sends them: the one place that makes paid requests.

The order is the safety: turn, PREPARE (whole body built), quota, SUBMITTING committed on the connection that holds the
worker's lock, then the POST within SEND_WITHIN_SECONDS or not at all, then the provider's job id, unfenced, before
anything else.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from datetime import timedelta

from kit import errors, loops, telemetry
from kit.failpoints import failpoint
from services.generator import (
    assets,
    attempts,
    catalogue,
    config,
    pools,
    progress,
    quota,
    spool,
    worker,
)
from services.generator.providers import contract
from services.generator.store import Store, rows, videos

log = telemetry.logger(__name__)

SEND_WITHIN_SECONDS = 2.0
PREPARE_RETRY = timedelta(seconds=2)
TWIN_RETRY = timedelta(seconds=1)
NOT_ACCEPTED_SECONDS = 2.0
RECORD_RETRY_SECONDS = 0.5
REFUSED_INPUTS = {"ASSET_NOT_FOUND": "REQUEST_INVALID", "NOT_AN_IMAGE": "REQUEST_INVALID"}


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
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._assets = assets_
        self._worker = worker_
        self._teller = teller
        self._quota = quota.Quota(store.queue)
        self._spool = spool.Spool(settings.spool_dir)
        self._running: set[asyncio.Task[None]] = set()
        self.wake = loops.Wake()

    async def run(self, stopping: asyncio.Event) -> None:
        """Dispatches until told to stop, then lets what was begun come to its end."""
        await loops.every(
            "dispatcher", self._settings.loop_seconds, self.run_once, stopping, self.wake
        )
        if self._running:
            await asyncio.wait(self._running)

    async def run_once(self) -> bool:
        """Gives one turn in each pool; true when there may be more to give."""
        await self._unspool()
        given = False
        for pool in self._pools.names:
            if len(self._running) >= self._settings.concurrent_submits:
                return False
            limits = {a.name: a.max_jobs_in_flight for a in self._pools.of_pool(pool)}
            lease = timedelta(seconds=self._settings.prepare_lease_seconds)
            attempt = await self._store.queue.pick(pool, limits, pools.LANE_WEIGHTS, lease)
            if attempt is not None:
                given = True
                task = asyncio.create_task(self._guarded(attempt))
                self._running.add(task)
                task.add_done_callback(self._ended)
        return given

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.wake.ring()

    async def _guarded(self, attempt: rows.Attempt) -> None:
        """A submission that fails in an unforeseen way leaves its lease to run out, which is always safe."""
        try:
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
        await self._quota.take(account)
        sent = await self._send(attempt, account, provider, body)
        if sent is not None:
            await self._record(attempt, account, sent)

    async def _prepare(
        self, attempt: rows.Attempt, provider: contract.Provider
    ) -> contract.Body | None:
        try:
            image = await self._assets.first_frame(attempt)
        except errors.ServiceError as error:
            cause = REFUSED_INPUTS.get(error.reason)
            if cause is not None and not attempt.key_pinned:
                verdict = videos.Verdict(
                    cause, f"the input image is not usable: {error.message}", False
                )
                await self._store.videos.fail(attempt, verdict, another_try=False)
            else:
                log.warning("prepare_failed", attempt_id=attempt.attempt_id, reason=error.reason)
                await self._put_back(attempt, PREPARE_RETRY, "storage did not answer")
            return None
        await failpoint("generator.prepare.after_fit")
        body = provider.build(attempt.job.spec, image, attempt.attempt_id)
        if attempt.key_pinned and _sha256(body) != attempt.body_sha256:
            # The same key with another body would be another job, or an error that says nothing. Its lease runs out,
            # again and again, until resolve_by.
            log.error("body_changed", attempt_id=attempt.attempt_id)
            return None
        return body

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
        cost_micros = account.models[spec.model].cost_micros_per_second * spec.seconds
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
                cost_micros=cost_micros * max(1, spec.variants),
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
            case contract.RefusedRequest(cause, message):
                verdict = videos.Verdict(
                    cause, f"the provider refused the request: {message}", False
                )
                await self._store.videos.fail(attempt, verdict, another_try=False)
            case contract.RefusedUs(message):
                closed = timedelta(seconds=account.closed_seconds)
                log.error("provider_account_closed", provider_account=account.name, message=message)
                await self._store.queue.hold_submits(account.name, closed, message)
                await self._put_back(attempt, timedelta(0), message)
            case contract.NotAccepted(message, retry_after_seconds):
                pause = timedelta(seconds=retry_after_seconds or NOT_ACCEPTED_SECONDS)
                await self._store.queue.hold_submits(account.name, pause, message)
                await self._put_back(attempt, timedelta(0), message)
            case contract.Ambiguous(message):
                shown = attempts.without_prompt(message, attempt.job.spec.prompt)
                log.warning("create_ambiguous", attempt_id=attempt.attempt_id, message=shown)
                await self._store.submissions.unknown(attempt, message)

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
