"""What every provider client must do, against the simulator in the part of its server (see provider_worlds)."""

from __future__ import annotations

import asyncio
import resource
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from services.generator import attempts, pools
from services.generator.providers import contract, http
from tests import provider_worlds, simulated
from tests.provider_worlds import DIALECTS, DOCUMENT, FIRST, LISTING, WORLDS, Client, World
from tests.waiting import eventually

PRICED = (
    *("model", "prompt", "size", "seconds", "width", "height", "input_reference", "inpaint_items"),
    *("n_seconds", "n_variants", "files", "promptImage", "promptText", "ratio", "duration"),
)
REFUSED, US, NOT, AMBIGUOUS = (
    contract.RefusedRequest,
    contract.RefusedUs,
    contract.NotAccepted,
    contract.Ambiguous,
)


@pytest.fixture(scope="module")
async def simulator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[simulated.Simulator]:
    async with provider_worlds.simulator(tmp_path_factory.mktemp("simulator")) as started:
        yield started


def each(*worlds: World, always: bool = False) -> pytest.MarkDecorator:
    """Once for each of these worlds; for one that is not the first of its dialect in the long run, unless `always`."""
    marked = [
        pytest.param(
            world, id=world.name, marks=[] if always or world in DIALECTS else [pytest.mark.long]
        )
        for world in worlds
    ]
    return pytest.mark.parametrize("world", marked)


@pytest.fixture
async def client(simulator: simulated.Simulator, world: World) -> AsyncIterator[Client]:
    await simulator.clear()
    async with world.open(simulator.url) as opened:
        yield opened
    await simulator.clear()


def test_every_dialect_and_variant_has_its_world() -> None:
    variants = set(DOCUMENT["dialects"]["openai_videos"]["variants"])
    assert variants | (set(pools.DIALECTS) - {"openai_videos"}) == set(provider_worlds.BY_NAME)


# Building and the whole way


@each(*WORLDS, always=True)
@pytest.mark.parametrize("with_image", [False, True])
async def test_a_job_from_its_beginning_to_its_film(
    client: Client, simulator: simulated.Simulator, with_image: bool
) -> None:
    world, provider = client.world, client.provider
    inputs = FIRST if with_image or world.needs_image else ()
    wanted = world.spec(
        f'Zoë says "hi" & 日本\r\n--framewire-x\n {uuid.uuid4()}',
        input_image_id="a" * 26 if inputs else "",
    )
    body = provider.build(wanted, inputs, "attempt")
    assert body == provider.build(wanted, inputs, "attempt")
    began = datetime.now(UTC) - timedelta(seconds=1)
    outcome = await provider.create(body, None)
    assert isinstance(outcome, contract.Accepted), outcome
    # In a form a lone \n and \r\n are the same, so the log is searched by what is unmistakable.
    (entry,) = await simulator.log(kind="accepted", id=outcome.provider_job_id)
    assert wanted.prompt.split()[-1] in entry["prompt"]
    assert (entry["size"], entry["seconds"], entry["n_variants"]) == ("320x180", "1", 1)
    assert entry["model"] == world.account.models[world.model].upstream
    assert bool(entry["reference_sha256"]) == bool(inputs)

    job = await client.ended(outcome.provider_job_id)
    assert (job.status, job.progress_percent) == (contract.Status.DONE, 100)
    assert began <= job.created_at <= datetime.now(UTC)
    marker = provider.shown_marker(wanted, "attempt")
    if world in LISTING:
        shown = await client.listed(outcome.provider_job_id)
        assert shown.marker == job.marker == marker
        assert shown.fingerprint == provider.shown(wanted)
    (output,) = job.outputs
    assert provider.outputs_are_listed == (output != job.provider_job_id)
    film = await client.there(output)
    assert film[4:8] == b"ftyp"
    assert await client.film(output, start=1000) == film[1000:]


