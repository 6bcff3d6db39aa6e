"""A whole generator for tests: its process, real Postgres, NATS and simulator; storage is a peer here in memory."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import nats
import yaml
from google.protobuf import json_format
from nats.aio.client import Client
from nats.aio.msg import Msg

from framewire import subjects
from framewire.events.v1 import event_pb2
from framewire.generator.v1 import attempt_pb2, attempt_pb2_grpc, job_pb2
from framewire.storage.v1 import storage_pb2, storage_pb2_grpc
from kit import auth, bus, errors, ids, rpc
from services.generator import catalogue
from services.local import environment, places, probes, process
from tests import containers, generator_world, pictures, simulated
from tests.waiting import eventually

SECRET = "s" * 32
OLD_WEBHOOK_SECRET = "an-older-secret-in-plain-text"
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"k" * 24).decode()
FACTOR = 100.0
Change = Callable[[list[dict[str, Any]]], object]
CATALOGUE = Path(catalogue.__file__).parent / "providers.yaml"


class Storage(storage_pb2_grpc.StorageServiceServicer):
    """Fit, Get, Stat and Put as their contract has them, in memory. The whole-path tests have the real one."""

    def __init__(self) -> None:
        self.assets: dict[str, tuple[storage_pb2.Asset, bytes]] = {}
        self.puts = 0
        self.down = False
        self.answering = asyncio.Event()
        self.answering.set()
        """Not set: a Put waits."""
        self.unusable: set[int] = set()
        """Variants of whose bytes it says that they are no video."""
        self.fitting = asyncio.Event()
        self.fitting.set()
        """Not set: a Fit waits."""
        self.fits: list[storage_pb2.FitRequest] = []
        self.refused_sha256: list[str] = []
        """What each Put said of bytes that had come before."""
        self.renditions: list[errors.ServiceError | None] = []
        """What the next calls are answered; None: made, as all later ones are."""

    async def Fit(self, request: Any, context: Any) -> storage_pb2.Asset:
        if self.down:
            raise errors.Unavailable("DEPENDENCY_UNAVAILABLE", "storage is down")
        if request.asset_id == "0" * 26:
            raise errors.NotFound("ASSET_NOT_FOUND", "no such asset")
        self.fits.append(request)
        await self.fitting.wait()
        if request.asset_id == "1" * 26:
            raise errors.InvalidArgument("TOO_LARGE", "this takes too much work")
        image = pictures.plain((9, 99, 9), (request.width, request.height))
        return self._keep(ids.derived_id("fit", request.asset_id), image)

    async def MakeRendition(self, request: Any, context: Any) -> storage_pb2.Asset:
        answer = self.renditions.pop(0) if self.renditions else None
        if answer is not None:
            raise answer
        smaller = self._keep(ids.derived_id("smaller", request.asset_id, request.height), b"small")
        smaller.height = request.height
        return smaller

    async def Get(self, request: Any, context: Any) -> AsyncIterator[storage_pb2.GetResponse]:
        content = self.assets[request.asset_id][1]
        for start in range(0, len(content), 1000):
            yield storage_pb2.GetResponse(chunk=content[start : start + 1000])

    async def Stat(self, request: Any, context: Any) -> storage_pb2.Asset:
        if self.down:
            raise errors.Unavailable("DEPENDENCY_UNAVAILABLE", "storage is down")
        if request.asset_id not in self.assets:
            raise errors.NotFound("ASSET_NOT_FOUND", "no such asset")
        return self.assets[request.asset_id][0]

    async def Put(self, request_iterator: Any, context: Any) -> storage_pb2.Asset:
        self.puts += 1
        await self.answering.wait()
        header = (await anext(request_iterator)).header
        self.refused_sha256.append(header.refused_sha256)
        kind = storage_pb2.AssetKind.Name(header.kind).removeprefix("ASSET_KIND_")
        asset_id = ids.derived_id(header.account_id, header.owner, kind, header.variant)
        if asset_id in self.assets:
            return self.assets[asset_id][0]  # READY: the bytes are dropped
        if self.down:
            raise errors.Unavailable("DEPENDENCY_UNAVAILABLE", "storage is down")
        content = b"".join([request.chunk async for request in request_iterator])
        if content[4:8] != b"ftyp" or header.variant in self.unusable:
            raise errors.InvalidArgument("NOT_A_VIDEO", "these bytes are no video")
        if header.size_bytes not in (0, len(content)):
            raise errors.InvalidArgument("CHECKSUM_MISMATCH", "more or fewer bytes than said")
        return self._keep(asset_id, content)

    def _keep(self, asset_id: str, content: bytes) -> storage_pb2.Asset:
        facts = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        asset = storage_pb2.Asset(asset_id=asset_id, height=180, **facts)
        self.assets[asset_id] = (asset, content)
        return asset


@dataclass
class Generator:
    """The running whole."""

    folder: Path
    database_url: str
    nats_url: str
    simulator: simulated.Simulator
    storage: Storage
    client: Client
    program: process.Service
    address: str
    webhook_url: str
    told: dict[str, list[event_pb2.Event]] = field(default_factory=dict)

    async def publish(self, made: job_pb2.Job) -> None:
        headers = {subjects.VIDEO_HEADER: f"{made.video_id} {made.account_id}"}
        data = made.SerializeToString()
        await self.client.jetstream().publish(subjects.JOBS_SUBJECT, data, headers=headers)

    async def ask(self, prompt: str = "", **fields: Any) -> job_pb2.Job:
        """A job on its way."""
        made = generator_world.job(prompt=prompt or f"A cat, {uuid.uuid4()}", **fields)
        await self.publish(made)
        return made

    async def ended(self, made: job_pb2.Job, within_seconds: float = 90) -> list[str]:
        """The kinds of a video's events, once it has ended."""

        async def check() -> bool:
            events = self.told.get(made.video_id, [])
            assert events, "nothing was told"
            kinds = self.kinds(made)
            assert kinds[-1] in subjects.TERMINAL_KINDS, f"{kinds}: {await self.state(made)}"
            return True

        await eventually(check, within_seconds=within_seconds)
        return self.kinds(made)

    async def sentinel(self, **fields: Any) -> None:
        """A finished job of ours in the provider's list: without one, absence can never be proved.

        The first create of a cold process on a busy machine may take longer than its timeout; then another is made.
        """
        for _ in range(5):
            made = await self.ask(**fields)

            async def decided(made: job_pb2.Job = made) -> str | None:
                state = (await self.state(made)).split()[0]
                return state if state in ("COMPLETED", "UNRESOLVED") else None

            if await eventually(decided, within_seconds=60) == "COMPLETED":
                return
        raise AssertionError("no create was answered in time")

    def kinds(self, made: job_pb2.Job) -> list[str]:
        """In the order of the stream; each must be numbered one above the one before."""
        events = self.told.get(made.video_id, [])
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        return [event_pb2.EventKind.Name(event.kind)[11:].lower() for event in events]

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self.database_url)
        try:
            return await connection.fetch(statement, *values)
        finally:
            await connection.close()

    async def state(self, made: job_pb2.Job) -> str:
        found = await self.fetch(
            "SELECT state, message FROM attempts WHERE video_id = $1 ORDER BY number DESC",
            made.video_id,
        )
        return " ".join(map(str, found[0])) if found else "none"

    async def until(self, made: job_pb2.Job, state: str) -> None:
        async def check() -> bool:
            now = await self.state(made)
            assert now.split()[0] == state, now
            return True

        await eventually(check)

    def arm(self, point: str, action: str) -> None:
        (self.folder / "failpoints").write_text(f"{point}={action}\n")

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[attempt_pb2_grpc.AttemptServiceAsyncStub]:
        tokens = auth.ServiceTokens("gateway", SECRET)
        async with rpc.channel(self.address, tokens) as channel:
            yield attempt_pb2_grpc.AttemptServiceStub(channel)  # pyright: ignore[reportReturnType]

    async def outcome(self, made: job_pb2.Job) -> attempt_pb2.VideoOutcome:
        async with self.stub() as stub:
            request = attempt_pb2.GetVideoOutcomeRequest(video_id=made.video_id)
            return await stub.GetVideoOutcome(request, timeout=5)

    def log(self) -> list[dict[str, Any]]:
        lines = self.program.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def providers_file(folder: Path, change: Change | None = None, **fields: Any) -> Path:
    """The shipped catalogue with what tests need changed."""
    document = yaml.safe_load(CATALOGUE.read_text())
    document["provider_accounts"][0] |= {
        "clock_skew_seconds": 2,
        "max_jobs_in_flight": 50,
        **fields,
    }
    if change is not None:
        change(document["provider_accounts"])
    path = folder / "providers.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@asynccontextmanager
