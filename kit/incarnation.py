"""Which life of a database this is: what tells a database that was restored, or fell behind, from one that went on.

Each database has a row that its service advances; the same numbers are kept outside it, in a bucket of the bus. A
database that is behind what is kept outside has forgotten something: its service is in RECOVERY then, serves reads, and
does nothing that costs or moves money until `framewire recover` has made good what was forgotten. ADR 16 has the cases.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Protocol

from nats.js import api
from nats.js import errors as js_errors
from prometheus_client import Gauge

from kit import bus, errors, ids, loops, postgres, telemetry

log = telemetry.logger(__name__)

BUCKET = "framewire_incarnations"
FIRST_SECONDS = 3.0
"""A process waits so long for its first comparison before it serves; then it serves closed."""
FIRST_PAUSE_SECONDS = 0.1
CLOSED_PAUSE_SECONDS = 1.0
RETRY_AFTER_SECONDS = 30.0

RECOVERY = Gauge(
    "framewire_recovery",
    "1 while this replica is closed: its database was restored, or could not be compared yet.",
)


@dataclass(frozen=True, slots=True)
class Life:
    """The numbers that are kept in both places."""

    incarnation_id: str
    generation: int
    """Raised by each recovery."""
    counter: int
    """Raised every few seconds."""


@dataclass(frozen=True, slots=True)
class Row:
    """The database's own."""

    life: Life
    written_in: str
    """The database that the row was written in: a copy has another."""
    bucket: str
    """The bucket that its numbers were last kept in; empty: in none yet."""
    advanced_at: datetime
    recovery_since: datetime | None
    recovery_reason: str


@dataclass(frozen=True, slots=True)
class Standing:
    """What operators are shown."""

    open: bool
    incarnation_id: str
    reason: str
    since: datetime | None
    restored_to: datetime | None
    """The database knows everything up to then."""


class Loop(Protocol):
    """As `kit.service` has it."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until told to stop."""
        ...


def why_behind(row: Row | None, kept: Life | None, database: str) -> str:
    """Why this database is not the one that went on; empty: it is, or nothing says that it is not.

    `kept` must have been read before the row, which is always written first; `database` is where the row was found.
    """
    if row is None:
        return "the database knows of no life, and one is kept outside it" if kept else ""
    if row.written_in != database:
        return "the database is a copy of another"
    if kept is None or row.life.generation > kept.generation:
        return ""
    if row.life.generation < kept.generation:
        return "the database is from before the last recovery"
    if row.life.incarnation_id != kept.incarnation_id:
        return "another database's life is kept outside it"
    if row.life.counter < kept.counter:
        return f"the database is {kept.counter - row.life.counter} steps behind what is kept outside it"
    return ""


