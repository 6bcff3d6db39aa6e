"""Videos as the generator knows them: acceptance, cancellation, verdicts, outcomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from framewire.events.v1 import event_pb2
from framewire.generator.v1 import job_pb2
from framewire.storage.v1 import storage_pb2
from kit import batches, postgres, telemetry
from kit.failpoints import failpoint
from services.generator import attempts, events
from services.generator.store import estimates, recovery, rows, telling

ACCEPTED_AT_ONCE = 64
ORDINARY_WEIGHT = 100
MAX_WEIGHT = 1000
RETRY_STARTS_WITHIN = timedelta(hours=1)
"""An attempt that an operator sends again may wait so long for its turn."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a video stands."""

    video_id: str
    account_id: str
    state: str
    stage: str
    last_event: event_pb2.Event | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an attempt ended without an output."""

    cause: str
    message: str
    retryable: bool
    billed: bool | None = False
    """Whether the provider charges for it; None: not known."""
    look_back: timedelta | None = None
    """How long a render of it that turns up after all is looked for; None: there can be none."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A job that is to be taken over."""

    job: job_pb2.Job
    pool: str
    fingerprint: str
    traceparent: str

    def place(self) -> tuple[str, str, str, str]:
        """Where it comes among others."""
        return self.pool, events.lane_name(self.job.lane), self.job.account_id, self.job.video_id

    def row(self) -> tuple[object, ...]:
        """The parameters of _NEW."""
        job = self.job
        return (
            *(job.video_id, job.account_id, job.SerializeToString(), self.traceparent),
            *(self.pool, events.lane_name(job.lane), _weight(job), job.spec.model),
        )

    def attempt(self, place: int, expected_at: datetime | None) -> tuple[object, ...]:
        """The parameters of _INSERT_ATTEMPT, for its first."""
        return _attempt(self.job, 1, self.pool, self.fingerprint, place, expected_at)


