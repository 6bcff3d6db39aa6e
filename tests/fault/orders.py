"""Videos that are asked for while things break: each of a colour of its own, which tells its owner from any frame."""

from __future__ import annotations

import asyncio
import collections
import itertools
import os
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from framewire import client as clients
from framewire import types
from services.generator import catalogue as catalogues
from services.local import places, probes, process
from tests import pictures
from tests import system as systems
from tests.waiting import eventually

TINY = {"width": 320, "height": 180, "seconds": 1}
MODELS = {"openai_videos": "sora-2", "azure_jobs": "sora-1"}
ASKED = {
    **{dialect: {"model": model, **TINY} for dialect, model in MODELS.items()},
    "runway": {"model": "runway-gen4-turbo", "width": 960, "height": 960, "seconds": 2},
}
"""What is asked for of each dialect."""
LEVELS = (50, 110, 170)
COLOURS = tuple(itertools.product(LEVELS, repeat=3))
COLOUR_TOLERANCE = (
    16  # JPEG and H.264 change a plain colour by a few steps; neighbours are 60 apart
)
FAST = {
    "generator": {
        "GENERATOR_POST_TIMEOUT_SECONDS": "2",
        "GENERATOR_SUBMIT_LEASE_MARGIN_SECONDS": "0.5",
        "GENERATOR_PREPARE_LEASE_SECONDS": "2",
        "GENERATOR_FETCH_LEASE_SECONDS": "2",
        "GENERATOR_PASS_LEASE_SECONDS": "1",
    },
    # Mass tests: fewer frames, and strangers' films share one.
    "simulator": {
        "SIMULATOR_AZURE_MAX_CONCURRENT_JOBS": "0",
        "SIMULATOR_RUNWAY_MAX_CONCURRENT_TASKS": "0",
        "SIMULATOR_DRAW_PROMPT": "false",
        "SIMULATOR_FRAMES_PER_SECOND": "8",
    },
}
LONGEST_LEASE_SECONDS = 2.5


def dice(what: str) -> random.Random:
    """All chance of a test: from FRAMEWIRE_SEED where it is set, and said, so that a failing run can be replayed."""
    seed = os.environ.get("FRAMEWIRE_SEED") or uuid.uuid4().hex[:8]
    print(f"{what}: FRAMEWIRE_SEED={seed} replays it")
    return random.Random(f"{seed}:{what}")


def number(name: str, default: int) -> int:
    """A size of a run, from the environment where it says one."""
    return int(os.environ.get(name) or default)


def overrides(
    folder: Path, accounts: Mapping[str, Mapping[str, object]] | None = None, **fields: float
) -> dict[str, dict[str, str]]:
    """Settings of a system for mass tests; `fields` change every provider account of the catalogue, `accounts` some."""
    document = yaml.safe_load((Path(catalogues.__file__).parent / "providers.yaml").read_text())
    roomy = {"max_jobs_in_flight": 50, "requests_per_minute": 600, "clock_skew_seconds": 2}
    for account in document["provider_accounts"]:
        account.update(roomy | fields | dict((accounts or {}).get(account["name"], {})))
    path = folder / "providers.yaml"
    path.write_text(yaml.safe_dump(document))
    return {**FAST, "generator": {**FAST["generator"], "GENERATOR_PROVIDERS_FILE": str(path)}}


@dataclass(frozen=True, slots=True)
class Order:
    """One video that was asked for."""

    client: clients.Client
    video_id: str
    prompt: str
    colour: tuple[int, ...]

    async def ended(self, within_seconds: float = 180) -> types.Video:
        """The video when it is over and settled."""
        async with asyncio.timeout(within_seconds):
            while True:
                async for video in self.client.watch_video(self.video_id):
                    if video.is_settled:
                        return video


