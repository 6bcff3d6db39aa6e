"""One program as a subprocess in a group of its own: started, probed, stopped, never orphaned."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from services.local import errors, places

Probe = Callable[[], Awaitable[bool]]

_LAUNCHER = str(Path(__file__).with_name("child.py"))
_LOG_LIMIT_BYTES = 10 * 1024 * 1024
_POLL_SECONDS = 0.02
_PROBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Account:
    """Who a program runs as, when not as us."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Child:
    """How to run one program. Without a probe it counts as ready once it runs."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    ready_probe: Probe | None = None
    ready_seconds: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0
    # What the kernel sends when the supervisor is gone.
    death_signal: signal.Signals = signal.SIGKILL
    account: Account | None = None
    cwd: Path = Path("/")


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def plain_environment(home: Path) -> dict[str, str]:
    """For servers: nothing of the user's (RCLONE_*, MINIO_*, proxies) may change how they run."""
    return {"PATH": os.defpath, "HOME": str(home), "LANG": "C.UTF-8", "TZ": "UTC"}


class Program(abc.ABC):
    """Something to run. The kernel ends it with the *thread* that started it: use one that lasts."""

    def __init__(self, name: str, data_dir: Path) -> None:
        self.name = name
        self.data_dir = places.prepare(data_dir)
        self.log_path = self.data_dir / "log" / f"{name}.log"
        # True while an end of the program would be our own doing.
        self.end_expected = True
        self._record_path = self.data_dir / "run" / f"{name}.json"
        self._popen: subprocess.Popen[bytes] | None = None
        self._child: Child | None = None

    @abc.abstractmethod
    async def prepare(self) -> Child:
        """Creates what the program needs (idempotent) and says how to run it."""

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen is not None else None

    @property
    def exit_code(self) -> int | None:
        """None while it runs or before it ran; negative: the signal."""
        return self._popen.poll() if self._popen is not None else None

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    async def start(self) -> None:
        """Starts and waits until ready. Idempotent. Raises LocalError, leaving nothing running."""
        if self.running:
            return
        await self._end_leftover()
        child = await self.prepare()
        self.spawn(child)
        try:
            await self._until_ready(child)
        except BaseException:
            await self.kill()
            raise
        self.end_expected = False

    async def stop(self) -> None:
        """Asks it to end, then makes it. Idempotent."""
        self.end_expected = True
        if self._popen is None or self._child is None:
            return
        if self.running:
            self.resume()  # what is paused cannot hear
            self._signal_group(self._child.stop_signal)
            with contextlib.suppress(TimeoutError):
                await self.wait_exit(self._child.stop_seconds)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL to it and everything it started, at once. Idempotent."""
        self.end_expected = True
        if self._popen is None:
            return
        self._signal_tree(signal.SIGKILL)
        await self.wait_exit(10.0)
        self.sweep()

    def sweep(self) -> None:
        """Ends helpers of a program that ended without them."""
        self._signal_group(signal.SIGKILL)
        self._record_path.unlink(missing_ok=True)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def pause(self) -> None:
        """SIGSTOP: alive and silent."""
        self._signal_tree(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_tree(signal.SIGCONT)

    async def wait_exit(self, timeout_seconds: float = 30.0) -> int:
        """Its exit code. Raises TimeoutError."""
        if self._popen is None:
            raise errors.LocalError(f"{self.name} was never started")
        async with asyncio.timeout(timeout_seconds):
            # Asking works from any event loop; child watchers of asyncio belong to one.
            while (code := self._popen.poll()) is None:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_SECONDS)
        return code

    def last_log_line(self) -> str:
        with contextlib.suppress(OSError), self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""

    def death_notice(self) -> str:
        code = self.exit_code
        how = "is not running" if code is None else describe_exit(code)
        last = self.last_log_line()
        return f"{self.name} {how}{': ' + last if last else ''} (log: {self.log_path})"

    def spawn(self, child: Child) -> None:
        """Starts the program, without waiting for it."""
        if self.log_path.exists() and self.log_path.stat().st_size > _LOG_LIMIT_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        account = child.account or Account(-1, -1)
        launcher = [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid())]
        launcher += [str(int(child.death_signal)), str(account.uid), str(account.gid)]
        with self.log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                [*launcher, *child.argv],
                env=dict(child.env),
                cwd=child.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in the terminal is ours to hear and to pass on in order
            )
        self._child = child
        self._write_record(self._popen.pid)

    async def _until_ready(self, child: Child) -> None:
        deadline = time.monotonic() + child.ready_seconds
        while time.monotonic() < deadline:
            if not self.running:
                raise errors.LocalError(f"while starting, {self.death_notice()}")
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_PROBE_SECONDS):
                    if child.ready_probe is None or await child.ready_probe():
                        return
            await asyncio.sleep(_POLL_SECONDS)
        raise errors.LocalError(
            f"{self.name} was not ready after {child.ready_seconds:g} s (log: {self.log_path})"
        )

    def _signal_group(self, number: signal.Signals) -> None:
        if self._popen is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, number)

    def _signal_tree(self, number: signal.Signals) -> None:
        """The group is not enough: Postgres puts each of its processes into a group of its own."""
        if not self.running:
            return
        descendants: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            descendants = psutil.Process(self.pid).children(recursive=True)
        self._signal_group(number)
        for process in descendants:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _write_record(self, pid: int) -> None:
        with contextlib.suppress(psutil.Error):
            record = {"program": _identity(pid), "supervisor": _identity(os.getpid())}
            places.write_private(self._record_path, json.dumps(record))

    async def _end_leftover(self) -> None:
        """Ends what a dead supervisor left behind: two servers on one directory would ruin it."""
        try:
            record = json.loads(self._record_path.read_text())
            program, supervisor = _find(record["program"]), _find(record["supervisor"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if program is None:
            return
        if supervisor is not None:
            raise errors.LocalError(
                f"{self.name} on {self.data_dir} already runs (pid {program.pid}), "
                f"started by process {supervisor.pid}"
            )
        descendants = program.children(recursive=True)
        program.send_signal(signal.SIGINT)
        if not await _gone(program, 10.0):
            for process in (program, *descendants):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            await _gone(program, 10.0)


class Service(Program):
    """A program described once; `restart(env=...)` of the supervisor changes its environment."""

    def __init__(self, child: Child, data_dir: Path) -> None:
        super().__init__(child.name, data_dir)
        self.child = child

    async def prepare(self) -> Child:
        return self.child


def _identity(pid: int) -> dict[str, float]:
    return {"pid": pid, "started": psutil.Process(pid).create_time()}


def _find(identity: dict[str, float]) -> psutil.Process | None:
    """The process that was meant, not another one that got its pid later."""
    try:
        process = psutil.Process(int(identity["pid"]))
        same = abs(process.create_time() - identity["started"]) < 0.05
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


async def _gone(process: psutil.Process, timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


async def run_to_end(child: Child, data_dir: Path, timeout_seconds: float = 60.0) -> None:
    """Runs a command that ends by itself. LocalError unless it succeeds; leaves nothing running."""
    task = Service(child, data_dir)
    task.spawn(child)
    try:
        code = await task.wait_exit(timeout_seconds)
    except TimeoutError:
        raise errors.LocalError(
            f"{child.name} did not end within {timeout_seconds:g} s (log: {task.log_path})"
        ) from None
    finally:
        await task.kill()
    if code != 0:
        raise errors.LocalError(task.death_notice())


async def together(*work: Coroutine[object, object, object]) -> None:
    """All at once; the first failure stops the others and is raised as the one line it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failures:
        if (known := failures.subgroup(errors.LocalError)) is not None:
            first = known.exceptions[0]
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
        raise
