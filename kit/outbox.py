"""The outbox: what a transaction wants told, and the relay that tells it, in order, at least once.

Every database that speaks has two tables of this shape (see any service's migrations):

    outbox(ce_id text PRIMARY KEY, ordering_key text, seq bigint, shard smallint, subject text, headers jsonb,
           data bytea, created_at timestamptz, published_at timestamptz, stream_sequence bigint)
    outbox_stream(stream text PRIMARY KEY, created text)

Rows stay RETENTION_DAYS; `Retention` then takes those that were told. When the stream turns out to be new (its disk was
lost), all of them are told again under the same ids.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kit import bus, loops, postgres, telemetry

log = telemetry.logger(__name__)

SHARDS = 4
BATCH = 200
RETENTION_DAYS = 35
RETENTION_BATCH = 1000
_LOCK_CLASS = 0x6F757462


@dataclass(frozen=True, slots=True)
class Row:
    """One message to be told. `ordering_key` and `seq` give its place; `ce_id` is its id for ever."""

    ce_id: str
    ordering_key: str
    seq: int
    subject: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def headed(row: Row) -> Row:
    """The row with the headers that every message has, the current trace among them."""
    headers = {
        **telemetry.trace_headers(),
        "ce-specversion": "1.0",
        "ce-id": row.ce_id,
        "content-type": "application/json",
        **row.headers,
    }
    return replace(row, headers=headers)


async def add(connection: postgres.Connection, row: Row) -> None:
    """Puts a message into the outbox, inside the caller's transaction. Idempotent by ce_id."""
    await add_all(connection, [headed(row)])


async def add_all(connection: postgres.Connection, rows: Sequence[Row]) -> None:
    """Puts messages that are `headed` into the outbox, by one statement."""
    await connection.execute(
        """
        INSERT INTO outbox (ce_id, ordering_key, seq, shard, subject, headers, data, created_at)
        SELECT *, clock_timestamp() FROM unnest($1::text[], $2::text[], $3::bigint[], $4::smallint[],
            $5::text[], $6::jsonb[], $7::bytea[])
        ON CONFLICT (ce_id) DO NOTHING
        """,
        [row.ce_id for row in rows],
        [row.ordering_key for row in rows],
        [row.seq for row in rows],
        [zlib.crc32(row.ordering_key.encode()) % SHARDS for row in rows],
        [row.subject for row in rows],
        [dict(row.headers) for row in rows],
        [row.data for row in rows],
    )


