"""The whole generator at azure_jobs and runway: several videos a job, adoption by a name of ours, billed refusals."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import job_pb2
from framewire.storage.v1 import storage_pb2
from kit import errors, ids
from tests import generator_process
from tests.generator_process import Generator
from tests.waiting import eventually

WHOLE = ["queued", "started", "completed"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def generator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Generator]:
    """One generator for all; a completed video of it serves as the sentinel that proves absence."""
    async with generator_process.running(tmp_path_factory.mktemp("generator")) as started:
        await started.sentinel(model="sora-1")
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


async def recorded(generator: Generator, made: job_pb2.Job) -> list[tuple[int, bool]]:
    """What each attempt says that it cost, and whether it claims to know."""
    rows = await generator.fetch(
        "SELECT cost_micros, cost_known FROM attempts WHERE video_id = $1 ORDER BY number",
        made.video_id,
    )
    return [(row["cost_micros"] or 0, row["cost_known"]) for row in rows]


async def billed(generator: Generator, prompt: str) -> list[int]:
    """What the provider bills for each job of a prompt."""
    answer = (await generator.simulator.http.get("/_sim/billing")).json()
    return [line["billed_micros"] for line in answer["billing"] if line["prompt"] == prompt]


async def test_variants_that_did_not_come_out_are_no_cost(generator: Generator) -> None:
    prompt = f"A cat, {uuid.uuid4()} [fault:fewer_generations=1]"
    made = await generator.ask(prompt, model="sora-1", variants=2)
    assert await generator.ended(made) == WHOLE
    assert await billed(generator, prompt) == [100_000]
    assert await recorded(generator, made) == [(100_000, True)]


async def test_a_runway_task_whose_address_was_over(generator: Generator) -> None:
    await generator.simulator.arm("url_expired")
    prompt = f"A cat, {uuid.uuid4()}"
    made = await generator.ask(prompt, model="runway-gen4-turbo", input_image_id=ids.new_id())
    assert await generator.ended(made) == WHOLE
    assert len(outputs(generator, made)) == 1
    assert await recorded(generator, made) == [(50_000, True)]
    assert await billed(generator, prompt) == [50_000]


@pytest.mark.parametrize(
    ("fault", "cause", "costs"),
    [
        ("moderated_later", vocabulary_pb2.CAUSE_OUTPUT_REFUSED, [50_000]),
        ("input_moderated_later", vocabulary_pb2.CAUSE_INPUT_REFUSED, [50_000]),
        ("input_invalid_later", vocabulary_pb2.CAUSE_INPUT_REFUSED, [0]),
        ("fails_later", vocabulary_pb2.CAUSE_PROVIDER_ERROR, [0, 0]),
    ],
)
async def test_what_runways_failures_cost(
    generator: Generator, fault: str, cause: int, costs: list[int]
) -> None:
    """What moderation stopped is billed and not tried again; what broke is free, and is."""
    prompt = f"A cat, {uuid.uuid4()} [fault:{fault}]"
    made = await generator.ask(prompt, model="runway-gen4-turbo", input_image_id=ids.new_id())
    assert (await generator.ended(made))[-1] == "failed"
    assert generator.told[made.video_id][-1].failed.cause == cause
    assert [cost for cost, known in await recorded(generator, made) if known] == costs
    assert await billed(generator, prompt) == costs


# Inputs


def image(frame: int = 0, **fields: Any) -> vocabulary_pb2.VideoInput:
    return vocabulary_pb2.VideoInput(image_id=ids.new_id(), frame_index=frame, **fields)


async def test_each_input_is_fitted_as_it_says_and_pinned(generator: Generator) -> None:
    prompt = f"A cat, {uuid.uuid4()}"
    crop = vocabulary_pb2.CropBounds(left_fraction=0.5, right_fraction=1, bottom_fraction=1)
    first = image(fit=vocabulary_pb2.FIT_MODE_CONTAIN_BLURRED)
    last = image(20, crop=crop)
    generator.storage.fits.clear()
    made = await generator.ask(prompt, model="sora-1", inputs=[first, last])
    assert await generator.ended(made) == WHOLE
    one, other = generator.storage.fits
    assert (one.asset_id, one.mode) == (first.image_id, storage_pb2.FIT_MODE_CONTAIN_BLURRED)
    assert (other.asset_id, other.crop.left_fraction) == (last.image_id, 0.5)
    assert not one.HasField("crop")
    assert {(fit.width, fit.height, fit.pin_owner) for fit in (one, other)} == {
        (320, 180, made.video_id)
    }
    (entry,) = await generator.simulator.accepted(prompt)
    assert [item["frame_index"] for item in entry["inputs"]] == [0, 20]


async def test_preparing_may_outlast_its_lease(generator: Generator) -> None:
    """To fit a video takes long. The lease is a second here: nobody else begins with it meanwhile."""
    prompt = f"A cat, {uuid.uuid4()}"
    generator.storage.fits.clear()
    generator.storage.fitting.clear()
    made = await generator.ask(prompt, model="sora-1", inputs=[image()])
    try:
        await generator.until(made, "PREPARING")
        lease = "SELECT lease_until, clock_timestamp() AS now FROM attempts WHERE video_id = $1"
        (first,) = await generator.fetch(lease, made.video_id)

        async def outlasted() -> bool:
            (row,) = await generator.fetch(lease, made.video_id)
            return row["now"] > first["lease_until"] and row["lease_until"] > row["now"]

        assert await eventually(outlasted)
    finally:
        generator.storage.fitting.set()
    assert await generator.ended(made) == WHOLE
    assert len(generator.storage.fits) == 1
    assert len(await generator.simulator.accepted(prompt)) == 1


@pytest.mark.parametrize(
    ("model", "asked", "says"),
    [
        ("sora-1", vocabulary_pb2.VideoInput(image_id="1" * 26), "too much work"),
        ("sora-2", vocabulary_pb2.VideoInput(input_video_id="a" * 26), "starts from one image"),
        ("sora-2", vocabulary_pb2.VideoInput(image_id="a" * 26, frame_index=9), "first frame"),
    ],
)
async def test_what_cannot_be_sent_fails_the_video_and_is_not_sent(
    generator: Generator, model: str, asked: vocabulary_pb2.VideoInput, says: str
) -> None:
    prompt = f"A cat, {uuid.uuid4()}"
    made = await generator.ask(prompt, model=model, inputs=[asked])
    assert (await generator.ended(made))[-1] == "failed"
    failed = generator.told[made.video_id][-1].failed
    assert failed.cause == vocabulary_pb2.CAUSE_REQUEST_INVALID
    assert says in failed.message
    assert await generator.simulator.accepted(prompt) == []


# Smaller versions, and bytes that are no video


async def smaller(generator: Generator, *answers: errors.ServiceError | None) -> list[int]:
    """Heights of the smaller versions of a video, when storage answers so."""
    generator.storage.renditions = list(answers)
    made = await generator.ask(rendition_heights=[120, 90])
    assert await generator.ended(made) == WHOLE
    (output,) = generator.told[made.video_id][-1].completed.outputs
    return [each.height for each in output.renditions]


async def test_smaller_versions_are_made_before_the_video_is_told(generator: Generator) -> None:
    assert await smaller(generator) == [120, 90]


async def test_one_that_cannot_be_made_is_left_out(generator: Generator) -> None:
    never = errors.InvalidArgument("TOO_LARGE", "it takes too much work")
    assert await smaller(generator, never) == [90]


async def test_one_that_is_not_made_now_is_made_later(generator: Generator) -> None:
    later = errors.Unavailable("DEPENDENCY_UNAVAILABLE", "storage is busy")
    assert await smaller(generator, None, later) == [120, 90]


async def test_storage_is_told_which_bytes_came_before(generator: Generator) -> None:
    """So that it keeps the same ones aside: the hash of what was refused goes with the next Put."""
    generator.storage.refused_sha256.clear()
    made = await generator.ask(f"A cat, {uuid.uuid4()} [fault:content_corrupt=9]")
    assert (await generator.ended(made))[-1] == "failed"
    first, second = generator.storage.refused_sha256
    assert first == ""
    assert len(second) == 64