class Incarnation:
    """Compares and advances; tells the rest of the process whether it may act."""

    def __init__(self, service: str, pool: postgres.Pool, bus_: bus.Bus, seconds: float) -> None:
        self._service = service
        self._pool = pool
        self._bus = bus_
        self._seconds = seconds
        self._opened, self._closed = asyncio.Event(), asyncio.Event()
        self._bell = loops.Wake()
        self._seen: Life | None = None
        self._compared = False
        self._close("not compared yet")

    @property
    def open(self) -> bool:
        """Whether anything may be done that costs or moves money."""
        return self._opened.is_set()

    def require(self) -> None:
        """Raises Unavailable/RECOVERY while closed."""
        if not self.open:
            raise errors.Unavailable(
                "RECOVERY",
                f"{self._service} waits for its recovery after a restore; try again later",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )

    async def begin(self) -> None:
        """The first comparison, before anything is served. While the bus is away it is left to the loop."""
        until = asyncio.get_running_loop().time() + FIRST_SECONDS
        while not self._compared and asyncio.get_running_loop().time() < until:
            try:
                await self.run_once()
            except bus.BusError:
                await asyncio.sleep(FIRST_PAUSE_SECONDS)
        if not self._compared:
            log.error("incarnation_not_compared", service=self._service)

    async def run(self, stopping: asyncio.Event) -> None:
        """Compares and advances until told to stop; more often while closed, so that the end is soon seen."""
        await loops.every("incarnation", self._seconds, self._paced, stopping, self._bell)

    async def _paced(self) -> None:
        try:
            await self.run_once()
        finally:
            if not self.open:
                asyncio.get_running_loop().call_later(CLOSED_PAUSE_SECONDS, self._bell.ring)

    def gate(self, loop: Loop) -> Loop:
        """The loop, run only while open; told to stop, and let come to its end, when it closes."""
        return _Gated(self, loop)

    async def run_once(self) -> None:
        """Compares, and where nothing is amiss advances: the row first, then what is kept outside."""
        kept, revision, bucket = await self._outside()
        # After what is kept outside: another replica may advance both between our two looks.
        async with self._pool.acquire() as connection, connection.transaction():
            database = await connection.fetchval(_DATABASE)
            row = await _read(connection)
            reason = why_behind(row, kept, database) or self._went_back(row)
            if row is not None and row.recovery_since is not None:
                reason = row.recovery_reason
            elif reason:
                await _enter(connection, row, reason, database)
                log.error("recovery_entered", service=self._service, reason=reason)
            else:
                await self._advance(connection, row, kept, database, bucket)
            now = await _read(connection)
        assert now is not None
        self._compared, self._seen = True, now.life
        if reason:
            self._close(reason)
            return
        await self._keep(now.life, revision)
        self._open()

    def _went_back(self, row: Row | None) -> str:
        seen = self._seen
        if seen is None:
            return ""
        if row is None:
            return "the database has lost its life while it was in use"
        here = (row.life.generation, row.life.counter)
        return (
            "the database went back while it was in use"
            if here < (seen.generation, seen.counter)
            else ""
        )

    async def _advance(
        self,
        connection: postgres.Connection,
        row: Row | None,
        kept: Life | None,
        database: str,
        bucket: str,
    ) -> None:
        if row is None:
            await connection.execute(_FIRST, ids.new_id(), database, bucket)
            return
        if kept is None:
            known = row.bucket not in ("", bucket)
            log.warning("incarnation_kept_anew", service=self._service, bucket_is_new=known)
        await connection.execute(_NEXT, bucket)

    async def _outside(self) -> tuple[Life | None, int, str]:
        """What is kept, its revision, and which bucket it is in. Raises one of BusError."""
        stream = self._bus.jetstream
        if not self._bus.client.is_connected:
            raise ConnectionError("the bus is away")
        try:
            values = await stream.key_value(BUCKET)
        except js_errors.NotFoundError:
            config = api.KeyValueConfig(bucket=BUCKET, history=1, storage=api.StorageType.FILE)
            values = await stream.create_key_value(config)
        bucket = await self._bus.stream_created(f"KV_{BUCKET}")
        try:
            entry = await values.get(self._service)
        except js_errors.KeyNotFoundError:
            return None, 0, bucket
        return Life(**json.loads(entry.value or b"")), entry.revision or 0, bucket

    async def _keep(self, life: Life, revision: int) -> None:
        """Keeps it outside, unless another replica has kept something since."""
        values = await self._bus.jetstream.key_value(BUCKET)
        data = json.dumps(asdict(life)).encode()
        try:
            if revision:
                await values.update(self._service, data, last=revision)
            else:
                await values.create(self._service, data)
        except js_errors.KeyWrongLastSequenceError:
            log.debug("incarnation_kept_by_another", service=self._service)

    async def standing(self) -> Standing:
        """What the database says now."""
        row = await _read(self._pool)
        if row is None:
            return Standing(self.open, "", "not compared yet", None, None)
        closed = row.recovery_since is not None or not self.open
        return Standing(
            not closed,
            row.life.incarnation_id,
            row.recovery_reason or ("" if self.open else "not compared yet"),
            row.recovery_since,
            row.advanced_at if row.recovery_since else None,
        )

    async def end_recovery(
        self, work: Callable[[postgres.Connection], Awaitable[object]] | None = None
    ) -> None:
        """A new life begins: later than every one that is kept. Idempotent. `work` is done in the same transaction."""
        kept, revision, bucket = await self._outside()
        async with self._pool.acquire() as connection, connection.transaction():
            row = await _read(connection)
            if row is None or row.recovery_since is None:
                return
            if work is not None:
                await work(connection)
            generation = max(row.life.generation, kept.generation if kept else 0) + 1
            database = await connection.fetchval(_DATABASE)
            await connection.execute(_RENEW, ids.new_id(), generation, database, bucket)
            now = await _read(connection)
        assert now is not None
        self._seen = now.life
        await self._keep(now.life, revision)
        log.warning("recovery_ended", service=self._service, generation=generation)
        self._open()

    def _open(self) -> None:
        self._closed.clear()
        self._opened.set()
        RECOVERY.set(0)

    def _close(self, reason: str) -> None:
        if self.open:
            log.error("recovery", service=self._service, reason=reason)
        self._opened.clear()
        self._closed.set()
        RECOVERY.set(1)

    async def until_open(self) -> None:
        """Waits until it may act."""
        await self._opened.wait()

    async def until_closed(self) -> None:
        """Waits until it may not act any more."""
        await self._closed.wait()


