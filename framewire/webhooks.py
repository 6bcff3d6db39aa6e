"""Webhooks: `verify` for who receives them, and `client.webhooks` for who wants them sent.

docs/webhooks.md has the promise to receivers.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from framewire import encode, transport
from framewire.decode import decode
from framewire.events import types
from framewire.events.v1 import event_pb2
from framewire.gateway.v1 import webhook_pb2, webhook_pb2_grpc

WINDOW_SECONDS = 300.0
GRACE = timedelta(days=1)
_PREFIX = "whsec_"
_PAGE_SIZE = 100


class InvalidWebhook(ValueError):
    """What came is not to be believed: answer 400."""


def verify(
    headers: Mapping[str, str], body: bytes, secret: str, *, now: float | None = None
) -> types.Event:
    """The event, if the body is signed with the secret ("whsec_...") and of now. Raises InvalidWebhook.

    The body must be the bytes that came. `event_id` is the webhook-id: one that you have had is a repeat.
    """
    given = {name.lower(): value for name, value in headers.items()}
    event_id, timestamp = given.get("webhook-id", ""), given.get("webhook-timestamp", "")
    if not event_id or not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) < 12):
        raise InvalidWebhook("the headers of a webhook are not there")
    if abs((time.time() if now is None else now) - int(timestamp)) > WINDOW_SECONDS:
        raise InvalidWebhook("it was signed too long ago, or the clocks differ")
    digest = hmac.digest(_key(secret), f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256)
    wanted = b"v1," + base64.b64encode(digest)
    right = False
    for signature in given.get("webhook-signature", "").split(" "):
        right |= hmac.compare_digest(signature.encode(), wanted)
    if not right:
        raise InvalidWebhook("no signature is that of the secret")
    from framewire.events import feed  # only those who receive pay for the import of nats

    try:
        event = feed.read("", {"ce-id": event_id}, body)
        kind = str(json.loads(body).get("kind", ""))
    except ValueError as error:
        raise InvalidWebhook(str(error)) from error
    # By the body, which is signed; the other headers are not.
    return dataclasses.replace(event, kind=kind.removeprefix("EVENT_KIND_").lower())


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(_PREFIX) or not key:
        raise ValueError(f"the secret is not {_PREFIX} and base64")
    return key


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where events are delivered. Without kinds: all. `disabled_why`: "OWNER", "GONE" or "FAILING"."""

    endpoint_id: str
    account_id: str
    url: str
    description: str
    kinds: tuple[str, ...]
    enabled: bool
    disabled_why: str
    disabled_at: datetime | None
    failing_since: datetime | None
    old_secret_until: datetime | None
    created_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewSecret:
    """An endpoint with its secret, which is shown here and nowhere else."""

    endpoint: Endpoint
    secret: str


@dataclass(frozen=True, slots=True)
class Try:
    """One try to deliver. Status 0: no answer."""

    at: datetime | None
    status: int
    duration_ms: int
    error: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way to an endpoint. "PENDING", "DELIVERED", or after a day "FAILED"."""

    delivery_id: str
    endpoint_id: str
    event_id: str
    kind: str
    video_id: str
    state: str
    attempts: int
    next_attempt_at: datetime | None
    created_at: datetime | None
    tries: tuple[Try, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What is delivered again, and where to go on; None: that was all."""

    events: int
    next_from: datetime | None


