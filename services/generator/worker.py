"""The submitting worker's standing: a session of its own that holds an advisory lock for as long as it may still send.

Whoever finds an attempt of a worker that went silent can see by the lock whether that worker is gone for good (a
stopped process still holds it, a dead one cannot send any more).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from kit import postgres


class Worker:
    """One connection, outside the pool and outside any pooler, with its lock."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()
        self.key = 0

    @asynccontextmanager
    async def session(self) -> AsyncIterator[tuple[asyncpg.Connection, int]]:
        """The connection and its lock's key, for one commit at a time. A lost one is replaced, under a new key."""
        async with self._turn:
            if self._connection is None or self._connection.is_closed():
                await self._open()
            assert self._connection is not None
            yield self._connection, self.key

    async def _open(self) -> None:
        connection = await asyncpg.connect(
            self._url,
            timeout=5,
            command_timeout=5,
            server_settings={"application_name": "generator-worker", "synchronous_commit": "on"},
        )
        key = random.getrandbits(62)
        try:
            await postgres.prepare(connection)
            await connection.execute("SELECT pg_advisory_lock($1)", key)
        except BaseException:
            connection.terminate()
            raise
        # Only now: a connection without its lock must never be sent on.
        self._connection, self.key = connection, key

    async def aclose(self) -> None:
        """Gives the lock up: nothing is sent after this."""
        if self._connection is not None and not self._connection.is_closed():
            self._connection.terminate()