class VideoStore:
    """Videos and the ends of their attempts."""

    def __init__(self, pool: postgres.Pool, told: Callable[[], None]) -> None:
        self._pool = pool
        self._told = told
        self._acceptances = batches.Batcher(self._accept, ACCEPTED_AT_ONCE)

    async def accept(self, job: job_pb2.Job, pool: str, fingerprint: str) -> bool:
        """Takes a job over: video, first attempt and `queued` event in one transaction. False when it was known."""
        traceparent = telemetry.trace_headers().get("traceparent", "")
        return await self._acceptances.do(_Job(job, pool, fingerprint, traceparent))

    async def _accept(self, jobs: Sequence[_Job]) -> list[bool]:
        """Which of the jobs were not known."""
        # In one order, so that no two replicas wait for each other.
        ordered = sorted({job.job.video_id: job for job in jobs}.values(), key=_Job.place)
        async with self._pool.acquire() as connection, connection.transaction():
            joined = {
                row["video_id"]: row
                for row in await connection.fetchmany(_NEW, [job.row() for job in ordered])
            }
            new = [job for job in ordered if job.job.video_id in joined]
            if not new:
                return [False] * len(jobs)
            told: list[tuple[telling.LockedVideo, event_pb2.Event]] = []
            first: list[tuple[object, ...]] = []
            for one in new:
                job, row = one.job, joined[one.job.video_id]
                lane = events.lane_name(job.lane)
                place, expected = estimates.foreseen(row, lane, job.account_id)
                first.append(one.attempt(place, expected))
                # Nobody else knows the video yet: its row needs no lock of its own.
                video = telling.LockedVideo(
                    job.video_id, job.account_id, "PENDING", 0, False, one.traceparent
                )
                told.append((video, events.queued(job.lane, job.spec.model, place, expected)))
            await connection.executemany(_INSERT_ATTEMPT, first)
            await telling.tell_all(connection, told, joined[new[-1].job.video_id]["now"])
            await failpoint("generator.accept.before_commit")
        self._told()
        await failpoint("generator.accept.after_commit")
        # One that was there twice was new once.
        return [joined.pop(job.job.video_id, None) is not None for job in jobs]

    async def refuse_poison(self, video_id: str, account_id: str, message: str) -> bool:
        """A job that cannot be read: the video fails, where no attempt of it exists. Idempotent."""
        async with self._pool.acquire() as connection, connection.transaction():
            inserted = await connection.fetchval(
                """
                INSERT INTO videos (video_id, account_id, state, finished_at)
                VALUES ($1, $2, 'FAILED', clock_timestamp())
                ON CONFLICT (video_id) DO NOTHING RETURNING true
                """,
                video_id,
                account_id,
            )
            if not inserted:
                return False
            video = await telling.lock(connection, video_id)
            assert video is not None
            event = events.failed("POISON_JOB", "QUEUED", message, retryable=True)
            await telling.tell(connection, video, event)
        self._told()
        return True

    async def cancel(self, video_id: str, account_id: str) -> Outcome:
        """Asks for the end: at once before it was sent, also for a job that is still on its way; else only noted."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                """
                INSERT INTO videos (video_id, account_id, state, cancel_requested, finished_at)
                VALUES ($1, $2, 'CANCELLED', true, clock_timestamp()) ON CONFLICT (video_id) DO NOTHING
                """,
                video_id,
                account_id,
            )
            video = await telling.lock(connection, video_id)
            assert video is not None
            await connection.execute(
                "UPDATE videos SET cancel_requested = true WHERE video_id = $1", video_id
            )
            event = events.cancelled("CANCELLED_BEFORE_SUBMIT", "QUEUED")
            if video.state not in telling.TERMINAL_STATES:
                unsent = await connection.fetchval(
                    """
                    UPDATE attempts SET state = 'CANCELLED', cause = 'CANCELLED_BEFORE_SUBMIT',
                        fence = fence + 1, lease_until = NULL
                    WHERE video_id = $1 AND state IN ('QUEUED', 'PREPARING') AND NOT key_pinned
                    RETURNING true
                    """,
                    video_id,
                )
                if unsent:
                    await telling.tell(connection, video, event)
            elif video.state == "CANCELLED" and video.seq == 0:
                await telling.tell(connection, video, event)
        self._told()
        outcome = await self.outcome(video_id)
        assert outcome is not None
        return outcome

    async def erase_prompt(self, video_id: str, account_id: str) -> bool:
        """Takes prompt and options out of the kept job of a video that has ended. False: it lives. Idempotent."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                "SELECT job, state FROM videos WHERE video_id = $1 AND account_id = $2 FOR UPDATE",
                video_id,
                account_id,
            )
            if row is None or row["job"] is None:
                return True
            if row["state"] not in telling.TERMINAL_STATES:
                return False
            job = job_pb2.Job.FromString(row["job"])
            job.spec.ClearField("prompt")
            job.spec.ClearField("options")
            await connection.execute(
                "UPDATE videos SET job = $2 WHERE video_id = $1", video_id, job.SerializeToString()
            )
        return True

    async def stopped(self, attempt: rows.Attempt) -> bool:
        """Ends a video whose render the provider stopped for its owner, or which is gone after we asked it to.

        Its price stays on it: whether a render that was stopped is billed, no server says. False: not the caller's.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            video = await telling.lock(connection, attempt.video_id)
            if video is None or video.state in telling.TERMINAL_STATES:
                return False
            done = await connection.fetchval(
                """
                UPDATE attempts SET state = 'CANCELLED', cause = 'CANCELLED_AFTER_SUBMIT', cost_known = false,
                    fence = fence + 1
                WHERE attempt_id = $1 AND fence = $2 AND state = 'RENDERING' AND cancel_sent_at IS NOT NULL
                RETURNING true
                """,
                attempt.attempt_id,
                attempt.fence,
            )
            if not done:
                return False
            event = events.cancelled("CANCELLED_AFTER_SUBMIT", "RENDERING")
            await telling.tell(connection, video, event)
            await failpoint("generator.finish.before_commit")
        self._told()
        await failpoint("generator.finish.after_commit")
        return True

    async def complete(
        self,
        attempt: rows.Attempt,
        outputs: Mapping[int, storage_pb2.Asset],
        renditions: Mapping[int, Sequence[storage_pb2.Asset]] | None = None,
    ) -> bool:
        """Ends the video well, with its outputs and smaller versions by variant. False: it is not the caller's."""
        async with self._pool.acquire() as connection, connection.transaction():
            video = await telling.lock(connection, attempt.video_id)
            if video is None or video.state in telling.TERMINAL_STATES:
                return False
            done = await connection.fetchval(
                """
                UPDATE attempts SET state = 'COMPLETED', cause = 'NONE', lease_until = NULL,
                    progress_percent = 100, cost_micros = cost_micros * $3 / $4
                WHERE attempt_id = $1 AND fence = $2 AND state = 'FETCHING' RETURNING true
                """,
                attempt.attempt_id,
                attempt.fence,
                # Variants that did not come out are not charged for.
                len(outputs),
                max(1, attempt.job.spec.variants),
            )
            if not done:
                return False
            spec, asked_to_end = attempt.job.spec, video.cancel_requested
            event = events.completed(outputs, spec, asked_to_end, renditions or {})
            await telling.tell(connection, video, event)
            await failpoint("generator.finish.before_commit")
        self._told()
        await failpoint("generator.finish.after_commit")
        return True

    async def fail(self, attempt: rows.Attempt, verdict: Verdict, *, another_try: bool) -> bool:
        """Ends the attempt without an output; with `another_try` the video goes on with a new one, else it has failed.

        A new one must still be able to start by `start_by`: else its end would be told as QUEUE_TIMEOUT.
        False when the attempt is no longer the caller's.
        """
        stage = attempts.STAGES[attempt.state]
        text = attempts.without_prompt(verdict.message, attempt.job.spec.prompt)
        async with self._pool.acquire() as connection, connection.transaction():
            video = await telling.lock(connection, attempt.video_id)
            if video is None or video.state in telling.TERMINAL_STATES:
                return False
            if not await self._fail_attempt(connection, attempt, verdict, text):
                return False
            in_time = await connection.fetchval(
                "SELECT $1::timestamptz > clock_timestamp()", attempt.start_by
            )
            if another_try and in_time and not video.cancel_requested:
                further = await connection.fetchval(_INSERT_ATTEMPT, *_next(attempt))
                if attempt.sent_until is not None:
                    # A restore may have forgotten that it was tried again, too.
                    await recovery.doubt_further(connection, attempt.attempt_id, further)
            else:
                event = events.failed(verdict.cause, stage, text, verdict.retryable)
                await telling.tell(connection, video, event)
            await failpoint("generator.finish.before_commit")
        self._told()
        await failpoint("generator.finish.after_commit")
        return True

    async def retry(self, attempt: rows.Attempt, verdict: Verdict) -> str | None:
        """Ends the attempt and goes on with a new one, whose id is answered, though start_by be over.

        None when it is no longer the caller's.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            video = await telling.lock(connection, attempt.video_id)
            if video is None or video.state in telling.TERMINAL_STATES:
                return None
            if not await self._fail_attempt(connection, attempt, verdict, verdict.message):
                return None
            again = await connection.fetchval(_INSERT_ATTEMPT, *_next(attempt))
            await connection.execute(
                """
                UPDATE attempts SET start_by = greatest(start_by, clock_timestamp() + $2)
                WHERE attempt_id = $1
                """,
                again,
                RETRY_STARTS_WITHIN,
            )
            await failpoint("generator.finish.before_commit")
        await failpoint("generator.finish.after_commit")
        return again

    async def _fail_attempt(
        self, connection: postgres.Connection, attempt: rows.Attempt, verdict: Verdict, text: str
    ) -> bool:
        done = await connection.fetchval(
            """
            UPDATE attempts SET state = 'FAILED', cause = $3, message = $4, lease_until = NULL,
                cost_micros = CASE WHEN $5 THEN cost_micros END, cost_known = $6
            WHERE attempt_id = $1 AND fence = $2 AND state NOT IN ('COMPLETED', 'FAILED', 'CANCELLED')
            RETURNING true
            """,
            attempt.attempt_id,
            attempt.fence,
            verdict.cause,
            text,
            verdict.billed is not False,
            verdict.billed is not None,
        )
        if done and verdict.look_back is not None:
            await self._look_back(connection, attempt, verdict.look_back)
        return bool(done)

    async def _look_back(
        self, connection: postgres.Connection, attempt: rows.Attempt, span: timedelta
    ) -> None:
        await connection.execute(
            """
            INSERT INTO late_renders (attempt_id, provider_account, provider_job_id, look_until)
            SELECT attempt_id, provider_account, provider_job_id, clock_timestamp() + $2
            FROM attempts WHERE attempt_id = $1
            """,
            attempt.attempt_id,
            span,
        )

    async def recovered(
        self, late: rows.LateRender, outputs: Mapping[int, storage_pb2.Asset]
    ) -> bool:
        """Keeps a render that turned up after its attempt was given up, and tells of it. The verdict stands.

        False when the late render is no longer the caller's.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            video = await telling.lock(connection, late.attempt.video_id)
            assert video is not None
            kept = await connection.fetchval(
                """
                UPDATE late_renders SET state = 'KEPT', message = '', updated_at = clock_timestamp()
                WHERE attempt_id = $1 AND fence = $2 AND state = 'FETCHING' RETURNING true
                """,
                late.attempt.attempt_id,
                late.fence,
            )
            if not kept:
                return False
            await telling.tell(connection, video, events.recovered(outputs))
            await failpoint("generator.late.before_commit")
        self._told()
        await failpoint("generator.late.after_commit")
        return True

    async def outcome(self, video_id: str) -> Outcome | None:
        """Where a video stands; None when nothing was ever heard of it."""
        row = await self._pool.fetchrow(
            """
            SELECT v.video_id, v.account_id, v.state, v.last_event, v.cancel_requested,
                   (SELECT a.state FROM attempts a WHERE a.video_id = v.video_id
                    ORDER BY a.number DESC LIMIT 1) AS attempt_state
            FROM videos v WHERE v.video_id = $1
            """,
            video_id,
        )
        return outcome(row) if row else None

    async def cancelled_waiting(self) -> list[tuple[str, str]]:
        """Videos to be cancelled whose attempt waits again for its turn: proved unsent after its owner had asked."""
        found = await self._pool.fetch(
            """
            SELECT video_id, v.account_id FROM attempts a JOIN videos v USING (video_id)
            WHERE a.state = 'QUEUED' AND NOT a.key_pinned AND v.cancel_requested LIMIT 100
            """
        )
        return [(row["video_id"], row["account_id"]) for row in found]