class Retention:
    """Deletes what was told RETENTION_DAYS ago: by then the stream has forgotten it, and it is not told again."""

    def __init__(self, pool: postgres.Pool, seconds: float = 3600) -> None:
        self._pool = pool
        self._seconds = seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Deletes until told to stop."""
        await loops.every("outbox_retention", self._seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """One batch; true when there may be more. What was never told stays, however old: somebody waits for it."""
        async with self._pool.acquire() as connection:
            # Two replicas take rows apart; neither waits for the relay.
            done = await connection.execute(
                """
                DELETE FROM outbox WHERE ce_id IN (
                    SELECT ce_id FROM outbox
                    WHERE published_at IS NOT NULL
                      AND created_at < clock_timestamp() - make_interval(days => $1)
                    ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
                )
                """,
                RETENTION_DAYS,
                RETENTION_BATCH,
            )
        return int(done.split()[-1]) >= RETENTION_BATCH


class Relay:
    """Tells the outbox to a stream. Any number of replicas may run it: one at a time has a shard."""

    def __init__(
        self, pool: postgres.Pool, bus_: bus.Bus, stream: str, seconds: float = 0.5
    ) -> None:
        self._pool = pool
        self._bus = bus_
        self._stream = stream
        self._seconds = seconds
        self._checked_at = -seconds
        self._measured_at = -loops.MEASURE_SECONDS
        self._wake = loops.Wake()

    def ring(self) -> None:
        """There is something to tell: called after a commit."""
        self._wake.ring()

    async def run(self, stopping: asyncio.Event) -> None:
        """Tells until told to stop."""
        await loops.every("outbox_relay", self._seconds, self.run_once, stopping, self._wake)

    async def run_once(self) -> bool:
        """One pass over the shards in which something waits; true when one was full."""
        await self._measure()  # above all while the bus is away
        if not self._bus.client.is_connected:
            return False
        # Not at every ring: under load that would be several questions for each event.
        if time.monotonic() - self._checked_at >= self._seconds:
            await self._check_stream()
            self._checked_at = time.monotonic()
        waiting = await self._pool.fetch(
            """
            SELECT shard FROM generate_series(0, $1) AS shard WHERE EXISTS (
                SELECT 1 FROM outbox o WHERE o.published_at IS NULL AND o.shard = shard::smallint)
            """,
            SHARDS - 1,
        )
        told = [await self._pass(row["shard"]) for row in waiting]
        return max(told, default=0) >= BATCH

    async def _measure(self) -> None:
        """Shows what waits, of all shards: each replica says the same."""
        if time.monotonic() - self._measured_at < loops.MEASURE_SECONDS:
            return
        self._measured_at = time.monotonic()
        row = await self._pool.fetchrow(
            """
            SELECT count(*) AS waiting,
                coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS oldest
            FROM outbox WHERE published_at IS NULL
            """
        )
        assert row is not None
        telemetry.OUTBOX_WAITING.set(row["waiting"])
        telemetry.OUTBOX_OLDEST.set(max(0.0, row["oldest"]))

    async def _check_stream(self) -> None:
        """Marks everything untold when the stream is not the one that it was told to."""
        await self._bus.ensure_streams()
        created = await self._bus.stream_created(self._stream)
        async with self._pool.acquire() as connection, connection.transaction():
            before = await connection.fetchval(
                "SELECT created FROM outbox_stream WHERE stream = $1 FOR UPDATE", self._stream
            )
            if before == created:
                return
            await connection.execute(
                """
                INSERT INTO outbox_stream (stream, created) VALUES ($1, $2)
                ON CONFLICT (stream) DO UPDATE SET created = EXCLUDED.created
                """,
                self._stream,
                created,
            )
            if before is not None:
                count = await connection.execute(
                    """
                    UPDATE outbox SET published_at = NULL, stream_sequence = NULL
                    WHERE published_at IS NOT NULL
                      AND created_at > clock_timestamp() - make_interval(days => $1)
                    """,
                    RETENTION_DAYS,
                )
                log.warning("outbox_told_again", stream=self._stream, rows=count.split()[-1])

    async def _pass(self, shard: int) -> int:
        """How many messages were told."""
        async with self._pool.acquire() as connection, connection.transaction():
            mine = await connection.fetchval(
                "SELECT pg_try_advisory_xact_lock($1, $2)", _LOCK_CLASS, shard
            )
            if not mine:
                return 0
            rows = await connection.fetch(
                """
                SELECT ce_id, ordering_key, subject, headers, data FROM outbox
                WHERE published_at IS NULL AND shard = $1
                ORDER BY ordering_key, seq LIMIT $2
                """,
                shard,
                BATCH,
            )
            by_key: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                by_key.setdefault(row["ordering_key"], []).append(dict(row))
            results = await asyncio.gather(*(self._tell(run) for run in by_key.values()))
            told = [item for result in results for item in result]
            if told:
                await connection.execute(
                    """
                    UPDATE outbox SET published_at = clock_timestamp(), stream_sequence = t.sequence
                    FROM unnest($1::text[], $2::bigint[]) AS t(ce_id, sequence)
                    WHERE outbox.ce_id = t.ce_id
                    """,
                    [ce_id for ce_id, _ in told],
                    [sequence for _, sequence in told],
                )
        return len(told)

    async def _tell(self, rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
        """Tells one key's messages one after the other; stops at the first that is not certain."""
        told: list[tuple[str, int]] = []
        for row in rows:
            try:
                sequence = await self._bus.publish(
                    row["subject"], bytes(row["data"]), row["headers"], row["ce_id"]
                )
            except bus.BusError as error:
                log.warning("publish_failed", ce_id=row["ce_id"], error=repr(error))
                break
            told.append((row["ce_id"], sequence))
        return told