@each(*WORLDS, always=True)
async def test_options_override_nothing(client: Client) -> None:
    world, provider = client.world, client.provider
    wanted = world.spec("a cat")
    bare = provider.build(wanted, FIRST, "a").data
    for name in PRICED:
        if f'"{name}"'.encode() in bare:
            wanted.options[name].string_value = "stolen"
    assert len(wanted.options) >= 4
    assert provider.build(wanted, FIRST, "a").data == bare
    wanted.options["seed"].number_value = 7
    wanted.options["enhance"].bool_value = True
    seeded = provider.build(wanted, FIRST, "a").data
    assert b'"seed": 7' in seeded or b'name="seed"\r\n\r\n7\r\n' in seeded
    assert b'"enhance": true' in seeded or b'name="enhance"\r\n\r\ntrue\r\n' in seeded


# What each answer of a create means

CREATES = [
    ("rate_limited=20", NOT, 0),
    ("rate_limited_date=20", NOT, 0),
    ("rate_limited_bare", NOT, 0),
    ("too_many_tasks", NOT, 0),
    ("out_of_money", US, 0),
    ("moderated_now", REFUSED, 0),
    ("model_gone", US, 0),
    ("unauthorized", US, 0),
    ("redirected", US, 0),
    ("error_before=500", AMBIGUOUS, 0),
    ("error_before=503", AMBIGUOUS, 0),
    ("error_after=502", AMBIGUOUS, 1),
    ("lost_answer", AMBIGUOUS, 1),
    ("garbled", AMBIGUOUS, 1),
    ("flood=4", AMBIGUOUS, 1),
]


@each(*WORLDS)
@pytest.mark.parametrize(("fault", "outcome", "jobs"), CREATES, ids=[c[0] for c in CREATES])
async def test_what_an_answer_of_a_create_means(
    client: Client, simulator: simulated.Simulator, fault: str, outcome: type, jobs: int
) -> None:
    prompt = f"A cat, {uuid.uuid4()} [fault:{fault}]"
    found = await client.create(prompt)
    assert isinstance(found, outcome), found
    assert len(await simulator.accepted(prompt)) == jobs
    if isinstance(found, contract.RefusedRequest):
        assert found.cause == "INPUT_REFUSED"
    if isinstance(found, contract.NotAccepted):
        assert found.limit == ("jobs" if fault == "too_many_tasks" else "requests")
        asked = client.provider.heard().wait_seconds
        if fault == "rate_limited=20":
            assert found.retry_after_seconds == pytest.approx(0.2)
            assert asked is not None
            assert asked <= 0.2
        elif fault.startswith("rate_limited_date"):  # whole seconds, rounded down
            assert 0 <= (found.retry_after_seconds or 0) <= 0.2
        else:
            assert found.retry_after_seconds is asked is None


@each(*DIALECTS)
async def test_a_create_is_over_at_its_timeout(
    simulator: simulated.Simulator, world: World
) -> None:
    prompts = {
        f"A cat, {uuid.uuid4()} [fault:{name}]": name for name in ("hang_before", "hang", "stall")
    }
    began = time.monotonic()
    async with world.open(simulator.url, post_timeout=0.4) as client:
        found = await asyncio.gather(*(client.create(prompt) for prompt in prompts))
    assert time.monotonic() - began < 3
    assert all(isinstance(outcome, contract.Ambiguous) for outcome in found), found
    for prompt, name in prompts.items():
        assert len(await simulator.accepted(prompt)) == (name != "hang_before")


@each(*(world for world in WORLDS if world.asks_for_key))
async def test_a_wrong_key_is_a_refusal_of_us(simulator: simulated.Simulator, world: World) -> None:
    async with world.open(simulator.url, key="wrong") as client:
        outcome = await client.create()
        assert isinstance(outcome, contract.RefusedUs)
        assert "wrong*" not in outcome.message
        with pytest.raises(contract.ProviderTrouble, match="401"):
            await client.provider.get("a")


@each(*DIALECTS)
async def test_a_request_that_cannot_be_made_is_refused(client: Client) -> None:
    outcome = await client.create(width=322, height=10)
    assert isinstance(outcome, contract.RefusedRequest)
    assert outcome.cause == "REQUEST_INVALID"


# Lists


