"""`make bench-gateway`: what callers touch, against LiteLLM's proxy and a bare gRPC echo; and two thousand watchers.

LiteLLM passes a create through and stores nothing; CreateVideo answers when the video is priced, its credits are held
and its job is durable. Both stand before the same upstream of canned replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import psutil
import uvloop

from bench import frame, gateway_watchers, litellm_proxy
from framewire import client
from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import operator_pb2, operator_pb2_grpc, video_pb2, video_pb2_grpc
from kit import ids
from services.local import environment, places, probes, process, stack

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = float(os.environ.get("SECONDS_EACH", "4"))
CALLERS = 16
WORKERS = 3
"""LiteLLM's: as many as we have processes on the way of a CreateVideo (gateway, credits, generator)."""
UPSTREAM_LEAST = 5000.0
PROMPT = "The camera rises slowly along the rocket while the exhaust cloud grows."
SPEC = vocabulary_pb2.VideoSpec(model="sora-2", prompt=PROMPT, width=1280, height=720, seconds=4)
MANY = 100_000_000

Call = Callable[[], Awaitable[object]]


class HttpCallers:
    """So many connections, kept alive, each for one caller at a time: as little of a client as can be."""

    def __init__(self, port: int, headers: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = f"POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{headers}"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self._request = head.encode() + data
        self._port = port
        self._free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Call]:
        """The connections, and the call that uses one of them."""
        self._free = asyncio.Queue()
        for _ in range(CALLERS):
            self._free.put_nowait(await asyncio.open_connection("127.0.0.1", self._port))
        try:
            yield self._call
        finally:
            while not self._free.empty():
                self._free.get_nowait()[1].close()

    async def _call(self) -> None:
        reader, writer = connection = self._free.get_nowait()
        if reader.at_eof():  # closed while the other side had its round
            reader, writer = connection = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        answer = await reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200") or b'"video' not in answer:
            raise SystemExit(f"not a video: {head!r} {answer[:300]!r}")
        self._free.put_nowait(connection)


async def serve(
    running: AsyncExitStack, folder: Path, name: str, arguments: list[str], ready: process.Probe
) -> None:
    """A program of the bench, until the end."""
    command = [environment.command("credits")[0], "-m", *arguments]
    env = environment.inherited() | {"PYTHONPATH": str(frame.ROOT)}
    program = process.Service(process.Child(name, command, env, ready), folder)
    await program.start()
    running.push_async_callback(program.stop)


async def upstream(running: AsyncExitStack, folder: Path) -> tuple[int, float]:
    """The canned provider: its port, and what it answers a second."""
    port = places.choose_port(folder, "canned")

    async def ready() -> bool:
        return await probes.http_status("127.0.0.1", port) == 200

    await serve(running, folder, "canned", ["bench.canned", f"127.0.0.1:{port}"], ready)
    async with HttpCallers(port, "", {"model": "sora-2", "prompt": PROMPT}).opened() as call:
        rate = (await frame.load(call, CALLERS, SECONDS)).rate
    if rate < UPSTREAM_LEAST:
        print(
            f"the upstream answers {rate:.0f}/s, below {UPSTREAM_LEAST:.0f}: it may be what is measured"
        )
    return port, rate


async def litellm(running: AsyncExitStack, folder: Path, upstream_port: int) -> Call:
    """LiteLLM's proxy before the upstream."""
    port = places.choose_port(folder, "litellm")
    proxy = litellm_proxy.service(folder, port, f"http://127.0.0.1:{upstream_port}", WORKERS)
    await proxy.start()
    running.push_async_callback(proxy.stop)
    authorised = f"authorization: Bearer {litellm_proxy.KEY}\r\n"
    callers = HttpCallers(port, authorised, {"model": "sora-2", "prompt": PROMPT, "seconds": "4"})
    return await running.enter_async_context(callers.opened())