class Webhooks:
    """Endpoints and deliveries. `account_id`: whose, where a call names none."""

    def __init__(self, opened: transport.Transport, account_id: str) -> None:
        self._transport = opened
        self._account_id = account_id
        self._stub: webhook_pb2_grpc.WebhookServiceAsyncStub = webhook_pb2_grpc.WebhookServiceStub(
            opened.channel
        )

    async def create(
        self, url: str, kinds: Sequence[str] = (), *, description: str = "", request_id: str = ""
    ) -> NewSecret:
        """Makes an endpoint for these kinds ("completed", ...), or for all. Keep the secret."""
        with encode.carried("endpoint"):
            request = webhook_pb2.CreateEndpointRequest(
                request_id=request_id or str(uuid.uuid4()),
                account_id=self._account_id,
                url=url,
                description=description,
                kinds=_kinds(kinds),
            )
        return decode(NewSecret, await self._transport.unary(self._stub.CreateEndpoint, request))

    async def get(self, endpoint_id: str) -> Endpoint:
        """An endpoint."""
        request = webhook_pb2.GetEndpointRequest(endpoint_id=endpoint_id)
        return decode(Endpoint, await self._transport.unary(self._stub.GetEndpoint, request))

    async def endpoints(self) -> tuple[Endpoint, ...]:
        """All of the account, the oldest first."""
        request = webhook_pb2.ListEndpointsRequest(account_id=self._account_id)
        answer = await self._transport.unary(self._stub.ListEndpoints, request)
        return tuple(decode(Endpoint, each) for each in answer.endpoints)

    async def update(
        self,
        endpoint_id: str,
        *,
        url: str | None = None,
        description: str | None = None,
        kinds: Sequence[str] | None = None,
        enabled: bool | None = None,
    ) -> Endpoint:
        """Changes what is given. Enabled, it begins anew."""
        with encode.carried("endpoint"):
            request = webhook_pb2.UpdateEndpointRequest(
                endpoint_id=endpoint_id,
                url=url,
                description=description,
                kinds=None if kinds is None else webhook_pb2.EventKinds(kinds=_kinds(kinds)),
                enabled=enabled,
            )
        return decode(Endpoint, await self._transport.unary(self._stub.UpdateEndpoint, request))

    async def delete(self, endpoint_id: str) -> None:
        """Removes an endpoint. Idempotent."""
        request = webhook_pb2.DeleteEndpointRequest(endpoint_id=endpoint_id)
        await self._transport.unary(self._stub.DeleteEndpoint, request)

    async def rotate(
        self, endpoint_id: str, *, grace: timedelta = GRACE, request_id: str = ""
    ) -> NewSecret:
        """Gives it a new secret; the one before signs too for the grace. Keep the new one."""
        request = webhook_pb2.RotateSecretRequest(
            request_id=request_id or str(uuid.uuid4()),
            endpoint_id=endpoint_id,
            grace_seconds=int(grace.total_seconds()),
        )
        return decode(NewSecret, await self._transport.unary(self._stub.RotateSecret, request))

    async def deliveries(self, endpoint_id: str, state: str = "") -> AsyncGenerator[Delivery, None]:
        """Deliveries to an endpoint, the newest first."""
        request = webhook_pb2.ListDeliveriesRequest(
            endpoint_id=endpoint_id,
            state=encode.enum_value(webhook_pb2.DeliveryState, "DELIVERY_STATE_", state, "state"),
            page_size=_PAGE_SIZE,
        )
        while True:
            page = await self._transport.unary(self._stub.ListDeliveries, request)
            for each in page.deliveries:
                yield decode(Delivery, each)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def redeliver(self, delivery_id: str) -> Delivery:
        """Delivers once more."""
        request = webhook_pb2.RedeliverDeliveryRequest(delivery_id=delivery_id)
        return decode(Delivery, await self._transport.unary(self._stub.RedeliverDelivery, request))

    async def replay(self, endpoint_id: str, since: datetime) -> Replayed:
        """Delivers again what was told since then, up to 1000 events: go on from `next_from`."""
        request = webhook_pb2.ReplayRequest(endpoint_id=endpoint_id)
        getattr(request, "from").CopyFrom(encode.timestamp(since))
        return decode(Replayed, await self._transport.unary(self._stub.Replay, request))

    async def test(self, endpoint_id: str, *, request_id: str = "") -> Delivery:
        """Delivers an event of kind TEST."""
        request = webhook_pb2.SendTestRequest(
            request_id=request_id or str(uuid.uuid4()), endpoint_id=endpoint_id
        )
        return decode(Delivery, await self._transport.unary(self._stub.SendTest, request))


def _kinds(kinds: Sequence[str]) -> list[Any]:
    return [encode.enum_value(event_pb2.EventKind, "EVENT_KIND_", kind, "kinds") for kind in kinds]
