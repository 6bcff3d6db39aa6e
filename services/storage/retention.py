"""Retention: what has reached its end is hidden, told of, and removed by the sweeper."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import Counter

from kit import loops, telemetry
from kit.failpoints import failpoint
from services.storage import store

log = telemetry.logger(__name__)

BATCH = 100
EXPIRED = Counter("framewire_storage_expired", "Assets that reached the end of their retention.")


class Retention:
    """The loop over ends."""

    def __init__(
        self, store_: store.Store, seconds: float, told: Callable[[], None], swept: loops.Wake
    ) -> None:
        self._store = store_
        self._seconds = seconds
        self._told = told
        self._swept = swept

    async def run(self, stopping: asyncio.Event) -> None:
        """Expires until told to stop."""
        await loops.every("retention", self._seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One batch; true when there is more."""
        ended = await self._store.keeping.expire(BATCH)
        if ended:
            await failpoint("storage.expire.after_commit")
            log.info("assets_expired", count=ended)
            EXPIRED.inc(ended)
            self._told()
            self._swept.ring()
        return ended >= BATCH
