"""Providers' webhooks: hints that make a poll due. None can do harm, and one that is lost costs latency alone."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.generator import receiver
from services.simulator import webhooks as sender
from tests import generator_process, generator_world
from tests.generator_process import WEBHOOK_SECRET, Generator
from tests.generator_world import World
from tests.waiting import eventually

server, world = generator_world.server, generator_world.world
WHOLE = ["queued", "started", "completed"]
USUAL, RARE = timedelta(seconds=60), timedelta(seconds=600)


# Hints as rows


async def next_poll_seconds(world: World) -> float:
    """Until the next poll of the account; below 0 when it is due."""
    found = await world.pool.fetchval(
        """
        SELECT extract(epoch FROM CASE WHEN next_poll_at = '-infinity' THEN interval '-1 s'
                                  ELSE next_poll_at - clock_timestamp() END)
        FROM provider_accounts WHERE provider_account = 'main'
        """
    )
    return float(found)


async def polled(world: World) -> None:
    """A pass that is just over."""
    await world.pool.execute("UPDATE provider_accounts SET next_poll_at = '-infinity'")
    held = await world.store.renders.claim_poll("main", USUAL)
    assert held
    await world.store.renders.end_poll("main", held, USUAL, RARE)


async def test_a_hint_makes_the_next_poll_due_once(world: World) -> None:
    await world.rendering("video_1")
    await polled(world)
    assert await next_poll_seconds(world) > 50
    assert await world.store.hints.add("main", "wh_1", "video_1")
    assert await next_poll_seconds(world) <= 0
    await polled(world)
    # Again, under its id: nothing more.
    assert not await world.store.hints.add("main", "wh_1", "video_1")
    assert await next_poll_seconds(world) > 50


async def test_what_nobody_waits_for_makes_no_poll_due(world: World) -> None:
    attempt = await world.rendering("video_1")
    await world.store.renders.finished(attempt, attempt.created_at + timedelta(days=1))
    await polled(world)
    for number, job_id in enumerate(("video_1", "video_foreign")):
        assert await world.store.hints.add("main", f"wh_{number}", job_id)
    assert await world.store.hints.add("second", "wh_0", "video_1")
    assert await next_poll_seconds(world) > 50


@pytest.mark.parametrize(("minutes", "counts"), [(0, True), (59, True), (61, False)])
async def test_a_hint_waits_an_hour_for_its_job(world: World, minutes: int, counts: bool) -> None:
    await polled(world)
    await world.store.hints.add("main", "wh_1", "video_1")
    await world.pool.execute(
        "UPDATE webhook_hints SET received_at = received_at - make_interval(mins => $1)", minutes
    )
    assert await next_poll_seconds(world) > 50
    await world.rendering("video_1")
    assert (await next_poll_seconds(world) <= 0) is counts
    await world.store.hints.add("main", "wh_2", "video_2")
    left = await world.pool.fetchval("SELECT count(*) FROM webhook_hints")
    assert left == (2 if minutes < 60 else 1)


async def test_a_hint_and_its_job_at_the_same_moment_do_not_miss_each_other(world: World) -> None:
    attempts = [await world.sending() for _ in range(10)]
    for number, attempt in enumerate(attempts):
        await polled(world)
        await asyncio.gather(
            world.record(attempt, f"video_{number}"),
            world.store.hints.add("main", f"wh_{number}", f"video_{number}"),
        )
        assert await next_poll_seconds(world) <= 0, number


async def test_a_hint_that_comes_during_a_pass_is_not_lost(world: World) -> None:
    await world.rendering("video_1")
    held = await world.store.renders.claim_poll("main", USUAL)
    assert held
    await world.store.hints.add("main", "wh_1", "video_1")
    await world.store.renders.end_poll("main", held, USUAL, RARE)
    assert await next_poll_seconds(world) <= 0
    # The pass that it asked for: the provider may show the end a little later than it tells it.
    await polled(world)
    assert 50 < await next_poll_seconds(world) < 70


async def test_polls_are_rare_while_webhooks_come(world: World) -> None:
    async def after(heard: timedelta) -> float:
        await world.pool.execute(
            """
            UPDATE provider_accounts SET hinted_at = '-infinity', next_poll_at = '-infinity',
                webhook_heard_at = clock_timestamp() - $1::interval
            """,
            heard,
        )
        await polled(world)
        return await next_poll_seconds(world)

    assert await after(timedelta(seconds=1)) > 590
    assert await after(2 * RARE - timedelta(seconds=10)) > 590
    assert 50 < await after(2 * RARE + timedelta(seconds=1)) < 70


# The endpoint, and the whole


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def generator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Generator]:
    """It polls once a minute: what ends sooner was hinted at."""
    folder = tmp_path_factory.mktemp("generator")
    async with generator_process.running(
        folder, webhooks=True, poll_interval_seconds=6000
    ) as started:
        await started.sentinel()
        yield started


async def send(
    generator: Generator,
    body: bytes,
    *,
    secret: str = WEBHOOK_SECRET,
    path: str = "main",
    **more: Any,
) -> httpx.Response:
    message_id, timestamp = f"wh_{uuid.uuid4()}", str(int(time.time()))
    headers = {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": sender.signature(secret, message_id, timestamp, body),
    }
    url = generator.webhook_url.removesuffix("main") + path
    async with httpx.AsyncClient(trust_env=False) as client:
        method = more.pop("method", "POST")
        return await client.request(method, url, content=body, headers={**headers, **more})


def about(job_id: str) -> bytes:
    return json.dumps({"type": "video.completed", "data": {"id": job_id}}).encode()


async def job_id(generator: Generator, prompt: str) -> str:
    (entry,) = await generator.simulator.accepted(prompt)
    return entry["id"]


@pytest.mark.parametrize("fault", ["", "webhook_twice", "webhook_foreign", "webhook_late=30"])
async def test_a_render_is_fetched_when_its_end_is_told(generator: Generator, fault: str) -> None:
    prompt = f"A cat, {uuid.uuid4()}" + (f" [fault:{fault}]" if fault else "")
    made = await generator.ask(prompt)
    assert await generator.ended(made) == WHOLE
    rows = await generator.fetch(
        "SELECT webhook_id FROM webhook_hints WHERE provider_job_id = $1",
        await job_id(generator, prompt),
    )
    assert len(rows) == 1


async def test_a_forged_one_does_nothing_and_a_lost_one_only_waits(generator: Generator) -> None:
    prompts = {name: f"A cat, {uuid.uuid4()} [fault:webhook_{name}]" for name in ("forged", "lost")}
    made = {name: await generator.ask(prompt) for name, prompt in prompts.items()}
    for job in made.values():
        await generator.until(job, "RENDERING")
    forged = await job_id(generator, prompts["forged"])

    async def refused() -> bool:
        told = await generator.simulator.log(kind="webhook")
        return [entry["status"] for entry in told if entry["job"] == forged] == [401]

    await eventually(refused)
    rows = await generator.fetch("SELECT 1 FROM webhook_hints WHERE provider_job_id = $1", forged)
    assert rows == []
    assert (await generator.state(made["forged"])).split()[0] == "RENDERING"
    # The next pass, whatever it is for, sees both.
    assert (await send(generator, about(forged))).status_code == 204
    for job in made.values():
        assert await generator.ended(job) == WHOLE


async def test_a_webhook_that_is_faster_than_what_it_is_about(generator: Generator) -> None:
    """The answer of the create is lost; the job's end is told before the job is found in the list."""
    prompt = f"A cat, {uuid.uuid4()} [fault:lost_answer]"
    made = await generator.ask(prompt)
    assert await generator.ended(made) == WHOLE
    assert len(await generator.simulator.accepted(prompt)) == 1


