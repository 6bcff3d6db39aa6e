"""What the generator's benchmarks share: the real processes, jobs on the bus, events as a subscriber sees them."""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import nats
import psutil
import yaml
from google.protobuf import json_format
from nats.aio.client import Client
from nats.aio.msg import Msg

from framewire import subjects
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.generator.v1 import job_pb2
from kit import bus, ids
from services.generator import catalogue
from services.local import stack
from tests import waiting

CATALOGUE = Path(catalogue.__file__).parent / "providers.yaml"
KEYS = {"ours": "sim-ours", "verbatim": "sim-verbatim", "polite": "sim-polite"}
"""Each side has a key of its own at the simulator: its own jobs, its own quota."""
FILM = {"model": "sora-2", "width": 64, "height": 64, "variants": 1}
ACCOUNT = "b" * 26


@dataclass(frozen=True, slots=True)
class Ended:
    """A video's last event, with our clock's time of its arrival."""

    kind: str
    at: float
    event: event_pb2.Event


@dataclass
class Bench:
    """The running generator with its peers, each a process of its own."""

    stack: stack.Stack
    client: Client
    http: httpx.AsyncClient
    ended: dict[str, Ended] = field(default_factory=dict)

    async def publish(self, count: int, seconds: int = 1) -> list[job_pb2.Job]:
        """So many jobs of one account, of which no two look alike."""
        jobs = [job(seconds) for _ in range(count)]
        for made in jobs:
            headers = {subjects.VIDEO_HEADER: f"{made.video_id} {made.account_id}"}
            await self.client.jetstream().publish(
                subjects.JOBS_SUBJECT, made.SerializeToString(), headers=headers
            )
        return jobs

    async def all_ended(self, count: int, within_seconds: float) -> None:
        """Waits for so many last events."""
        what = f"the end of {count} videos"
        await waiting.eventually(
            lambda: len(self.ended) >= count, within_seconds=within_seconds, what=what
        )

    @asynccontextmanager
    async def database(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection to the generator's database."""
        connection = await asyncpg.connect(self.stack.addresses.database_url("generator"))
        try:
            yield connection
        finally:
            await connection.close()

    async def simulated(self, path: str) -> Any:
        """An answer of the simulator's own pages."""
        return (await self.http.get(path, timeout=60)).json()

    async def logged(self, kind: str, key_name: str) -> list[dict[str, Any]]:
        """Lines of the simulator's log about one key."""
        entries = (await self.simulated(f"/_sim/log?kind={kind}"))["entries"]
        return [entry for entry in entries if entry["key_name"] == key_name]

    async def too_many(self, key_name: str) -> int:
        """How often a key was answered 429."""
        return sum(entry["status"] == 429 for entry in await self.logged("refused", key_name))

    async def requests(self, key_name: str) -> dict[str, int]:
        """What a key asked for: create, list, retrieve, content."""
        asked = (await self.simulated("/_sim/state"))["requests"]
        return {
            name.removeprefix(f"{key_name} "): count
            for name, count in asked.items()
            if name.startswith(f"{key_name} ")
        }

    def process(self, name: str) -> psutil.Process:
        """A program of the stack."""
        pid = next(one.pid for one in self.stack.supervisor.status() if one.name == name)
        return psutil.Process(pid)

    def told(self, event: str) -> Iterator[dict[str, Any]]:
        """Lines of the generator's log."""
        path = self.stack.supervisor.get("generator").log_path
        for line in path.read_text().splitlines():
            if line.startswith("{") and f'"{event}"' in line:
                yield json.loads(line)


def job(seconds: int = 1) -> job_pb2.Job:
    """A job as the gateway sends it."""
    made = job_pb2.Job(
        video_id=ids.new_id(),
        account_id=ACCOUNT,
        spec=vocabulary_pb2.VideoSpec(prompt=f"bench {uuid.uuid4()}", seconds=seconds, **FILM),
        lane=vocabulary_pb2.LANE_STANDARD,
        weight=100,
    )
    made.start_by.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    return made


class Memory:
    """Resident memory of a process: now, and the most since the last `begin`, as the kernel counts it."""

    def __init__(self, process: psutil.Process) -> None:
        self._folder = Path(f"/proc/{process.pid}")

    def begin(self) -> float:
        """Forgets the peak; answers what is resident now, in MB."""
        (self._folder / "clear_refs").write_text("5")
        return self._read("VmRSS")

    def peak(self) -> float:
        """The most since then, in MB."""
        return self._read("VmHWM")

    def _read(self, name: str) -> float:
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process and its children."""
    spent = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        spent += times.user + times.system
    return spent


def _overrides(
    folder: Path,
    account: Mapping[str, Any],
    simulator: Mapping[str, Any],
    generator: Mapping[str, Any],
) -> dict[str, dict[str, str]]:
    document = yaml.safe_load(CATALOGUE.read_text())
    document["provider_accounts"] = [document["provider_accounts"][0] | account]
    path = folder / "providers.yaml"
    path.write_text(yaml.safe_dump(document))
    keys = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    simulated = {"api_keys": keys, "draw_prompt": "false", "queue_seconds": 0}
    simulated |= {"content_lag_seconds": 0, **simulator}
    settings = {"providers_file": path, "provider_api_key": KEYS["ours"], **generator}
    return {
        "simulator": {f"SIMULATOR_{name.upper()}": str(value) for name, value in simulated.items()},
        "generator": {f"GENERATOR_{name.upper()}": str(value) for name, value in settings.items()},
    }


@asynccontextmanager
async def running(
    time_factor: float = 1.0,
    *,
    account: Mapping[str, Any] | None = None,
    simulator: Mapping[str, Any] | None = None,
    generator: Mapping[str, Any] | None = None,
) -> AsyncIterator[Bench]:
    """Generator, storage, simulator, Postgres, NATS and S3, new ones."""
    with tempfile.TemporaryDirectory(prefix="framewire-bench-") as folder:
        place = Path(folder)
        whole = stack.Stack(
            place,
            time_factor=time_factor,
            services=("simulator", "storage", "generator"),
            overrides=_overrides(place, account or {}, simulator or {}, generator or {}),
            environ={},
            report=lambda _: None,
        )
        try:
            await whole.start()
            client = await nats.connect(whole.addresses.nats_url)
            base_url = whole.addresses.provider_base_url.removesuffix("/v1")
            try:
                async with httpx.AsyncClient(base_url=base_url, trust_env=False) as http:
                    made = Bench(whole, client, http)
                    await bus.Bus(client).ensure_streams()
                    await _subscribe(made)
                    yield made
            finally:
                await client.close()
        finally:
            await whole.destroy()


async def _subscribe(bench: Bench) -> None:
    async def heard(message: Msg) -> None:
        at = time.time()
        kind = message.subject.rsplit(".", 1)[1]
        if kind in subjects.TERMINAL_KINDS:
            event = json_format.Parse(message.data, event_pb2.Event())
            bench.ended.setdefault(event.video_id, Ended(kind, at, event))

    await bench.client.subscribe(subjects.EVENTS_SUBJECTS, cb=heard)
