"""The whole generator, its process killed and stopped at every crash point."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from framewire import subjects
from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import attempt_pb2, attempt_pb2_grpc
from kit import errors, ids
from tests import generator_process, generator_world
from tests.fault import kills
from tests.generator_process import Generator
from tests.waiting import eventually

WHOLE = ["queued", "started", "completed"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def generator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Generator]:
    """One generator for all; a completed video of it serves as the sentinel that proves absence."""
    async with generator_process.running(tmp_path_factory.mktemp("generator")) as started:
        await started.sentinel()
        yield started


@pytest.fixture(autouse=True)
async def healthy(generator: Generator) -> AsyncIterator[None]:
    yield
    await generator.simulator.clear()
    generator.storage.down = False
    (generator.folder / "failpoints").unlink(missing_ok=True)
    await generator.program.start()
    await generator.fetch(
        "UPDATE provider_accounts SET submits_after = '-infinity', troubles = 0, rate_share = 1,"
        " requests_after = '-infinity', jobs_learnt = NULL, paused = false"
    )
    # What a test gave up is looked for, and found, in the next one otherwise.
    await generator.fetch("UPDATE late_renders SET look_until = '-infinity'")


async def one_accepted(generator: Generator, prompt: str) -> None:
    accepted = await generator.simulator.accepted(prompt)
    assert len(accepted) == 1, [entry["id"] for entry in accepted]


# Without crashes


async def test_an_image_becomes_a_stored_video(generator: Generator) -> None:
    prompt = f"A cat, {uuid.uuid4()}"
    made = await generator.ask(prompt, input_image_id=ids.new_id())
    assert await generator.ended(made) == WHOLE
    await one_accepted(generator, prompt)
    assert (await generator.simulator.accepted(prompt))[0]["reference_sha256"]
    completed = generator.told[made.video_id][-1].completed
    asset, content = generator.storage.assets[completed.outputs[0].asset_id]
    assert content[4:8] == b"ftyp"
    assert completed.outputs[0].sha256 == asset.sha256
    assert (completed.model, completed.seconds_requested) == ("sora-2", 1)
    outcome = await generator.outcome(made)
    assert outcome.state == vocabulary_pb2.VIDEO_STATE_COMPLETED
    assert outcome.last_event == generator.told[made.video_id][-1]
    # A repeat changes nothing.
    await generator.publish(made)
    another = await generator.ask()
    await generator.ended(another)
    assert generator.kinds(made) == WHOLE
    text = generator.program.log_path.read_text()
    assert prompt not in text
    assert "sim-key" not in text


async def test_many_at_once_and_twins_one_after_the_other(generator: Generator) -> None:
    prompt = f"The same for all, {uuid.uuid4()}"
    asked = [await generator.ask(prompt, input_image_id=ids.new_id()) for _ in range(4)]
    asked += [await generator.ask() for _ in range(8)]
    for made in asked:
        assert await generator.ended(made) == WHOLE
    assert len(await generator.simulator.accepted(prompt)) == 4
    jobs = await generator.fetch(
        "SELECT count(*) AS n, count(DISTINCT provider_job_id) AS d FROM attempts"
        " WHERE state = 'COMPLETED'"
    )
    assert jobs[0]["n"] == jobs[0]["d"]


FAILED = ["queued", "started", "failed"]
FAULTS = {
    "lost_answer": (1, ""),  # adopted
    "error_after=500": (1, ""),
    "hang": (1, ""),
    "hang_before": (1, ""),  # proved absent, sent again
    "error_before=503": (1, ""),
    "rate_limited=20": (1, ""),
    "rate_limited_bare": (1, ""),
    "model_gone": (1, ""),  # refused us: goes back, and the account opens again
    "poll_404=2] [fault:list_drop=2": (1, ""),
    "content_404=30": (1, ""),
    "content_403": (1, ""),
    "content_html": (1, ""),
    "content_empty": (1, ""),
    "content_cut": (1, ""),
    "content_corrupt=2": (1, "OUTPUT_UNUSABLE"),
    "fails_later": (2, "PROVIDER_ERROR"),  # unbilled: one further attempt
    "moderated_later": (1, "OUTPUT_REFUSED"),
    "moderated_now": (0, "INPUT_REFUSED"),
}
"""By fault: how many jobs the provider accepts for the prompt, and why the video fails, if it does."""


async def test_what_becomes_of_a_video_under_each_fault(generator: Generator) -> None:
    asked = {
        fault: await generator.ask(f"A cat, {uuid.uuid4()} [fault:{fault}]") for fault in FAULTS
    }
    await asyncio.gather(*(generator.ended(made) for made in asked.values()))
    log = generator.program.log_path.read_text()
    for fault, made in asked.items():
        jobs, cause = FAULTS[fault]
        failed = generator.told[made.video_id][-1].failed
        told = vocabulary_pb2.Cause.Name(failed.cause).removeprefix("CAUSE_")
        assert told == (cause or "UNSPECIFIED"), f"{fault}: {failed.message}"
        assert generator.kinds(made) == (FAILED if cause else WHOLE), fault
        assert len(await generator.simulator.accepted(made.spec.prompt)) == jobs, fault
        (row,) = await generator.fetch(
            "SELECT count(*) AS jobs FROM provider_jobs JOIN attempts USING (attempt_id)"
            " WHERE video_id = $1",
            made.video_id,
        )
        assert row["jobs"] == jobs, fault
        assert made.spec.prompt not in log


async def test_a_strangers_twin_is_never_delivered(generator: Generator) -> None:
    prompt = f"A cat, {uuid.uuid4()} [fault:twin_job] [fault:lost_answer]"
    made = await generator.ask(prompt)
    await generator.until(made, "UNRESOLVED")
    outcome = await generator.outcome(made)
    assert outcome.stage == vocabulary_pb2.VIDEO_STAGE_UNRESOLVED
    await one_accepted(generator, prompt)
    # Nothing more is known of it until resolve_by.
    await generator.fetch(
        "UPDATE attempts SET resolve_by = clock_timestamp() WHERE video_id = $1", made.video_id
    )
    assert await generator.ended(made) == FAILED
    failed = generator.told[made.video_id][-1].failed
    assert (failed.cause, failed.stage) == (
        vocabulary_pb2.CAUSE_UNRESOLVED,
        vocabulary_pb2.VIDEO_STAGE_UNRESOLVED,
    )
    await one_accepted(generator, prompt)


async def test_storage_being_down_delays_and_a_lost_image_fails(generator: Generator) -> None:
    generator.storage.down = True
    waiting = await generator.ask(input_image_id=ids.new_id())
    rendered = await generator.ask()
    await generator.until(rendered, "FETCHING")
    gone = await generator.ask(input_image_id="0" * 26)
    generator.storage.down = False
    assert await generator.ended(waiting) == WHOLE
    assert await generator.ended(rendered) == WHOLE
    assert await generator.ended(gone) == FAILED
    cause = generator.told[gone.video_id][-1].failed.cause
    assert cause == vocabulary_pb2.CAUSE_REQUEST_INVALID


async def test_a_closed_account_sends_nothing_and_loses_nothing(generator: Generator) -> None:
    async with generator.stub() as stub:
        pause = attempt_pb2.PauseProviderAccountRequest(provider_account="main", paused=True)
        assert not (await stub.PauseProviderAccount(pause, timeout=5)).open
        made = await generator.ask()

        async def accepted() -> bool:
            return generator.kinds(made) == ["queued"]

        await eventually(accepted)
        assert (await generator.outcome(made)).stage == vocabulary_pb2.VIDEO_STAGE_QUEUED
        pause.paused = False
        assert (await stub.PauseProviderAccount(pause, timeout=5)).open
        assert await generator.ended(made) == WHOLE
        listed = await stub.ListProviderAccounts(
            attempt_pb2.ListProviderAccountsRequest(), timeout=5
        )
        assert [a.provider_account for a in listed.provider_accounts] == ["azure", "main", "runway"]
        pause.provider_account = "nobody"
        with pytest.raises(errors.NotFound):
            await stub.PauseProviderAccount(pause, timeout=5)


async def test_operators_page_through_attempts(generator: Generator) -> None:
    asked = [await generator.ask() for _ in range(3)]
    for made in asked:
        await generator.ended(made)
    newest = await generator.fetch("SELECT video_id FROM attempts ORDER BY created_at DESC")
    seen: list[str] = []
    token = ""
    async with generator.stub() as stub:
        while True:
            request = attempt_pb2.ListAttemptsRequest(page_size=2, page_token=token)
            page = await stub.ListAttempts(request, timeout=5)
            seen += [attempt.video_id for attempt in page.attempts]
            token = page.next_page_token
            if not token:
                break
        unheard = attempt_pb2.GetVideoOutcomeRequest(video_id=ids.new_id())
        with pytest.raises(errors.NotFound) as refused:
            await stub.GetVideoOutcome(unheard, timeout=5)
    assert refused.value.reason == "ATTEMPT_NOT_FOUND"
    assert seen == [row["video_id"] for row in newest]
    assert {made.video_id for made in asked} == set(seen[:3])
    async with grpc.aio.insecure_channel(generator.address) as channel:
        bare = attempt_pb2_grpc.AttemptServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await bare.ListAttempts(attempt_pb2.ListAttemptsRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_cancel_before_and_after_the_job_arrives(generator: Generator) -> None:
    early, late = generator_world.job(), generator_world.job()
    async with generator.stub() as stub:
        for made in (early, late):
            if made is late:
                await generator.publish(late)
                await generator.until(late, "RENDERING")
            request = attempt_pb2.CancelAttemptRequest(
                video_id=made.video_id, account_id=made.account_id
            )
            outcome = await stub.CancelAttempt(request, timeout=5)
            if made is early:
                assert outcome.state == vocabulary_pb2.VIDEO_STATE_CANCELLED
                await generator.publish(early)
    assert await generator.ended(late) == WHOLE
    assert generator.told[late.video_id][-1].completed.cancel_requested
    assert await generator.ended(early) == ["cancelled"]
    assert await generator.simulator.accepted(early.spec.prompt) == []


async def test_bytes_that_are_no_job_fail_their_video_and_block_nothing(
    generator: Generator,
) -> None:
    known, unheard = generator_world.job(), generator_world.job()
    stream = generator.client.jetstream()
    bad_ids = generator_world.job()
    bad_ids.video_id = "../etc/passwd"
    for data, header in (
        (b"\xff\xff\xff", ""),
        (b"", "A B"),
        (bad_ids.SerializeToString(), "x" * 53),
        (b"\xff", f"{unheard.video_id} {unheard.account_id}"),
    ):
        await stream.publish(subjects.JOBS_SUBJECT, data, headers={subjects.VIDEO_HEADER: header})
    newer = generator_world.job()
    newer.lane = 99  # pyright: ignore[reportAttributeAccessIssue]
    await generator.publish(newer)
    await generator.publish(known)
    assert await generator.ended(known) == WHOLE
    assert await generator.ended(unheard) == ["failed"]
    assert await generator.state(newer) == "none"
    events = [entry["event"] for entry in generator.log()]
    assert "message_failed" not in events
    info = await stream.consumer_info(subjects.JOBS_STREAM, "generator")
    assert info.num_ack_pending == 1  # the newer one waits for a newer generator
    await stream.purge_stream(subjects.JOBS_STREAM)


async def test_an_idle_account_asks_the_provider_nothing(generator: Generator) -> None:
    await generator.ended(await generator.ask())
    before = await _tat(generator)
    passes = await _polls(generator)

    async def polled() -> bool:
        return await _polls(generator) != passes

    await eventually(polled)
    assert await _tat(generator) == before


async def _tat(generator: Generator) -> object:
    return (
        await generator.fetch(
            "SELECT requests_tat FROM provider_accounts WHERE provider_account = 'main'"
        )
    )[0][0]


async def _polls(generator: Generator) -> object:
    return (
        await generator.fetch(
            "SELECT next_poll_at FROM provider_accounts WHERE provider_account = 'main'"
        )
    )[0][0]


async def test_an_answer_that_only_the_spool_holds_is_taken_up(generator: Generator) -> None:
    prompt = f"A cat, {uuid.uuid4()}"
    generator.arm("generator.submit.after_post", "kill")
    await generator.simulator.arm("list_error", times=0)  # the list is no help
    made = await generator.ask(prompt)
    await generator.program.wait_exit()
    (entry,) = await generator.simulator.accepted(prompt)
    (row,) = await generator.fetch(
        "SELECT attempt_id, fence FROM attempts WHERE video_id = $1", made.video_id
    )
    spool = generator.folder / "spool"
    spool.mkdir(exist_ok=True)
    (spool / "torn.json").write_text('["')
    (spool / "odd.json").write_text("7")
    file = spool / "x.json"
    file.write_text(f'["{row["attempt_id"]}", "main", "{entry["id"]}", {row["fence"]}]')
    await generator.program.start()
    assert await generator.ended(made) == WHOLE
    assert not file.exists()
    await one_accepted(generator, prompt)


# With crashes

KILLS = [
    *((point, "", WHOLE) for point in kills.MATRIX["generator"]),
    ("generator.resolve.after_adopt", "lost_answer", WHOLE),
    ("generator.resolve.before_put_back", "hang_before", WHOLE),
    ("generator.finish.before_commit", "moderated_later", FAILED),
    ("generator.finish.after_commit", "moderated_later", FAILED),
]


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize(
    ("point", "fault", "kinds"), KILLS, ids=[f"{point}-{fault}" for point, fault, _ in KILLS]
)
async def test_kill(generator: Generator, point: str, fault: str, kinds: list[str]) -> None:
    prompt = f"killed at {point} {uuid.uuid4()}" + (f" [fault:{fault}]" if fault else "")
    generator.arm(point, "kill")
    made = await generator.ask(prompt, input_image_id=ids.new_id())
    assert await generator.program.wait_exit() == -signal.SIGKILL
    await generator.program.start()
    if point == "generator.accept.before_commit":
        # Else the bus brings it when its ack is overdue, after 30 s; the gateway rings again while it is not known.
        await generator.publish(made)
    assert await generator.ended(made) == kinds
    await one_accepted(generator, prompt)


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize("point", ["after_commit", "after_post", "before_commit"])
async def test_stopped_past_its_lease(generator: Generator, point: str) -> None:
    """A second process takes the attempts over while the first is stopped; then the first wakes up."""
    prompt = f"stopped at {point} {uuid.uuid4()}"
    generator.arm(f"generator.submit.{point}", "stop")
    made = await generator.ask(prompt)
    pid = generator.program.pid
    assert pid is not None

    async def stopped() -> bool:
        return (generator.folder / "failpoints.struck").exists() and _is_stopped(pid)

    await eventually(stopped)
    async with generator_process.second(generator):
        # What the second can do with it, it does: adopt what was sent, prepare anew what was not begun.
        end = {
            "after_commit": "UNRESOLVED",
            "after_post": "COMPLETED",
            "before_commit": "COMPLETED",
        }
        await generator.until(made, end[point])
        os.kill(pid, signal.SIGCONT)
        assert await generator.ended(made) == WHOLE
        await one_accepted(generator, prompt)
        # The first is alive and goes on as one of two.
        others = [await generator.ask() for _ in range(6)]
        await asyncio.gather(*(generator.ended(other) for other in others))
    assert generator.program.running


def _is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        return stat.read().rsplit(")", 1)[1].split()[0] == "T"


@pytest.mark.fault
@pytest.mark.long
async def test_two_processes_share_the_work_and_pay_once(generator: Generator) -> None:
    async with generator_process.second(generator):
        asked = [await generator.ask(lane=1 + number % 3) for number in range(24)]
        for made in asked:
            assert await generator.ended(made) == WHOLE
            await one_accepted(generator, made.spec.prompt)


@pytest.mark.fault
@pytest.mark.long
async def test_it_stops_when_told_and_leaves_nothing_half_done(generator: Generator) -> None:
    asked = [await generator.ask() for _ in range(6)]
    await generator.until(asked[0], "RENDERING")
    await generator.program.stop()
    assert generator.program.exit_code == 0
    await generator.program.start()
    for made in asked:
        assert await generator.ended(made) == WHOLE
        await one_accepted(generator, made.spec.prompt)