async def echo(running: AsyncExitStack, folder: Path) -> Call:
    """A bare grpc.aio server that gives back what it got, without interceptors."""
    address = f"127.0.0.1:{places.choose_port(folder, 'echo')}"
    ready = lambda: probes.grpc_serving(address)  # noqa: E731
    await serve(running, folder, "echo", ["bench.echo", address], ready)
    channel = await running.enter_async_context(grpc.aio.insecure_channel(address))
    stub = ledger_pb2_grpc.LedgerServiceStub(channel)

    async def call() -> None:
        request = ledger_pb2.ReserveRequest(hold_id=ids.new_id(), account_id=ids.new_id())
        await stub.Reserve(request, timeout=30)

    return call


class Ours:
    """A running Framewire with an account that can pay for everything."""

    def __init__(self, whole: stack.Stack, channel: grpc.aio.Channel, key: str) -> None:
        self.stack = whole
        self.channel = channel
        self.metadata = (("authorization", f"Bearer {key}"),)
        self._videos = video_pb2_grpc.VideoServiceStub(channel)

    async def create(self) -> video_pb2.Video:
        """One more video."""
        request = video_pb2.CreateVideoRequest(request_id=str(uuid.uuid4()), spec=SPEC)
        return await self._videos.CreateVideo(request, metadata=self.metadata, timeout=30)

    def get(self, video_id: str) -> Call:
        """Reads one video, again and again."""
        request = video_pb2.GetVideoRequest(video_id=video_id)
        return lambda: self._videos.GetVideo(request, metadata=self.metadata, timeout=30)


@asynccontextmanager
async def ours(upstream_port: int, services: tuple[str, ...]) -> AsyncIterator[Ours]:
    """New servers, new services, one account."""
    with tempfile.TemporaryDirectory(prefix="framewire-bench-") as folder:
        provider = {
            "FRAMEWIRE_PROVIDER_BASE_URL": f"http://127.0.0.1:{upstream_port}/v1",
            "FRAMEWIRE_PROVIDER_API_KEY": "sk-upstream",
        }
        whole = stack.Stack(
            Path(folder), services=services, environ=provider, report=lambda _: None
        )
        try:
            await whole.start()
            async with client.Client(whole.gateway_address, whole.operator_key) as operator:
                account_id = await _account(whole)
                await operator.grant(account_id, MANY)
                key = await operator.create_api_key(account_id=account_id, display_name="bench")
            async with grpc.aio.insecure_channel(whole.gateway_address) as channel:
                yield Ours(whole, channel, key.secret)
        finally:
            await whole.destroy()


async def _account(whole: stack.Stack) -> str:
    async with grpc.aio.insecure_channel(whole.gateway_address) as channel:
        request = operator_pb2.CreateAccountRequest(
            request_id=str(uuid.uuid4()),
            display_name="bench",
            max_in_flight=MANY,
            requests_per_minute=MANY,
            videos_per_hour=MANY,
        )
        metadata = (("authorization", f"Bearer {whole.operator_key}"),)
        stub = operator_pb2_grpc.OperatorServiceStub(channel)
        return (await stub.CreateAccount(request, metadata=metadata, timeout=10)).account_id


class Spent:
    """What everything that this process started, and its databases, have spent so far."""

    def __init__(self, whole: stack.Stack) -> None:
        self._whole = whole

    async def read(self) -> dict[str, float]:
        """CPU seconds, commits by database, bytes of the write-ahead log."""
        cpu = 0.0
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                cpu += sum(child.cpu_times()[:2])
        found = {"cpu": cpu}
        for service in ("gateway", "credits", "generator"):
            connection = await asyncpg.connect(self._whole.addresses.database_url(service))
            try:
                found[service] = await connection.fetchval(
                    "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
                )
                found["wal"] = float(
                    await connection.fetchval("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")
                )
            finally:
                await connection.close()
        return found


