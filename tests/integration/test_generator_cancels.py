"""A render that its owner cancels is stopped at the provider where that can be said; what is paid is not destroyed."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import attempt_pb2, job_pb2
from kit import errors, ids
from services.simulator import api_runway
from tests import generator_process, simulated
from tests.generator_process import Generator
from tests.waiting import eventually

RUNWAY = {"model": "runway-gen4-turbo"}
HEADERS = {"authorization": f"Bearer {simulated.KEY}", "x-runway-version": api_runway.VERSION}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def generator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Generator]:
    """One generator for all, at a provider that takes three seconds of ours a render."""
    folder, slow = tmp_path_factory.mktemp("generator"), {"render_seconds_base": 300}
    async with generator_process.running(folder, simulator_settings=slow) as started:
        yield started


@pytest.fixture(autouse=True)
async def healthy(generator: Generator) -> AsyncIterator[None]:
    yield
    await generator.simulator.clear()
    (generator.folder / "failpoints").unlink(missing_ok=True)
    await generator.program.start()


async def rendering(generator: Generator, *faults: str, **fields: Any) -> tuple[job_pb2.Job, str]:
    """A job that the provider renders, and its prompt."""
    prompt = " ".join([f"A cat, {uuid.uuid4()}", *(f"[fault:{fault}]" for fault in faults)])
    image = {"input_image_id": ids.new_id()} if fields.get("model", "").startswith("runway") else {}
    made = await generator.ask(prompt, **fields, **image)
    await generator.until(made, "RENDERING")
    return made, prompt


async def cancel(generator: Generator, made: job_pb2.Job) -> attempt_pb2.VideoOutcome:
    async with generator.stub() as stub:
        request = attempt_pb2.CancelAttemptRequest(
            video_id=made.video_id, account_id=made.account_id
        )
        return await stub.CancelAttempt(request, timeout=5)


async def billed(generator: Generator, prompt: str) -> list[int]:
    answer = (await generator.simulator.http.get("/_sim/billing")).json()
    return [line["billed_micros"] for line in answer["billing"] if line["prompt"] == prompt]


async def stopped(generator: Generator, made: job_pb2.Job, prompt: str) -> None:
    """It has ended as cancelled after it was sent, once, and the provider renders it no more."""
    assert await generator.ended(made) == ["queued", "started", "cancelled"]
    told = generator.told[made.video_id][-1].cancelled
    assert told.cause == vocabulary_pb2.CAUSE_CANCELLED_AFTER_SUBMIT
    assert told.stage == vocabulary_pb2.VIDEO_STAGE_RENDERING
    assert await billed(generator, prompt) == [0]
    rows = await generator.fetch(
        "SELECT state, cost_micros > 0 AS priced, cost_known FROM attempts WHERE video_id = $1",
        made.video_id,
    )
    # Whether it is billed the provider does not say: the caps on money go on counting it.
    assert [tuple(row) for row in rows] == [("CANCELLED", True, False)]


async def test_what_runs_is_stopped(generator: Generator) -> None:
    made, prompt = await rendering(generator, "stuck", **RUNWAY)
    other, _ = await rendering(generator, **RUNWAY)
    outcome = await cancel(generator, made)
    assert outcome.state == vocabulary_pb2.VIDEO_STATE_PROCESSING
    assert outcome.stage == vocabulary_pb2.VIDEO_STAGE_CANCELLING
    await stopped(generator, made, prompt)
    assert (await generator.ended(other))[-1] == "completed"
    assert (await cancel(generator, made)).state == vocabulary_pb2.VIDEO_STATE_CANCELLED


@pytest.mark.fault
@pytest.mark.parametrize("point", ["generator.stop.before_cancel", "generator.stop.after_cancel"])
async def test_a_kill_beside_the_cancel(generator: Generator, point: str) -> None:
    made, prompt = await rendering(generator, "stuck", **RUNWAY)
    generator.arm(point, "kill")
    await cancel(generator, made)
    assert await generator.program.wait_exit() == -signal.SIGKILL
    await generator.program.start()
    await stopped(generator, made, prompt)


async def test_a_render_that_was_finished_first_is_kept(generator: Generator) -> None:
    """It is finished between the last look at it and the cancel: nothing is deleted."""
    made, prompt = await rendering(generator, **RUNWAY)
    (job,) = await generator.simulator.accepted(prompt)
    generator.arm("generator.stop.before_cancel", "stop")
    await cancel(generator, made)
    pid = generator.program.pid
    assert pid is not None

    async def finished() -> bool:
        task = await generator.simulator.http.get(f"/v1/tasks/{job['id']}", headers=HEADERS)
        assert (generator.folder / "failpoints.struck").exists()
        return task.json()["status"] == "SUCCEEDED"

    try:
        await eventually(finished)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await generator.ended(made) == ["queued", "started", "completed"]
    assert generator.told[made.video_id][-1].completed.cancel_requested
    assert (await billed(generator, prompt))[0] > 0


async def test_where_nothing_stops_a_render_it_is_only_noted(generator: Generator) -> None:
    """A DELETE there may destroy what is paid: none is sent."""
    made, prompt = await rendering(generator)
    await cancel(generator, made)
    assert await generator.ended(made) == ["queued", "started", "completed"]
    assert generator.told[made.video_id][-1].completed.cancel_requested
    assert (await billed(generator, prompt))[0] > 0


async def test_a_prompt_is_forgotten_when_its_video_has_ended_and_not_before(
    generator: Generator,
) -> None:
    made, prompt = await rendering(generator, "stuck", **RUNWAY)
    request = attempt_pb2.ErasePromptRequest(video_id=made.video_id, account_id=made.account_id)
    async with generator.stub() as stub:
        with pytest.raises(errors.FailedPrecondition) as refused:
            await stub.ErasePrompt(request, timeout=5)
        assert refused.value.reason == "CONFLICT"
        await cancel(generator, made)
        await stopped(generator, made, prompt)
        for _ in range(2):
            await stub.ErasePrompt(request, timeout=5)
        unknown = attempt_pb2.ErasePromptRequest(video_id=ids.new_id(), account_id=ids.new_id())
        await stub.ErasePrompt(unknown, timeout=5)
    query = "SELECT job FROM videos WHERE video_id = $1"
    (row,) = await generator.fetch(query, made.video_id)
    kept = job_pb2.Job.FromString(row["job"])
    assert (kept.spec.prompt, kept.spec.model) == ("", RUNWAY["model"])
    assert prompt.encode() not in row["job"]
