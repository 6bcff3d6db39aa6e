"""Every fault of the simulator, in both dialects."""

import asyncio
import pathlib
import random
import re
import time

import av.error
import httpx
import pytest

from services.simulator import faults
from tests import simulators
from tests.simulators import Client, Simulator, decoded, eventually

# The stand-in's own faults; what the product makes of them is tested with the providers, in every run.
pytestmark = pytest.mark.long

simulator = simulators.simulator
no_rules_left = simulators.no_rules_left


@pytest.fixture(params=["openai_videos", "azure_jobs"])
def client(simulator: Simulator, request: pytest.FixtureRequest) -> Client:
    return simulator.client(request.param)


@pytest.mark.parametrize(
    ("name", "status", "jobs"),
    [
        ("unauthorized", 401, 0),
        ("rate_limited=300", 429, 0),
        ("rate_limited_bare", 429, 0),
        ("too_many_tasks", 429, 0),
        ("model_gone", 404, 0),
        ("error_before=503", 503, 0),
        ("error_after", 500, 1),
        ("poll_404", 200, 1),
    ],
)
async def test_creation_answers_wrongly_once(
    simulator: Simulator, client: Client, name: str, status: int, jobs: int
) -> None:
    prompt = f"{client.dialect} wrong once [fault:{name}]"
    answer = await client.create(prompt)
    assert answer.status_code == status
    assert len(await simulator.accepted(prompt)) == jobs
    if status == 429:
        waits = (answer.headers.get("retry-after"), answer.headers.get("retry-after-ms"))
        assert waits == (("3", "3000") if "=" in name else (None, None))
    again = await client.create(prompt)
    assert again.status_code == 200
    entries = await simulator.accepted(prompt)
    assert [entry["dialect"] for entry in entries] == [client.dialect] * (jobs + 1)
    if name != "poll_404":
        assert len(await simulator.log(kind="fault", prompt=prompt)) == 1


async def test_moderation_now_is_for_ever(client: Client) -> None:
    for _ in range(2):
        answer = await client.create("[fault:moderated_now]")
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("The request is blocked by our")


async def test_unauthorized_for_a_while(client: Client) -> None:
    job_id = await client.made("before the key is refused")
    prompt = f"{client.dialect} [fault:unauthorized=40]"
    assert (await client.create(prompt)).status_code == 401
    assert (await client.get(job_id)).status_code == 401
    await client.until(f"{client.jobs_path}/{job_id}", 200)


async def test_lost_answer_leaves_a_job(simulator: Simulator, client: Client) -> None:
    prompt = f"{client.dialect} lost [fault:lost_answer]"
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await client.create(prompt)
    assert len(await simulator.accepted(prompt)) == 1
    assert (await client.create(prompt)).status_code == 200


@pytest.mark.parametrize(("name", "jobs"), [("hang", 1), ("hang_before", 0)])
async def test_hang_until_the_client_gives_up(
    simulator: Simulator, client: Client, name: str, jobs: int
) -> None:
    prompt = f"{client.dialect} [fault:{name}]"
    with pytest.raises(httpx.ReadTimeout):
        await client.post({"prompt": prompt, **client.tiny}, timeout=0.25)
    assert len(await simulator.accepted(prompt)) == jobs


async def test_jobs_end_badly_later(simulator: Simulator, client: Client) -> None:
    wanted = {
        "moderated_later": ("moderation_blocked", "output_moderation"),
        "input_moderated_later": ("moderation_blocked", "input_moderation"),
        "fails_later": ("internal_error", "internal_error"),
        "fails_unknown": ("solar_flare", "solar_flare"),
        "cancelled_later": (None, None),
    }
    made = {name: await client.made(f"{client.dialect} [fault:{name}]") for name in wanted}
    for name, job_id in made.items():
        job = await client.ended(job_id)
        assert job["status"] == ("cancelled" if name == "cancelled_later" else "failed")
        assert client.failure(job) == wanted[name][client.dialect == "azure_jobs"]
        (entry,) = await simulator.accepted(f"{client.dialect} [fault:{name}]")
        assert entry["billed_micros"] == 0
    answer = await simulator.videos.content(made["fails_later"])
    assert answer.status_code == 404


async def test_stuck_job_never_ends(client: Client) -> None:
    stuck, control = await client.made("[fault:stuck]"), await client.made("control")
    await client.ended(control)
    job = (await client.get(stuck)).json()
    assert job["status"] in ("in_progress", "processing")


@pytest.mark.parametrize(("name", "status"), [("poll_404=2", 404), ("poll_error=502*2", 502)])
async def test_polls_go_wrong(client: Client, name: str, status: int) -> None:
    job_id = await client.made(f"[fault:{name}]")
    assert [(await client.get(job_id)).status_code for _ in range(3)] == [status, status, 200]


async def test_content_goes_wrong(client: Client) -> None:
    names = ("403", "html", "empty", "cut", "corrupt")
    job_id = await client.made("".join(f"[fault:content_{name}]" for name in names))
    await client.until(await client.content_path(job_id), 403)
    page, empty = await client.content(job_id), await client.content(job_id)
    assert (page.status_code, page.headers["content-type"][:9]) == (200, "text/html")
    assert (empty.status_code, empty.content) == (200, b"")
    with pytest.raises(httpx.RemoteProtocolError):
        await client.content(job_id)
    # Looking at the headers alone uses no fault up.
    head = await client.call("HEAD", await client.content_path(job_id))
    corrupt = await client.content(job_id)
    assert int(head.headers["content-length"]) == len(corrupt.content)
    with pytest.raises(av.error.FFmpegError):
        decoded(corrupt.content)
    whole = await client.content(job_id)
    assert len(whole.content) == len(corrupt.content)
    decoded(whole.content)