@each(*LISTING)
async def test_the_list_is_read_to_its_end_newest_first(
    client: Client, simulator: simulated.Simulator
) -> None:
    job_ids = [await client.made() for _ in range(5)]
    if client.world.pages:
        await simulator.arm("list_short", value=2, times=0)
    seen: list[str] = []
    cursor: str | None = None
    pages = 0
    while len(seen) < len(job_ids) or pages == 0:
        page, cursor = await client.provider.list_page(cursor)
        assert len(page) <= 2 or not client.world.pages
        seen += [job.provider_job_id for job in page]
        pages += 1
        if cursor is None:
            break
    assert [job_id for job_id in seen if job_id in job_ids] == job_ids[::-1]
    assert len(seen) == len(set(seen))
    assert (cursor is None) == (not client.world.pages)
    await simulator.clear()
    stranger = await client.made(f"A cat, {uuid.uuid4()} [fault:foreign_jobs=2]")
    late = await client.made(f"A cat, {uuid.uuid4()} [fault:list_lag=60]")
    page, _ = await client.provider.list_page(None)
    assert [job.provider_job_id for job in page].index(stranger) == 2
    assert late not in [job.provider_job_id for job in page]
    await simulator.arm("list_error", value=503)
    with pytest.raises(contract.ProviderTrouble, match="503"):
        await client.provider.list_page(None)


@each(*LISTING, always=True)
async def test_the_list_ends(client: Client) -> None:
    await client.made()
    cursor: str | None = None
    for _ in range(30):
        _, cursor = await client.provider.list_page(cursor)
        if cursor is None:
            return
    raise AssertionError("it has no end")


@each(*(world for world in WORLDS if world not in LISTING), always=True)
async def test_where_there_is_no_list_none_is_asked_for(
    client: Client, simulator: simulated.Simulator
) -> None:
    assert not client.provider.has_list
    with pytest.raises(contract.ProviderTrouble, match="no list"):
        await client.provider.list_page(None)
    assert not [e for e in await simulator.log(kind="refused") if e["status"] == 405]


# Jobs


@each(*WORLDS)
async def test_a_job_that_fails_tells_why(client: Client) -> None:
    faults = ("fails_later", "moderated_later", "cancelled_later", "fails_unknown")
    made = [await client.made(f"A cat {uuid.uuid4()} [fault:{fault}]") for fault in faults]
    found = [await client.ended(job_id) for job_id in made]
    assert {job.status for job in found} == {contract.Status.FAILED}
    assert all(job.outputs == () for job in found)
    failed, moderated = client.world.failure_codes
    assert (found[0].error_code, found[1].error_code) == (failed, moderated)
    if not client.world.many_outputs:  # azure_jobs has one word, and no sentence
        assert all(job.error_message for job in (found[0], found[1], found[3]))
    # Only Runway charges for what its moderation stopped.
    assert [job.billed for job in found] == [False, client.world.name == "runway", False, False]


@each(*WORLDS)
async def test_what_single_questions_answer(client: Client) -> None:
    provider = client.provider
    assert await provider.get("a/b+c==") is None
    faults = "[fault:poll_404*1] [fault:poll_error=500*1] [fault:poll_rate_limited=20*1]"
    more = "[fault:poll_garbled*1] [fault:poll_flood=20*1] [fault:poll_word*1] [fault:stuck]"
    job_id = await client.made(f"A cat {uuid.uuid4()} {faults} {more}")
    assert await provider.get(job_id) is None
    with pytest.raises(contract.ProviderTrouble, match="500"):
        await provider.get(job_id)
    provider.heard()
    with pytest.raises(contract.ProviderTrouble, match="429") as caught:
        await provider.get(job_id)
    assert caught.value.retry_after_seconds == pytest.approx(0.2)
    assert (provider.heard().wait_seconds or 1) <= 0.2
    for _ in ("garbled", "flood"):
        with pytest.raises(contract.ProviderTrouble, match="200"):
            await provider.get(job_id)
    for _ in ("a word of no list", "itself"):
        job = await provider.get(job_id)
        assert job is not None
        assert (job.status, job.outputs) == (contract.Status.RUNNING, ())


@each(*DIALECTS)
async def test_a_job_that_goes_back_is_still_running(client: Client) -> None:
    job_id = await client.made(f"A cat {uuid.uuid4()} [fault:regresses] [fault:clock_skew=7200]")
    job = await client.ended(job_id)
    assert job.status is contract.Status.DONE
    assert job.created_at < datetime.now(UTC) - timedelta(seconds=7100)
    waiting = await client.provider.get(await client.made("A cat [fault:stuck_queued]"))
    assert waiting is not None
    assert (waiting.status, waiting.progress_percent) == (contract.Status.RUNNING, 0)


