"""The client of the OpenAI Videos protocol, against the simulator and against servers that misbehave worse."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from google.protobuf import struct_pb2

from framewire.events.v1 import vocabulary_pb2
from services.generator import catalogue
from services.generator.providers import contract, openai_videos
from tests import pictures, simulated
from tests.waiting import eventually

FILE = Path(catalogue.__file__).parent / "providers.yaml"
ACCOUNT = catalogue.parse(yaml.safe_load(FILE.read_text()), 1.0)["main"]
IMAGE = pictures.plain((200, 30, 30))


@pytest.fixture(scope="module")
async def simulator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[simulated.Simulator]:
    folder = tmp_path_factory.mktemp("simulator")
    async with simulated.running(folder, time_factor=100, draw_prompt=False) as started:
        yield started


@asynccontextmanager
async def client(
    base_url: str, post_timeout: float = 10, key: str = simulated.KEY, **account: Any
) -> AsyncIterator[openai_videos.OpenAIVideos]:
    changed = dataclasses.replace(ACCOUNT, post_timeout_seconds=post_timeout, **account)
    opened = openai_videos.OpenAIVideos(changed, base_url, key)
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def provider(
    simulator: simulated.Simulator,
) -> AsyncIterator[openai_videos.OpenAIVideos]:
    await simulator.clear()
    async with client(f"{simulator.url}/v1/") as opened:
        yield opened
    await simulator.clear()


def spec(prompt: str = "", **fields: Any) -> vocabulary_pb2.VideoSpec:
    given = {"model": "sora-2", "width": 320, "height": 180, "seconds": 1, "variants": 1}
    return vocabulary_pb2.VideoSpec(
        prompt=prompt or f"A cat, {uuid.uuid4()}", **{**given, **fields}
    )


async def create(
    provider: openai_videos.OpenAIVideos,
    prompt: str = "",
    image: bytes | None = None,
    **fields: Any,
) -> contract.CreateOutcome:
    return await provider.create(
        provider.build(spec(prompt, **fields), image, uuid.uuid4().hex), None
    )


async def made(provider: openai_videos.OpenAIVideos, prompt: str = "", **fields: Any) -> str:
    outcome = await create(provider, prompt, **fields)
    assert isinstance(outcome, contract.Accepted), outcome
    return outcome.provider_job_id


async def ended(provider: openai_videos.OpenAIVideos, job_id: str) -> contract.Job:
    async def check() -> contract.Job | None:
        job = await provider.get(job_id)
        assert job is not None
        return job if job.status is not contract.Status.RUNNING else None

    job = await eventually(check)
    assert job is not None
    return job


# Building


async def test_the_body_is_the_same_each_time_and_is_accepted(
    provider: openai_videos.OpenAIVideos, simulator: simulated.Simulator
) -> None:
    prompt = f'Zoë says "hi" & 日本\r\n--framewire-x\n {uuid.uuid4()}'
    wanted = spec(prompt)
    body = provider.build(wanted, IMAGE, "attempt")
    assert body == provider.build(wanted, IMAGE, "attempt")
    assert body.data != provider.build(wanted, IMAGE, "other").data
    outcome = await provider.create(body, None)
    assert isinstance(outcome, contract.Accepted)
    entry = next(
        e for e in await simulator.log(kind="accepted") if e["id"] == outcome.provider_job_id
    )
    assert (entry["size"], entry["seconds"], entry["model"]) == ("320x180", "1", "sora-2")
    assert entry["reference_sha256"]
    # What the list shows of it has the fingerprint that was computed beforehand.
    jobs, _ = await provider.list_page(None)
    shown = {job.provider_job_id: job.fingerprint for job in jobs}
    assert shown[outcome.provider_job_id] == provider.shown(wanted)


async def test_options_are_sent_as_servers_read_them_and_override_nothing() -> None:
    values = {"seed": 7, "guidance_scale": 7.5, "enhance": True, "style": "noir", "model": "other"}
    values |= {"seconds": 20}
    wanted = spec("a cat")
    for name, value in values.items():
        wanted.options[name].CopyFrom(_value(value))
    async with client("http://x/v1") as provider:
        text = provider.build(wanted, None, "attempt").data.decode()
    assert "application/octet-stream" not in text
    for name, value in {
        "seed": "7",
        "guidance_scale": "7.5",
        "enhance": "true",
        "style": "noir",
    }.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n' in text
    assert 'name="model"\r\n\r\nsora-2\r\n' in text
    assert 'name="seconds"\r\n\r\n1\r\n' in text
    assert text.count('name="model"') == text.count('name="seconds"') == 1


def _value(value: Any) -> struct_pb2.Value:
    if isinstance(value, bool):
        return struct_pb2.Value(bool_value=value)
    if isinstance(value, str):
        return struct_pb2.Value(string_value=value)
    return struct_pb2.Value(number_value=value)


# Outcomes of a create

REFUSED, US, NOT, AMBIGUOUS, YES = (
    contract.RefusedRequest,
    contract.RefusedUs,
    contract.NotAccepted,
    contract.Ambiguous,
    contract.Accepted,
)


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
        ("error_after=500", AMBIGUOUS, 1),
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
    async with client(f"{simulator.url}/v1", post_timeout=0.4) as provider:
        found = await create(provider, prompt)
    assert time.monotonic() - began < 3
    assert isinstance(found, outcome), found
    assert len(await simulator.accepted(prompt)) == jobs
    if isinstance(found, contract.RefusedRequest):
        assert found.cause == "INPUT_REFUSED"
    if isinstance(found, contract.NotAccepted):
        wanted = pytest.approx(0.2) if fault == "rate_limited=20" else None
        assert found.retry_after_seconds == wanted


async def test_an_image_of_another_size_is_a_refusal_of_the_request(
    provider: openai_videos.OpenAIVideos,
) -> None:
    outcome = await create(provider, image=IMAGE, width=180, height=320)
    assert isinstance(outcome, contract.RefusedRequest)
    assert outcome.cause == "REQUEST_INVALID"
    assert "Inpaint image must match" in outcome.message


async def test_a_wrong_key_is_a_refusal_of_us(simulator: simulated.Simulator) -> None:
    async with client(f"{simulator.url}/v1", key="wrong") as provider:
        outcome = await create(provider)
        assert isinstance(outcome, contract.RefusedUs)
        assert "wrong" not in outcome.message
        with pytest.raises(contract.ProviderTrouble, match="401"):
            await provider.list_page(None)


async def test_a_refused_connection_is_not_accepted(unused_port: int) -> None:
    async with client(f"http://127.0.0.1:{unused_port}/v1") as provider:
        assert isinstance(await create(provider), contract.NotAccepted)
        with pytest.raises(contract.ProviderTrouble):
            await provider.get("video_1")


@pytest.fixture
async def unused_port() -> int:
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


# Servers of our own, for what the simulator does not do


@dataclasses.dataclass(slots=True)
class Server:
    """Answers every request with the same bytes; keeps the requests."""

    url: str = ""
    requests: list[str] = dataclasses.field(default_factory=list[str])
    connections: int = 0


def answer(status: str, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body.encode())}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


@asynccontextmanager
async def serving(
    reply: bytes | Callable[[asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Server]:
    """Keeps connections open after an answer, as a server with keep-alive does."""
    server = Server()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                text = head.decode()
                server.requests.append(text)
                for line in text.lower().splitlines():
                    if line.startswith("content-length:"):
                        await reader.readexactly(int(line.split(":")[1]))
                if isinstance(reply, bytes):
                    writer.write(reply)
                    await writer.drain()
                else:
                    await reply(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        listener.close()


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
async def test_a_redirect_of_a_create_is_not_followed(status: str) -> None:
    async with serving(answer("200 OK", '{"id": "video_2"}')) as second:
        moved = answer(status, "", f"Location: {second.url}/videos")
        async with serving(moved) as first, client(first.url) as provider:
            assert isinstance(await create(provider), contract.RefusedUs)
        assert len(first.requests) == 1
        assert second.requests == []


async def test_a_create_uses_a_connection_once_and_retries_nothing() -> None:
    async with (
        serving(answer("503 Busy", "{}", "Retry-After: 0")) as server,
        client(server.url) as provider,
    ):
        for _ in range(3):
            assert isinstance(await create(provider), contract.Ambiguous)
    assert server.connections == len(server.requests) == 3
    assert all("connection: close" in request.lower() for request in server.requests)
    assert all("idempotency-key" not in request.lower() for request in server.requests)


async def test_an_idempotency_key_is_sent_where_there_is_one() -> None:
    async with (
        serving(answer("200 OK", '{"id": "video_1"}')) as server,
        client(server.url) as provider,
    ):
        outcome = await provider.create(provider.build(spec(), None, "a"), "the-key")
        assert outcome == contract.Accepted("video_1")
    assert "idempotency-key: the-key" in server.requests[0].lower()


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
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
        ("400 Bad", '{"detail": "moderation_blocked"}', REFUSED),
        ("422 Bad", '{"detail": [{"loc": []}]}', REFUSED),
        ("429 Busy", '{"error": "insufficient_quota"}', US),
        ("418 Teapot", "", AMBIGUOUS),
        ("garbage", "", AMBIGUOUS),
    ],
)
async def test_odd_answers_of_a_create(status: str, body: str, outcome: type) -> None:
    async with serving(answer(status, body)) as server, client(server.url) as provider:
        found = await create(provider)
    assert isinstance(found, outcome), found
    if isinstance(found, contract.RefusedRequest):
        found.message.encode()
        assert "\x00" not in found.message


async def test_a_create_is_over_at_its_timeout_though_bytes_trickle() -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: y\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    began = time.monotonic()
    async with serving(trickle) as server, client(server.url, post_timeout=0.5) as provider:
        assert isinstance(await create(provider), contract.Ambiguous)
    assert time.monotonic() - began < 2


# Reading


async def test_the_list_is_paged_to_its_end_newest_first(
    provider: openai_videos.OpenAIVideos, simulator: simulated.Simulator
) -> None:
    job_ids = [await made(provider) for _ in range(5)]
    await simulator.arm("list_short", value=2, times=0)
    listed: list[str] = []
    cursor: str | None = None
    pages = 0
    while True:
        page, cursor = await provider.list_page(cursor)
        assert len(page) <= 2
        listed += [job.provider_job_id for job in page]
        pages += 1
        if cursor is None:
            break
    assert listed[:5] == job_ids[::-1]
    assert len(listed) == len(set(listed))
    assert pages == -(-len(listed) // 2)
    await simulator.arm("list_error", value=503)
    with pytest.raises(contract.ProviderTrouble, match="503"):
        await provider.list_page(None)


async def test_a_job_from_its_beginning_to_its_film(provider: openai_videos.OpenAIVideos) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    job_id = await made(provider, "A cat. [fault:content_404=30]")
    job = await provider.get(job_id)
    assert job is not None
    assert job.status is contract.Status.RUNNING
    assert before <= job.created_at <= datetime.now(UTC)
    job = await ended(provider, job_id)
    assert (job.status, job.progress_percent) == (contract.Status.DONE, 100)
    assert job.expires_at is not None
    with pytest.raises(contract.ContentGone):
        await film(provider, job_id)

    async def there() -> bytes | None:
        try:
            return await film(provider, job_id)
        except contract.ContentGone:
            return None

    content = await eventually(there)
    assert content is not None
    assert content[4:8] == b"ftyp"


async def film(provider: openai_videos.OpenAIVideos, job_id: str) -> bytes:
    async with provider.content(job_id, 0) as (size, chunks):
        content = b"".join([chunk async for chunk in chunks])
    assert size in (None, len(content))
    return content


async def test_what_is_not_there(provider: openai_videos.OpenAIVideos) -> None:
    assert await provider.get("video_unknown") is None
    with pytest.raises(contract.ContentGone):
        await film(provider, "video_unknown")
    job_id = await made(provider, "A cat. [fault:poll_404*1] [fault:poll_error=500*1]")
    assert await provider.get(job_id) is None
    with pytest.raises(contract.ProviderTrouble, match="500"):
        await provider.get(job_id)
    assert await provider.get(job_id) is not None


@pytest.mark.parametrize(
    ("fault", "code"),
    [("fails_later", "internal_error"), ("moderated_later", "moderation_blocked")],
)
async def test_a_job_that_fails_tells_why(
    provider: openai_videos.OpenAIVideos, fault: str, code: str
) -> None:
    job = await ended(provider, await made(provider, f"A cat. [fault:{fault}]"))
    assert (job.status, job.error_code) == (contract.Status.FAILED, code)
    assert job.error_message


async def test_a_cut_film_is_trouble_and_not_a_film(provider: openai_videos.OpenAIVideos) -> None:
    job_id = await made(provider, "A cat. [fault:content_403*1] [fault:content_cut*1]")
    await ended(provider, job_id)

    async def trouble(word: str) -> bool:
        try:
            await film(provider, job_id)
        except contract.ContentGone:
            return False  # just after it was done
        except contract.ProviderTrouble as error:
            return word in str(error)
        raise AssertionError("it was whole")

    await eventually(lambda: trouble("403"))
    await eventually(lambda: trouble("RemoteProtocolError"))
    assert (await film(provider, job_id))[4:8] == b"ftyp"


async def test_other_servers_of_the_dialect(tmp_path: Path) -> None:
    quirks = (
        "create_202,omit_nulls,other_words,int_error_code,failed_as_500,duration,redirect_content"
    )
    async with (
        simulated.running(tmp_path, time_factor=200, quirks=quirks, draw_prompt=False) as other,
        client(f"{other.url}/v1") as provider,
    ):
        wanted = spec("A cat that other servers show")
        outcome = await provider.create(provider.build(wanted, None, "a"), None)
        assert isinstance(outcome, contract.Accepted)
        failed = await ended(provider, await made(provider, "A dog. [fault:fails_later]"))
        assert (failed.status, failed.error_code) == (contract.Status.FAILED, "500")
        done = await ended(provider, outcome.provider_job_id)
        assert (done.status, done.fingerprint) == (contract.Status.DONE, provider.shown(wanted))

        async def whole() -> bool:
            try:
                return (await film(provider, outcome.provider_job_id))[4:8] == b"ftyp"
            except contract.ContentGone:
                return False

        assert await eventually(whole)


SHOWN = {"id": "v", "status": "queued", "model": "m", "prompt": "p", "size": "1x2", "seconds": "3"}


@pytest.mark.parametrize(
    ("fields", "readable"),
    [
        ({}, True),
        ({"seconds": 3}, True),
        ({"seconds": None, "duration": 3.0}, True),
        ({"prompt": None}, False),
        ({"size": "huge"}, False),
        ({"seconds": "x"}, False),
        ({"created_at": None}, False),
        ({"created_at": 1e18}, False),
    ],
)
async def test_a_job_that_shows_too_little_has_no_fingerprint(
    fields: dict[str, Any], readable: bool
) -> None:
    item = {**SHOWN, "created_at": 1_763_000_000, "progress": float("nan"), **fields}
    page = {"data": [item, {"id": ""}, "x"], "has_more": False}
    async with (
        serving(answer("200 OK", json.dumps(page))) as server,
        client(server.url) as provider,
    ):
        (job,), cursor = await provider.list_page(None)
    assert cursor is None
    assert (job.fingerprint is not None) == readable
    assert (job.status, job.progress_percent) == (contract.Status.RUNNING, 0)


@pytest.mark.parametrize(
    ("status", "body", "found"),
    [
        ("200 OK", {**SHOWN, "status": "preparing the paint"}, contract.Status.RUNNING),
        ("500 Oops", {**SHOWN, "status": "failed", "error": "text"}, contract.Status.FAILED),
        ("500 Oops", {"id": "err_1", "status": 500, "title": "oops"}, None),
        ("502 Bad", {"id": "x", "status": "in_progress"}, None),
        ("200 OK", {}, None),
        ("200 OK", [], None),
    ],
)
async def test_what_a_job_is_and_what_is_only_trouble(
    status: str, body: Any, found: contract.Status | None
) -> None:
    async with (
        serving(answer(status, json.dumps(body))) as server,
        client(server.url) as provider,
    ):
        if found is None:
            with pytest.raises(contract.ProviderTrouble):
                await provider.get("v")
        else:
            job = await provider.get("a/b+c")
            assert job is not None
            assert job.status is found
            assert server.requests[0].startswith("GET /v1/videos/a%2Fb%2Bc ")


async def test_a_list_that_promises_more_and_shows_nothing_proves_nothing() -> None:
    for page in ({"data": [], "has_more": True}, {"data": {}}, []):
        async with (
            serving(answer("200 OK", json.dumps(page))) as server,
            client(server.url) as provider,
        ):
            with pytest.raises(contract.ProviderTrouble):
                await provider.list_page(None)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, 3600),
        ({"retry-after": "9" * 400}, 3600),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 99 Foo"}, None),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9),
        ({"retry-after-ms": "²", "retry-after": "9"}, 9),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert openai_videos.retry_after(httpx.Headers(headers, encoding="latin-1")) == seconds


def test_retry_after_as_a_date() -> None:
    def of(moment: datetime) -> float | None:
        return openai_videos.retry_after(httpx.Headers({"retry-after": format_datetime(moment)}))

    now = datetime.now(UTC)
    assert of(now + timedelta(seconds=90)) == pytest.approx(90, abs=3)
    assert of(now - timedelta(hours=1)) == 0
    assert of(now + timedelta(days=2)) == 3600
