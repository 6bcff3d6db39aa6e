"""OperatorService about who may call and how much: members, limits, accounts' attributes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from framewire.gateway.v1 import account_pb2, operator_pb2
from kit import errors
from services.gateway import auth, erasure, messages, peers, store, videos
from services.gateway.api import common
from services.gateway.store import rows


class AccessMethods:
    """The part of OperatorService that changes what the gateway itself keeps; each change is in the audit."""

    def __init__(
        self, kept: store.Store, issuers: Collection[str], erasure_: erasure.Erasure
    ) -> None:
        self._kept = kept
        self._issuers = issuers
        self._erasure = erasure_

    async def EraseAccount(
        self, request: operator_pb2.EraseAccountRequest, context: Any
    ) -> operator_pb2.EraseAccountResponse:
        """Erases an account, or says how far that is."""
        try:
            progress = await self._erasure.erase(
                request.account_id, request.why, common.caller().key_id
            )
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        left = progress.left
        return operator_pb2.EraseAccountResponse(
            asked_at=messages.timestamp(left.asked_at),
            live_videos=left.live,
            videos_to_remove=left.to_remove,
            assets_to_remove=progress.assets,
            done_at=messages.timestamp(left.done_at) if left.done_at else None,
        )

    async def AddMember(
        self, request: operator_pb2.AddMemberRequest, context: Any
    ) -> operator_pb2.Member:
        """Lets somebody call."""
        if request.issuer not in self._issuers:
            known = ", ".join(sorted(self._issuers)) or "none is configured"
            raise _invalid("issuer", f"must be one that is configured: {known}")
        role = messages.role(request.role)
        if (role == auth.Role.MEMBER) != bool(request.account_id):
            raise _invalid("account_id", "must name the account of a member, and none for others")
        if request.account_id and await self._kept.accounts.get(request.account_id) is None:
            raise auth.account_not_found()
        new = rows.Member(
            principal_id="",
            issuer=request.issuer,
            subject=request.subject,
            email=request.email.lower(),
            role=role,
            account_id=request.account_id or None,
            added_at=None,
        )
        added, has = await self._kept.principals.add(new, request.why, common.caller().key_id)
        if added is None:
            raise errors.FailedPrecondition(
                "MEMBER_ROLE_DIFFERS",
                f"the principal has the role {has}: remove it first, with the accounts that it is a member of",
                role=has,
            )
        return _member(added)

    async def RemoveMember(
        self, request: operator_pb2.RemoveMemberRequest, context: Any
    ) -> operator_pb2.RemoveMemberResponse:
        """Takes somebody out."""
        removed = await self._kept.principals.remove(
            request.principal_id, request.account_id, request.why, common.caller().key_id
        )
        return operator_pb2.RemoveMemberResponse(removed=removed)

    async def ListMembers(
        self, request: operator_pb2.ListMembersRequest, context: Any
    ) -> operator_pb2.ListMembersResponse:
        """Who may call."""
        if request.account_id and await self._kept.accounts.get(request.account_id) is None:
            raise auth.account_not_found()
        found = await self._kept.principals.listing(request.account_id)
        return operator_pb2.ListMembersResponse(members=[_member(each) for each in found])

    async def SetLimits(
        self, request: operator_pb2.SetLimitsRequest, context: Any
    ) -> account_pb2.Limits:
        """Changes limits."""
        asked = messages.asked_limits(request.limits)
        least = 0 if request.key_id else 1
        for name, value in asked.items():
            if value < least or (name.startswith("moderation_") and request.key_id):
                rule = f"must be {least} or more" if value < least else "is only an account's"
                raise _invalid(f"limits.{name}", rule)
        if not request.account_id and not request.key_id:
            raise _invalid("account_id", "must be set where key_id is not")
        found = await self._kept.limits.change(
            request.account_id, request.key_id, asked, request.why, common.caller().key_id
        )
        if found is None and request.key_id:
            raise errors.NotFound("KEY_NOT_FOUND", "there is no such key of this account")
        if found is None:
            raise auth.account_not_found()
        return messages.limits(found)

    async def SetAccount(
        self, request: operator_pb2.SetAccountRequest, context: Any
    ) -> operator_pb2.Account:
        """Changes an account."""
        asked = {messages.lane(number) for number in request.lanes}
        lanes = [lane for lane in videos.LANES if lane in asked]
        account = await self._kept.accounts.set_account(
            request.account_id, lanes, request.weight, request.why, common.caller().key_id
        )
        if account is None:
            raise auth.account_not_found()
        return account_message(account)


def account_message(account: rows.Account) -> operator_pb2.Account:
    """An account as operators see it."""
    return operator_pb2.Account(
        account_id=account.account_id,
        display_name=account.display_name,
        lanes=[messages.lane_number(lane) for lane in account.lanes],
        weight=account.weight,
        max_in_flight=account.max_in_flight,
        requests_per_minute=account.requests_per_minute,
        videos_per_hour=account.videos_per_hour,
        created_at=messages.timestamp(account.created_at),
        limits=messages.limits(account),
    )


def _member(member: rows.Member) -> operator_pb2.Member:
    return operator_pb2.Member(
        principal_id=member.principal_id,
        issuer=member.issuer,
        subject=member.subject,
        email=member.email,
        role=account_pb2.Role.Value(f"ROLE_{member.role}"),
        account_id=member.account_id or "",
        added_at=messages.timestamp(member.added_at),
    )


def _invalid(field: str, rule: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("INVALID_FIELD", f"{field}: {rule}", violations=[(field, rule)])
