"""Who may call and how much, as `client.access`: API keys; and for operators, audited, members and limits."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from google.protobuf import message as protobuf

from framewire import encode, transport, types
from framewire.decode import decode
from framewire.gateway.v1 import (
    account_pb2,
    account_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """Who calls with tokens of an issuer, in an account, or as a service or operator without one."""

    principal_id: str
    issuer: str
    subject: str
    email: str
    role: str
    account_id: str
    added_at: datetime | None


class Access:
    """Keys, members, limits. `account_id`: whose, where a call names none."""

    def __init__(self, opened: transport.Transport, account_id: str) -> None:
        self._transport = opened
        self._account_id = account_id
        self._accounts: account_pb2_grpc.AccountServiceAsyncStub = (
            account_pb2_grpc.AccountServiceStub(opened.channel)
        )
        self._operators: operator_pb2_grpc.OperatorServiceAsyncStub = (
            operator_pb2_grpc.OperatorServiceStub(opened.channel)
        )

    async def keys(self, account_id: str = "") -> tuple[types.ApiKey, ...]:
        """Keys, newest first."""
        request = account_pb2.ListApiKeysRequest(account_id=account_id or self._account_id)
        answer = await self._transport.unary(self._accounts.ListApiKeys, request)
        return tuple(decode(types.ApiKey, key) for key in answer.keys)

    async def rotate_key(
        self, key_id: str, *, grace: timedelta = timedelta(), request_id: str = ""
    ) -> types.NewApiKey:
        """Makes a key like another one, which ends after the grace; the client's own has five minutes at least.

        The secret is in the first answer only. When that was lost on the way, the new key is rotated in its turn; with
        a given request_id the answer is the key without its secret.
        """
        request = account_pb2.RotateApiKeyRequest(
            request_id=request_id or str(uuid.uuid4()),
            key_id=key_id,
            grace_seconds=int(grace.total_seconds()),
        )
        made = await self._call(types.NewApiKey, self._accounts.RotateApiKey, request)
        if made.secret or request_id:
            return made
        lost = account_pb2.RotateApiKeyRequest(request_id=str(uuid.uuid4()), key_id=made.key.key_id)
        return await self._call(types.NewApiKey, self._accounts.RotateApiKey, lost)

    async def revoke_key(self, key_id: str) -> types.ApiKey:
        """Ends a key, within 5 seconds everywhere. Idempotent."""
        request = account_pb2.RevokeApiKeyRequest(key_id=key_id)
        return await self._call(types.ApiKey, self._accounts.RevokeApiKey, request)

    async def add_member(
        self,
        issuer: str,
        *,
        subject: str = "",
        email: str = "",
        role: str = "MEMBER",
        account_id: str = "",
        why: str = "",
    ) -> Member:
        """Lets who comes with the issuer's tokens call. Give the subject, or the verified e-mail address."""
        request = operator_pb2.AddMemberRequest(
            issuer=issuer,
            subject=subject,
            email=email,
            role=encode.enum_value(account_pb2.Role, "ROLE_", role, "role"),
            account_id=(account_id or self._account_id) if role == "MEMBER" else "",
            why=why,
        )
        return await self._call(Member, self._operators.AddMember, request)

    async def remove_member(self, principal_id: str, account_id: str = "", *, why: str = "") -> int:
        """Takes a principal out of an account; without one, out of all and out of its role. Answers of how many."""
        request = operator_pb2.RemoveMemberRequest(
            principal_id=principal_id, account_id=account_id, why=why
        )
        return (await self._transport.unary(self._operators.RemoveMember, request)).removed

    async def members(self, account_id: str = "") -> tuple[Member, ...]:
        """Members of an account; without one, services and operators."""
        request = operator_pb2.ListMembersRequest(account_id=account_id)
        answer = await self._transport.unary(self._operators.ListMembers, request)
        return tuple(decode(Member, member) for member in answer.members)

    async def set_limits(
        self, limits: types.Limits, *, account_id: str = "", key_id: str = "", why: str = ""
    ) -> types.Limits:
        """Changes those that are not None, of an account or of one of its keys; 0 for a key: no limit of its own."""
        asked = account_pb2.Limits(**limits.given())
        request = operator_pb2.SetLimitsRequest(
            account_id=account_id or self._account_id, key_id=key_id, limits=asked, why=why
        )
        return await self._call(types.Limits, self._operators.SetLimits, request)

    async def set_account(
        self, *, account_id: str = "", lanes: Sequence[str] = (), weight: int = 0, why: str = ""
    ) -> types.Account:
        """Changes an account's lanes and its weight inside a lane; what is left out stays."""
        request = operator_pb2.SetAccountRequest(
            account_id=account_id or self._account_id,
            lanes=[encode.lane(lane) for lane in lanes],
            weight=weight,
            why=why,
        )
        return await self._call(types.Account, self._operators.SetAccount, request)

    async def _call(self, kind: type[T], send: Any, request: protobuf.Message) -> T:
        return decode(kind, await self._transport.unary(send, request))
