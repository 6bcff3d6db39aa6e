"""What operators see of storage, read from its database. Each replica shows the same."""

from __future__ import annotations

import asyncio

from prometheus_client import Gauge

from kit import errors, loops, service
from services.storage import blobs, store

PUTS = Gauge(
    "framewire_storage_puts", "Puts under way, those that died and wait for the sweeper included."
)
OLDEST_PUT = Gauge("framewire_storage_oldest_put_seconds", "Age of the oldest of them.")
USED_BYTES = Gauge("framewire_storage_used_bytes", "Bytes of all assets, by kind.", ["kind"])
USED_COUNT = Gauge("framewire_storage_assets", "Assets whose bytes are there, by kind.", ["kind"])
USED_SECONDS = 60.0
"""That counts every row."""
DELETING = Gauge("framewire_storage_deleting", "Deleted assets whose bytes are still there.")
OVERDUE = Gauge(
    "framewire_storage_retention_overdue_seconds",
    "For how long the asset is past its end, and still there, that is so longest; those in use not counted.",
)

S3_UP = Gauge(
    "framewire_storage_s3_up", "1 while S3 answers this process and shows it its buckets."
)


class Reach:
    """The loop that looks whether S3 answers, and says so: as a metric, and by the name `s3` of the health service.

    The process itself stays SERVING: much that it does needs no S3, and callers get better errors from it than from
    a balancer without replicas.
    """

    def __init__(self, blobs_: blobs.Blobs, process: service.Process, seconds: float) -> None:
        self._blobs = blobs_
        self._process = process
        self._seconds = seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Looks until told to stop. What was not looked at yet is not believed to be well."""
        await self._tell(False)
        await loops.every("reach", self._seconds, self.run_once, stopping)

    async def run_once(self) -> None:
        """One look."""
        try:
            await self._blobs.check()
        except errors.Unavailable:
            await self._tell(False)
            raise
        await self._tell(True)

    async def _tell(self, is_up: bool) -> None:
        S3_UP.set(is_up)
        await self._process.tell("s3", is_up)


class Measures:
    """The loop that reads them."""

    def __init__(self, store_: store.MeasureStore) -> None:
        self._store = store_

    async def run(self, stopping: asyncio.Event) -> None:
        """Reads until told to stop."""
        await loops.every("measures", loops.MEASURE_SECONDS, self.run_once, stopping)

    async def run_once(self) -> None:
        """Reads once."""
        found = await self._store.read()
        PUTS.set(found.puts)
        OLDEST_PUT.set(found.oldest_put_seconds)
        DELETING.set(found.deleting)
        OVERDUE.set(found.overdue_seconds)


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
