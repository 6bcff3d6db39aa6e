"""What an account has stored, as `client.assets`: how much there is, and how long it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from framewire import transport
from framewire.decode import decode, moment
from framewire.gateway.v1 import account_pb2, account_pb2_grpc


@dataclass(frozen=True, slots=True)
class KindUsage:
    """What there is of a kind: "INPUT_IMAGE", "OUTPUT_VIDEO", "POSTER", ..."""

    kind: str
    count: int
    size_bytes: int


class Assets:
    """The part of a client about stored images and outputs."""

    def __init__(self, opened: transport.Transport, account_id: str) -> None:
        self._transport = opened
        self._account_id = account_id
        self._stub: account_pb2_grpc.AccountServiceAsyncStub = account_pb2_grpc.AccountServiceStub(
            opened.channel
        )

    async def usage(self) -> tuple[KindUsage, ...]:
        """What the account has stored, by kind."""
        request = account_pb2.GetStorageUsageRequest(account_id=self._account_id)
        answer = await self._transport.unary(self._stub.GetStorageUsage, request)
        return tuple(decode(KindUsage, used) for used in answer.kinds)

    async def keep(self, asset_id: str, duration: timedelta) -> datetime | None:
        """Keeps an image or an output at least so long from now; answers until when, None: for ever."""
        request = account_pb2.ExtendRetentionRequest(
            account_id=self._account_id,
            asset_id=asset_id,
            keep_seconds=int(duration.total_seconds()),
        )
        answer = await self._transport.unary(self._stub.ExtendRetention, request)
        return moment(answer.expires_at) if answer.HasField("expires_at") else None