async def costs(made: Ours) -> list[frame.Measured]:
    """What a video costs until the generator has it queued: one more round, counted until all is told."""
    spent = Spent(made.stack)
    await asyncio.sleep(2)  # what is under way ends; statistics are written every second
    before = await spent.read()
    videos = len((await frame.load(made.create, CALLERS, SECONDS)).seconds)
    await asyncio.sleep(2)
    after = await spent.read()
    each = {name: (after[name] - before[name]) / videos for name in after}
    return [
        frame.alone("a video until it is queued: CPU of all processes", 1e3 * each["cpu"], "ms"),
        frame.alone("the same: write-ahead log", each["wal"] / 1e3, "kB"),
        *(
            frame.alone(f"the same: commits in the database of {name}", each[name], "commits")
            for name in ("gateway", "credits", "generator")
        ),
    ]


async def creating(
    running: AsyncExitStack, folder: Path, upstream_port: int
) -> list[frame.Measured]:
    """CreateVideo and GetVideo beside LiteLLM and echo, rounds interleaved."""
    services = ("gateway", "credits", "storage", "generator")
    async with ours(upstream_port, services) as made:
        video = await made.create()
        calls = {
            "litellm": await litellm(running, folder, upstream_port),
            "create": made.create,
            "echo": await echo(running, folder),
            "get": made.get(video.video_id),
        }
        loads: dict[str, list[frame.Load]] = {name: [] for name in calls}
        for call in calls.values():
            await frame.load(call, CALLERS, 1.0)  # warm
        for _ in range(ROUNDS):
            for name, call in calls.items():
                loads[name].append(await frame.load(call, CALLERS, SECONDS))
        spent = await costs(made)
    rates = {name: [one.rate for one in rounds] for name, rounds in loads.items()}
    p99 = {name: [one.percentile(0.99) for one in rounds] for name, rounds in loads.items()}
    theirs, bare = "LiteLLM POST /v1/videos", "bare grpc.aio echo"
    return [
        frame.against("CreateVideo, 16 callers", rates["create"], "1/s", theirs, rates["litellm"], at_least=5),
        frame.against("p99 of the same", p99["create"], "ms", theirs, p99["litellm"], at_most=0.5),
        frame.against("CreateVideo, 16 callers", rates["create"], "1/s", bare, rates["echo"]),
        frame.against("GetVideo, 16 callers", rates["get"], "1/s", bare, rates["echo"], at_least=0.35),
        *spent,
    ]  # fmt: skip


NOTES = f"""\
{CALLERS} callers in one process, each calling again as soon as it is answered, {ROUNDS} rounds of {SECONDS:g} s of each
side in turn. CreateVideo: authenticated, validated, priced, credits held, stored, published; text to video; gateway,
credits, storage and generator one process each, the generator taking the jobs and sending what its quota lets through.
LiteLLM {litellm_proxy.VERSION}, pass-through, nothing stored: master key, no database, LITELLM_MODE=PRODUCTION,
LITELLM_LOG=ERROR, {WORKERS} workers, called over {CALLERS} kept connections by a client that does next to nothing.
Watchers: opened at {gateway_watchers.OPENED_A_SECOND}/s; events are published to the stream as the generator would, one
after the other, and all watchers are streams of the bench's own process, whose work counts as ours."""


async def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        place = places.prepare(Path(folder))
        async with AsyncExitStack() as running:
            port, rate = await upstream(running, place)
            measured = [frame.alone("upstream of canned replies", rate, "1/s")]
            measured += await creating(running, place, port)
        async with AsyncExitStack() as running:
            port, _ = await upstream(running, place)
            services = ("gateway", "credits", "storage")
            async with ours(port, services) as made:
                measured += await gateway_watchers.measure(made.stack, made.create, made.metadata)
    frame.publish("gateway", "make bench-gateway", measured, NOTES)


if __name__ == "__main__":
    uvloop.run(main())
