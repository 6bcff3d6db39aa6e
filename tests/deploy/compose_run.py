"""`make test-compose`: builds the images, starts docker-compose.yml with several replicas of each service, makes a
video in each dialect, kills one replica of each while ten more are made, checks the books and the log of the provider,
restarts every replica, one after the other, while calls go on and none fails, has Prometheus scrape all of them, and
removes all.

Wants a Docker engine and the compose plugin (or docker-compose 1.29). Where no registry can be reached,
../shared/tools/stand-in-images.sh makes stand-ins for the base images. FRAMEWIRE_KEEP=1 leaves it running.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from framewire import client, types
from framewire.gateway.v1 import operator_pb2, operator_pb2_grpc
from tests.deploy import compose_watch
from tests.deploy.steps import Failed, require, say
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
KILLED = ("generator", "storage", "credits", "gateway")
REPLICAS = {"generator": 3, "storage": 2, "credits": 2, "gateway": 2}
VIDEOS = 10
CREDITS = 1000
ALL_WITHIN_SECONDS = 420.0
MODELS = {"sora-2": "openai_videos", "sora-1": "azure_jobs"}  # the dialect by which each is paid
TINY = {"width": 320, "height": 180, "seconds": 1}
LOG = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8099/_sim/log?kind=accepted').read().decode())"
KEEP = bool(os.environ.get("FRAMEWIRE_KEEP"))


def run(*command: str, env: dict[str, str] | None = None, quiet: bool = False) -> str:
    """Its output; raises Failed with the last of it."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode and not quiet:
        raise Failed(
            f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return done.stdout


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that the kernel hands out."""
    for first in range(17700, 29000, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return first
    raise Failed("no ports are free")


class Compose:
    """The project under test: its own name, secrets, ports, networks and volumes."""

    def __init__(self, secrets: Path) -> None:
        self.project = f"framewiretest{os.getpid()}"
        first = free_ports(4)
        self.address = f"127.0.0.1:{first}"
        self.s3 = f"127.0.0.1:{first + 1}"
        self.prometheus = f"127.0.0.1:{first + 3}"
        self.secrets = secrets
        self.env = os.environ | {
            "FRAMEWIRE_SECRETS": str(secrets),
            "FRAMEWIRE_TAG": "test",
            "FRAMEWIRE_TIME_FACTOR": "5",
            "FRAMEWIRE_GATEWAY_PUBLISH": self.address,
            "FRAMEWIRE_S3_PUBLISH": self.s3,
            "FRAMEWIRE_S3_PUBLIC_ENDPOINT": self.s3,
            "FRAMEWIRE_NATS_PUBLISH": f"127.0.0.1:{first + 2}",
            "FRAMEWIRE_PROMETHEUS_PUBLISH": self.prometheus,
        }
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        self._command = ("docker", "compose") if plugin.returncode == 0 else ("docker-compose",)
        require(
            shutil.which(self._command[0]),
            "neither `docker compose` nor docker-compose is installed",
        )

    @property
    def operator_key(self) -> str:
        return (self.secrets / "operator_key").read_text().strip()

    def __call__(self, *arguments: str, quiet: bool = False) -> str:
        return run(*self._command, "-p", self.project, *arguments, env=self.env, quiet=quiet)

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What the engine says of each replica."""
        ids = self("ps", "-q", service).split()
        return json.loads(run("docker", "inspect", *ids)) if ids else []

    def healthy(self, service: str, replicas: int) -> bool:
        found = [one["State"].get("Health", {}).get("Status") for one in self.containers(service)]
        return found.count("healthy") == replicas

    def kill_one(self, service: str) -> str:
        """SIGKILL to all processes of one replica but the init, which ends of it. The engine starts it again."""
        victim = self.containers(service)[0]["Id"]
        run("docker", "exec", victim, "sh", "-c", "kill -9 -1", quiet=True)
        return victim

    def accepted(self, prompt: str) -> list[dict[str, Any]]:
        """The jobs that the provider accepted, and bills, by its own log."""
        answer = json.loads(self("exec", "-T", "simulator", "python", "-c", LOG))
        entries = answer["entries"] if isinstance(answer, dict) else answer
        return [entry for entry in entries if prompt in entry.get("prompt", "")]


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A directory; what is left running goes on reading its secrets there."""
    place = Path(tempfile.mkdtemp(prefix="framewire-compose-"))
    try:
        yield place
    finally:
        if not KEEP:
            shutil.rmtree(place)


@contextlib.contextmanager
def started(secrets: Path) -> Iterator[Compose]:
    """The project, up and healthy; removed at the end with its volumes."""
    compose = Compose(secrets)
    run("deploy/compose/make-secrets.sh", env=compose.env)
    say("building the images, one after the other")
    for service in (*KILLED, "simulator"):
        compose("build", "-q", service)
    try:
        say(f"starting with {REPLICAS}")
        scales = [part for name in KILLED for part in ("--scale", f"{name}={REPLICAS[name]}")]
        compose("up", "-d", "--no-build", *scales)
        yield compose
    except BaseException:
        print(
            compose("ps", quiet=True),
            compose("logs", "--tail=30", quiet=True)[-20_000:],
            flush=True,
        )
        raise
    finally:
        if KEEP:
            say(f"left running: project {compose.project}, {compose.address}, secrets in {secrets}")
        else:
            compose("down", "--volumes", "--remove-orphans", quiet=True)
            say("removed")


async def all_healthy(compose: Compose) -> None:
    async def healthy() -> bool:
        unwell = [
            name
            for name in KILLED
            if not await asyncio.to_thread(compose.healthy, name, REPLICAS[name])
        ]
        assert not unwell, f"not healthy: {unwell}"
        return True

    await eventually(healthy, within_seconds=120, every_seconds=1)


async def first_video(
    compose: Compose, caller: client.Client, place: Path, model: str
) -> types.Video:
    """From a photo to a file downloaded from the public address."""
    out = place / f"{model}.mp4"
    prompt = f"first {uuid.uuid4().hex}"
    photo = ROOT / "examples" / "rocket.jpg"
    # A character that only databases in UTF-8 take as jsonb.
    labels = {"naughty": "\x80"}
    video = await caller.generate(prompt, photo, out=out, model=model, labels=labels, **TINY)
    require(video.labels == labels, f"the labels came back as {video.labels}")
    require(video.state == "COMPLETED", f"the first video of {model} is {video.state}")
    require(out.read_bytes()[4:8] == b"ftyp", "what was downloaded is no MP4")
    url = (await caller.get_download_url(video.video_id)).url
    require(
        f"//{compose.s3}/" in url,
        f"the download address is not the public one: {url.split('?')[0]}",
    )
    paid = [entry["dialect"] for entry in compose.accepted(prompt)]
    require(paid == [MODELS[model]], f"the first video of {model} was paid as {paid}")
    say(f"made a video of {model}: {out.stat().st_size} bytes from {compose.s3}")
    return video


async def ten_more(compose: Compose, caller: client.Client, place: Path) -> list[types.Video]:
    """Ten videos at once, the models in turn, one replica of each service killed while they are made."""
    admitted: asyncio.Queue[str] = asyncio.Queue()
    prompts = [f"video {number} {uuid.uuid4().hex}" for number in range(VIDEOS)]
    models = list(MODELS)

    async def make(number: int) -> types.Video:
        def told(video: types.Video) -> None:
            if video.video_id not in seen:
                seen.add(video.video_id)
                admitted.put_nowait(video.video_id)

        seen: set[str] = set()
        out = place / f"{number}.mp4"
        video = await caller.generate(
            prompts[number], out=out, on_progress=told, model=models[number % len(models)], **TINY
        )
        require(out.read_bytes()[4:8] == b"ftyp", f"video {number} is no MP4")
        return video

    async def kill() -> None:
        for service in KILLED:
            for _ in range(2):  # so that work is under way at each kill
                await admitted.get()
            victim = await asyncio.to_thread(compose.kill_one, service)
            say(f"killed one {service} ({victim[:12]})")

    async with asyncio.timeout(ALL_WITHIN_SECONDS), asyncio.TaskGroup() as group:
        killing = group.create_task(kill())
        making = [group.create_task(make(number)) for number in range(VIDEOS)]
    assert killing.done()
    videos = [task.result() for task in making]
    paid = {prompt: len(await asyncio.to_thread(compose.accepted, prompt)) for prompt in prompts}
    require(set(paid.values()) == {1}, f"not every video was paid once: {sorted(paid.values())}")
    say(f"{VIDEOS} more videos are made, each paid once")
    return videos


async def check_books(
    compose: Compose, caller: client.Client, videos: Sequence[types.Video]
) -> None:
    """What was captured is what was reserved is what is gone; the ledger's own proof finds nothing."""
    for video in videos:
        require(video.state == "COMPLETED", f"{video.video_id} is {video.state}")
        require(video.credits.settlement == "DONE", f"{video.video_id} is not settled")
        require(
            video.credits.captured == video.credits.reserved > 0,
            f"{video.video_id}: {video.credits}",
        )
    all_videos = [video async for video in caller.list_videos()]
    spent = sum(video.credits.captured for video in all_videos)
    balance = await caller.balance()
    require(len(all_videos) == len(videos), f"{len(all_videos)} videos are listed")
    require(
        (balance.available_credits, balance.held_credits) == (CREDITS - spent, 0),
        f"{spent} were captured of {CREDITS}, and the balance is {balance}",
    )
    async with grpc.aio.insecure_channel(compose.address) as channel:
        stub = operator_pb2_grpc.OperatorServiceStub(channel)
        metadata = (("authorization", f"Bearer {compose.operator_key}"),)
        request = operator_pb2.CheckBooksRequest()
        books = await stub.CheckBooks(request, metadata=metadata, timeout=30, wait_for_ready=True)
    require(not books.findings, f"the books do not hold: {list(books.findings)}")
    say(f"the books hold: {spent} of {CREDITS} credits captured, none held")


async def check_restarts(compose: Compose) -> None:
    """Who was killed is back: exactly one replica of each."""
    await all_healthy(compose)
    restarts = {
        name: sum(one["RestartCount"] for one in compose.containers(name)) for name in KILLED
    }
    require(restarts == dict.fromkeys(KILLED, 1), f"restarts: {restarts}")
    say("every killed replica is back and healthy")


async def rolling_restart(compose: Compose, caller: client.Client, video_id: str) -> None:
    """Every replica is told to end and started again while callers call; what they are answered is never an error."""
    ended, answered = asyncio.Event(), 0

    async def calling() -> None:
        nonlocal answered
        while not ended.is_set():
            await caller.get_video(video_id)
            await caller.quote_video("a look", **TINY)
            answered += 2

    async def making() -> int:
        made = 0
        while not ended.is_set():
            video = await caller.generate(f"rolling {uuid.uuid4().hex}", **TINY)
            require(video.state == "COMPLETED", f"{video.video_id} is {video.state}")
            made += 1
        return made

    async def restarting() -> None:
        for service in reversed(KILLED):
            for replica in await asyncio.to_thread(compose.containers, service):
                await asyncio.to_thread(run, "docker", "restart", "-t", "50", replica["Id"])
                await all_healthy(compose)
            say(f"restarted every {service}")
        ended.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(restarting())
        videos = group.create_task(making())
        for _ in range(4):
            group.create_task(calling())
    say(
        f"rolling restart: {answered} calls answered and {videos.result()} videos made, none failed"
    )


async def check(compose: Compose, place: Path) -> None:
    await all_healthy(compose)
    say("all are healthy")
    async with client.Client(compose.address, compose.operator_key) as operator:
        account = await operator.create_account("compose")
        await operator.grant(account.account_id, CREDITS)
        key = await operator.create_api_key(account_id=account.account_id, display_name="compose")
    async with client.Client(compose.address, key.secret, retry_seconds=120) as caller:
        videos = [await first_video(compose, caller, place, model) for model in MODELS]
        videos += await ten_more(compose, caller, place)
        await check_books(compose, caller, videos)
        await check_restarts(compose)
        await rolling_restart(compose, caller, videos[0].video_id)
        await caller.delete_video(videos[0].video_id)
    await compose_watch.bus_is_used(compose, KILLED)
    say("every consumer is there, and everything is told")
    if await compose_watch.prometheus_scrapes(compose, REPLICAS):
        say("Prometheus scrapes every replica, and evaluates every alert")
    else:
        say("no image of Prometheus here: NOT CHECKED that it scrapes every replica")


def main() -> None:
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        sys.exit("no Docker engine answers (docker info)")
    try:
        with workplace() as place, started(place / "secrets") as compose:
            asyncio.run(check(compose, place))
    except (Failed, AssertionError) as error:
        sys.exit(f"test-compose: {error}")
    say("test-compose: passed")


if __name__ == "__main__":
    main()