@dataclass(slots=True)
class Desk:
    """Where videos are asked for and what came of them is checked."""

    system: systems.System
    dice: random.Random
    client: clients.Client
    orders: list[Order] = field(default_factory=list)
    _colours: list[tuple[int, ...]] = field(default_factory=list)

    async def ask(self, dialect: str, tokens: str = "") -> Order:
        """One more video, of a colour that those asked for just before do not have."""
        if not self._colours:
            self._colours = self.dice.sample(COLOURS, len(COLOURS))
        colour = self._colours.pop()
        prompt = f"order {len(self.orders)} {uuid.uuid4().hex} {tokens}".strip()
        image = await self.client.upload_image(pictures.plain(colour))
        video = await self.client.create_video(prompt, image_id=image.image_id, **ASKED[dialect])
        order = Order(self.client, video.video_id, prompt, colour)
        self.orders.append(order)
        return order

    async def check(self, orders: Sequence[Order], folder: Path) -> list[types.Video]:
        """Each COMPLETED, one paid job, one charge, its owner's picture; answers those that failed as UNRESOLVED.

        Those are never charged; whoever asks says whether there may be any.
        """
        videos = await asyncio.gather(*(order.ended() for order in orders))
        paid = await self.paid()
        unresolved: list[types.Video] = []
        for order, video in zip(orders, videos, strict=True):
            assert paid[order.prompt] <= 1, f"{order.prompt} was paid {paid[order.prompt]} times"
            if video.failure is not None and video.failure.cause == "UNRESOLVED":
                assert video.credits.captured == 0, video
                unresolved.append(video)
                continue
            assert video.state == "COMPLETED", f"{order.prompt}: {video.failure}"
            assert paid[order.prompt] == 1, order.prompt
            assert video.credits.captured == video.credits.reserved > 0
            (film,) = await self.client.download_all(video, folder / f"{video.video_id}.mp4")
            seen = pictures.colour(pictures.frames(film)[0])
            film.unlink()
            off = max(abs(one - other) for one, other in zip(seen, order.colour, strict=True))
            assert off <= COLOUR_TOLERANCE, f"{order.prompt}: {seen} is not {order.colour}"
        return unresolved

    async def paid(self) -> collections.Counter[str]:
        """How many jobs the provider accepted for each prompt: the oracle."""
        log = await self.system.simulated("/_sim/log?kind=accepted")
        return collections.Counter(entry["prompt"] for entry in log["entries"])

    async def sentinels(self) -> None:
        """A finished job of ours in each list: without one, absence can never be proved."""
        first = [await self.ask(dialect) for dialect in MODELS]
        for order in first:
            assert (await order.ended()).state == "COMPLETED"


async def second_generator(system: systems.System) -> str:
    """Starts another generator on the same database; its name. It ends with the system."""
    spool = {"GENERATOR_SPOOL_DIR": str(system.stack.data_dir / "spool-2")}
    return await second_replica(system, "generator", spool)


async def second_replica(system: systems.System, service: str, env: Mapping[str, str]) -> str:
    """Starts another replica of a service on the same database, with `env` besides; its name."""
    first = system.supervisor.get(service)
    assert isinstance(first, process.Service)
    name, folder = f"{service}-2", system.stack.data_dir
    listen, metrics = (
        f"{places.HOST}:{places.choose_port(folder, part)}" for part in (name, f"{name}-metrics")
    )
    child = replace(
        first.child,
        name=name,
        env={
            **first.child.env,
            f"{service.upper()}_LISTEN": listen,
            f"{service.upper()}_METRICS_LISTEN": metrics,
            **env,
        },
        ready_probe=lambda: probes.grpc_serving(listen),
    )
    system.supervisor.add(process.Service(child, folder))
    await system.supervisor.start(name)
    return name


async def database_clock(system: systems.System, seconds: float) -> None:
    """Waits until the database's clock has gone on by so much: that is the clock leases go by."""
    async with system.database("generator") as database:
        until = await database.fetchval(
            "SELECT clock_timestamp() + make_interval(secs => $1)", seconds
        )

        async def over() -> bool:
            return await database.fetchval("SELECT clock_timestamp() > $1", until)

        await eventually(over, within_seconds=seconds + 30)


async def moves(system: systems.System) -> int:
    """How many changes of state the generator's attempts have gone through."""
    async with system.database("generator") as database:
        return await database.fetchval("SELECT coalesce(max(id), 0) FROM attempt_history")


async def under_way(system: systems.System) -> bool:
    """Whether any attempt has not ended: a fault that meets none proves nothing."""
    async with system.database("generator") as database:
        return await database.fetchval(
            "SELECT EXISTS (SELECT 1 FROM attempts WHERE state NOT IN ('COMPLETED', 'FAILED', 'CANCELLED'))"
        )
