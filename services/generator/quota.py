"""The provider accounts' quota, taken from the one bucket in Postgres that all replicas share."""

from __future__ import annotations

import asyncio

from services.generator import catalogue
from services.generator.store import queue


class Quota:
    """Takes requests from the accounts' buckets."""

    def __init__(self, store: queue.QueueStore) -> None:
        self._store = store

    async def take(self, account: catalogue.ProviderAccount) -> None:
        """Waits for its turn and takes one request. A request taken by a worker that dies is simply lost."""
        while True:
            seconds = await self._store.take_request(account.name, account.requests_per_minute)
            if seconds <= 0:
                return
            await asyncio.sleep(min(seconds, 5.0))