_NEW = f"""
    WITH new AS (
        INSERT INTO videos (video_id, account_id, job, state, traceparent)
        VALUES ($1, $2, $3, 'PENDING', $4)
        ON CONFLICT (video_id) DO NOTHING RETURNING video_id
    ), {estimates.JOINED}
"""
_INSERT_ATTEMPT = """
    INSERT INTO attempts (attempt_id, video_id, number, account_id, pool, lane, weight, state,
                          fingerprint, start_by, model, queue_position, expected_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, 'QUEUED', $8, $9, $10, $11, $12) RETURNING attempt_id
"""


def _attempt(
    job: job_pb2.Job,
    number: int,
    pool: str,
    fingerprint: str,
    queue_position: int = 0,
    expected_at: datetime | None = None,
) -> tuple[object, ...]:
    """The parameters of _INSERT_ATTEMPT."""
    return (
        *(attempts.attempt_id(job.video_id, number), job.video_id, number, job.account_id),
        *(pool, events.lane_name(job.lane), _weight(job), fingerprint),
        *(events.moment(job.start_by), job.spec.model, queue_position, expected_at),
    )


def _next(attempt: rows.Attempt) -> tuple[object, ...]:
    """The parameters of _INSERT_ATTEMPT, for the one after it."""
    return _attempt(attempt.job, attempt.number + 1, attempt.pool, attempt.fingerprint)


def _weight(job: job_pb2.Job) -> int:
    return max(1, min(MAX_WEIGHT, job.weight or ORDINARY_WEIGHT))


def outcome(row: Any) -> Outcome:
    """Where a video stands, from its row with the state of its newest attempt."""
    stage = "DONE"
    if row["state"] not in telling.TERMINAL_STATES and row["attempt_state"]:
        stage = attempts.STAGES[attempts.State(row["attempt_state"])]
        stage = "CANCELLING" if row["cancel_requested"] else stage
    event = event_pb2.Event.FromString(bytes(row["last_event"])) if row["last_event"] else None
    return Outcome(row["video_id"], row["account_id"], row["state"], stage, event)
