"""Webhook deliveries: recorded with their event, taken under a lease, settled under its epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import ids, outbox, postgres
from services.gateway import announcements, webhooks

PURGED = 1000
REPLAYED = 1000
_SKEW = "interval '1 minute'"
_COLUMNS = ", ".join(
    f"{'e' if field.name in ('kind', 'video_id') else 'd'}.{field.name}"
    for field in dataclasses.fields(webhooks.Delivery)
)
_AGAIN = """
    state = 'PENDING', next_attempt_at = clock_timestamp(), leased_until = NULL, epoch = {0}.epoch + 1,
    give_up_at = clock_timestamp() + make_interval(secs => {1})
"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Times of deliveries, in seconds."""

    lease: float
    give_up: float
    disable_after: float
    each: int
    """Deliveries at once to one endpoint; to one that fails, one."""


class DeliveryStore:
    """Statements about deliveries."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def record(self, event: webhooks.Event, occurred_at: datetime, give_up: float) -> int:
        """The event and its deliveries, in one commit; how many are new. Idempotent by the event's id.

        Nothing is kept for accounts without an endpoint. Events of before an endpoint was made are not for it.
        """
        found = await self._pool.fetch(
            f"""
            SELECT endpoint_id, kinds, disabled_why FROM webhook_endpoints
            WHERE account_id = $1 AND deleted_at IS NULL AND created_at - {_SKEW} <= $2
            """,
            event.account_id,
            occurred_at,
        )
        if not found:
            return 0
        due = [
            row["endpoint_id"]
            for row in found
            if not row["disabled_why"] and webhooks.wants(row["kinds"], event.kind)
        ]
        async with self._pool.acquire() as connection, connection.transaction():
            await _keep(connection, event)
            return await _deliver(connection, due, [event.event_id] * len(due), give_up)

    async def take(self, most: int, bounds: Bounds) -> list[webhooks.Taken]:
        """Due deliveries, leased to the caller: of each endpoint a few at once, endpoints in random order."""
        found = await self._pool.fetch(
            """
            WITH due AS MATERIALIZED (
                SELECT waiting.delivery_id FROM (
                    SELECT endpoint_id, failures FROM webhook_endpoints
                    WHERE disabled_why = '' AND deleted_at IS NULL ORDER BY random()
                ) AS e CROSS JOIN LATERAL (
                    SELECT delivery_id FROM webhook_deliveries
                    WHERE endpoint_id = e.endpoint_id AND state = 'PENDING'
                      AND next_attempt_at <= clock_timestamp()
                    ORDER BY next_attempt_at, delivery_id
                    LIMIT greatest(0, CASE WHEN e.failures > 0 THEN 1 ELSE $2::bigint END - (
                        SELECT count(*) FROM webhook_deliveries
                        WHERE endpoint_id = e.endpoint_id AND leased_until > clock_timestamp()))
                    FOR UPDATE SKIP LOCKED
                ) AS waiting LIMIT $1
            )
            UPDATE webhook_deliveries d SET epoch = d.epoch + 1, attempts = d.attempts + 1,
                leased_until = clock_timestamp() + make_interval(secs => $3),
                next_attempt_at = clock_timestamp() + make_interval(secs => $3)
            FROM webhook_endpoints p, webhook_events e
            WHERE d.delivery_id IN (SELECT delivery_id FROM due)
              AND p.endpoint_id = d.endpoint_id AND e.event_id = d.event_id
            RETURNING d.delivery_id, d.epoch, d.attempts, d.endpoint_id, p.url, e.event_id, e.headers, e.body,
                p.secret, CASE WHEN p.old_secret_until > clock_timestamp() THEN p.old_secret END AS old_secret,
                clock_timestamp() AS now
            """,
            most,
            bounds.each,
            bounds.lease,
        )
        return [_taken(row) for row in found]

    async def settle(
        self, taken: webhooks.Taken, answer: webhooks.Answer, pause: float, bounds: Bounds
    ) -> str | None:
        """What has become of the delivery; None: another has it, and this result does not count.

        The endpoint's count of failures goes with it, and its end, with the event that tells of it.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            state = await connection.fetchval(
                """
                UPDATE webhook_deliveries SET leased_until = NULL,
                    state = CASE WHEN $3 THEN 'DELIVERED' WHEN give_up_at <= clock_timestamp() THEN 'FAILED'
                                 ELSE 'PENDING' END,
                    next_attempt_at = clock_timestamp() + make_interval(secs => $4),
                    tries = (CASE WHEN jsonb_array_length(tries) >= $6 THEN tries - 0 ELSE tries END)
                            || jsonb_build_array($5::jsonb
                                   || jsonb_build_object('at', extract(epoch FROM clock_timestamp())))
                WHERE delivery_id = $1 AND epoch = $2 AND state = 'PENDING' RETURNING state
                """,
                taken.delivery_id,
                taken.epoch,
                answer.good,
                pause,
                {
                    "status": answer.status,
                    "duration_ms": answer.duration_ms,
                    "error": answer.error,
                },
                webhooks.KEPT_TRIES,
            )
            if state is not None:
                await _count(connection, taken, answer, bounds.disable_after)
        return state

    async def listing(
        self, endpoint_id: str, state: str, place: tuple[datetime, str] | None, limit: int
    ) -> list[webhooks.Delivery]:
        """Deliveries to an endpoint, the newest first, from after a place."""
        created_at, delivery_id = place or (None, "")
        found = await self._pool.fetch(
            f"""
            SELECT {_COLUMNS} FROM webhook_deliveries d JOIN webhook_events e USING (event_id)
            WHERE d.endpoint_id = $1 AND ($2 = '' OR d.state = $2)
              AND ($3::timestamptz IS NULL OR (d.created_at, d.delivery_id) < ($3, $4))
            ORDER BY d.created_at DESC, d.delivery_id DESC LIMIT $5
            """,
            endpoint_id,
            state,
            created_at,
            delivery_id,
            limit,
        )
        return [webhooks.Delivery(**dict(row)) for row in found]

    async def get(self, delivery_id: str) -> webhooks.Delivery | None:
        """A delivery, whosever."""
        row = await self._pool.fetchrow(
            f"""
            SELECT {_COLUMNS} FROM webhook_deliveries d JOIN webhook_events e USING (event_id)
            WHERE d.delivery_id = $1
            """,
            delivery_id,
        )
        return webhooks.Delivery(**dict(row)) if row else None

    async def again(self, delivery_id: str, give_up: float) -> None:
        """Makes a delivery due now. Whoever is sending it does so for nothing."""
        again = _AGAIN.format("webhook_deliveries", "$2")
        await self._pool.execute(
            f"UPDATE webhook_deliveries SET {again} WHERE delivery_id = $1", delivery_id, give_up
        )

    async def replay(
        self, endpoint: webhooks.Endpoint, since: datetime, give_up: float
    ) -> tuple[int, datetime | None]:
        """Makes what was recorded since then due now: how many, and where to go on if that was not all."""
        async with self._pool.acquire() as connection, connection.transaction():
            found = await connection.fetch(
                """
                SELECT event_id, recorded_at FROM webhook_events
                WHERE account_id = $1 AND recorded_at >= $2 AND kind <> 'test'
                  AND ($3::text[] = '{}' OR kind = ANY($3))
                ORDER BY recorded_at, event_id LIMIT $4
                """,
                endpoint.account_id,
                since,
                list(endpoint.kinds),
                REPLAYED + 1,
            )
            events = [row["event_id"] for row in found[:REPLAYED]]
            await _deliver(connection, [endpoint.endpoint_id] * len(events), events, give_up, True)
        return len(events), found[REPLAYED]["recorded_at"] if len(found) > REPLAYED else None

    async def test(
        self, endpoint: webhooks.Endpoint, event: webhooks.Event, give_up: float
    ) -> webhooks.Delivery:
        """A delivery of this event to this endpoint alone. Idempotent by the event's id."""
        async with self._pool.acquire() as connection, connection.transaction():
            await _keep(connection, event)
            await _deliver(connection, [endpoint.endpoint_id], [event.event_id], give_up)
        made = await self.get(_delivery_id(endpoint.endpoint_id, event.event_id))
        assert made is not None
        return made

    async def purge(self) -> bool:
        """Removes what is too old or of removed endpoints, a batch of each; true when there may be more."""
        days, most = outbox.RETENTION_DAYS, PURGED
        done = [
            await self._pool.execute(
                """
                DELETE FROM webhook_deliveries WHERE delivery_id IN (
                    SELECT delivery_id FROM webhook_deliveries JOIN webhook_endpoints USING (endpoint_id)
                    WHERE deleted_at IS NOT NULL LIMIT $1)
                """,
                most,
            ),
            await self._pool.execute(
                """
                DELETE FROM webhook_deliveries WHERE event_id IN (
                    SELECT event_id FROM webhook_events
                    WHERE recorded_at < clock_timestamp() - make_interval(days => $1)
                    ORDER BY recorded_at LIMIT $2)
                """,
                days,
                most,
            ),
            await self._pool.execute(
                """
                DELETE FROM webhook_events e WHERE event_id IN (
                    SELECT event_id FROM webhook_events
                    WHERE recorded_at < clock_timestamp() - make_interval(days => $1)
                    ORDER BY recorded_at LIMIT $2)
                  AND NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.event_id = e.event_id)
                """,
                days,
                most,
            ),
        ]
        await self._pool.execute(
            """
            DELETE FROM webhook_endpoints e WHERE deleted_at IS NOT NULL
              AND NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.endpoint_id = e.endpoint_id)
            """
        )
        return any(int(each.split()[-1]) >= most for each in done)

    async def oldest_due_seconds(self) -> float:
        """For how long the delivery has been due that has been due longest, of endpoints that take what they get."""
        oldest = await self._pool.fetchval(
            """
            SELECT max(extract(epoch FROM clock_timestamp() - first.due))::float8
            FROM webhook_endpoints e CROSS JOIN LATERAL (
                SELECT min(next_attempt_at) AS due FROM webhook_deliveries
                WHERE endpoint_id = e.endpoint_id AND state = 'PENDING'
            ) AS first WHERE e.disabled_why = '' AND e.failures = 0 AND e.deleted_at IS NULL
            """
        )
        return max(0.0, oldest or 0.0)

    async def endpoints(self) -> Mapping[str, int]:
        """How many there are, by condition."""
        found = await self._pool.fetch(
            """
            SELECT CASE WHEN disabled_why <> '' THEN 'disabled: ' || lower(disabled_why)
                        WHEN failures > 0 THEN 'failing' ELSE 'well' END AS condition, count(*)
            FROM webhook_endpoints WHERE deleted_at IS NULL GROUP BY condition
            """
        )
        return {row["condition"]: row["count"] for row in found}


