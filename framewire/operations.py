"""What operators may do with the ledger and the whole system, as `client.operations`: each leaves a row in the audit.

All are idempotent; what gives credits or changes prices carries one `request_id`, kept over retries.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, TypeVar

from google.protobuf import message as protobuf

from framewire import encode, reconciliation, recovery, transport, types
from framewire.credits.v1 import ledger_pb2
from framewire.decode import decode, enum_name
from framewire.gateway.v1 import operator_pb2, operator_pb2_grpc
from framewire.storage.v1 import storage_pb2

T = TypeVar("T")


class Operations:
    """The ledger's rules and repairs. Kinds of rulebooks: "PRICE_BOOK", "REFUND_POLICY"."""

    def __init__(self, opened: transport.Transport) -> None:
        self._transport = opened
        self._stub: operator_pb2_grpc.OperatorServiceAsyncStub = (
            operator_pb2_grpc.OperatorServiceStub(opened.channel)
        )

    async def refund(
        self,
        video_id: str,
        credits: int,
        *,
        from_loss: bool = False,
        note: str = "",
        why: str = "",
        request_id: str = "",
    ) -> types.Grant:
        """Gives captured credits back; `from_loss`: they stay earned, and the platform bears it."""
        taken_from = ledger_pb2.REFUND_FROM_LOSS if from_loss else ledger_pb2.REFUND_FROM_REVENUE
        refund = ledger_pb2.RefundRequest(
            hold_id=video_id,
            request_id=request_id or str(uuid.uuid4()),
            credits=credits,
            note=note,
            taken_from=taken_from,
        )
        request = operator_pb2.RefundRequest(refund=refund, why=why)
        return await self._call(types.Grant, self._stub.Refund, request)

    async def set_frozen(
        self, account_id: str, frozen: bool, *, why: str = ""
    ) -> types.AccountRules:
        """Freezes an account, or lets it go on: a frozen one makes no new videos."""
        asked = ledger_pb2.SetFrozenRequest(account_id=account_id, frozen=frozen)
        request = operator_pb2.SetFrozenRequest(request=asked, why=why)
        return await self._call(types.AccountRules, self._stub.SetFrozen, request)

    async def set_admission(self, paused: bool, *, why: str = "") -> bool:
        """Stops or starts taking videos, for everyone; answers whether it is stopped. Idempotent."""
        request = operator_pb2.SetAdmissionRequest(paused=paused, why=why)
        return (await self._transport.unary(self._stub.SetAdmission, request)).paused

    async def set_daily_cap(
        self, account_id: str, credits: int | None, *, key_id: str = "", why: str = ""
    ) -> types.AccountRules:
        """Caps what an account, or one API key for it, may use from midnight to midnight UTC; None: no cap."""
        asked = ledger_pb2.SetDailyCapRequest(account_id=account_id, key_id=key_id, credits=credits)
        request = operator_pb2.SetDailyCapRequest(request=asked, why=why)
        return await self._call(types.AccountRules, self._stub.SetDailyCap, request)

    async def rulebooks(self, kind: str) -> tuple[types.Rulebook, ...]:
        """Versions of the price book or the refund policy, newest first."""
        asked = ledger_pb2.ListRulebooksRequest(kind=_kind(kind))
        request = operator_pb2.ListRulebooksRequest(request=asked)
        answer = await self._transport.unary(self._stub.ListRulebooks, request)
        return tuple(decode(types.Rulebook, one) for one in answer.rulebooks)

    async def add_rulebook(self, kind: str, yaml: str, *, why: str = "") -> types.Rulebook:
        """Adds a version, inactive. It is checked whole; the error says what is wrong and where."""
        asked = ledger_pb2.AddRulebookRequest(kind=_kind(kind), yaml=yaml)
        request = operator_pb2.AddRulebookRequest(request=asked, why=why)
        return await self._call(types.Rulebook, self._stub.AddRulebook, request)

    async def activate_rulebook(
        self,
        kind: str,
        version: str,
        content_hash: str,
        *,
        effective_from: datetime | None = None,
        why: str = "",
        request_id: str = "",
    ) -> types.Rulebook:
        """Puts a version in force, now unless told. Holds and quotes that are there keep theirs."""
        asked = ledger_pb2.ActivateRulebookRequest(
            kind=_kind(kind),
            version=version,
            content_hash=content_hash,
            effective_from=encode.timestamp(effective_from),
            request_id=request_id or str(uuid.uuid4()),
        )
        request = operator_pb2.ActivateRulebookRequest(request=asked, why=why)
        return await self._call(types.Rulebook, self._stub.ActivateRulebook, request)

    async def set_retention(
        self, account_id: str, keep: Mapping[str, timedelta | None], *, why: str = ""
    ) -> dict[str, timedelta | None]:
        """How long an account's assets are kept, by kind, from now on; None: for ever. Others: as set."""
        kinds = [
            storage_pb2.KindRetention(
                kind=encode.enum_value(storage_pb2.AssetKind, "ASSET_KIND_", kind, "kind"),
                keep_seconds=0 if duration is None else int(duration.total_seconds()),
            )
            for kind, duration in keep.items()
        ]
        asked = storage_pb2.SetRetentionRequest(account_id=account_id, kinds=kinds)
        request = operator_pb2.SetRetentionRequest(retention=asked, why=why)
        answer = await self._transport.unary(self._stub.SetRetention, request)
        return {
            enum_name(storage_pb2.AssetKind.DESCRIPTOR, item.kind): timedelta(
                seconds=item.keep_seconds
            )
            if item.keep_seconds
            else None
            for item in answer.kinds
        }

    async def erase_account(self, account_id: str, *, why: str) -> types.Erasure:
        """Erases an account for good, but for its ledger entries. Call it again to see how far it is."""
        request = operator_pb2.EraseAccountRequest(account_id=account_id, why=why)
        return await self._call(types.Erasure, self._stub.EraseAccount, request)

    async def check_books(self) -> types.Proof:
        """Proves the books of the whole ledger."""
        request = operator_pb2.CheckBooksRequest()
        return await self._call(types.Proof, self._stub.CheckBooks, request)

    async def reconcile(self, since: datetime | None = None) -> reconciliation.Reconciliation:
        """Compares all services once; changes nothing. `since`: 24 hours ago unless given, at most 35 days."""
        request = operator_pb2.ReconcileRequest(since=encode.timestamp(since))
        parts = await self._transport.collect(self._stub.Reconcile, request)
        found = [part.finding for part in parts if part.HasField("finding")]
        return reconciliation.Reconciliation(
            tuple(decode(reconciliation.Finding, one) for one in found),
            decode(reconciliation.Pass, parts[-1].done),
        )

    async def repair(self, finding_id: str, *, why: str = "") -> reconciliation.Finding:
        """Applies the repair of one confirmed finding, where it still stands. Idempotent."""
        request = operator_pb2.RepairRequest(finding_id=finding_id, why=why)
        return await self._call(reconciliation.Finding, self._stub.Repair, request)

    async def quarantined(self, account_id: str, *, why: str = "") -> tuple[types.Quarantined, ...]:
        """What is kept aside of an account, newest first: of the first hundred."""
        request = operator_pb2.ListQuarantinedRequest(account_id=account_id, page_size=100, why=why)
        answer = await self._transport.unary(self._stub.ListQuarantined, request)
        return tuple(decode(types.Quarantined, each) for each in answer.quarantined)

    async def recover(self, *, dry_run: bool = False, why: str = "") -> recovery.Recovery:
        """Makes good what restored databases forgot, then opens their services. Idempotent; may be run again."""
        request = operator_pb2.RecoverRequest(dry_run=dry_run, why=why)
        # Not begun anew by itself: what the first run did would be missing from the answer of the second.
        parts = await self._transport.collect(self._stub.Recover, request, once=True)
        done = [part.video for part in parts if part.HasField("video")]
        return recovery.Recovery(
            tuple(decode(recovery.Recovered, one) for one in done),
            decode(recovery.Done, parts[-1].done),
        )

    async def _call(self, kind: type[T], send: Any, request: protobuf.Message) -> T:
        return decode(kind, await self._transport.unary(send, request))


def _kind(name: str) -> Any:
    return encode.enum_value(ledger_pb2.RulebookKind, "RULEBOOK_KIND_", name, "kind")
