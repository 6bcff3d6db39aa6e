"""What operators see of attempts, and their verdicts on those that nobody else can decide."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import attempt_pb2, job_pb2
from kit import errors, ids
from tests import generator_process
from tests.generator_process import Generator
from tests.waiting import eventually

WHOLE = ["queued", "started", "completed"]
FAILED = ["queued", "started", "failed"]
LOCK = 4711


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def generator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Generator]:
    async with generator_process.running(tmp_path_factory.mktemp("operators")) as started:
        await started.sentinel()
        yield started


@pytest.fixture(autouse=True)
async def healthy(generator: Generator) -> AsyncIterator[None]:
    yield
    await generator.simulator.clear()
    await generator.fetch("UPDATE late_renders SET look_until = '-infinity'")


async def undecided(generator: Generator, fault: str) -> job_pb2.Job:
    """A video whose create has no answer, while the list is no help."""
    await generator.simulator.arm("list_error", times=0)
    made = await generator.ask(f"A cat, {uuid.uuid4()} [fault:{fault}]")
    await generator.until(made, "UNKNOWN")
    return made


async def call(generator: Generator, method: str, made: job_pb2.Job, **fields: Any) -> Any:
    kind = getattr(attempt_pb2, f"{method}Request")
    async with generator.stub() as stub:
        return await getattr(stub, method)(kind(video_id=made.video_id, **fields), timeout=10)


async def resolve(generator: Generator, made: job_pb2.Job, resolution: str, **fields: Any) -> Any:
    value = attempt_pb2.AttemptResolution.Value(f"ATTEMPT_RESOLUTION_{resolution}")
    return await call(generator, "ResolveAttempt", made, resolution=value, **fields)


async def refused(answer: Any) -> str:
    with pytest.raises(errors.ServiceError) as error:
        await answer
    return error.value.reason


def state(attempt: attempt_pb2.Attempt) -> str:
    return attempt_pb2.AttemptState.Name(attempt.state).removeprefix("ATTEMPT_STATE_")


async def accepted(generator: Generator, made: job_pb2.Job) -> list[str]:
    return [entry["id"] for entry in await generator.simulator.accepted(made.spec.prompt)]


async def test_an_operator_says_which_job_it_is(generator: Generator) -> None:
    other = await generator.ask()
    assert await generator.ended(other) == WHOLE
    made = await undecided(generator, "lost_answer")
    (ours,), (others,) = await accepted(generator, made), await accepted(generator, other)
    await generator.simulator.clear()
    await generator.simulator.arm("list_error", times=0)
    await generator.simulator.arm("foreign_jobs", times=1, value=1)
    await generator.ended(await generator.ask())  # with it a stranger's job appears
    stranger = (await generator.simulator.log(kind="foreign"))[-1]["id"]

    def adopt(job: str) -> Any:
        return resolve(generator, made, "ADOPT", provider_job_id=job)

    assert await refused(adopt(others)) == "PROVIDER_JOB_TAKEN"
    assert await refused(adopt("video_0")) == "PROVIDER_JOB_NOT_FOUND"
    assert await refused(adopt(stranger)) == "PROVIDER_JOB_MISMATCH"
    assert await refused(adopt("")) == "INVALID_FIELD"
    attempt = await adopt(ours)
    assert (state(attempt), attempt.provider_job_id) == ("RENDERING", ours)
    assert (await adopt(ours)).provider_job_id == ours  # a repeat changes nothing
    assert await generator.ended(made) == WHOLE
    assert await refused(adopt("video_0")) == "ATTEMPT_NOT_UNDECIDED"
    assert await accepted(generator, made) == [ours]


async def test_an_operator_says_that_it_was_never_accepted(generator: Generator) -> None:
    made = await undecided(generator, "hang_before")
    first = await resolve(generator, made, "NEVER_ACCEPTED")
    assert (first.number, first.provider_job_id) == (1, "")
    assert await generator.ended(made) == WHOLE
    assert await refused(resolve(generator, made, "NEVER_ACCEPTED")) == "ATTEMPT_NOT_UNDECIDED"
    assert len(await accepted(generator, made)) == 1


async def test_what_may_still_be_sent_is_not_sent_again(generator: Generator) -> None:
    made = await undecided(generator, "hang_before")
    holder = await asyncpg.connect(generator.database_url)
    try:
        await holder.execute("SELECT pg_advisory_lock($1)", LOCK)
        await generator.fetch(
            "UPDATE attempts SET worker = $2 WHERE video_id = $1", made.video_id, LOCK
        )
        assert await refused(resolve(generator, made, "NEVER_ACCEPTED")) == "SENDER_ALIVE"
        again = call(generator, "RetryAttempt", made, number=1, accept_double_cost=True)
        assert await refused(again) == "SENDER_ALIVE"
    finally:
        await holder.close()
    assert state(await resolve(generator, made, "NEVER_ACCEPTED")) in ("QUEUED", "PREPARING")
    assert await generator.ended(made) == WHOLE


async def test_cancelled_meanwhile_it_ends_without_being_sent(generator: Generator) -> None:
    made = await undecided(generator, "hang_before")
    await call(generator, "CancelAttempt", made, account_id=made.account_id)
    await resolve(generator, made, "NEVER_ACCEPTED")
    assert await generator.ended(made) == ["queued", "started", "cancelled"]
    assert await accepted(generator, made) == []


async def test_an_operator_gives_it_up(generator: Generator) -> None:
    made = await undecided(generator, "hang_before")
    for _ in range(2):
        assert state(await resolve(generator, made, "GIVE_UP")) == "FAILED"
    assert await generator.ended(made) == FAILED
    assert generator.told[made.video_id][-1].failed.cause == vocabulary_pb2.CAUSE_UNRESOLVED
    again = call(generator, "RetryAttempt", made, number=1, accept_double_cost=True)
    assert await refused(again) == "VIDEO_ENDED"


async def test_a_retry_pays_twice_only_when_told_so(generator: Generator) -> None:
    made = await undecided(generator, "lost_answer")

    def retry(**fields: Any) -> Any:
        return call(generator, "RetryAttempt", made, number=1, **fields)

    assert await refused(retry()) == "COULD_PAY_TWICE"
    for _ in range(2):
        again = await retry(accept_double_cost=True)
        assert again.number == 2
    assert await generator.ended(made) == WHOLE
    jobs = await accepted(generator, made)
    assert len(jobs) == 2  # it was the operator's word
    # The first one turns up after all: kept, free.
    await generator.simulator.clear()

    async def kept() -> bool:
        assert generator.kinds(made) == [*WHOLE, "recovered"]
        return True

    await eventually(kept)
    first = await call(generator, "GetAttempt", made, number=1)
    assert (first.attempt.state, first.cost_known) == (attempt_pb2.ATTEMPT_STATE_FAILED, False)
    assert [job.provider_job_id for job in first.provider_jobs] == [jobs[0]]
    assert (first.late_render.state, first.late_render.provider_job_id) == ("KEPT", jobs[0])
    assert [output.state for output in first.outputs] == ["STORED"]


async def test_everything_on_record_of_an_attempt(generator: Generator) -> None:
    made = await generator.ask()
    assert await generator.ended(made) == WHOLE
    found = await call(generator, "GetAttempt", made)
    assert [state(change) for change in found.history] == [
        "QUEUED",
        "PREPARING",
        "SUBMITTING",
        "RENDERING",
        "FETCHING",
        "COMPLETED",
    ]
    assert (found.submissions, found.cost_known) == (1, True)
    assert found.cost_micros == 100_000
    assert not found.HasField("lease_until")
    assert not found.HasField("late_render")
    assert not found.provider_jobs[0].adopted
    assert await refused(call(generator, "GetAttempt", made, number=2)) == "ATTEMPT_NOT_FOUND"
    made.video_id = ids.new_id()
    assert await refused(call(generator, "GetAttempt", made)) == "ATTEMPT_NOT_FOUND"


async def test_attempts_are_listed_by_what_is_asked_for(generator: Generator) -> None:
    made = await generator.ask(account_id="z" * 26)
    other = await generator.ask(model="sora-1")
    for one in (made, other):
        assert await generator.ended(one) == WHOLE

    async def listed(**fields: Any) -> set[str]:
        async with generator.stub() as stub:
            page = await stub.ListAttempts(attempt_pb2.ListAttemptsRequest(**fields), timeout=5)
        return {attempt.video_id for attempt in page.attempts}

    assert await listed(account_id="z" * 26) == {made.video_id}
    assert await listed(provider_account="azure") == {other.video_id}
    assert await listed(account_id="z" * 26, provider_account="azure") == set()
    assert {made.video_id, other.video_id} <= await listed()