class _Gated:
    """A loop that runs only while its database is the one that went on."""

    def __init__(self, incarnation: Incarnation, loop: Loop) -> None:
        self._incarnation = incarnation
        self._loop = loop

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until told to stop."""
        stop = asyncio.ensure_future(stopping.wait())
        try:
            while not stopping.is_set():
                await _first(stop, self._incarnation.until_open())
                if not stopping.is_set():
                    await self._while_open(stop)
        finally:
            stop.cancel()

    async def _while_open(self, stop: asyncio.Future[Any]) -> None:
        inner = asyncio.Event()
        running = asyncio.create_task(self._loop.run(inner))
        closed = asyncio.ensure_future(self._incarnation.until_closed())
        try:
            await asyncio.wait({stop, closed, running}, return_when=asyncio.FIRST_COMPLETED)
            inner.set()
            await running
        finally:
            closed.cancel()
            running.cancel()


async def _first(stop: asyncio.Future[Any], other: Coroutine[Any, Any, None]) -> None:
    waiting = asyncio.ensure_future(other)
    try:
        await asyncio.wait({stop, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


_DATABASE = """
    SELECT system_identifier::text || '/' ||
        (SELECT oid::text FROM pg_database WHERE datname = current_database())
    FROM pg_control_system()
"""
_FIRST = """
    INSERT INTO incarnation (incarnation_id, generation, counter, written_in, bucket, advanced_at)
    VALUES ($1, 1, 1, $2, $3, clock_timestamp()) ON CONFLICT DO NOTHING
"""
_NEXT = """
    UPDATE incarnation SET counter = counter + 1, bucket = $1, advanced_at = clock_timestamp()
"""
_RENEW = """
    UPDATE incarnation SET incarnation_id = $1, generation = $2, counter = 1, written_in = $3, bucket = $4,
        advanced_at = clock_timestamp(), recovery_since = NULL, recovery_reason = ''
"""


async def _read(connection: postgres.Connection | postgres.Pool) -> Row | None:
    found = await connection.fetchrow("SELECT * FROM incarnation")
    if found is None:
        return None
    return Row(
        Life(found["incarnation_id"], found["generation"], found["counter"]),
        found["written_in"],
        found["bucket"],
        found["advanced_at"],
        found["recovery_since"],
        found["recovery_reason"],
    )


async def _enter(
    connection: postgres.Connection, row: Row | None, reason: str, database: str
) -> None:
    if row is None:
        # It may lack everything: as far back as anything is kept.
        await connection.execute(
            """
            INSERT INTO incarnation (incarnation_id, generation, counter, written_in, advanced_at)
            VALUES ($1, 1, 0, $2, clock_timestamp() - interval '35 days') ON CONFLICT DO NOTHING
            """,
            ids.new_id(),
            database,
        )
    await connection.execute(
        """
        UPDATE incarnation SET recovery_since = clock_timestamp(), recovery_reason = $1
        WHERE recovery_since IS NULL
        """,
        reason,
    )
