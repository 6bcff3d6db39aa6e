"""Events to webhook endpoints: recorded as they come on the bus, sent by whichever replica takes them."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC

from google.protobuf import json_format
from nats.aio.msg import Msg
from prometheus_client import Counter, Gauge

from framewire import subjects
from framewire.events.v1 import event_pb2
from kit import bus, loops, telemetry
from kit.failpoints import failpoint
from services.gateway import config, posting, store, webhooks
from services.gateway.store import deliveries

log = telemetry.logger(__name__)

DURABLE = "gateway-webhooks"
CONCURRENT = 128
EACH = 4
PURGE_SECONDS = 600.0
LEASE_FACTOR = 3
"""A lease is so many times as long as a try: when it ends, whoever had it has given up, or died."""

DELIVERIES = Counter(
    "framewire_webhook_deliveries",
    "Tries to deliver an event to a webhook endpoint, by what came of it.",
    ["outcome"],
)
OLDEST_DUE = Gauge(
    "framewire_webhook_oldest_due_seconds",
    "For how long the delivery has been due that has been due longest, of webhook endpoints that do not fail.",
)

CONDITIONS = ("well", "failing", "disabled: owner", "disabled: gone", "disabled: failing")
ENDPOINTS = Gauge(
    "framewire_webhook_endpoints", "Webhook endpoints of all accounts, by condition.", ["condition"]
)


class Recorder:
    """The second consumer of EVENTS: what is to be delivered is in rows before the message is acknowledged."""

    def __init__(
        self, kept: store.DeliveryStore, deliverer: Deliverer, give_up_seconds: float
    ) -> None:
        self._kept = kept
        self._deliverer = deliverer
        self._give_up_seconds = give_up_seconds

    def loop(self, bus_: bus.Bus) -> bus.PullLoop:
        """The durable consumer that feeds this."""
        return bus.PullLoop(
            bus_, subjects.EVENTS_STREAM, DURABLE, [subjects.EVENTS_SUBJECTS], self.handle
        )

    async def handle(self, received: Msg) -> None:
        """Records one event. A repeat changes nothing."""
        headers = received.headers or {}
        try:
            event = json_format.Parse(received.data, event_pb2.Event(), ignore_unknown_fields=True)
            occurred_at = event.occurred_at.ToDatetime(tzinfo=UTC)
            event_id = headers["ce-id"]
        except (json_format.ParseError, KeyError, ValueError, OverflowError) as error:
            telemetry.MESSAGES.labels(DURABLE, "unreadable").inc()
            log.error("event_unreadable", subject=received.subject, error=repr(error))
            return
        account_id, kind = received.subject.split(".")[-2:]
        told = webhooks.Event(
            event_id=event_id,
            account_id=account_id,
            video_id=event.video_id,
            kind=kind,
            headers=headers,
            body=received.data,
        )
        made = await self._kept.record(told, occurred_at, self._give_up_seconds)
        await failpoint("gateway.webhook.after_record")
        if made:
            self._deliverer.ring()


class Deliverer:
    """Sends what is due, of each endpoint a little at a time. Replicas share the work by leases."""

    def __init__(
        self, kept: store.DeliveryStore, poster: posting.Poster, settings: config.Settings
    ) -> None:
        self._kept = kept
        self._poster = poster
        self._settings = settings
        self._bounds = deliveries.Bounds(
            lease=settings.webhook_timeout_seconds * LEASE_FACTOR,
            give_up=settings.webhook_give_up_seconds,
            disable_after=settings.webhook_disable_seconds,
            each=EACH,
        )
        self._wake = loops.Wake()
        self._sending = 0

    def ring(self) -> None:
        """Something is due."""
        self._wake.ring()

    async def run(self, stopping: asyncio.Event) -> None:
        """Sends until told to stop; what is being sent by then is sent."""
        async with asyncio.TaskGroup() as group:

            async def take() -> None:
                await self.run_once(group)

            await loops.every(
                "webhooks", self._settings.webhook_poll_seconds, take, stopping, self._wake
            )

    async def run_once(self, group: asyncio.TaskGroup) -> None:
        """Takes what is due, as far as there is room, and has the group send it."""
        free = CONCURRENT - self._sending
        for taken in await self._kept.take(free, self._bounds) if free > 0 else ():
            self._sending += 1
            group.create_task(self._send(taken))

    async def _send(self, taken: webhooks.Taken) -> None:
        """One try. When its result cannot be written the lease ends, and it is sent again."""
        try:
            answer = await self._poster.post(taken.url, webhooks.headers(taken), taken.body)
            await failpoint("gateway.webhook.before_settle")
            first = self._settings.webhook_retry_seconds
            pause = webhooks.pause(first, taken.attempts, answer, random.random())
            state = await self._kept.settle(taken, answer, pause, self._bounds)
            DELIVERIES.labels(_outcome(state)).inc()
            if not answer.good:
                log.info(
                    "webhook_failed",
                    endpoint_id=taken.endpoint_id,
                    event_id=taken.event_id,
                    status=answer.status,
                    error=answer.error,
                )
        except Exception as error:
            DELIVERIES.labels("unknown").inc()
            log.warning("webhook_unsettled", delivery_id=taken.delivery_id, error=repr(error))
        finally:
            self._sending -= 1
            self.ring()


class Keeping:
    """Removes old deliveries, and shows how late the others are."""

    def __init__(self, kept: store.DeliveryStore) -> None:
        self._kept = kept

    async def run(self, stopping: asyncio.Event) -> None:
        """Does both until told to stop."""
        async with asyncio.TaskGroup() as group:
            purge = self._kept.purge
            group.create_task(loops.every("webhook_purge", PURGE_SECONDS, purge, stopping))
            seconds = loops.MEASURE_SECONDS
            group.create_task(loops.every("webhook_measure", seconds, self._measure, stopping))

    async def _measure(self) -> None:
        OLDEST_DUE.set(await self._kept.oldest_due_seconds())
        found = await self._kept.endpoints()
        for condition in CONDITIONS:
            ENDPOINTS.labels(condition).set(found.get(condition, 0))


def _outcome(state: str | None) -> str:
    return {"DELIVERED": "delivered", "PENDING": "retried", "FAILED": "given_up"}.get(
        state or "", "overtaken"
    )
