"""Blocking calls in bounded thread pools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def run(
    pool: ThreadPoolExecutor, call: Callable[[], T], cut: Callable[[], None] | None = None
) -> T:
    """Runs a call in the pool. When cancelled it still waits for the call's end, which `cut` may hasten.

    A thread cannot be stopped, and what it does must be over before anybody cleans up behind it.
    """
    future = pool.submit(call)
    waited = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waited)
    except asyncio.CancelledError:
        if not future.cancel():
            if cut is not None:
                cut()
            await asyncio.wait({waited})
            if not waited.cancelled():
                waited.exception()  # seen, so that asyncio does not report it
        raise
