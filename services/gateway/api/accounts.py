"""AccountService."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import account_pb2, account_pb2_grpc
from framewire.generator.v1 import attempt_pb2
from framewire.storage.v1 import storage_pb2
from kit import errors
from services.gateway import auth, catalogue, messages, peers, store, videos
from services.gateway.api import common
from services.gateway.store import rows

USAGE_SECONDS = 30.0
OWN_GRACE_SECONDS = 300
"""A key that rotates itself works on so long at least: ended at once, nobody could ask again after a lost answer."""


class AccountApi(account_pb2_grpc.AccountServiceServicer):
    """Accounts, served."""

    def __init__(
        self, accounts: store.AccountStore, peers_: peers.Peers, models: catalogue.Catalogue
    ) -> None:
        self._accounts = accounts
        self._peers = peers_
        self._models = models

    async def _account(self, named: str) -> str:
        account_id = common.caller().account(named)
        if await self._accounts.get(account_id) is None:
            raise auth.account_not_found()
        return account_id

    async def _books_of(self, named: str) -> str:
        """The books of an account stay when it is erased, for operators to see."""
        account_id = common.caller().account(named)
        operator = common.caller().role is auth.Role.OPERATOR
        if await self._accounts.get(account_id, erased_too=operator) is None:
            raise auth.account_not_found()
        return account_id

    async def GetBalance(
        self, request: account_pb2.GetBalanceRequest, context: Any
    ) -> ledger_pb2.Balance:
        """Credits of an account."""
        account_id = await self._books_of(request.account_id)
        try:
            return await self._peers.balance(account_id)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error

    async def ListEntries(
        self, request: account_pb2.ListEntriesRequest, context: Any
    ) -> ledger_pb2.ListEntriesResponse:
        """The account's statement. The page token is the ledger's."""
        account_id = await self._books_of(request.account_id)
        asked = ledger_pb2.ListEntriesRequest(
            account_id=account_id,
            page_size=request.page_size,
            page_token=request.page_token,
            video_id=request.video_id,
            kinds=request.kinds,
            **_times(request),
        )
        try:
            return await self._peers.stubs.credits.ListEntries(asked, timeout=peers.TIMEOUT_SECONDS)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error

    async def ListModels(
        self, request: account_pb2.ListModelsRequest, context: Any
    ) -> account_pb2.ListModelsResponse:
        """Models, with what they make, cost and how long they take: the default first, then by name."""
        paused, now = await self._accounts.admission_paused()
        account = await self._waiting_account(request.account_id)
        lanes = account.lanes if account else videos.LANES
        estimates = await self._peers.estimates(
            account.account_id if account else "", account.weight if account else 0
        )
        default, *others = self._models.models.values()
        models = [default, *sorted(others, key=lambda model: model.name)]
        listed = await asyncio.gather(*(self._model(model) for model in models))
        for each, model in zip(listed, models, strict=True):
            each.state = _state(model.retires_at, paused, now)
            if model.name in estimates:
                _add_estimate(each, estimates[model.name], lanes)
        return account_pb2.ListModelsResponse(models=listed)

    async def _waiting_account(self, named: str) -> rows.Account | None:
        """Whose videos would wait: the one that is named, or the caller's only one."""
        mine = common.caller().account_ids
        if not named and (mine is None or len(mine) != 1):
            return None
        account = await self._accounts.get(common.caller().account(named))
        if account is None:
            raise auth.account_not_found()
        return account

    async def _model(self, model: catalogue.Model) -> account_pb2.Model:
        return account_pb2.Model(
            model=model.name,
            display_name=model.display_name,
            sizes=[account_pb2.Size(width=width, height=height) for width, height in model.sizes],
            seconds=model.seconds,
            max_variants=max(model.variants_at(size) for size in model.sizes),
            text_to_video=model.text_to_video,
            image_to_video=model.max_input_images > 0,
            max_input_images=model.max_input_images,
            input_images_at_any_frame=model.input_images_at_any_frame,
            max_input_video_seconds=model.max_input_video_seconds,
            frames_per_second=model.frames_per_second,
            options=[
                account_pb2.ModelOption(
                    name=option.name,
                    type=option.type,
                    min=option.min,
                    max=option.max,
                    choices=option.choices,
                )
                for option in model.options.values()
            ],
            default_credits=await self._default_price(model),
            retires_at=messages.timestamp(model.retires_at),
        )

    async def _default_price(self, model: catalogue.Model) -> int:
        """0 where the price book has no line for it: then CreateVideo says NO_PRICE."""
        width, height = model.sizes[0]
        spec = vocabulary_pb2.VideoSpec(
            model=model.name, width=width, height=height, seconds=model.seconds[0], variants=1
        )
        lane = messages.lane_number(videos.DEFAULT_LANE)
        try:
            return (await self._peers.price(spec, lane)).credits
        except errors.ServiceError as error:
            if error.reason == "NO_PRICE":
                return 0
            raise peers.for_caller(error) from error

    async def GetUsage(
        self, request: account_pb2.GetUsageRequest, context: Any
    ) -> account_pb2.GetUsageResponse:
        """Use of an account over a time, as the ledger counts it."""
        asked = ledger_pb2.GetUsageRequest(
            account_id=await self._books_of(request.account_id),
            group_by=request.group_by,
            label=request.label,
            **_times(request),
        )
        try:
            used = await self._peers.stubs.credits.GetUsage(asked, timeout=USAGE_SECONDS)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        return account_pb2.GetUsageResponse(
            lines=[_usage_line(line) for line in used.lines], **_times(used)
        )

    async def CreateApiKey(
        self, request: account_pb2.CreateApiKeyRequest, context: Any
    ) -> account_pb2.CreateApiKeyResponse:
        """Makes a key. A replay answers the key without its secret, which is not kept: revoke it and make another."""
        caller = common.caller()
        role = messages.role(request.role)
        if caller.role is not auth.Role.OPERATOR and role is not auth.Role.MEMBER:
            raise errors.PermissionDenied(
                "ROLE_NOT_ALLOWED", "a member makes keys with the role MEMBER only"
            )
        if role is auth.Role.MEMBER:
            account_id: str | None = await self._account(request.account_id)
        elif request.account_id:
            rule = f"must be empty for the role {role}, which names an account in each request"
            raise errors.InvalidArgument(
                "INVALID_FIELD", f"account_id: {rule}", violations=[("account_id", rule)]
            )
        else:
            account_id = None
        expires_at = messages.moment(request, "expires_at")
        if expires_at is not None and expires_at <= datetime.now(UTC):
            rule = "must be later than now"
            raise errors.InvalidArgument(
                "INVALID_FIELD", f"expires_at: {rule}", violations=[("expires_at", rule)]
            )
        values = {
            "account_id": account_id,
            "role": role.value,
            "display_name": request.display_name,
            "expires_at": expires_at,
        }
        return await self._made(request, values)

    async def _made(
        self, request: Any, values: dict[str, Any], instead_of: str = "", grace_seconds: int = 0
    ) -> account_pb2.CreateApiKeyResponse:
        secret = auth.new_secret()
        fingerprint = videos.fingerprint(messages.own_fields(request))
        values |= {"sha256": auth.digest(secret), "prefix": auth.shown(secret)}
        maker, request_id = common.caller().key_id, request.request_id
        key, earlier, made = await self._accounts.create_key(
            values, maker, request_id, fingerprint, instead_of, grace_seconds
        )
        common.check_reuse(earlier, fingerprint)
        return account_pb2.CreateApiKeyResponse(key=_key(key), secret=secret if made else "")

    async def RotateApiKey(
        self, request: account_pb2.RotateApiKeyRequest, context: Any
    ) -> account_pb2.CreateApiKeyResponse:
        """Makes a key like another one, which ends. A replay answers the new key without its secret."""
        caller = common.caller()
        key = await self._accounts.key_to_rotate(request.key_id, caller.key_id, request.request_id)
        if key is None or not _owns(caller, key):
            raise _key_not_found()
        values = {
            "account_id": key.account_id,
            "role": key.role,
            "display_name": key.display_name,
            "expires_at": None,
        }
        least = OWN_GRACE_SECONDS if key.key_id == caller.key_id else 0
        return await self._made(request, values, key.key_id, max(request.grace_seconds, least))

    async def ListApiKeys(
        self, request: account_pb2.ListApiKeysRequest, context: Any
    ) -> account_pb2.ListApiKeysResponse:
        """Keys of an account; for an operator who names none, those of services and operators."""
        of_none = common.caller().role is auth.Role.OPERATOR and not request.account_id
        account_id = None if of_none else await self._account(request.account_id)
        keys = await self._accounts.list_keys(account_id)
        return account_pb2.ListApiKeysResponse(keys=[_key(key) for key in keys])

    async def RevokeApiKey(
        self, request: account_pb2.RevokeApiKeyRequest, context: Any
    ) -> account_pb2.ApiKey:
        """Ends a key."""
        caller = common.caller()
        key = await self._accounts.revoke_key(request.key_id, caller.account_ids, caller.key_id)
        if key is None:
            raise _key_not_found()
        return _key(key)

    async def GetStorageUsage(
        self, request: account_pb2.GetStorageUsageRequest, context: Any
    ) -> storage_pb2.GetUsageResponse:
        """What the account has stored."""
        asked = storage_pb2.GetUsageRequest(account_id=await self._account(request.account_id))
        try:
            return await self._peers.stubs.storage.GetUsage(asked, timeout=peers.TIMEOUT_SECONDS)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error

    async def ExtendRetention(
        self, request: account_pb2.ExtendRetentionRequest, context: Any
    ) -> account_pb2.ExtendRetentionResponse:
        """Keeps an image or output longer."""
        asked = storage_pb2.ExtendRetentionRequest(
            account_id=await self._account(request.account_id),
            asset_id=request.asset_id,
            keep_seconds=request.keep_seconds,
        )
        try:
            kept = await self._peers.stubs.storage.ExtendRetention(
                asked, timeout=peers.TIMEOUT_SECONDS
            )
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        until = kept.expires_at if kept.HasField("expires_at") else None
        return account_pb2.ExtendRetentionResponse(expires_at=until)


