"""The whole generator at an account of the azure_jobs dialect: several videos a job, and adoption by a name of ours."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import job_pb2
from kit import ids
from tests import generator_process
from tests.generator_process import Generator

WHOLE = ["queued", "started", "completed"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def generator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Generator]:
    """One generator for all; a completed video of it serves as the sentinel that proves absence."""
    async with generator_process.running(tmp_path_factory.mktemp("generator")) as started:
        assert await started.ended(await started.ask(model="sora-1")) == WHOLE
        yield started


def outputs(generator: Generator, made: job_pb2.Job) -> list[str]:
    return [output.sha256 for output in generator.told[made.video_id][-1].completed.outputs]


@pytest.mark.parametrize(
    ("fault", "count"), [("[fault:content_cut*1]", 3), ("[fault:fewer_generations=2]", 2)]
)
async def test_every_video_that_came_out_is_stored(
    generator: Generator, fault: str, count: int
) -> None:
    prompt = f"A cat, {uuid.uuid4()} {fault}"
    made = await generator.ask(prompt, model="sora-1", variants=3)
    assert await generator.ended(made) == WHOLE
    stored = outputs(generator, made)
    assert len(stored) == len(set(stored)) == count
    assert len(await generator.simulator.accepted(prompt)) == 1


async def test_a_lost_image_job_is_found_by_its_name_among_twins(generator: Generator) -> None:
    """By prompt, model, size and length alone nobody could say which of the two is ours."""
    prompt = f"A cat, {uuid.uuid4()} [fault:lost_answer] [fault:twin_job]"
    made = await generator.ask(prompt, model="sora-1", input_image_id=ids.new_id())
    assert await generator.ended(made) == WHOLE
    found = await generator.fetch(
        "SELECT provider_job_id FROM attempts WHERE video_id = $1", made.video_id
    )
    (ours,) = [e for e in await generator.simulator.accepted(prompt) if not e.get("foreign")]
    assert [row["provider_job_id"] for row in found] == [ours["id"]]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("input_moderated_later", vocabulary_pb2.CAUSE_INPUT_REFUSED),
        ("moderated_later", vocabulary_pb2.CAUSE_OUTPUT_REFUSED),
        ("cancelled_later", vocabulary_pb2.CAUSE_PROVIDER_ERROR),
    ],
)
async def test_why_it_failed(generator: Generator, fault: str, cause: int) -> None:
    made = await generator.ask(f"A cat, {uuid.uuid4()} [fault:{fault}]", model="sora-1")
    assert (await generator.ended(made))[-1] == "failed"
    assert generator.told[made.video_id][-1].failed.cause == cause
