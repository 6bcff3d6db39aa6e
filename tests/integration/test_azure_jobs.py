"""The client of the Azure jobs protocol: what it sends, what answers mean, its lists, jobs and films."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.generator import attempts, catalogue
from services.generator.providers import azure_jobs, contract
from tests import openai_world, pictures, simulated
from tests.openai_world import answer, ended, serving
from tests.waiting import eventually

ACCOUNT = catalogue.parse(yaml.safe_load(openai_world.FILE.read_text()), 1.0)["azure"]
IMAGE = pictures.plain((200, 30, 30))
REFUSED, US, NOT, AMBIGUOUS, YES = (
    contract.RefusedRequest,
    contract.RefusedUs,
    contract.NotAccepted,
    contract.Ambiguous,
    contract.Accepted,
)


@pytest.fixture(scope="module")
async def simulator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[simulated.Simulator]:
    folder = tmp_path_factory.mktemp("simulator")
    async with running(folder) as started:
        yield started


def running(folder: Path, **settings: Any) -> Any:
    given = {"time_factor": 100, "draw_prompt": False, "azure_max_concurrent_jobs": 0, **settings}
    return simulated.running(folder, **given)


@asynccontextmanager
async def client(
    url: str, post_timeout: float = 10, key: str = simulated.KEY
) -> AsyncIterator[azure_jobs.AzureJobs]:
    opened = azure_jobs.AzureJobs(
        dataclasses.replace(ACCOUNT, post_timeout_seconds=post_timeout), url, key
    )
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def provider(simulator: simulated.Simulator) -> AsyncIterator[azure_jobs.AzureJobs]:
    await simulator.clear()
    async with client(f"{simulator.url}/openai/v1") as opened:
        yield opened
    await simulator.clear()


def spec(prompt: str = "", **fields: Any) -> Any:
    return openai_world.spec(prompt, **{"model": "sora-1", **fields})


async def create(
    provider: azure_jobs.AzureJobs, prompt: str = "", **fields: Any
) -> contract.CreateOutcome:
    return await openai_world.create(provider, prompt, **{"model": "sora-1", **fields})


async def made(provider: azure_jobs.AzureJobs, prompt: str = "", **fields: Any) -> str:
    return await openai_world.made(provider, prompt, **{"model": "sora-1", **fields})


async def film(provider: azure_jobs.AzureJobs, output_id: str) -> bytes:
    async with provider.content(output_id) as (size, chunks):
        content = b"".join([chunk async for chunk in chunks])
    assert size in (None, len(content))
    return content


async def there(provider: azure_jobs.AzureJobs, output_id: str) -> bytes:
    async def check() -> bytes | None:
        try:
            return await film(provider, output_id)
        except contract.ContentGone:
            return None

    content = await eventually(check)
    assert content is not None
    return content


async def listed(provider: azure_jobs.AzureJobs, job_id: str) -> contract.Job:
    jobs, _ = await provider.list_page(None)
    return next(job for job in jobs if job.provider_job_id == job_id)


# Creates


async def test_a_text_job_is_sent_and_shown(
    provider: azure_jobs.AzureJobs, simulator: simulated.Simulator
) -> None:
    wanted = spec(f'Zoë says "hi" & 日本\n {uuid.uuid4()}')
    body = provider.build(wanted, None, "attempt")
    assert body == provider.build(wanted, None, "attempt")
    assert body.content_type == "application/json"
    outcome = await provider.create(body, None)
    assert isinstance(outcome, contract.Accepted)
    (entry,) = await simulator.accepted(wanted.prompt)
    assert (entry["size"], entry["seconds"], entry["model"]) == ("320x180", "1", "sora")
    assert (entry["id"], entry["n_variants"]) == (outcome.provider_job_id, 1)
    job = await listed(provider, outcome.provider_job_id)
    assert job.fingerprint == provider.shown(wanted)
    assert job.marker == provider.shown_marker(wanted, "attempt") == ""


async def test_an_image_job_shows_its_marker_again(provider: azure_jobs.AzureJobs) -> None:
    wanted = spec(input_image_id="a" * 26)
    body = provider.build(wanted, IMAGE, "attempt-7")
    assert body == provider.build(wanted, IMAGE, "attempt-7")
    assert body.data != provider.build(wanted, IMAGE, "attempt-8").data
    outcome = await provider.create(body, None)
    assert isinstance(outcome, contract.Accepted), outcome
    job = await listed(provider, outcome.provider_job_id)
    assert job.marker == provider.shown_marker(wanted, "attempt-7") == attempts.marker("attempt-7")
    assert job.fingerprint == provider.shown(wanted)
    done = await ended(provider, outcome.provider_job_id)
    assert done.marker == job.marker
    assert (await there(provider, done.outputs[0]))[4:8] == b"ftyp"


async def test_options_override_nothing() -> None:
    wanted = spec("a cat")
    for name, value in {"seed": 7, "n_seconds": 20, "n_variants": 4, "inpaint_items": 1}.items():
        wanted.options[name].number_value = value
    async with client("http://x") as provider:
        fields = json.loads(provider.build(wanted, None, "a").data)
        form = provider.build(wanted, IMAGE, "a").data
    assert (fields["n_seconds"], fields["n_variants"], fields["seed"]) == (1, 1, 7)
    assert "inpaint_items" not in fields
    assert form.count(b'name="n_seconds"') == form.count(b'name="inpaint_items"') == 1
    assert b'name="n_seconds"\r\n\r\n1\r\n' in form


@pytest.mark.parametrize(
    ("fault", "outcome", "jobs"),
    [
        ("rate_limited=20", NOT, 0),
        ("rate_limited_bare", NOT, 0),
        ("too_many_tasks", NOT, 0),
        ("moderated_now", REFUSED, 0),
        ("model_gone", US, 0),
        ("unauthorized", US, 0),
        ("error_before=500", AMBIGUOUS, 0),
        ("error_before=503", AMBIGUOUS, 0),
        ("hang_before", AMBIGUOUS, 0),
        ("error_after=502", AMBIGUOUS, 1),
        ("lost_answer", AMBIGUOUS, 1),
        ("hang", AMBIGUOUS, 1),
    ],
)
async def test_what_each_fault_of_a_create_means(
    simulator: simulated.Simulator, fault: str, outcome: type, jobs: int
) -> None:
    prompt = f"A cat, {uuid.uuid4()} [fault:{fault}]"
    began = time.monotonic()
    async with client(f"{simulator.url}/openai/v1", post_timeout=0.4) as provider:
        found = await create(provider, prompt)
    assert time.monotonic() - began < 3
    assert isinstance(found, outcome), found
    assert len(await simulator.accepted(prompt)) == jobs
    if isinstance(found, contract.RefusedRequest):
        assert found.cause == "INPUT_REFUSED"
    if isinstance(found, contract.NotAccepted):
        wanted = pytest.approx(0.2) if fault == "rate_limited=20" else None
        assert found.retry_after_seconds == wanted


ERRORS = [
    (400, {"message": "blocked", "inner_error": {"code": "ResponsibleAIPolicyViolation"}}, REFUSED),
    (400, {"message": "The API deployment 'x' for this resource does not exist."}, US),
    (404, {"code": "404", "message": "Resource not found"}, US),
    (429, {"message": "Too many running tasks", "type": "video_generation_user_error"}, NOT),
    (400, {"message": "Too many running tasks", "type": "video_generation_user_error"}, NOT),
    (429, {"code": "429", "message": "Try again in 60 seconds."}, NOT),
    (400, {"message": "Invalid 'n_seconds'", "param": "n_seconds"}, REFUSED),
    (500, {"message": "oops"}, AMBIGUOUS),
]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("status", "error", "outcome"), ERRORS)
async def test_both_envelopes_of_errors(
    status: int, error: dict[str, Any], outcome: type, wrapped: bool
) -> None:
    body = json.dumps({"error": error} if wrapped else error)
    async with serving(answer(f"{status} X", body)) as server, client(server.url) as provider:
        found = await create(provider)
    assert isinstance(found, outcome), found
    assert not isinstance(found, contract.Accepted)
    assert error["message"] in found.message
    if isinstance(found, contract.RefusedRequest):
        blocked = "inner_error" in error
        assert found.cause == ("INPUT_REFUSED" if blocked else "REQUEST_INVALID")


async def test_the_simulators_flat_errors(tmp_path: Path) -> None:
    async with (
        running(tmp_path, quirks="flat_errors,create_202,omit_nulls,failed_as_500") as other,
        client(f"{other.url}/openai/v1") as provider,
    ):
        found = await create(provider, "A cat [fault:moderated_now]")
        assert isinstance(found, contract.RefusedRequest)
        assert (found.cause, "moderation" in found.message) == ("INPUT_REFUSED", True)
        job = await ended(provider, await made(provider, "A dog [fault:fails_later]"))
        assert (job.status, job.error_code) == (contract.Status.FAILED, "internal_error")


async def test_what_goes_over_the_wire() -> None:
    async with (
        serving(answer("200 OK", '{"id": "task_1"}')) as server,
        client(server.url) as provider,
    ):
        assert await create(provider) == contract.Accepted("task_1")
        assert await create(provider) == contract.Accepted("task_1")
    assert server.connections == len(server.requests) == 2
    first = server.requests[0].lower()
    assert first.startswith("post /v1/video/generations/jobs?api-version=preview ")
    assert f"api-key: {simulated.KEY}\r\n" in first
    assert "connection: close" in first
    assert "authorization" not in first


async def test_a_wrong_key_is_a_refusal_of_us(simulator: simulated.Simulator) -> None:
    async with client(f"{simulator.url}/openai/v1", key="wrong") as provider:
        assert isinstance(await create(provider), contract.RefusedUs)
        with pytest.raises(contract.ProviderTrouble, match="401"):
            await provider.list_page(None)


async def test_a_third_job_at_once_is_not_accepted(tmp_path: Path) -> None:
    async with (
        running(tmp_path, azure_max_concurrent_jobs=2) as strict,
        client(f"{strict.url}/openai/v1") as provider,
    ):
        for _ in range(2):
            await made(provider, f"A cat {uuid.uuid4()} [fault:stuck]")
        found = await create(provider)
    assert isinstance(found, contract.NotAccepted)
    assert "Too many running tasks" in found.message


# Lists, jobs, films


async def test_the_list_is_paged_to_its_end_newest_first(
    provider: azure_jobs.AzureJobs, simulator: simulated.Simulator
) -> None:
    job_ids = [await made(provider) for _ in range(5)]
    await simulator.arm("list_short", value=2, times=0)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = await provider.list_page(cursor)
        assert len(page) <= 2
        seen += [job.provider_job_id for job in page]
        if cursor is None:
            break
    assert seen[:5] == job_ids[::-1]
    assert len(seen) == len(set(seen))
    await simulator.arm("list_error", value=503)
    with pytest.raises(contract.ProviderTrouble, match="503"):
        await provider.list_page(None)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("moderated_later", "output_moderation"),
        ("input_moderated_later", "input_moderation"),
        ("fails_later", "internal_error"),
        ("cancelled_later", "cancelled"),
    ],
)
async def test_a_job_that_fails_tells_why(
    provider: azure_jobs.AzureJobs, fault: str, code: str
) -> None:
    job = await ended(provider, await made(provider, f"A cat. [fault:{fault}]"))
    assert (job.status, job.error_code) == (contract.Status.FAILED, code)
    assert job.outputs == ()


@pytest.mark.parametrize(("fault", "count"), [("", 2), ("[fault:fewer_generations=1]", 1)])
async def test_every_generation_that_came_out_is_an_output(
    provider: azure_jobs.AzureJobs, fault: str, count: int
) -> None:
    job = await ended(provider, await made(provider, f"A cat {uuid.uuid4()} {fault}", variants=2))
    assert (job.progress_percent, len(job.outputs)) == (100, count)
    assert job.expires_at is not None
    films = [await there(provider, output_id) for output_id in job.outputs]
    assert all(content[4:8] == b"ftyp" for content in films)


async def test_a_job_that_runs_has_no_outputs_yet(provider: azure_jobs.AzureJobs) -> None:
    job = await provider.get(await made(provider, f"A cat {uuid.uuid4()} [fault:stuck]"))
    assert job is not None
    assert (job.status, job.outputs) == (contract.Status.RUNNING, ())


async def test_what_is_not_there(provider: azure_jobs.AzureJobs) -> None:
    assert await provider.get("task_unknown") is None
    with pytest.raises(contract.ContentGone):
        await film(provider, "gen_unknown")
    job_id = await made(provider, "A cat. [fault:poll_404*1] [fault:poll_error=500*1]")
    assert await provider.get(job_id) is None
    with pytest.raises(contract.ProviderTrouble, match="500"):
        await provider.get(job_id)
    assert await provider.get(job_id) is not None


async def test_a_cut_film_is_trouble_and_not_a_film(provider: azure_jobs.AzureJobs) -> None:
    job = await ended(provider, await made(provider, "A cat. [fault:content_cut*1]"))
    with pytest.raises(contract.ProviderTrouble, match="RemoteProtocolError"):
        await there(provider, job.outputs[0])
    assert (await there(provider, job.outputs[0]))[4:8] == b"ftyp"


async def test_a_film_from_elsewhere_is_fetched_without_the_key() -> None:
    async with serving(answer("200 OK", "film")) as elsewhere:
        moved = answer("302 Found", "", f"Location: {elsewhere.url}/film")
        async with serving(moved) as first, client(first.url) as provider:
            assert await film(provider, "gen_1") == b"film"
    assert "api-key" in first.requests[0].lower()
    assert "api-key" not in elsewhere.requests[0].lower()


SHOWN = {
    "id": "t",
    "status": "queued",
    "model": "m",
    "prompt": "p",
    "width": 2,
    "height": 4,
    "n_seconds": 1,
    "created_at": 1_763_000_000,
}


@pytest.mark.parametrize(
    ("fields", "readable", "marker"),
    [
        ({}, True, ""),
        ({"prompt": None}, False, ""),
        ({"width": "2"}, False, ""),
        ({"created_at": None}, False, ""),
        ({"inpaint_items": [{"file_name": "a.png"}]}, True, "a.png"),
        ({"inpaint_items": "x"}, True, ""),
        ({"inpaint_items": ["x", {}]}, True, ""),
        ({"status": "painting", "generations": [{"id": "g"}]}, True, ""),
    ],
)
async def test_how_odd_jobs_are_read(fields: dict[str, Any], readable: bool, marker: str) -> None:
    page = {"data": [{**SHOWN, **fields}, {"id": ""}, "x"], "has_more": False}
    async with (
        serving(answer("200 OK", json.dumps(page))) as server,
        client(server.url) as provider,
    ):
        (job,), cursor = await provider.list_page(None)
    assert cursor is None
    assert "limit=100" in server.requests[0]
    assert ((job.fingerprint is not None), job.marker) == (readable, marker)
    assert (job.status, job.outputs) == (contract.Status.RUNNING, ())
