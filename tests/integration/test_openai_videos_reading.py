"""The client of the OpenAI Videos protocol: its lists, jobs and films."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.generator.providers import contract, openai_videos
from tests import simulated
from tests.openai_world import (
    answer,
    client,
    ended,
    made,
    provider,
    serving,
    simulator,
    spec,
)
from tests.waiting import eventually

__all__ = ["provider", "simulator"]


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
    async with provider.content(job_id) as (size, chunks):
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