@each(*WORLDS, always=True)
async def test_cancelling_stops_what_runs_and_destroys_nothing_paid(
    client: Client, simulator: simulated.Simulator
) -> None:
    provider = client.provider
    stops = client.world.account.cancel == "delete_aborts"
    running = await client.made(f"A cat {uuid.uuid4()} [fault:stuck]")
    assert await provider.cancel(running) is stops
    assert (await provider.get(running) is None) is stops
    billing = (await simulator.http.get("/_sim/billing")).json()["billing"]
    billed = {entry["id"]: entry["billed_micros"] for entry in billing}
    assert (billed[running] == 0) is stops
    done = await client.ended(await client.made())
    assert not await provider.cancel(done.provider_job_id)
    assert (await client.there(done.outputs[0]))[4:8] == b"ftyp"
    assert not await provider.cancel("unknown")


# Films


@each(*WORLDS)
async def test_films_that_do_not_come_whole(client: Client) -> None:
    faults = "[fault:content_403*1] [fault:content_cut*1] [fault:content_cut_chunks*1]"
    late = "[fault:content_404=100] [fault:content_type*1]"
    job = await client.ended(await client.made(f"A cat {uuid.uuid4()} {faults} {late}"))
    (output,) = job.outputs
    with pytest.raises(contract.ContentGone):
        await client.film(output)

    async def trouble() -> str:
        try:
            await client.film(output)
        except contract.ContentGone:
            return ""  # not there yet
        except contract.ProviderTrouble as error:
            return str(error)
        raise AssertionError("it was whole")

    assert "403" in await eventually(trouble)
    for _ in ("its length", "its last chunk"):
        assert "RemoteProtocolError" in await eventually(trouble)
    film = await client.film(output)  # whatever it is called: storage looks at the bytes
    assert film[4:8] == b"ftyp"
    assert await client.film(output, start=len(film) - 1) == film[-1:]
    with pytest.raises(contract.ProviderTrouble):
        await client.film(output, start=len(film) + 10)


@each(*WORLDS)
async def test_content_that_is_not_there(client: Client, simulator: simulated.Simulator) -> None:
    running = await client.made(f"A cat {uuid.uuid4()} [fault:stuck]")
    unknown = {
        "azure_jobs": "gen_unknown",
        "runway": f"{simulator.url}/nowhere.mp4",
    }.get(client.world.name, running)
    with pytest.raises(contract.ContentGone):
        await client.film(unknown)


@each(*DIALECTS)
async def test_a_film_that_drips_is_given_up(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PATIENCE_SECONDS", 0.5)
    job = await client.ended(await client.made(f"A cat {uuid.uuid4()} [fault:content_drip*1]"))
    with pytest.raises(contract.ProviderTrouble, match="drips: 2 bytes"):
        await client.there(job.outputs[0])
    assert (await client.there(job.outputs[0]))[4:8] == b"ftyp"


# Memory


@each(*DIALECTS)
async def test_a_gigabyte_of_json_fills_no_memory(client: Client) -> None:
    def peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    flood = "[fault:flood=1000*1]"
    await client.create(f"A cat {uuid.uuid4()}")  # what a first request loads
    before = peak_bytes()
    assert isinstance(await client.create(f"A cat {uuid.uuid4()} {flood}"), contract.Ambiguous)
    job_id = await client.made(f"A cat {uuid.uuid4()} [fault:poll_flood=1000*1]")
    with pytest.raises(contract.ProviderTrouble, match="200"):
        await client.provider.get(job_id)
    assert peak_bytes() - before < 64 * 2**20


@each(*DIALECTS)
async def test_a_marker_is_the_attempts_and_nobody_elses(client: Client) -> None:
    spec = client.world.spec(input_image_id="a" * 26)
    marker = client.provider.shown_marker(spec, "attempt-7")
    one, other = (client.provider.build(spec, FIRST, f"attempt-{n}").data for n in (7, 8))
    if marker:
        assert marker == attempts.marker("attempt-7")
        assert marker.encode() in one
        assert one != other
    assert client.provider.build(spec, FIRST, "attempt-7").data == one
