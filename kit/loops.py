"""Loops of a service: each has `run(stopping)` and a testable `run_once()`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from kit import telemetry

log = telemetry.logger(__name__)

MEASURE_SECONDS = 15.0
"""Pause between two looks of whoever keeps gauges, about as often as they are scraped."""
LAG_STEP_SECONDS = 0.5


class Wake:
    """A bell: whoever waits goes on at once. Rings while nobody waits are kept, as one."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wakes the waiter, now or when it next waits."""
        self._event.set()

    async def wait(self, seconds: float, stopping: asyncio.Event) -> None:
        """Waits for the bell, the end of the time or the end of the process."""
        ring = asyncio.ensure_future(self._event.wait())
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait({ring, stop}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ring.cancel()
            stop.cancel()
            self._event.clear()


async def every(
    name: str,
    seconds: float,
    run_once: Callable[[], Awaitable[object]],
    stopping: asyncio.Event,
    wake: Wake | None = None,
) -> None:
    """Runs `run_once` again and again until told to stop; a failure is logged, counted and tried again after the pause.

    A result that is true means that there is more to do: no pause then.
    """
    bell = wake or Wake()
    while not stopping.is_set():
        more: object = False
        with telemetry.loop_pass(name) as outcome:
            try:
                more = await run_once()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                outcome.failed = True
                log.warning("loop_failed", loop=name, error=repr(error), exc_info=True)
        if not more:
            await bell.wait(seconds * random.uniform(0.8, 1.2), stopping)


class Lag:
    """Watches how late the event loop is: the one number that says that a process has too much to do."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Watches until told to stop."""
        while not stopping.is_set():
            worst, until = 0.0, time.monotonic() + MEASURE_SECONDS
            while time.monotonic() < until and not stopping.is_set():
                began = time.monotonic()
                await asyncio.sleep(LAG_STEP_SECONDS)
                worst = max(worst, time.monotonic() - began - LAG_STEP_SECONDS)
            telemetry.LOOP_LAG.set(worst)