async def test_who_is_not_let_in_learns_nothing(generator: Generator) -> None:
    answers = [
        await send(generator, about("video_1"), secret="not-the-secret-at-all"),
        await send(generator, about("video_1"), path="nobody"),
        await send(generator, b"not even JSON", secret="not-the-secret-at-all"),
        await send(generator, about("video_1"), **{"webhook-timestamp": "1614265330"}),
    ]
    assert {(answer.status_code, answer.content) for answer in answers} == {(401, b"")}
    assert len({tuple(sorted(answer.headers.items())) for answer in answers}) == 1
    others = [
        (await send(generator, b"", method="GET")).status_code,
        (await send(generator, b"x" * (receiver.MAX_BODY_BYTES + 1))).status_code,
        (await send(generator, b"[]")).status_code,
    ]
    assert others == [404, 413, 204]
    assert (
        await send(generator, about("v"), secret=generator_process.OLD_WEBHOOK_SECRET)
    ).is_success


@pytest.mark.parametrize(
    "text", ["hello\r\n\r\n", "POST /webhooks/main HTTP/1.1\r\n\r\n", "\x00" * 50]
)
async def test_what_is_no_http_is_hung_up_on(generator: Generator, text: str) -> None:
    host, port = generator.webhook_url[7:].split("/")[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(text.encode() + b"x" * 70_000)
    answer = b""
    try:
        answer = await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        pass
    finally:
        writer.close()
    assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
async def test_killed_while_it_is_told(generator: Generator, point: str) -> None:
    """Told again, since it was not answered: taken if it was lost with us, nothing new if it was not."""
    prompt = f"killed at {point} {uuid.uuid4()}"
    generator.arm(f"generator.webhook.{point}", "kill")
    made = await generator.ask(prompt)
    assert await generator.program.wait_exit() == -signal.SIGKILL
    # What the new process would poll as it starts, by no hint of anyone's.
    await generator.fetch(
        """
        UPDATE provider_accounts SET next_poll_at = clock_timestamp() + interval '1 hour'
        WHERE next_poll_at > clock_timestamp()
        """
    )
    await generator.program.start()
    assert await generator.ended(made) == WHOLE
    rows = await generator.fetch(
        "SELECT webhook_id FROM webhook_hints WHERE provider_job_id = $1",
        await job_id(generator, prompt),
    )
    assert len(rows) == 1
