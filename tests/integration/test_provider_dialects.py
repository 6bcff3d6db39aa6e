"""What is a dialect's or a server's alone; what all have in common is in test_provider_conformance and _wire."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from email import message_from_bytes
from email.message import Message

import pytest

from services.generator import attempts, variants
from services.generator.providers import contract
from tests import provider_worlds, simulated
from tests.provider_worlds import BY_NAME, FIRST, IMAGE, answer, serving


@pytest.fixture(scope="module")
async def simulator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[simulated.Simulator]:
    folder = tmp_path_factory.mktemp("simulator")
    limits = {"azure_max_concurrent_jobs": 2, "runway_max_concurrent_tasks": 2}
    async with provider_worlds.simulator(
        folder, quirks="flat_errors", api_keys=f"{simulated.KEY},second,third", **limits
    ) as started:
        yield started


def form(body: contract.Body) -> dict[str, Message]:
    """The parts of a multipart body by name."""
    head = f"Content-Type: {body.content_type}\r\n\r\n".encode()
    parts = message_from_bytes(head + body.data).get_payload()
    assert isinstance(parts, list)
    return {str(part.get_param("name", header="content-disposition")): part for part in parts}


# azure_jobs


async def test_an_image_job_shows_its_name_again_and_a_text_job_has_none(
    simulator: simulated.Simulator,
) -> None:
    async with BY_NAME["azure_jobs"].open(simulator.url) as client:
        provider = client.provider
        wanted = client.world.spec(input_image_id="a" * 26)
        outcome = await provider.create(provider.build(wanted, FIRST, "attempt-7"), None)
        assert isinstance(outcome, contract.Accepted)
        job = await client.listed(outcome.provider_job_id)
        assert (
            job.marker == provider.shown_marker(wanted, "attempt-7") == attempts.marker("attempt-7")
        )
        assert provider.shown_marker(client.world.spec(), "attempt-7") == ""
        text = await client.made()
        assert (await client.listed(text)).marker == ""


@pytest.mark.parametrize("items", ["x", ["x", {}], [{"file_name": 0}]])
async def test_odd_items_have_no_marker(items: object) -> None:
    shown = {"id": "t", "status": "succeeded", "generations": [{"id": "g"}, {}, 7, {"id": "h"}]}
    body = answer("200 OK", json.dumps({**shown, "inpaint_items": items}))
    async with serving(body) as server, BY_NAME["azure_jobs"].open(server.url) as client:
        job = await client.provider.get("t")
    assert job is not None
    assert (job.marker, job.outputs) == ("", ("g", "h"))


@pytest.mark.parametrize(("fault", "count"), [("", 2), ("[fault:fewer_generations=1]", 1)])
async def test_every_generation_that_came_out_is_an_output(
    simulator: simulated.Simulator, fault: str, count: int
) -> None:
    async with BY_NAME["azure_jobs"].open(simulator.url, key="second") as client:
        job = await client.ended(await client.made(f"A cat {uuid.uuid4()} {fault}", variants=2))
        assert (job.progress_percent, len(job.outputs)) == (100, count)
        assert job.expires_at is not None
        films = [await client.there(output_id) for output_id in job.outputs]
    assert all(content[4:8] == b"ftyp" for content in films)
    assert len(set(films)) == count


async def test_a_third_job_at_once_is_not_accepted_flat_as_it_is_said(
    simulator: simulated.Simulator,
) -> None:
    async with BY_NAME["azure_jobs"].open(simulator.url, key="third") as client:
        for _ in range(2):
            await client.made(f"A cat {uuid.uuid4()} [fault:stuck]")
        found = await client.create()
        assert isinstance(found, contract.NotAccepted)
        assert (found.message, found.limit) == ("Too many running tasks", "jobs")
        blocked = await client.create("A cat [fault:moderated_now]")
    assert isinstance(blocked, contract.RefusedRequest)
    assert blocked.cause == "INPUT_REFUSED"


# openai_videos: what each server is sent


async def test_the_bodies_of_the_variants() -> None:
    async def body(name: str, *inputs: contract.Input) -> contract.Body:
        async with BY_NAME[name].open("http://x/v1") as client:
            return client.provider.build(client.world.spec("a cat"), inputs, "a")

    plain = form(await body("openai", *FIRST))
    assert plain["input_reference"].get_payload(decode=True) == IMAGE
    assert (plain["size"].get_payload(), plain["seconds"].get_payload()) == ("320x180", "1")
    sglang = json.loads((await body("sglang")).data)
    assert sglang == {"model": "sora-2", "prompt": "a cat", "size": "320x180", "seconds": 1}
    assert "input_reference" in form(await body("sglang", *FIRST))
    reseller = json.loads((await body("reseller", *FIRST)).data)
    assert (reseller["width"], reseller["height"], reseller["seconds"]) == (320, 180, "1")
    assert reseller["input_reference"]["image_url"].startswith("data:image/jpeg;base64,")
    assert "size" not in reseller


async def test_an_object_in_a_form() -> None:
    """What the official SDK makes of a reference that is no file."""
    world = BY_NAME["openai"]
    variant = variants.parse({"image": "object", "api_version": "preview"})
    created = answer("200 OK", '{"id": "v"}')
    async with serving(created) as server, world.open(server.url, variant=variant) as client:
        parts = form(client.provider.build(world.spec(), FIRST, "a"))
        assert isinstance(await client.create(), contract.Accepted)
    assert str(parts["input_reference[image_url]"].get_payload()).startswith("data:image/jpeg")
    assert server.requests[0].startswith("POST /v1/videos?api-version=preview ")


async def test_an_image_of_another_size_is_a_refusal_of_the_request(
    simulator: simulated.Simulator,
) -> None:
    async with BY_NAME["openai"].open(simulator.url) as client:
        outcome = await client.create(image=IMAGE, width=180, height=320)
    assert isinstance(outcome, contract.RefusedRequest)
    assert outcome.cause == "REQUEST_INVALID"
    assert "Inpaint image must match" in outcome.message


# runway


async def test_what_is_over_the_limit_waits_its_turn(simulator: simulated.Simulator) -> None:
    async with BY_NAME["runway"].open(simulator.url) as client:
        running = [await client.made(f"A cat {uuid.uuid4()}", seconds=10) for _ in range(2)]
        third = await client.made(f"A cat {uuid.uuid4()}")
        headers = {"authorization": f"Bearer {simulated.KEY}", "x-runway-version": "2024-11-06"}
        shown = (await simulator.http.get(f"/v1/tasks/{third}", headers=headers)).json()
        seen_at = time.time()
        first, _, ours = [
            (await simulator.log(kind="accepted", id=task))[0] for task in (*running, third)
        ]
        # Taken, and not begun before one of the two is over.
        assert ours["throttled_until"] == first["due_at"]
        assert ours["starts_at"] >= first["due_at"]
        if seen_at < first["due_at"]:
            assert shown["status"] == "THROTTLED"
        job = await client.ended(third)
        assert job.status is contract.Status.DONE


async def test_a_signed_address_dies_and_the_next_question_brings_a_fresh_one(
    simulator: simulated.Simulator,
) -> None:
    async with BY_NAME["runway"].open(simulator.url, key="second") as client:
        task = await client.made(f"A cat {uuid.uuid4()}")
        (first,) = (await client.ended(task)).outputs
        assert (await client.there(first))[4:8] == b"ftyp"
        await simulator.arm("url_expired")
        (dead,) = (await client.ended(task)).outputs
        with pytest.raises(contract.ProviderTrouble, match="403"):
            await client.film(dead)
        (fresh,) = (await client.ended(task)).outputs
        assert (await client.film(fresh)) == await client.film(first)
        with pytest.raises(contract.ProviderTrouble, match="403"):
            await client.film(fresh.replace("signature=", "signature=0"))


@pytest.mark.parametrize(
    ("fault", "code", "billed"),
    [
        ("input_moderated_later", "SAFETY.INPUT.IMAGE", True),
        ("prompt_moderated_later", "INPUT_PREPROCESSING.SAFETY.TEXT", False),
        ("input_breaks_later", "INPUT_PREPROCESSING.INTERNAL", False),
        ("input_invalid_later", "ASSET.INVALID", False),
        ("third_party_later", "THIRD_PARTY.UNAVAILABLE", False),
        ("fails_unknown", "", False),
    ],
)
async def test_every_failure_of_a_task(
    simulator: simulated.Simulator, fault: str, code: str, billed: bool
) -> None:
    async with BY_NAME["runway"].open(simulator.url, key="third") as client:
        task = await client.made(f"A cat {uuid.uuid4()} [fault:{fault}]")
        job = await client.ended(task)
    assert (job.status, job.error_code, job.billed) == (contract.Status.FAILED, code, billed)
    billing = (await simulator.http.get("/_sim/billing")).json()["billing"]
    (entry,) = [entry for entry in billing if entry["id"] == task]
    assert (entry["billed_micros"] > 0) is billed


async def test_text_has_a_place_of_its_own() -> None:
    async with BY_NAME["runway"].open("http://x/v1") as client:
        spec = client.world.spec("a cat")
        body = client.provider.build(spec, (), "a")
        with_image = client.provider.build(spec, FIRST, "a")
    assert (body.path, with_image.path) == ("/text_to_video", "/image_to_video")
    assert json.loads(body.data) == {
        "model": "gen4_turbo",
        "promptText": "a cat",
        "ratio": "320:180",
        "duration": 1,
    }