async def storage_peer(folder: Path) -> AsyncIterator[tuple[Storage, str]]:
    """The stand-in behind the interceptor that every service has: tokens and rules are checked."""
    tokens, stored = auth.ServiceTokens("storage", SECRET), Storage()

    async def authenticate(_: str, metadata: Any) -> str:
        return tokens.caller(metadata.get("authorization", ""), ("generator",))

    server = grpc.aio.server(interceptors=[rpc.ServerInterceptor(authenticate)])
    storage_pb2_grpc.add_StorageServiceServicer_to_server(stored, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield stored, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def _variables(
    folder: Path,
    url: str,
    nats_url: str,
    address: str,
    storage_address: str,
    simulator: simulated.Simulator,
    webhooks_listen: str,
) -> dict[str, str]:
    settings = {
        "DATABASE_URL": url,
        "NATS_URL": nats_url,
        "LISTEN": address,
        "SERVICE_TOKEN_SECRET": SECRET,
        "STORAGE_ADDRESS": storage_address,
        "PROVIDERS_FILE": str(folder / "providers.yaml"),
        "PROVIDER_BASE_URL": f"{simulator.url}/v1",
        "PROVIDER_API_KEY": simulated.KEY,
        "AZURE_BASE_URL": f"{simulator.url}/openai/v1",
        "AZURE_API_KEY": simulated.KEY,
        "RUNWAY_BASE_URL": f"{simulator.url}/v1",
        "RUNWAY_API_KEY": simulated.KEY,
        "TIME_FACTOR": str(FACTOR),
        "POST_TIMEOUT_SECONDS": "1.5",
        "SUBMIT_LEASE_MARGIN_SECONDS": "0.3",
        "PREPARE_LEASE_SECONDS": "1",
        "FETCH_LEASE_SECONDS": "1",
        "PASS_LEASE_SECONDS": "0.5",
        "LOOP_SECONDS": "0.05",
        "SPOOL_DIR": str(folder / "spool"),
        "DRAIN_SECONDS": "2",
    }
    settings["WEBHOOKS_LISTEN"] = webhooks_listen
    settings["WEBHOOK_SECRETS"] = f"main:{OLD_WEBHOOK_SECRET},main:{WEBHOOK_SECRET}"
    variables = {f"GENERATOR_{name}": value for name, value in settings.items()}
    variables["FRAMEWIRE_FAILPOINTS"] = str(folder / "failpoints")
    return variables


@asynccontextmanager
async def running(
    folder: Path,
    change: Change | None = None,
    simulator_settings: Mapping[str, Any] | None = None,
    variables: Mapping[str, str] | None = None,
    *,
    webhooks: bool = False,
    **account: Any,
) -> AsyncIterator[Generator]:
    """The generator and its peers. `account` changes its provider account, `change` them all; `webhooks` are sent."""
    places.prepare(folder)
    providers_file(folder, change, **account)
    database, broker = containers.postgres(folder), containers.nats(folder)
    try:
        await asyncio.gather(database.start(), broker.start())
        await database.create_database("framewire_generator")
        hooks = f"{places.HOST}:{places.choose_port(folder, 'webhooks')}"
        webhook_url = f"http://{hooks}/webhooks/main"
        told = {"webhook_url": webhook_url, "webhook_secret": WEBHOOK_SECRET}
        async with (
            simulated.running(
                folder / "simulator",
                **{
                    "time_factor": FACTOR,
                    "draw_prompt": False,
                    **(told if webhooks else {}),
                    **(simulator_settings or {}),
                },
            ) as simulator,
            storage_peer(folder) as (stored, storage_address),
        ):
            url = database.database_url("framewire_generator")
            address = f"{places.HOST}:{places.choose_port(folder, 'generator')}"
            given = _variables(folder, url, broker.url, address, storage_address, simulator, hooks)
            child = process.Child(
                "generator",
                environment.command("generator"),
                environment.inherited() | given | (variables or {}),
                lambda: probes.grpc_serving(address),
            )
            migrate = process.Child("migrate", [*child.argv, "migrate"], child.env)
            await process.run_to_end(migrate, folder)
            program = process.Service(child, folder)
            client = await nats.connect(broker.url)
            made = Generator(
                folder, url, broker.url, simulator, stored, client, program, address, webhook_url
            )
            await bus.Bus(client).ensure_streams()
            await _subscribe(made)
            await program.start()
            try:
                yield made
            finally:
                await program.stop()
                await client.close()
    finally:
        await broker.stop()
        await database.destroy()


@asynccontextmanager
async def second(generator: Generator) -> AsyncIterator[process.Service]:
    """Another process of the same service, with the same database."""
    address = f"{places.HOST}:{places.choose_port(generator.folder, 'second')}"
    first = generator.program.child
    env = {**first.env, "GENERATOR_LISTEN": address, "FRAMEWIRE_FAILPOINTS": ""}
    env["GENERATOR_WEBHOOKS_LISTEN"] = f"{places.HOST}:0"
    child = process.Child("second", first.argv, env, lambda: probes.grpc_serving(address))
    program = process.Service(child, generator.folder)
    await program.start()
    try:
        yield program
    finally:
        await program.stop()


async def _subscribe(generator: Generator) -> None:
    async def heard(message: Msg) -> None:
        event = json_format.Parse(message.data, event_pb2.Event())
        generator.told.setdefault(event.video_id, []).append(event)

    await generator.client.jetstream().subscribe(
        subjects.EVENTS_SUBJECTS, cb=heard, ordered_consumer=True
    )
