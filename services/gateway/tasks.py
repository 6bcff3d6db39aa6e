"""Work that goes on when the caller who asked for it has hung up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Shielded:
    """Runs work in tasks of its own, each bounded. Leaving the context waits for what still runs."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._group.__aexit__(kind, error, trace)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result. Cancelling this ends the waiting, not the work. TimeoutError after the bound."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting any more: then its error has been logged where it arose, and is not reported again.
        outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._group.create_task(self._work(work, outcome))
        return await asyncio.shield(outcome)

    async def _work(self, work: Coroutine[Any, Any, T], outcome: asyncio.Future[T]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                result = await work
        except asyncio.CancelledError:
            outcome.cancel()
            raise
        except Exception as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)