def _delivery_id(endpoint_id: str, event_id: str) -> str:
    return ids.derived_id("delivery", endpoint_id, event_id)


async def _keep(connection: postgres.Connection, event: webhooks.Event) -> None:
    await connection.execute(
        """
        INSERT INTO webhook_events (event_id, account_id, video_id, kind, headers, body)
        VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (event_id) DO NOTHING
        """,
        event.event_id,
        event.account_id,
        event.video_id,
        event.kind,
        dict(event.headers),
        event.body,
    )


async def _deliver(
    connection: postgres.Connection,
    endpoint_ids: Sequence[str],
    event_ids: Sequence[str],
    give_up: float,
    again: bool = False,
) -> int:
    """Pairs of endpoint and event to be delivered; one that there is stays as it is, or is due again."""
    known = f"UPDATE SET {_AGAIN.format('d', '$4')}" if again else "NOTHING"
    done = await connection.execute(
        f"""
        INSERT INTO webhook_deliveries AS d (delivery_id, endpoint_id, event_id, give_up_at)
        SELECT *, clock_timestamp() + make_interval(secs => $4)
        FROM unnest($1::text[], $2::text[], $3::text[])
        ON CONFLICT (endpoint_id, event_id) DO {known}
        """,
        [_delivery_id(*pair) for pair in zip(endpoint_ids, event_ids, strict=True)],
        list(endpoint_ids),
        list(event_ids),
        give_up,
    )
    return int(done.split()[-1])


