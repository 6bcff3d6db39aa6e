"""Waiting for conditions, never for times."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(
    condition: Callable[[], Awaitable[T] | T],
    *,
    within_seconds: float = 30.0,
    every_seconds: float = 0.02,
    what: str = "",
) -> T:
    """The first true answer of `condition`; fails with the last answer or error when the time is over."""
    deadline = time.monotonic() + within_seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            answer = condition()
            if inspect.isawaitable(answer):
                answer = await answer
        except AssertionError as error:
            last = error
        else:
            if answer:
                return answer
            last = answer
        await asyncio.sleep(every_seconds)
    raise AssertionError(
        f"{what or condition.__name__} did not come within {within_seconds} s: {last!r}"
    )
