"""The real servers in containers instead of the embedded ones: FRAMEWIRE_STACK=docker.

Wants a Docker engine; what runs is a container for each server and each system, on ports of its own, removed with the
system. A killed test run leaves some: docker rm --force --volumes $(docker ps --quiet --filter label=framewire.tests)
"""

from __future__ import annotations

import abc
import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from services.local import nats as local_nats
from services.local import places, probes, process, stack
from services.local import postgres as local_postgres
from services.local import s3 as local_s3
from tests.waiting import eventually

ROOT = Path(__file__).parents[1]
STACK = os.environ.get("FRAMEWIRE_STACK") or "embedded"
if STACK not in ("embedded", "docker"):
    raise ValueError(f"FRAMEWIRE_STACK is embedded or docker, not {STACK}")
IN_DOCKER = STACK == "docker"
# As docker-compose.yml names them (a test holds both together); the same variables change them.
POSTGRES_IMAGE = os.environ.get("POSTGRES_IMAGE", "postgres:18")
NATS_IMAGE = os.environ.get("NATS_IMAGE", "nats:2.15-alpine")
S3_IMAGE = os.environ.get("S3_IMAGE", "docker.io/pgsty/silo:RELEASE.2026-09-03T13-18-01Z")
LABEL = "framewire.tests"
READY_SECONDS = 60.0


class Server(abc.ABC):
    """One container, at one address for all its life. Subclasses say which, and how to ask whether it answers."""

    image: str
    port: int

    def __init__(self) -> None:
        self.password = secrets.token_hex(16)
        self._published: int | None = None
        self._container: Any = None

    @abc.abstractmethod
    def describe(self, container: Any) -> None:
        """Adds to the container what this server needs."""

    @abc.abstractmethod
    async def answers(self) -> bool:
        """Whether it answers in its own protocol."""

    @property
    def address(self) -> str:
        """host:port, where the engine publishes it."""
        host = self._container.get_container_host_ip()
        host = "127.0.0.1" if host == "localhost" else host  # never ::1
        return f"{host}:{self._container.get_exposed_port(self.port)}"

    async def start(self) -> Self:
        """Starts, after a kill with its data, and waits until it answers in its own protocol. Leaves nothing running
        when it does not.
        """
        if self._published is None:  # by us: the engine would choose another one at each start
            self._published = places.free_port(self.image)
        await asyncio.to_thread(self._run if self._container is None else self._run_again)
        try:
            what = f"{self.image} answering"
            await eventually(self.answers, within_seconds=READY_SECONDS, what=what)
        except BaseException:
            print(b"\n".join(self._container.get_logs()).decode(errors="replace")[-4000:])
            await self.stop()
            raise
        return self

    async def kill(self) -> None:
        """SIGKILL. Its data stay for a new start."""
        await asyncio.to_thread(self._container.get_wrapped_container().kill)

    async def stop(self) -> None:
        """Removes the container and its data. Idempotent."""
        if self._container is not None:
            container, self._container = self._container, None
            await asyncio.to_thread(container.stop)

    async def destroy(self) -> None:
        await self.stop()

    def _run(self) -> None:
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer

        # Ryuk would be a fourth image to pull, from a registry of its choice; we stop what we start.
        testcontainers_config.ryuk_disabled = True
        container = DockerContainer(self.image).with_bind_ports(self.port, self._published)
        container.with_kwargs(labels={LABEL: str(os.getpid())})
        self.describe(container)
        self._container = container.start()

    def _run_again(self) -> None:
        self._container.get_wrapped_container().start()


class Postgres(Server):
    """Of the face of services.local.postgres.Postgres."""

    image, port, user = POSTGRES_IMAGE, 5432, "framewire"

    @property
    def url(self) -> str:
        return self.database_url("postgres")

    def database_url(self, name: str) -> str:
        return f"postgresql://{self.user}:{self.password}@{self.address}/{name}"

    async def create_database(self, name: str, template: str | None = None) -> None:
        await local_postgres.create_database(self.url, name, template)

    async def drop_database(self, name: str) -> None:
        await local_postgres.drop_database(self.url, name)

    def describe(self, container: Any) -> None:
        container.with_envs(POSTGRES_USER=self.user, POSTGRES_PASSWORD=self.password)
        container.with_env("POSTGRES_INITDB_ARGS", "--auth-host=scram-sha-256")
        settings = ("max_connections=300", "timezone=UTC")
        options = [part for setting in settings for part in ("-c", setting)]
        container.with_command(["postgres", *options])

    async def answers(self) -> bool:
        return await probes.postgres_answers(self.url)


