"""Operators' verdicts on attempts of which nobody knows what became of them, with what keeps them from paying twice."""

from __future__ import annotations

from datetime import timedelta

from kit import errors, telemetry
from services.generator import attempts, pools, quota
from services.generator.attempts import State
from services.generator.providers import contract
from services.generator.store import Store, rows, videos
from services.generator.store.operators import Detail

log = telemetry.logger(__name__)

LEASE = timedelta(seconds=5)
UNDECIDED = (State.UNKNOWN, State.UNRESOLVED)
LOOK_BACK = timedelta(days=1)


class Operators:
    """What operators do to attempts. Every verdict is idempotent, and refused with a reason where it does not fit."""

    def __init__(self, store: Store, pools_: pools.Pools, quota_: quota.Quota) -> None:
        self._store = store
        self._pools = pools_
        self._quota = quota_

    async def detail(self, video_id: str, number: int) -> Detail:
        """Everything on record of an attempt."""
        attempt = await self._find(video_id, number)
        return await self._store.operators.detail(attempt.attempt_id)

    async def adopt(self, video_id: str, number: int, provider_job_id: str) -> str:
        """It is this job of the provider's. Answers the attempt's id."""
        attempt = await self._find(video_id, number)
        late = await self._store.operators.late(attempt.attempt_id)
        if provider_job_id in (attempt.provider_job_id, late[1] if late else None):
            return attempt.attempt_id
        undecided = attempt.state in UNDECIDED and attempt.provider_job_id is None
        if not undecided and not (late and late[1] is None):
            raise _not_undecided(attempt)
        await self._check_job(attempt, provider_job_id)
        if undecided:
            taken = await self._take(attempt)
            if not await self._store.submissions.adopt(taken, provider_job_id):
                raise _taken(provider_job_id)
            await self._store.submissions.accepted(taken, provider_job_id)
        else:
            assert attempt.provider_account is not None
            await self._store.submissions.add_job(
                attempt.attempt_id, attempt.provider_account, provider_job_id, attempt.fence
            )
            await self._store.late.turned_up()
        log.warning("operator_adopted", attempt_id=attempt.attempt_id)
        return attempt.attempt_id

    async def never_accepted(self, video_id: str, number: int) -> str:
        """The provider never had it: it is sent again. Answers the attempt's id."""
        attempt = await self._find(video_id, number)
        if attempt.state in (State.QUEUED, State.PREPARING) and attempt.submissions > 0:
            return attempt.attempt_id  # said before
        if attempt.provider_job_id is not None:
            raise _not_undecided(attempt)
        taken = await self._take(attempt)
        await self._check_sender(taken)
        if not await self._store.operators.never_accepted(taken):
            raise _not_undecided(taken)  # an id of it has turned up
        log.warning("operator_never_accepted", attempt_id=attempt.attempt_id)
        return attempt.attempt_id

    async def give_up(self, video_id: str, number: int) -> str:
        """Nobody can tell: it fails, and nothing is captured. Answers the attempt's id."""
        attempt = await self._find(video_id, number)
        if attempt.state is State.FAILED:
            return attempt.attempt_id
        taken = await self._take(attempt)
        if not await self._store.videos.fail(taken, self._given_up(taken), another_try=False):
            raise _met()
        log.warning("operator_gave_up", attempt_id=attempt.attempt_id)
        return attempt.attempt_id

    async def retry(self, video_id: str, number: int, accept_double_cost: bool) -> str:
        """Gives it up and sends its video again, as a new attempt, whose id is answered."""
        newest = await self._find(video_id, 0)
        if 0 < number < newest.number:
            return newest.attempt_id  # done before
        attempt = await self._find(video_id, number)
        if attempt.state in attempts.TERMINAL:
            raise errors.FailedPrecondition(
                "VIDEO_ENDED",
                "the video has ended and its hold is settled; its owner sends it again as a new video",
                state=attempt.state,
            )
        if attempt.state not in UNDECIDED:
            raise _not_undecided(attempt)
        if not accept_double_cost:
            raise errors.FailedPrecondition(
                "COULD_PAY_TWICE",
                "the provider may have been paid for it already: say what became of it, or accept the cost",
                state=attempt.state,
                provider_job_id=attempt.provider_job_id or "",
            )
        taken = await self._take(attempt)
        await self._check_sender(taken)
        again = await self._store.videos.retry(taken, self._given_up(taken))
        if again is None:
            raise _met()
        log.warning("operator_retried", attempt_id=attempt.attempt_id, as_attempt_id=again)
        return again

    async def _find(self, video_id: str, number: int) -> rows.Attempt:
        attempt = await self._store.operators.find(video_id, number)
        if attempt is None:
            raise errors.NotFound("ATTEMPT_NOT_FOUND", "there is no such attempt of this video")
        return attempt

    async def _take(self, attempt: rows.Attempt) -> rows.Attempt:
        taken = await self._store.operators.take(attempt, LEASE)
        if taken is None:
            raise _not_undecided(attempt)
        return taken

    async def _check_sender(self, attempt: rows.Attempt) -> None:
        """A stopped process still holds its lock, and may send when it goes on."""
        _, gone = await self._store.submissions.senders_gone([attempt])
        if attempt.attempt_id not in gone:
            raise errors.FailedPrecondition(
                "SENDER_ALIVE",
                "the process that was sending it has not ended and may still send it; end it first",
            )

    async def _check_job(self, attempt: rows.Attempt, provider_job_id: str) -> None:
        """The job is there, and not shown as another's: a stranger's video must never go out."""
        account = self._pools.accounts.get(attempt.provider_account or "")
        if account is None:
            raise errors.NotFound(
                "ACCOUNT_NOT_FOUND", "its provider account is not in the catalogue any more"
            )
        owner = await self._store.operators.owner(account.name, provider_job_id)
        if owner not in (None, attempt.attempt_id):
            raise _taken(provider_job_id)
        provider = self._pools.providers[account.name]
        await self._quota.take(account, quota.Use.POLL)
        try:
            job = await provider.get(provider_job_id)
        except contract.ProviderTrouble as trouble:
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE", f"the provider did not answer: {trouble}"
            ) from trouble
        if job is None:
            raise errors.NotFound(
                "PROVIDER_JOB_NOT_FOUND", "the provider does not know a job of this id"
            )
        marker = provider.shown_marker(attempt.job.spec, attempt.attempt_id)
        other_marker = bool(marker and job.marker and job.marker != marker)
        if other_marker or job.fingerprint not in (None, attempt.fingerprint):
            raise errors.FailedPrecondition(
                "PROVIDER_JOB_MISMATCH",
                "the provider shows that job with another name, prompt, model, size or length",
            )

    def _given_up(self, attempt: rows.Attempt) -> videos.Verdict:
        known = attempt.provider_job_id is not None
        account = self._pools.accounts.get(attempt.provider_account or "")
        look_back = timedelta(seconds=account.retention_seconds) if account else LOOK_BACK
        return videos.Verdict(
            "TIMEOUT" if known else "UNRESOLVED",
            "given up by an operator",
            retryable=True,
            billed=None,
            look_back=look_back,
        )


def _not_undecided(attempt: rows.Attempt) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        "ATTEMPT_NOT_UNDECIDED",
        f"attempt {attempt.number} is {attempt.state}: there is nothing to be said about it",
        state=attempt.state,
        provider_job_id=attempt.provider_job_id or "",
    )


def _taken(provider_job_id: str) -> errors.AlreadyExists:
    return errors.AlreadyExists(
        "PROVIDER_JOB_TAKEN",
        "that job is another attempt's already",
        provider_job_id=provider_job_id,
    )


def _met() -> errors.Aborted:
    return errors.Aborted("CONFLICT", "two writers met; try again", retry_after_seconds=0.5)
