"""Natural batches: who shares one, and who is harmed by another's mistake or end: nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from kit import batches


class Work:
    """Doubles numbers, when it is let; a negative one fails the batch that it is in."""

    def __init__(self, most: int = 10) -> None:
        self.batches: list[list[int]] = []
        self.free = asyncio.Event()
        self.batcher = batches.Batcher(self._run, most)

    async def _run(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        await self.free.wait()
        if min(numbers) < 0:
            raise ValueError(numbers)
        return [2 * number for number in numbers]

    async def ask(self, *numbers: int) -> list[asyncio.Task[int]]:
        """One task each; each has asked by the time that this returns."""
        tasks = [asyncio.create_task(self.batcher.do(number)) for number in numbers]
        await asyncio.sleep(0)
        return tasks


async def test_who_comes_while_one_is_served_shares_the_next() -> None:
    work = Work()
    tasks = await work.ask(1)
    tasks += await work.ask(2, 3, 4)
    work.free.set()
    assert await asyncio.gather(*tasks) == [2, 4, 6, 8]
    assert work.batches == [[1], [2, 3, 4]]


async def test_no_batch_is_larger_than_it_may_be() -> None:
    work = Work(most=2)
    tasks = await work.ask(1, 2, 3, 4, 5)
    work.free.set()
    assert await asyncio.gather(*tasks) == [2, 4, 6, 8, 10]
    assert [len(batch) for batch in work.batches] == [1, 2, 2]


async def test_what_fails_fails_alone() -> None:
    work = Work()
    tasks = await work.ask(1)
    tasks += await work.ask(2, -3, 4)
    work.free.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answer for answer in answers if not isinstance(answer, ValueError)] == [2, 4, 8]
    assert isinstance(answers[2], ValueError)
    assert work.batches == [[1], [2, -3, 4], [2], [-3], [4]]


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_who_goes_takes_nobody_along(gone: int) -> None:
    work = Work()
    tasks = await work.ask(1, 2, 3)
    tasks[gone].cancel()
    await asyncio.sleep(0)
    work.free.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers.pop(gone), asyncio.CancelledError)
    assert answers == [2 * number for number in (1, 2, 3) if number != gone + 1]
    assert await work.batcher.do(7) == 14


async def test_too_few_answers_leave_nobody_waiting() -> None:
    async def mute(_: Sequence[int]) -> list[int]:
        await asyncio.sleep(0)
        return []

    batcher = batches.Batcher(mute, 10)
    asked = asyncio.gather(*(batcher.do(number) for number in range(3)), return_exceptions=True)
    answers = await asyncio.wait_for(asked, 5)
    assert [type(answer) for answer in answers] == [ValueError] * 3