def _state(
    retires_at: datetime | None, paused: bool, now: datetime
) -> account_pb2.ModelState.ValueType:
    if retires_at is not None and retires_at <= now:
        return account_pb2.MODEL_STATE_RETIRED
    if paused:
        return account_pb2.MODEL_STATE_PAUSED
    return account_pb2.MODEL_STATE_RETIRING if retires_at else account_pb2.MODEL_STATE_OK


def _add_estimate(
    model: account_pb2.Model, estimate: attempt_pb2.ModelEstimate, allowed: Collection[str]
) -> None:
    model.render_seconds = estimate.render_seconds
    for lane in estimate.lanes:
        if messages.lane(lane.lane) in allowed:
            seconds = lane.expected_seconds if lane.HasField("expected_seconds") else None
            model.lanes.add(
                lane=lane.lane, queue_position=lane.queue_position, expected_seconds=seconds
            )


def _times(message: Any) -> dict[str, Any]:
    """`from` and `to`, where they are set; the first is a word of Python's."""
    return {name: getattr(message, name) for name in ("from", "to") if message.HasField(name)}


def _usage_line(line: ledger_pb2.UsageLine) -> account_pb2.UsageLine:
    return account_pb2.UsageLine(
        month=line.month,
        model=line.model,
        lane=line.lane,
        key_id=line.key_id,
        label_value=line.label_value,
        videos=line.videos,
        credits=line.captured_credits,
        refunded_credits=line.refunded_credits,
    )


def _owns(caller: auth.Caller, key: rows.ApiKey) -> bool:
    return caller.account_ids is None or key.account_id in caller.account_ids


def _key_not_found() -> errors.NotFound:
    return errors.NotFound("KEY_NOT_FOUND", "there is no such key, or it is not yours")


def _key(key: rows.ApiKey) -> account_pb2.ApiKey:
    return account_pb2.ApiKey(
        key_id=key.key_id,
        prefix=key.prefix,
        account_id=key.account_id or "",
        role=account_pb2.Role.Value(f"ROLE_{key.role}"),
        display_name=key.display_name,
        created_at=messages.timestamp(key.created_at),
        revoked_at=messages.timestamp(key.revoked_at),
        expires_at=messages.timestamp(key.expires_at),
        last_used_at=messages.timestamp(key.last_used_at),
        limits=messages.limits(key),
    )
