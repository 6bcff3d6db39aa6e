"""What every provider client does on the wire, at servers that are stranger than the simulator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import pytest

from services.generator.providers import contract, http
from tests import simulated
from tests.provider_worlds import BY_NAME, DIALECTS, World, answer, serving

REFUSED, US, NOT, AMBIGUOUS, YES = (
    contract.RefusedRequest,
    contract.RefusedUs,
    contract.NotAccepted,
    contract.Ambiguous,
    contract.Accepted,
)
each = pytest.mark.parametrize("world", DIALECTS, ids=lambda world: world.name)
CREATED = answer("200 OK", '{"id": "job_1"}')


@each
async def test_a_create_uses_a_connection_once_and_retries_nothing(world: World) -> None:
    busy = answer("503 Busy", "{}", "Retry-After: 0")
    async with serving(busy) as server, world.open(server.url) as client:
        for _ in range(3):
            assert isinstance(await client.create(), contract.Ambiguous)
    assert server.connections == len(server.requests) == 3
    for request in server.requests:
        head = request.lower()
        assert "connection: close" in head
        # A few bytes of a compressed answer can be a gigabyte.
        assert "accept-encoding: identity\r\n" in head
        assert "idempotency-key" not in head


@each
async def test_an_idempotency_key_is_sent_where_there_is_one(world: World) -> None:
    async with serving(CREATED) as server, world.open(server.url) as client:
        body = client.provider.build(world.spec(), (), "a")
        assert await client.provider.create(body, "the-key") == contract.Accepted("job_1")
    assert "idempotency-key: the-key" in server.requests[0].lower()


@pytest.mark.parametrize(
    ("name", "line", "key"),
    [
        ("openai", "post /v1/videos ", f"authorization: bearer {simulated.KEY}"),
        ("azure_v1", "post /v1/videos ", f"api-key: {simulated.KEY}"),
        ("vllm_omni", "post /v1/videos ", ""),
        (
            "azure_jobs",
            "post /v1/video/generations/jobs?api-version=preview ",
            f"api-key: {simulated.KEY}",
        ),
        (
            "runway",
            "post /v1/image_to_video ",
            f"authorization: bearer {simulated.KEY}\r\nx-runway-version: 2024-11-06",
        ),
    ],
)
async def test_the_place_and_the_key(name: str, line: str, key: str) -> None:
    async with serving(CREATED) as server, BY_NAME[name].open(server.url) as client:
        assert await client.create() == contract.Accepted("job_1")
    head = server.requests[0].lower()
    assert head.startswith(line)
    assert key in head
    assert (head.count("authorization:"), head.count("api-key:")) == (
        key.count("authorization:"),
        key.count("api-key:"),
    )


@each
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
async def test_a_redirect_of_a_create_is_not_followed(world: World, status: str) -> None:
    async with serving(CREATED) as second:
        moved = answer(status, "", f"Location: {second.url}/videos")
        async with serving(moved) as first, world.open(first.url) as client:
            assert isinstance(await client.create(), contract.RefusedUs)
        assert len(first.requests) == 1
        assert second.requests == []


@each
async def test_a_refused_connection_is_not_accepted(world: World) -> None:
    async with serving(CREATED) as server:
        url = server.url
    async with world.open(url) as client:
        assert isinstance(await client.create(), contract.NotAccepted)
        with pytest.raises(contract.ProviderTrouble):
            await client.provider.get("job_1")


@each
async def test_a_create_is_over_at_its_timeout_though_bytes_trickle(world: World) -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: y\r\n")
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.05)

    began = time.monotonic()
    async with serving(trickle) as server, world.open(server.url, post_timeout=0.3) as client:
        assert isinstance(await client.create(), contract.Ambiguous)
    assert time.monotonic() - began < 2


@each
async def test_a_question_is_over_though_bytes_trickle(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{")
        while True:
            writer.write(b" ")
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.05)

    monkeypatch.setattr(http, "READ_SECONDS", 0.3)
    async with serving(trickle) as server, world.open(server.url) as client:
        with pytest.raises(contract.ProviderTrouble, match="Timeout"):
            await client.provider.get("job_1")


ODD = [
    ("201 Created", '{"id": "a/b+c=="}', YES),
    ("202 Accepted", '{"id": "video_1"}', YES),
    ("200 OK", "{}", AMBIGUOUS),
    ("200 OK", "", AMBIGUOUS),
    ("200 OK", "<html>", AMBIGUOUS),
    ("200 OK", "[" * 100_000, AMBIGUOUS),
    ("200 OK", '{"id": 7}', AMBIGUOUS),
    ("200 OK", '{"id": "a\\u0000b"}', AMBIGUOUS),
    ("204 No Content", "", AMBIGUOUS),
    ("400 Bad", '{"error": {"message": "a\\u0000b\\ud800c", "code": 7}}', REFUSED),
    ("400 Bad", '{"detail": "content policy"}', REFUSED),
    ("422 Bad", '{"detail": [{"loc": []}]}', REFUSED),
    ("429 Busy", '{"error": "insufficient_quota"}', US),
    ("418 Teapot", "", AMBIGUOUS),
    ("garbage", "", AMBIGUOUS),
]


@each
@pytest.mark.parametrize(("status", "body", "outcome"), ODD)
async def test_odd_answers_of_a_create(world: World, status: str, body: str, outcome: type) -> None:
    async with serving(answer(status, body)) as server, world.open(server.url) as client:
        found = await client.create()
    assert isinstance(found, outcome), found
    if isinstance(found, contract.RefusedRequest):
        found.message.encode()
        assert "\x00" not in found.message
        assert found.cause == ("INPUT_REFUSED" if "policy" in body else "REQUEST_INVALID")


ERRORS = [
    (400, "blocked by our moderation system", REFUSED),
    (400, "Invalid value: '9'.", REFUSED),
    (401, "Incorrect API key", US),
    (404, "Resource not found", US),
    (429, "Too many running tasks", NOT),
    (429, "Try again in 60 seconds.", NOT),
    (500, "oops", AMBIGUOUS),
]
ENVELOPES = {
    "wrapped": lambda text: {"error": {"message": text, "type": "t", "param": None, "code": None}},
    "flat": lambda text: {"message": text, "code": None, "inner_error": {"code": "x"}},
    "text": lambda text: {"error": text},
    "detail": lambda text: {"detail": text},
}


@each
@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize(("status", "message", "outcome"), ERRORS)
async def test_every_envelope_of_errors(
    world: World, status: int, message: str, outcome: type, envelope: str
) -> None:
    body = json.dumps(ENVELOPES[envelope](message))
    async with serving(answer(f"{status} X", body)) as server, world.open(server.url) as client:
        found = await client.create()
        with contextlib.suppress(contract.ProviderTrouble):
            assert await client.provider.get("job_1") is None
    assert isinstance(found, outcome), found
    assert not isinstance(found, contract.Accepted)
    assert message in found.message


@each
async def test_what_the_headers_say_of_the_quota(world: World) -> None:
    headers = ("x-ratelimit-limit-requests: 60", "x-ratelimit-remaining-requests: 7")
    more = ("x-ratelimit-reset-requests: 1m30s", "openai-poll-after-ms: 2500", "Retry-After: 9")
    busy = answer("429 Busy", "{}", *headers, *more)
    async with serving(busy) as server, world.open(server.url) as client:
        assert isinstance(await client.create(), contract.NotAccepted)
        said = client.provider.heard()
        assert client.provider.heard() == contract.Limits()
    assert (said.requests_limit, said.requests_remaining) == (60, 7)
    assert said.reset_seconds == pytest.approx(90, abs=3)
    assert said.poll_after_seconds == pytest.approx(2.5, abs=2)
    assert said.wait_seconds == pytest.approx(9, abs=3)


# Jobs and lists

SHOWN = {"id": "v", "model": "m", "prompt": "p", "created_at": 1_763_000_000}
OF_DIALECT: dict[str, dict[str, Any]] = {
    "openai": {**SHOWN, "size": "2x4", "seconds": "3", "progress": float("nan")},
    "azure_jobs": {**SHOWN, "width": 2, "height": 4, "n_seconds": 1},
    "runway": {"id": "v", "createdAt": "2026-11-20T10:00:00.000Z", "progress": "half"},
}


@each
@pytest.mark.parametrize(
    ("status", "fields", "found"),
    [
        ("200 OK", {"status": "preparing the paint"}, contract.Status.RUNNING),
        ("200 OK", {"status": "queued", "error": []}, contract.Status.RUNNING),
        ("500 Oops", {"status": "failed", "error": "text"}, contract.Status.FAILED),
        ("404 Gone", {"status": "cancelled"}, contract.Status.FAILED),
        ("500 Oops", {"id": "err_1", "status": 500, "title": "oops"}, None),
        ("502 Bad", {"id": "x", "status": "in_progress"}, None),
        ("200 OK", {"id": "", "status": "queued"}, None),
    ],
)
async def test_what_a_job_is_and_what_is_only_trouble(
    world: World, status: str, fields: dict[str, Any], found: contract.Status | None
) -> None:
    body = json.dumps({**OF_DIALECT[world.name], **fields})
    async with serving(answer(status, body)) as server, world.open(server.url) as client:
        if found is None:
            with pytest.raises(contract.ProviderTrouble):
                await client.provider.get("v")
        else:
            job = await client.provider.get("a/b+c")
            assert job is not None
            assert (job.status, job.progress_percent, job.outputs) == (found, 0, ())
            assert "/a%2Fb%2Bc" in server.requests[0]


def test_every_dialect_is_told_how_its_jobs_look() -> None:
    assert set(OF_DIALECT) == {world.name for world in DIALECTS}


@pytest.mark.parametrize("name", ["openai", "azure_jobs"])
async def test_a_list_that_promises_more_and_shows_nothing_proves_nothing(name: str) -> None:
    for page in ({"data": [], "has_more": True}, {"data": {}}, []):
        body = answer("200 OK", json.dumps(page))
        async with serving(body) as server, BY_NAME[name].open(server.url) as client:
            with pytest.raises(contract.ProviderTrouble):
                await client.provider.list_page(None)


@pytest.mark.parametrize(
    ("name", "fields", "readable"),
    [
        ("openai", {}, True),
        ("openai", {"seconds": 3}, True),
        ("openai", {"seconds": None, "duration": 3.0}, True),
        ("openai", {"prompt": None}, False),
        ("openai", {"size": "huge"}, False),
        ("openai", {"seconds": "x"}, False),
        ("openai", {"created_at": None}, False),
        ("openai", {"created_at": 1e18}, False),
        ("azure_jobs", {}, True),
        ("azure_jobs", {"prompt": None}, False),
        ("azure_jobs", {"width": "2"}, False),
        ("azure_jobs", {"created_at": None}, False),
    ],
)
async def test_a_job_that_shows_too_little_has_no_fingerprint(
    name: str, fields: dict[str, Any], readable: bool
) -> None:
    item = {**OF_DIALECT[name], "status": "queued", **fields}
    page = {"data": [item, {"id": ""}, "x"], "has_more": False}
    body = answer("200 OK", json.dumps(page))
    async with serving(body) as server, BY_NAME[name].open(server.url) as client:
        (job,), cursor = await client.provider.list_page(None)
    assert cursor is None
    assert "limit=100" in server.requests[0]
    assert (job.fingerprint is not None) == readable


# Films


def output(world: World, server_url: str) -> str:
    return f"{server_url}/film" if world.name == "runway" else "out_1"


@each
async def test_a_film_from_elsewhere_is_fetched_without_the_key(world: World) -> None:
    async with serving(answer("200 OK", "film")) as elsewhere:
        moved = answer("302 Found", "", f"Location: {elsewhere.url}/film")
        async with serving(moved) as first, world.open(first.url) as client:
            assert await client.film(output(world, first.url)) == b"film"
    assert simulated.KEY not in elsewhere.requests[0]
    # Runway's addresses are signed: no key goes even to the first.
    assert (simulated.KEY in first.requests[0]) == (world.name != "runway")


@each
async def test_a_film_goes_on_where_it_was_cut(world: World) -> None:
    part = answer("206 Partial", "lm", "Content-Range: bytes 2-3/4")
    async with serving(part) as server, world.open(server.url) as client:
        assert await client.film(output(world, server.url), start=2) == b"lm"
    assert "range: bytes=2-\r\n" in server.requests[0].lower()
    async with serving(answer("200 OK", "film")) as server, world.open(server.url) as client:
        assert await client.film(output(world, server.url), start=2) == b"lm"
        with pytest.raises(contract.ProviderTrouble, match="shorter"):
            await client.film(output(world, server.url), start=5)
    for strange in ("bytes 3-3/4", "bytes */4", "pages 2-3/4", ""):
        other = answer("206 Partial", "lm", f"Content-Range: {strange}")
        async with serving(other) as server, world.open(server.url) as client:
            with pytest.raises(contract.ProviderTrouble, match="another part"):
                await client.film(output(world, server.url), start=2)


async def test_no_film_is_fetched_from_a_strange_address() -> None:
    world = BY_NAME["runway"]
    async with world.open("https://localhost:1/v1") as client:
        for url in ("file:///etc/passwd", "http://localhost:1/film", "ftp://x/y", "https://", "x"):
            with pytest.raises(contract.ProviderTrouble):
                await client.film(url)
