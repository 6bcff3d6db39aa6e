"""Clients of the OpenAI Videos protocol for tests, and servers that misbehave more than the simulator does."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from framewire.events.v1 import vocabulary_pb2
from services.generator import catalogue
from services.generator.providers import contract, openai_videos
from tests import simulated
from tests.waiting import eventually

FILE = Path(catalogue.__file__).parent / "providers.yaml"
ACCOUNT = catalogue.parse(yaml.safe_load(FILE.read_text()), 1.0)["main"]


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
    provider: contract.Provider,
    prompt: str = "",
    image: bytes | None = None,
    **fields: Any,
) -> contract.CreateOutcome:
    return await provider.create(
        provider.build(spec(prompt, **fields), image, uuid.uuid4().hex), None
    )


async def made(provider: contract.Provider, prompt: str = "", **fields: Any) -> str:
    outcome = await create(provider, prompt, **fields)
    assert isinstance(outcome, contract.Accepted), outcome
    return outcome.provider_job_id


async def ended(provider: contract.Provider, job_id: str) -> contract.Job:
    async def check() -> contract.Job | None:
        job = await provider.get(job_id)
        assert job is not None
        return job if job.status is not contract.Status.RUNNING else None

    job = await eventually(check)
    assert job is not None
    return job


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
