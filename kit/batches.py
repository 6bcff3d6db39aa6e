"""Natural batches: what was asked for while one batch was under way is done together by the next.

Who asks alone is served at once; the busier it gets, the fewer statements and commits each costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Batcher(Generic[Asked, Answer]):
    """Collects what callers ask for; `run` answers a batch, in its order, all in one transaction.

    A batch that fails is run again one by one, so that nobody fails for what another one asked. `run` must therefore
    be idempotent, as everything is that may be asked for twice.
    """

    def __init__(
        self, run: Callable[[Sequence[Asked]], Awaitable[Sequence[Answer]]], most: int
    ) -> None:
        self._run = run
        self._most = most
        self._turn = asyncio.Lock()
        self._waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []

    async def do(self, asked: Asked) -> Answer:
        """The answer to it. Raises what `run` raised for it."""
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, mine))
        async with self._turn:
            if not mine.done():
                await self._batch()
        return await mine

    async def _batch(self) -> None:
        """Whoever has the turn serves the first that wait, the others among them."""
        batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        try:
            await self._serve(batch)
        except asyncio.CancelledError:
            # Only who had the turn is gone: the others are served by the next of them.
            self._waiting = [one for one in batch if not one[1].done()] + self._waiting
            raise

    async def _serve(self, batch: Sequence[tuple[Asked, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._run([asked for asked, _ in batch])
            served = list(zip(batch, answers, strict=True))
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await self._serve([one])
            else:
                batch[0][1].set_exception(error)
                batch[0][1].exception()  # its asker may be gone, and then nobody looks
            return
        for (_, answered), answer in served:
            answered.set_result(answer)
