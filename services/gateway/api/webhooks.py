"""WebhookService."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format

from framewire.events.v1 import event_pb2
from framewire.gateway.v1 import webhook_pb2, webhook_pb2_grpc
from kit import errors, ids, pages
from services.gateway import auth, messages, posting, store, videos, webhooks
from services.gateway.api import common


class WebhookApi(webhook_pb2_grpc.WebhookServiceServicer):
    """Webhooks, served."""

    def __init__(
        self, kept: store.Store, poster: posting.Poster, pages_: pages.Pages, give_up: float
    ) -> None:
        self._endpoints = kept.endpoints
        self._deliveries = kept.deliveries
        self._accounts = kept.accounts
        self._poster = poster
        self._pages = pages_
        self._give_up = give_up

    async def CreateEndpoint(
        self, request: webhook_pb2.CreateEndpointRequest, context: Any
    ) -> webhook_pb2.EndpointSecret:
        """Makes an endpoint."""
        caller = common.caller()
        account_id = await self._account(request.account_id)
        fingerprint = videos.fingerprint(messages.own_fields(request))
        made = await self._endpoints.made_by(
            account_id, caller.scope, "CreateEndpoint", request.request_id
        )
        if made is None:
            await self._poster.judge(request.url)
            new = webhooks.Endpoint(
                endpoint_id=ids.new_id(),
                account_id=account_id,
                url=request.url,
                description=request.description,
                kinds=_tokens(request.kinds),
                secret=secrets.token_bytes(webhooks.SECRET_BYTES),
                secret_number=1,
                old_secret=None,
                old_secret_until=None,
                disabled_why="",
                disabled_at=None,
                failing_since=None,
                created_at=datetime.now(UTC),
            )
            made = await self._endpoints.create(new, caller.scope, request.request_id, fingerprint)
        if made is None:
            raise errors.ResourceExhausted(
                "TOO_MANY_WEBHOOKS",
                f"the account has {webhooks.MOST_ENDPOINTS} endpoints: delete one that is not needed",
            )
        return _secret(made, fingerprint)

    async def GetEndpoint(
        self, request: webhook_pb2.GetEndpointRequest, context: Any
    ) -> webhook_pb2.Endpoint:
        """An endpoint."""
        return _endpoint(await self._endpoint(request.endpoint_id))

    async def ListEndpoints(
        self, request: webhook_pb2.ListEndpointsRequest, context: Any
    ) -> webhook_pb2.ListEndpointsResponse:
        """The account's endpoints."""
        found = await self._endpoints.of_account(await self._account(request.account_id))
        return webhook_pb2.ListEndpointsResponse(endpoints=[_endpoint(one) for one in found])

    async def UpdateEndpoint(
        self, request: webhook_pb2.UpdateEndpointRequest, context: Any
    ) -> webhook_pb2.Endpoint:
        """Changes an endpoint."""
        await self._endpoint(request.endpoint_id)
        if request.HasField("url"):
            await self._poster.judge(request.url)
        changed = await self._endpoints.update(
            request.endpoint_id,
            common.caller().account_ids,
            request.url if request.HasField("url") else None,
            request.description if request.HasField("description") else None,
            _tokens(request.kinds.kinds) if request.HasField("kinds") else None,
            request.enabled if request.HasField("enabled") else None,
        )
        if changed is None:
            raise _not_found()
        return _endpoint(changed)

    async def DeleteEndpoint(
        self, request: webhook_pb2.DeleteEndpointRequest, context: Any
    ) -> webhook_pb2.DeleteEndpointResponse:
        """Removes an endpoint."""
        if not await self._endpoints.delete(request.endpoint_id, common.caller().account_ids):
            raise _not_found()
        return webhook_pb2.DeleteEndpointResponse()

    async def RotateSecret(
        self, request: webhook_pb2.RotateSecretRequest, context: Any
    ) -> webhook_pb2.EndpointSecret:
        """Gives an endpoint a new secret."""
        endpoint = await self._endpoint(request.endpoint_id)
        fingerprint = videos.fingerprint(messages.own_fields(request))
        made = await self._endpoints.rotate(
            endpoint,
            secrets.token_bytes(webhooks.SECRET_BYTES),
            request.grace_seconds,
            common.caller().scope,
            request.request_id,
            fingerprint,
        )
        if made is None:
            raise _not_found()
        return _secret(made, fingerprint)

    async def ListDeliveries(
        self, request: webhook_pb2.ListDeliveriesRequest, context: Any
    ) -> webhook_pb2.ListDeliveriesResponse:
        """Deliveries to an endpoint."""
        endpoint = await self._endpoint(request.endpoint_id)
        state = ""
        if request.state:
            state = webhook_pb2.DeliveryState.Name(request.state).removeprefix("DELIVERY_STATE_")
        size = request.page_size or pages.DEFAULT_SIZE
        listing = ("ListDeliveries", endpoint.endpoint_id, state)
        place = self._pages.place(listing, request.page_token)
        found = await self._deliveries.listing(endpoint.endpoint_id, state, place, size + 1)
        token = ""
        if len(found) > size:
            last = found[size - 1]
            token = self._pages.token(listing, last.created_at, last.delivery_id)
        return webhook_pb2.ListDeliveriesResponse(
            deliveries=[_delivery(one) for one in found[:size]], next_page_token=token
        )

    async def RedeliverDelivery(
        self, request: webhook_pb2.RedeliverDeliveryRequest, context: Any
    ) -> webhook_pb2.Delivery:
        """Delivers once more."""
        found = await self._deliveries.get(request.delivery_id)
        if found is None:
            raise _not_found()
        await self._enabled(found.endpoint_id)
        await self._deliveries.again(request.delivery_id, self._give_up)
        return _delivery(await self._deliveries.get(request.delivery_id) or found)

    async def Replay(
        self, request: webhook_pb2.ReplayRequest, context: Any
    ) -> webhook_pb2.ReplayResponse:
        """Delivers a time once more."""
        endpoint = await self._enabled(request.endpoint_id)
        since = messages.moment(request, "from")
        assert since is not None, "a rule of the contract"
        events, further = await self._deliveries.replay(endpoint, since, self._give_up)
        return webhook_pb2.ReplayResponse(events=events, next_from=messages.timestamp(further))

    async def SendTest(
        self, request: webhook_pb2.SendTestRequest, context: Any
    ) -> webhook_pb2.Delivery:
        """Delivers a test."""
        endpoint = await self._enabled(request.endpoint_id)
        event = event_pb2.Event(
            account_id=endpoint.account_id, kind=event_pb2.EVENT_KIND_TEST, test=event_pb2.Test()
        )
        event.occurred_at.GetCurrentTime()
        event_id = f"{ids.derived_id(endpoint.endpoint_id, request.request_id)}:test"
        told = webhooks.Event(
            event_id=event_id,
            account_id=endpoint.account_id,
            video_id="",
            kind="test",
            headers={
                "ce-specversion": "1.0",
                "ce-id": event_id,
                "ce-type": "framewire.events.v1.test",
                "ce-source": "/framewire/gateway",
                "ce-time": event.occurred_at.ToJsonString(),
            },
            body=json_format.MessageToJson(event, indent=None).encode(),
        )
        return _delivery(await self._deliveries.test(endpoint, told, self._give_up))

    async def _account(self, named: str) -> str:
        account_id = common.caller().account(named)
        if await self._accounts.get(account_id) is None:
            raise auth.account_not_found()
        return account_id

    async def _endpoint(self, endpoint_id: str) -> webhooks.Endpoint:
        found = await self._endpoints.get(endpoint_id, common.caller().account_ids)
        if found is None:
            raise _not_found()
        return found

    async def _enabled(self, endpoint_id: str) -> webhooks.Endpoint:
        endpoint = await self._endpoint(endpoint_id)
        if endpoint.disabled_why:
            raise errors.FailedPrecondition(
                "WEBHOOK_DISABLED",
                f"the endpoint is disabled ({endpoint.disabled_why}): enable it first",
                why=endpoint.disabled_why,
            )
        return endpoint