async def test_content_comes_late(client: Client) -> None:
    job_id = await client.made("[fault:content_404=40]")
    await client.ended(job_id)
    since = time.monotonic()
    assert (await client.content(job_id)).status_code == 404
    await client.film(job_id)
    assert time.monotonic() - since > 0.15


async def test_lists_lag_drop_shorten_and_fail(simulator: Simulator, client: Client) -> None:
    lagging = await client.made("[fault:list_lag=60]")
    dropped = await client.made("[fault:list_drop]")
    plain = await client.made("plain")
    first = {job["id"] for job in await client.listed(limit=20)}
    assert first & {lagging, dropped, plain} == {plain}
    second = {job["id"] for job in await client.listed(limit=20)}
    assert second & {dropped, plain} == {dropped, plain}

    async def shown() -> bool:
        return lagging in {job["id"] for job in await client.listed()}

    await eventually(shown)
    await simulator.arm(name="list_lag", value=6000, match="plain")
    assert plain not in {job["id"] for job in await client.listed(limit=20)}
    await simulator.arm(name="list_drop", value=1)
    assert await client.listed() == []
    await client.made("[fault:list_error=503]")
    assert (await client.call("GET", client.jobs_path)).status_code == 503
    await client.made("[fault:list_short=1]")
    assert [len(await client.listed()) for _ in range(2)] == [1, 1]


async def test_strangers_in_the_list(simulator: Simulator, client: Client) -> None:
    prompt = f"{client.dialect} mine [fault:twin_job]"
    mine = await client.made(prompt)
    twins = [job for job in await client.listed(limit=10) if job["prompt"] == prompt]
    assert len(twins) == 2
    same = set(client.tiny) | {"model"}
    assert len({tuple(job[name] for name in sorted(same)) for job in twins}) == 1
    assert [entry["id"] for entry in await simulator.accepted(prompt)] == [mine]
    before = len(await simulator.log(kind="foreign", prompt="A stranger's film"))
    await simulator.arm(name="foreign_jobs", value=2)
    newest = await client.listed(limit=2)
    assert all(job["prompt"].startswith("A stranger's film") for job in newest)
    strangers = await simulator.log(kind="foreign", prompt="A stranger's film")
    assert [entry["dialect"] for entry in strangers[before:]] == [client.dialect] * 2


@pytest.mark.parametrize("left", [2, 0])
async def test_fewer_generations_come_out(simulator: Simulator, left: int) -> None:
    prompt = f"[fault:fewer_generations={left}] of three"
    job = await simulator.jobs.ended(await simulator.jobs.made(prompt, n_variants=3))
    assert (job["status"], job["n_variants"], len(job["generations"])) == ("succeeded", 3, left)
    (entry,) = await simulator.accepted(prompt)
    assert (entry["n_variants"], entry["billed_micros"]) == (3, left * 100_000)
    lost = entry["generation_ids"][left]
    assert (await simulator.jobs.call("GET", f"{simulators.AZURE}/{lost}")).status_code == 404


async def test_rules_match_count_and_draw_by_seed(simulator: Simulator, client: Client) -> None:
    await simulator.arm(name="error_before", match="some of these", probability=0.5, times=0)
    await simulator.arm(name="rate_limited_bare", match="twice", times=2)
    drawn = [(await client.create("some of these")).status_code for _ in range(12)]
    rule = (await simulator.http.get("/_sim/faults")).json()["faults"][0]
    wanted = [random.Random(f"0:{rule['id']}:{n}").random() < 0.5 for n in range(12)]
    assert [status == 500 for status in drawn] == wanted
    assert rule["strikes"] == sum(wanted)
    counted = [(await client.create("twice")).status_code for _ in range(3)]
    assert counted == [429, 429, 200]
    await simulator.http.delete("/_sim/faults")
    assert (await client.create("some of these")).status_code == 200
    for bad in ({"name": "x"}, {"name": "hang", "tmes": 1}, {"name": "hang", "times": -1}, []):
        assert (await simulator.http.post("/_sim/faults", json=bad)).status_code == 400


async def test_idempotency_key_makes_one_job(simulator: Simulator, client: Client) -> None:
    headers = {"idempotency-key": "once"}
    prompt = f"keyed {client.dialect}"
    body = {"prompt": prompt, **client.tiny}
    answers = await asyncio.gather(*(client.post(body, headers=headers) for _ in range(8)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(await simulator.accepted(prompt)) == 1
    other = await client.post({**body, "prompt": f"{prompt} again"}, headers=headers)
    assert other.status_code == 409


def test_every_fault_is_documented_and_tested() -> None:
    """By name: a fault that is in no table row or in no test is a defect."""
    rows = re.findall(r"^\| ([a-z0-9_]+) +\|", faults.__doc__ or "", re.MULTILINE)
    assert set(rows) - {"name"} == set(faults.DEFAULT_VALUES)
    here = pathlib.Path(__file__)
    # What only a client can tell the sense of is tested with the clients.
    others = (
        "test_provider_conformance.py",
        "test_provider_dialects.py",
        "test_generator_webhooks.py",
    )
    sources = [path.read_text() for path in (here, *(here.with_name(name) for name in others))]
    source = "".join(sources).replace('"content_{name}', "")
    spelt = {f"content_{name}" for name in ("403", "html", "empty", "cut", "corrupt")}
    spelt |= {"webhook_forged", "webhook_lost"}
    assert not [name for name in set(rows) - {"name"} - spelt if name not in source]
