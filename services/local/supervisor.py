"""Runs programs side by side, says who is up and at once who died. Restarts nobody by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from services.local import errors, process

Child = process.Child


@dataclass(frozen=True, slots=True)
class Status:
    """One program, now."""

    name: str
    state: str  # "not started", "starting", "up", "stopped" or "died"
    pid: int | None
    exit_code: int | None


class Supervisor:
    """Programs by name, in the order of their start; they are stopped in reverse order.

    Use as `async with`: leaving it stops all. Should this process be killed, the kernel ends them.
    """

    def __init__(
        self,
        data_dir: Path,
        children: Iterable[Child] = (),
        *,
        report: Callable[[str], None] = print,
    ) -> None:
        self.data_dir = data_dir
        self._report = report
        self._programs: dict[str, process.Program] = {}
        self._reported: dict[str, int | None] = {}
        for child in children:
            self.add(process.Service(child, data_dir))

    async def __aenter__(self) -> Self:
        try:
            await self.start_all()
        except BaseException:
            await self.stop_all()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop_all()

    def add(self, program: process.Program) -> None:
        """Replaces one of the same name that ended."""
        if program.name in self._programs and self._programs[program.name].running:
            raise errors.LocalError(f"two programs are called {program.name}")
        self._programs[program.name] = program

    def get(self, name: str) -> process.Program:
        try:
            return self._programs[name]
        except KeyError:
            known = ", ".join(self._programs) or "none"
            raise errors.LocalError(f"no program is called {name}; there are: {known}") from None

    @property
    def names(self) -> list[str]:
        return list(self._programs)

    async def start_all(self) -> None:
        """Those not yet running, all at once. The first failure is raised; the caller stops all."""
        await process.together(*(program.start() for program in self._programs.values()))

    async def stop_all(self) -> None:
        """In reverse order, each gracefully, then by force. Nothing stays."""
        failures: list[Exception] = []
        for program in reversed(self._programs.values()):
            try:
                await program.stop()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    async def start(self, name: str) -> None:
        await self.get(name).start()

    async def stop(self, name: str) -> None:
        await self.get(name).stop()

    async def kill(self, name: str) -> None:
        await self.get(name).kill()

    async def restart(self, name: str, env: Mapping[str, str] | None = None) -> None:
        """With `env`, these variables are added to its environment, for good."""
        program = self.get(name)
        if env is not None:
            if not isinstance(program, process.Service):
                raise errors.LocalError(f"{name} takes no environment")
            program.child = replace(program.child, env={**program.child.env, **env})
        await program.restart()

    def pause(self, name: str) -> None:
        self.get(name).pause()

    def resume(self, name: str) -> None:
        self.get(name).resume()

    async def wait_exit(self, name: str, timeout_seconds: float = 30.0) -> int:
        return await self.get(name).wait_exit(timeout_seconds)

    def status(self) -> list[Status]:
        return [
            Status(name, _state(program), program.pid, program.exit_code)
            for name, program in self._programs.items()
        ]

    def check(self) -> list[str]:
        """One line, also reported, for each program that died by itself since the last call."""
        notices: list[str] = []
        for name, program in self._programs.items():
            died = not program.end_expected and program.exit_code is not None
            if died and self._reported.get(name) != program.pid:
                self._reported[name] = program.pid
                program.sweep()
                notices.append(program.death_notice())
        for notice in notices:
            self._report(notice)
        return notices

    async def watch(self, interval_seconds: float = 0.2) -> None:
        """Checks until cancelled."""
        while True:
            self.check()
            await asyncio.sleep(interval_seconds)


def _state(program: process.Program) -> str:
    if program.running:
        return "starting" if program.end_expected else "up"
    if program.exit_code is None:
        return "not started"
    return "stopped" if program.end_expected else "died"
