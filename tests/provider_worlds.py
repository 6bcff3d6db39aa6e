"""Where providers are registered for the conformance suite, one world each; and servers worse than the simulator.

A world is a kind of server: the client, its account as the catalogue has it, and where the simulator plays that server.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from framewire.events.v1 import vocabulary_pb2
from services.generator import catalogue, pools
from services.generator.providers import contract
from tests import pictures, simulated
from tests.waiting import eventually

FILE = Path(catalogue.__file__).parent / "providers.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(FILE.read_text())
IMAGE = pictures.plain((200, 30, 30))
FIRST = (contract.Input(IMAGE),)


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """One kind of server."""

    name: str
    path: str
    """Its base URL at the simulator."""
    account: catalogue.ProviderAccount
    shows: bool = True
    """Whether its jobs show prompt, model, size and seconds as they were asked for."""
    pages: bool = True
    """Whether its list comes in pages."""
    asks_for_key: bool = True
    needs_image: bool = False
    many_outputs: bool = False
    failure_codes: tuple[str, str] = ("internal_error", "moderation_blocked")
    """What its failed jobs say after `fails_later` and `moderated_later`."""

    @property
    def model(self) -> str:
        """The first that it serves."""
        return next(iter(self.account.models))

    def spec(self, prompt: str = "", **fields: Any) -> vocabulary_pb2.VideoSpec:
        given = {"model": self.model, "width": 320, "height": 180, "seconds": 1, "variants": 1}
        return vocabulary_pb2.VideoSpec(
            prompt=prompt or f"A cat, {uuid.uuid4()}", **{**given, **fields}
        )

    @asynccontextmanager
    async def open(
        self, server_url: str, post_timeout: float = 10, key: str = simulated.KEY, **account: Any
    ) -> AsyncIterator[Client]:
        """A client of it, at a simulator or at a server of a test (whose address ends in `/v1`)."""
        changed = dataclasses.replace(self.account, post_timeout_seconds=post_timeout, **account)
        url = server_url if server_url.endswith("/v1") else server_url + self.path
        opened = pools.DIALECTS[self.account.dialect](changed, url, key)
        try:
            yield Client(self, opened)
        finally:
            await opened.close()


@dataclasses.dataclass(frozen=True, slots=True)
class Client:
    """An opened provider, with what tests do to it."""

    world: World
    provider: contract.Provider

    async def create(
        self, prompt: str = "", image: bytes | None = None, **fields: Any
    ) -> contract.CreateOutcome:
        if self.world.needs_image:
            image = image or IMAGE
        inputs = (contract.Input(image),) if image else ()
        spec = self.world.spec(prompt, **fields)
        return await self.provider.create(self.provider.build(spec, inputs, uuid.uuid4().hex), None)

    async def made(self, prompt: str = "", **fields: Any) -> str:
        outcome = await self.create(prompt, **fields)
        assert isinstance(outcome, contract.Accepted), outcome
        return outcome.provider_job_id

    async def ended(self, job_id: str) -> contract.Job:
        async def check() -> contract.Job | None:
            job = await self.provider.get(job_id)
            assert job is not None
            return job if job.status is not contract.Status.RUNNING else None

        job = await eventually(check)
        assert job is not None
        return job

    async def film(self, output_id: str, start: int = 0) -> bytes:
        async with self.provider.content(output_id, start) as (size, chunks):
            content = b"".join([chunk async for chunk in chunks])
        assert size in (None, start + len(content))
        return content

    async def there(self, output_id: str) -> bytes:
        """The film, once the lag after completion is over."""

        async def check() -> bytes | None:
            try:
                return await self.film(output_id)
            except contract.ContentGone:
                return None

        content = await eventually(check)
        assert content is not None
        return content

    async def listed(self, job_id: str) -> contract.Job:
        jobs, _ = await self.provider.list_page(None)
        return next(job for job in jobs if job.provider_job_id == job_id)


def account(name: str, **fields: Any) -> catalogue.ProviderAccount:
    """One of the catalogue, with fields changed."""
    document = copy.deepcopy(DOCUMENT)
    entry = next(item for item in document["provider_accounts"] if item["name"] == name)
    entry |= fields
    return catalogue.parse(document, 1.0)[name]


def _openai(variant: str, cancel: str = "none", **fields: Any) -> World:
    found = account("main", variant=variant, cancel=cancel)
    return World(variant, f"/servers/{variant}/v1", found, **fields)


WORLDS = [
    _openai("openai"),
    _openai("azure_v1"),
    _openai("vllm_omni", "delete_aborts", asks_for_key=False, failure_codes=("500", "400")),
    _openai("sglang", failure_codes=("", "")),
    _openai("litellm"),
    _openai("tensorrt_llm", pages=False, failure_codes=("", "")),
    _openai("reseller"),
    World(
        "azure_jobs",
        "/openai/v1",
        account("azure"),
        many_outputs=True,
        failure_codes=("internal_error", "output_moderation"),
    ),
    World(
        "runway",
        "/v1",
        account("runway"),
        shows=False,
        needs_image=True,
        failure_codes=("INTERNAL.BAD_OUTPUT.CODE01", "SAFETY.OUTPUT.VIDEO"),
    ),
]
BY_NAME = {world.name: world for world in WORLDS}
DIALECTS = [BY_NAME[name] for name in ("openai", "azure_jobs", "runway")]
LISTING = [world for world in WORLDS if world.account.variant.has_list and world.name != "runway"]


@asynccontextmanager
async def simulator(folder: Path, **settings: Any) -> AsyncIterator[simulated.Simulator]:
    """The simulator with short renders and no limits of its own."""
    given = {"time_factor": 100, "draw_prompt": False, "queue_seconds": 2, "failure_seconds": 2}
    given |= {"render_seconds_base": 2, "render_seconds_per_second": 1, "content_lag_seconds": 1}
    given |= {"azure_max_concurrent_jobs": 0, "runway_max_concurrent_tasks": 0}
    async with simulated.running(folder, **{**given, **settings}) as started:
        yield started


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
