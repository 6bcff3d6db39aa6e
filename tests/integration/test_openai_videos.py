"""The client of the OpenAI Videos protocol: what it sends, and what each answer of a create means."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from google.protobuf import struct_pb2

from services.generator.providers import contract, limits, openai_videos
from tests import pictures, simulated
from tests.openai_world import (
    answer,
    client,
    create,
    provider,
    serving,
    simulator,
    spec,
)

__all__ = ["provider", "simulator"]

IMAGE = pictures.plain((200, 30, 30))


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
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.05)

    began = time.monotonic()
    async with serving(trickle) as server, client(server.url, post_timeout=0.5) as provider:
        assert isinstance(await create(provider), contract.Ambiguous)
    assert time.monotonic() - began < 2


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
    assert limits.retry_after(httpx.Headers(headers, encoding="latin-1")) == seconds


def test_retry_after_as_a_date() -> None:
    def of(moment: datetime) -> float | None:
        return limits.retry_after(httpx.Headers({"retry-after": format_datetime(moment)}))

    now = datetime.now(UTC)
    assert of(now + timedelta(seconds=90)) == pytest.approx(90, abs=3)
    assert of(now - timedelta(hours=1)) == 0
    assert of(now + timedelta(days=2)) == 3600
