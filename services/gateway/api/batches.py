"""BatchCreateVideos: ordinary admissions, a few at a time, and a verdict on each."""

from __future__ import annotations

import asyncio

import grpc

from framewire.gateway.v1 import video_pb2
from kit import errors, rpc
from services.gateway import auth, messages, store, videos
from services.gateway.api import common, creating

AT_ONCE = 8


class Batches:
    """Takes batches."""

    def __init__(self, creator: creating.Creator, store_: store.Store) -> None:
        self._creator = creator
        self._store = store_

    async def create(
        self, request: video_pb2.BatchCreateVideosRequest, caller: auth.Caller, patience: float
    ) -> video_pb2.BatchCreateVideosResponse:
        """Every item by itself; a replay runs all of them again, which changes nothing that was admitted."""
        account_id = _account(request, caller)
        await self._creator.standing(account_id)
        fingerprint = videos.fingerprint(messages.own_fields(request))
        batch = (account_id, caller.scope, request.request_id)
        common.check_reuse(await self._store.batches.bind(*batch, fingerprint), fingerprint)
        slots = asyncio.Semaphore(AT_ONCE)

        async def verdict(number: int) -> video_pb2.BatchCreateVideosResult:
            async with slots:
                try:
                    item = _item(request, number, account_id)
                    video = await self._creator.create(item, caller, patience)
                except errors.ServiceError as error:
                    return _refusal(error)
                return video_pb2.BatchCreateVideosResult(video=video)

        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(verdict(number)) for number in range(len(request.requests))
            ]
        results = [task.result() for task in running]
        undecided = grpc.StatusCode.UNAVAILABLE.value[0]
        if not any(result.HasField("video") or result.code == undecided for result in results):
            await self._store.batches.forget(*batch)  # only what was accepted binds its id
        return video_pb2.BatchCreateVideosResponse(results=results)


def _account(request: video_pb2.BatchCreateVideosRequest, caller: auth.Caller) -> str:
    account_id = caller.account(request.requests[0].account_id)
    if any(item.account_id not in ("", account_id) for item in request.requests):
        rule = "all items of a batch are of one account"
        raise errors.InvalidArgument(
            "INVALID_FIELD", f"requests: {rule}", violations=[("requests", rule)]
        )
    return account_id


def _item(
    request: video_pb2.BatchCreateVideosRequest, number: int, account_id: str
) -> video_pb2.CreateVideoRequest:
    """An item as a request of its own. Raises InvalidArgument where it is against the contract's rules."""
    item = video_pb2.CreateVideoRequest()
    item.CopyFrom(request.requests[number])
    item.account_id, item.request_id = account_id, request.request_id
    rpc.validate(item)
    item.request_id = f"{request.request_id}/{number}"
    return item


def _refusal(error: errors.ServiceError) -> video_pb2.BatchCreateVideosResult:
    return video_pb2.BatchCreateVideosResult(
        code=grpc.StatusCode[error.code].value[0],
        reason=error.reason,
        message=error.message,
        metadata=error.metadata,
    )