class Nats(Server):
    """Of the face of services.local.nats.Nats, with the configuration of deploy/nats. Its user may do all."""

    image, port = NATS_IMAGE, 4222
    users = ("operator", "gateway", "credits", "generator", "subscriber")

    @property
    def url(self) -> str:
        return f"nats://operator:{self.password}@{self.address}"

    def describe(self, container: Any) -> None:
        config = (ROOT / "deploy" / "nats" / "nats.conf").read_bytes()
        passwords = "".join(f'{user}_password: "{self.password}"\n' for user in self.users)
        container.with_copy_into_container(config, "/tmp/nats.conf")
        container.with_copy_into_container(passwords.encode(), "/tmp/passwords.conf")
        container.with_command(["--config", "/tmp/nats.conf"])

    async def answers(self) -> bool:
        # The client sleeps two seconds after a refused connection, so it is not what asks first.
        host, _, port = self.address.partition(":")
        return await probes.tcp_accepts(host, int(port)) and await probes.nats_answers(self.url)


class S3(Server):
    """Of the face of services.local.s3.S3."""

    image, port = S3_IMAGE, 9000
    access_key, region = "framewire", local_s3.REGION

    @property
    def secret_key(self) -> str:
        return self.password

    @property
    def endpoint(self) -> str:
        return self.address

    def describe(self, container: Any) -> None:
        container.with_envs(MINIO_ROOT_USER=self.access_key, MINIO_ROOT_PASSWORD=self.password)
        container.with_envs(MINIO_REGION=self.region, MINIO_UPDATE="off")
        container.with_command(["server", "/data"])

    async def answers(self) -> bool:
        return await probes.http_answers(self.endpoint)


def postgres(data_dir: Path) -> Postgres | local_postgres.Postgres:
    """The Postgres of this mode, to be started."""
    return Postgres() if IN_DOCKER else local_postgres.Postgres(data_dir)


def nats(data_dir: Path) -> Nats | local_nats.Nats:
    """The NATS of this mode, to be started."""
    return Nats() if IN_DOCKER else local_nats.Nats(data_dir)


async def lose_disk(server: Server | process.Program) -> None:
    """Kills it and starts it again with nothing that it had."""
    await server.kill()
    if isinstance(server, Server):
        await server.stop()
    else:
        shutil.rmtree(server.data_dir / server.name)
    await server.start()


@dataclass(frozen=True, slots=True)
class Outer:
    """Servers in containers for a Stack; none, with which it starts its own."""

    servers: Mapping[str, Server]
    environ: Mapping[str, str]

    def server(self, whole: stack.Stack, name: str) -> Server | process.Program:
        """Who serves the stack as postgres, nats or s3."""
        return self.servers[name] if self.servers else whole.supervisor.get(name)


@asynccontextmanager
async def outer_servers() -> AsyncIterator[Outer]:
    """Fresh ones, running; removed at the end."""
    if not IN_DOCKER:
        yield Outer({}, {})
        return
    database, bus, objects = Postgres(), Nats(), S3()
    servers = {"postgres": database, "nats": bus, "s3": objects}
    try:
        async with asyncio.TaskGroup() as group:
            for server in servers.values():
                group.create_task(server.start())
        environ = {
            "FRAMEWIRE_POSTGRES_URL": database.url,
            "FRAMEWIRE_NATS_URL": bus.url,
            "FRAMEWIRE_S3_ENDPOINT": objects.endpoint,
            "FRAMEWIRE_S3_ACCESS_KEY": objects.access_key,
            "FRAMEWIRE_S3_SECRET_KEY": objects.secret_key,
        }
        yield Outer(servers, environ)
    finally:
        await asyncio.gather(*(server.stop() for server in servers.values()))
