"""What the data directory remembers: ports, secrets, and who holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil

from services.local import errors

HOST = "127.0.0.1"
# Below the kernel's ephemeral range: a client that keeps reconnecting to a stopped server must
# never get the server's own port as its local one (TCP connects to itself and blocks the port).
_PORTS = range(17000, 30000)
_handed_out: set[int] = set()
_claims: dict[int, IO[str]] = {}


def prepare(data_dir: Path) -> Path:
    """Creates the directory (idempotent) and returns its absolute path."""
    try:
        # As root, others may pass through (not list): Postgres runs as another account below it.
        data_dir.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        for name in ("log", "run", "ports", "secrets"):
            (data_dir / name).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise errors.LocalError(
            f"cannot use {data_dir} as data directory: {error.strerror}; "
            "choose another with --data-dir"
        ) from error
    if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        raise errors.LocalError(
            f"{data_dir} belongs to another user (uid {data_dir.stat().st_uid}); "
            "run as that user or choose another --data-dir"
        )
    return data_dir.resolve()


def write_private(path: Path, text: str) -> None:
    """Replaces the file whole, readable by its owner alone."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)


def secret(path: Path, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
    """The secret kept in this file, made on the first call. Idempotent."""
    with contextlib.suppress(FileNotFoundError):
        if kept := path.read_text().strip():
            return kept
    made = make()
    write_private(path, made + "\n")
    return made


def port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise
    return True


def who_holds(port: int) -> str:
    """Names the listener, as far as this user may see it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr[1:] == (port,)
                and connection.pid is not None
            ):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "a process of another user"


def require_port(port: int, option: str) -> int:
    """A port somebody asked for by number is used or refused, never exchanged."""
    if not 0 < port < 65536:
        raise errors.LocalError(f"{option} {port} is not a port number (1 to 65535)")
    if not port_is_free(port):
        raise errors.LocalError(
            f"port {port} ({option}) is in use by {who_holds(port)}; stop it or choose another port"
        )
    return port


def choose_port(data_dir: Path, name: str, preferred: int | None = None) -> int:
    """The port `name` had here before, else the preferred one, else any; free, and remembered."""
    note = data_dir / "ports" / name
    candidates: list[int] = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        candidates.append(int(note.read_text()))
    if preferred is not None:
        candidates.append(preferred)
    for place, port in enumerate(candidates):
        remembered = place == 0 and note.exists()
        if (remembered or port not in _handed_out) and 0 < port < 65536 and _taken(port):
            break
    else:
        port = free_port(name)
    note.write_text(f"{port}\n")
    return port


def free_port(name: str) -> int:
    """Any free port, kept from others until this process ends."""
    for port in random.sample(_PORTS, 50):
        if port not in _handed_out and _taken(port):
            return port
    raise errors.LocalError(f"no free port for {name} on {HOST}")


def _taken(port: int) -> bool:
    """Whether it was free and is ours now."""
    if not (port_is_free(port) and _claimed(port)):
        return False
    _handed_out.add(port)
    return True


def _claimed(port: int) -> bool:
    """Whether the port is ours among all stacks of this user: two that start together must not choose the same one."""
    if port in _claims:
        return True
    directory = Path(tempfile.gettempdir()) / f"framewire-ports-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    file = (directory / str(port)).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    _claims[port] = file  # held until this process ends
    return True


@contextlib.contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """Holds the data directory for this process; a second holder gets one clear line."""
    with (data_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise errors.LocalError(
                f"already running on {data_dir} (pid {file.read().strip() or 'unknown'}); "
                "stop that one or choose another --data-dir"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
