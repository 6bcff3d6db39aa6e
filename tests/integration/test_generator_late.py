"""The end of a render: what is fetched, what is kept on disk meanwhile, what ends it, and what turns up late."""

from __future__ import annotations

import signal
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.generator.v1 import job_pb2
from services.generator import films
from tests import generator_process
from tests.generator_process import Generator
from tests.waiting import eventually

WHOLE = ["queued", "started", "completed"]
FAILED = ["queued", "started", "failed"]
RECOVERED = [*FAILED, "recovered"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def generator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Generator]:
    async with generator_process.running(tmp_path_factory.mktemp("late")) as started:
        await started.sentinel()
        yield started


@pytest.fixture(autouse=True)
async def healthy(generator: Generator) -> AsyncIterator[None]:
    yield
    await generator.simulator.clear()
    generator.storage.down = False
    generator.storage.unusable.clear()
    generator.storage.answering.set()
    (generator.folder / "failpoints").unlink(missing_ok=True)
    await generator.program.start()
    await generator.fetch("UPDATE late_renders SET look_until = '-infinity'")


def asked(*faults: str) -> str:
    return " ".join([f"A cat, {uuid.uuid4()}", *(f"[fault:{fault}]" for fault in faults)])


def failure(generator: Generator, made: job_pb2.Job) -> str:
    (failed,) = [
        event.failed for event in generator.told[made.video_id] if event.HasField("failed")
    ]
    return vocabulary_pb2.Cause.Name(failed.cause).removeprefix("CAUSE_")


async def told(generator: Generator, made: job_pb2.Job, kinds: list[str]) -> None:
    async def check() -> bool:
        rows = await generator.fetch("SELECT state, message FROM late_renders")
        assert generator.kinds(made) == kinds, [dict(row) for row in rows]
        return True

    await eventually(check)


async def given_up(generator: Generator, made: job_pb2.Job) -> None:
    """Its resolve_by comes."""
    await generator.fetch(
        "UPDATE attempts SET resolve_by = clock_timestamp() WHERE video_id = $1", made.video_id
    )
    assert await generator.ended(made) == FAILED


async def lost(generator: Generator) -> job_pb2.Job:
    """A video whose create was accepted, with an answer that nobody heard and a list that does not help; given up."""
    await generator.simulator.arm("list_error", times=0)
    made = await generator.ask(asked("lost_answer"))
    await generator.until(made, "UNKNOWN")
    await given_up(generator, made)
    assert failure(generator, made) == "UNRESOLVED"
    return made


async def check_kept(generator: Generator, made: job_pb2.Job) -> None:
    """The verdict stands, the film is there, its owner was told once, and it was paid once."""
    await told(generator, made, RECOVERED)
    (output,) = generator.told[made.video_id][-1].recovered.outputs
    assert generator.storage.assets[output.asset_id][0].sha256 == output.sha256
    outcome = await generator.outcome(made)
    assert outcome.state == vocabulary_pb2.VIDEO_STATE_FAILED
    assert outcome.last_event.kind == event_pb2.EVENT_KIND_FAILED
    assert len(await generator.simulator.accepted(made.spec.prompt)) == 1
    (row,) = await generator.fetch(
        "SELECT state, cost_micros, cost_known FROM attempts WHERE video_id = $1", made.video_id
    )
    # Booked as unknown when it was given up, and that does not change.
    assert (row["state"], row["cost_micros"] > 0, row["cost_known"]) == ("FAILED", True, False)


# Late renders


async def test_a_render_that_the_list_shows_too_late_is_kept_free(generator: Generator) -> None:
    made = await lost(generator)
    await generator.simulator.clear()
    await check_kept(generator, made)


