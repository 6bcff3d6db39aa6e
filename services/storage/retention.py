"""Retention: what has reached its end is hidden, told of, and removed by the sweeper; and how much there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import Counter, Gauge

from kit import loops, telemetry
from services.storage import store

log = telemetry.logger(__name__)

BATCH = 100
USED_SECONDS = 60.0
EXPIRED = Counter("framewire_storage_expired", "Assets that reached the end of their retention.")
USED_BYTES = Gauge("framewire_storage_used_bytes", "Bytes of all assets, by kind.", ["kind"])
USED_COUNT = Gauge("framewire_storage_assets", "Assets whose bytes are there, by kind.", ["kind"])


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
            log.info("assets_expired", count=ended)
            EXPIRED.inc(ended)
            self._told()
            self._swept.ring()
        return ended >= BATCH


class Usage:
    """The loop that counts what there is, for operators."""

    def __init__(self, store_: store.Store, seconds: float = USED_SECONDS) -> None:
        self._store = store_
        self._seconds = seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Counts until told to stop."""
        await loops.every("usage", self._seconds, self.run_once, stopping)

    async def run_once(self) -> None:
        """One count."""
        for used in await self._store.keeping.used(None):
            USED_BYTES.labels(used.kind).set(used.size_bytes)
            USED_COUNT.labels(used.kind).set(used.count)