def _not_found() -> errors.NotFound:
    return errors.NotFound(
        "WEBHOOK_NOT_FOUND", "there is no such webhook endpoint or delivery, or it is not yours"
    )


def _tokens(kinds: Iterable[event_pb2.EventKind.ValueType]) -> list[str]:
    return [event_pb2.EventKind.Name(each).removeprefix("EVENT_KIND_").lower() for each in kinds]


def _kind(token: str) -> event_pb2.EventKind.ValueType:
    """The contract's value; not set for a kind of a newer service."""
    name = f"EVENT_KIND_{token.upper()}"
    known = name in event_pb2.EventKind.keys()  # noqa: SIM118 - it is no mapping
    return event_pb2.EventKind.Value(name) if known else event_pb2.EVENT_KIND_UNSPECIFIED


def _kinds(tokens: Sequence[str]) -> list[event_pb2.EventKind.ValueType]:
    return [_kind(token) for token in tokens]


def _secret(
    made: tuple[webhooks.Endpoint, bytes, int], fingerprint: bytes
) -> webhook_pb2.EndpointSecret:
    endpoint, earlier, number = made
    common.check_reuse(earlier, fingerprint)
    current = number == endpoint.secret_number
    secret = webhooks.shown(endpoint.secret) if current else ""
    return webhook_pb2.EndpointSecret(endpoint=_endpoint(endpoint), secret=secret)


def _endpoint(endpoint: webhooks.Endpoint) -> webhook_pb2.Endpoint:
    return webhook_pb2.Endpoint(
        endpoint_id=endpoint.endpoint_id,
        account_id=endpoint.account_id,
        url=endpoint.url,
        description=endpoint.description,
        kinds=_kinds(endpoint.kinds),
        enabled=not endpoint.disabled_why,
        disabled_why=endpoint.disabled_why,
        disabled_at=messages.timestamp(endpoint.disabled_at),
        failing_since=messages.timestamp(endpoint.failing_since),
        old_secret_until=messages.timestamp(endpoint.old_secret_until),
        created_at=messages.timestamp(endpoint.created_at),
    )


def _delivery(one: webhooks.Delivery) -> webhook_pb2.Delivery:
    return webhook_pb2.Delivery(
        delivery_id=one.delivery_id,
        endpoint_id=one.endpoint_id,
        event_id=one.event_id,
        kind=_kind(one.kind),
        video_id=one.video_id,
        state=webhook_pb2.DeliveryState.Value(f"DELIVERY_STATE_{one.state}"),
        attempts=one.attempts,
        next_attempt_at=messages.timestamp(one.next_attempt_at) if one.state == "PENDING" else None,
        created_at=messages.timestamp(one.created_at),
        tries=[
            webhook_pb2.DeliveryTry(
                at=messages.timestamp(datetime.fromtimestamp(each["at"], UTC)),
                status=each["status"],
                duration_ms=each["duration_ms"],
                error=each["error"],
            )
            for each in one.tries
        ],
    )