@pytest.mark.long
async def test_a_render_whose_id_turns_up_too_late_is_kept_free(generator: Generator) -> None:
    """As from a late worker or a spool: the list is no help all along."""
    made = await lost(generator)
    (entry,) = await generator.simulator.accepted(made.spec.prompt)
    await generator.fetch("UPDATE late_renders SET look_until = '-infinity'")

    async def over() -> bool:
        (row,) = await generator.fetch(
            "SELECT l.state FROM late_renders l JOIN attempts USING (attempt_id) WHERE video_id = $1",
            made.video_id,
        )
        assert row["state"] == "GIVEN_UP"
        return True

    await eventually(over)  # an id is a proof whenever it comes
    (row,) = await generator.fetch(
        "SELECT attempt_id, fence FROM attempts WHERE video_id = $1", made.video_id
    )
    spool = generator.folder / "spool"
    spool.mkdir(exist_ok=True)
    (spool / "late.tmp").write_text(
        f'["{row["attempt_id"]}", "main", "{entry["id"]}", {row["fence"]}]'
    )
    (spool / "late.tmp").rename(spool / "late.json")
    await check_kept(generator, made)


@pytest.mark.long
async def test_a_render_that_was_too_slow_is_kept_free(generator: Generator) -> None:
    made = await generator.ask(asked(), seconds=12)
    await generator.until(made, "RENDERING")
    await generator.fetch(
        "UPDATE attempts SET render_deadline = clock_timestamp() WHERE video_id = $1", made.video_id
    )
    await given_up(generator, made)
    assert failure(generator, made) == "TIMEOUT"
    await check_kept(generator, made)


@pytest.mark.long
async def test_a_late_render_that_the_provider_fails_is_told_to_nobody(
    generator: Generator,
) -> None:
    await generator.simulator.arm("list_error", times=0)
    made = await generator.ask(asked("lost_answer", "fails_later"))
    await generator.until(made, "UNKNOWN")
    await given_up(generator, made)
    await generator.simulator.clear()

    async def over() -> bool:
        (row,) = await generator.fetch(
            """
            SELECT l.state, l.message FROM late_renders l JOIN attempts a USING (attempt_id)
            WHERE a.video_id = $1
            """,
            made.video_id,
        )
        assert row["state"] == "GIVEN_UP", row["message"]
        return "provider failed" in row["message"]

    await eventually(over)
    assert generator.kinds(made) == FAILED


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
async def test_a_late_render_is_told_once_whenever_its_keeper_dies(
    generator: Generator, point: str
) -> None:
    made = await lost(generator)
    generator.arm(f"generator.late.{point}", "kill")
    await generator.simulator.clear()
    assert await generator.program.wait_exit() == -signal.SIGKILL
    await generator.program.start()
    await check_kept(generator, made)


# Fetching has an end


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "expires", "cause"),
    [
        ("content_404=100000", False, "PROVIDER_LOST"),
        ("content_403=9000", True, "PROVIDER_LOST"),
        ("content_html=9000", True, "OUTPUT_UNUSABLE"),
    ],
)
async def test_a_film_that_never_comes_ends_with_an_honest_verdict(
    generator: Generator, fault: str, expires: bool, cause: str
) -> None:
    made = await generator.ask(asked(fault))
    await generator.until(made, "FETCHING")
    if expires:
        await generator.fetch(
            "UPDATE attempts SET content_expires_at = clock_timestamp() WHERE video_id = $1",
            made.video_id,
        )
    assert await generator.ended(made) == FAILED
    assert failure(generator, made) == cause
    (row,) = await generator.fetch(
        "SELECT cost_micros, cost_known FROM attempts WHERE video_id = $1", made.video_id
    )
    # It was made, so it is billed, and we say so.
    assert (row["cost_micros"] > 0, row["cost_known"]) == (True, True)