async def _count(
    connection: postgres.Connection,
    taken: webhooks.Taken,
    answer: webhooks.Answer,
    disable_after: float,
) -> None:
    """Counts for or against the endpoint, as long as it is at the URL that was tried."""
    if answer.good:
        await connection.execute(
            """
            UPDATE webhook_endpoints SET failures = 0, failing_since = NULL
            WHERE endpoint_id = $1 AND failures > 0 AND url = $2
            """,
            taken.endpoint_id,
            taken.url,
        )
        return
    row = await connection.fetchrow(
        """
        UPDATE webhook_endpoints SET failures = failures + 1,
            failing_since = COALESCE(failing_since, clock_timestamp()),
            disabled_why = CASE WHEN $3 THEN 'GONE'
                WHEN failures + 1 >= $5 AND failing_since < clock_timestamp() - make_interval(secs => $4)
                THEN 'FAILING' ELSE '' END,
            disabled_at = CASE WHEN $3 OR (failures + 1 >= $5
                AND failing_since < clock_timestamp() - make_interval(secs => $4))
                THEN clock_timestamp() END
        WHERE endpoint_id = $1 AND url = $2 AND disabled_why = '' AND deleted_at IS NULL
        RETURNING account_id, disabled_why, disabled_at
        """,
        taken.endpoint_id,
        taken.url,
        answer.gone,
        disable_after,
        webhooks.LEAST_FAILURES,
    )
    if row is not None and row["disabled_why"]:
        told = announcements.webhook_disabled(
            row["account_id"], taken.endpoint_id, row["disabled_why"], row["disabled_at"]
        )
        await outbox.add(connection, told)


def _taken(row: Any) -> webhooks.Taken:
    values = dict(row)
    secret, old = values.pop("secret"), values.pop("old_secret")
    return webhooks.Taken(**values, secrets=[secret, old] if old else [secret])