async def test_one_unusable_output_takes_no_other_with_it(generator: Generator) -> None:
    generator.storage.unusable.add(1)
    made = await generator.ask(asked(), model="sora-1", variants=3)
    assert await generator.ended(made) == WHOLE
    completed = generator.told[made.video_id][-1].completed
    assert [output.variant for output in completed.outputs] == [0, 2]
    assert completed.variants_requested == 3
    for output in completed.outputs:
        assert generator.storage.assets[output.asset_id][0].sha256 == output.sha256


@pytest.mark.long
async def test_it_fails_when_no_output_is_usable(generator: Generator) -> None:
    generator.storage.unusable.update({0, 1})
    made = await generator.ask(asked(), model="sora-1", variants=2)
    assert await generator.ended(made) == FAILED
    assert failure(generator, made) == "OUTPUT_UNUSABLE"


@pytest.mark.long
async def test_a_fetch_that_outlasts_the_grace_time_is_given_back(generator: Generator) -> None:
    generator.storage.answering.clear()
    puts = generator.storage.puts
    made = await generator.ask(asked())

    async def putting() -> bool:
        return generator.storage.puts > puts

    await eventually(putting)
    await generator.program.stop()
    assert generator.program.exit_code == 0
    (row,) = await generator.fetch(
        """
        SELECT state, lease_until, next_step_at <= clock_timestamp() AS due
        FROM attempts WHERE video_id = $1
        """,
        made.video_id,
    )
    assert (row["state"], row["lease_until"], row["due"]) == ("FETCHING", None, True)
    generator.storage.answering.set()
    await generator.program.start()
    assert await generator.ended(made) == WHOLE


# Our own disk


def on_disk(generator: Generator) -> list[tuple[str, int]]:
    return films.Films(generator.folder / "spool" / "films", 0).kept()


async def near_expiry(generator: Generator, seconds: float = 5) -> job_pb2.Job:
    """A finished render, storage away, and little time left at the provider."""
    generator.storage.down = True
    made = await generator.ask(asked())
    await generator.until(made, "FETCHING")
    await generator.fetch(
        """
        UPDATE attempts SET content_expires_at = clock_timestamp() + make_interval(secs => $2),
            next_step_at = clock_timestamp()
        WHERE video_id = $1
        """,
        made.video_id,
        seconds,
    )
    return made


async def spooled(generator: Generator) -> None:
    async def there() -> bool:
        found = await generator.fetch("SELECT 1 FROM outputs WHERE state = 'SPOOLED'")
        return bool(found) and bool(on_disk(generator))

    await eventually(there)


@pytest.mark.parametrize(
    "kill",
    [False, pytest.param(True, marks=[pytest.mark.fault, pytest.mark.long])],
    ids=["alive", "killed"],
)
async def test_a_film_that_would_expire_waits_on_our_own_disk(
    generator: Generator, kill: bool
) -> None:
    if kill:
        generator.arm("generator.fetch.after_spool", "kill")
    made = await near_expiry(generator)
    if kill:
        assert await generator.program.wait_exit() == -signal.SIGKILL
        assert on_disk(generator)
        await generator.program.start()
    else:
        await spooled(generator)
    # The provider gives it no more, and its expiry is over.
    await generator.simulator.arm("content_403", times=0)
    await generator.fetch(
        "UPDATE attempts SET content_expires_at = clock_timestamp() WHERE video_id = $1",
        made.video_id,
    )
    generator.storage.down = False
    assert await generator.ended(made) == WHOLE

    async def drained() -> bool:
        return on_disk(generator) == []

    await eventually(drained)


@pytest.mark.long
async def test_a_full_disk_ends_it_as_our_own_fault(generator: Generator) -> None:
    folder = generator.folder / "spool" / "films"
    folder.mkdir(parents=True, exist_ok=True)
    big = folder / "other"
    with big.open("wb") as file:
        file.truncate(2 * 1024**3)  # a hole: it takes no room
    try:
        made = await near_expiry(generator, 1)
        assert await generator.ended(made) == FAILED
    finally:
        big.unlink()
    assert failure(generator, made) == "INTERNAL"
