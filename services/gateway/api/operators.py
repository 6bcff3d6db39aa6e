"""OperatorService: what operators may do in the services behind, with an audit row each."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from framewire.credits.v1 import ledger_pb2
from framewire.gateway.v1 import operator_pb2, operator_pb2_grpc
from framewire.generator.v1 import attempt_pb2
from framewire.storage.v1 import storage_pb2
from kit import errors, pages
from services.gateway import erasure, messages, peers, reconciler, recoverer, videos
from services.gateway.api import access, common, creating
from services.gateway.store import findings

T = TypeVar("T")

DEFAULT_WEIGHT = 100
DEFAULT_LANES = ("STANDARD", "BATCH")
CHECK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Defaults:
    """Limits of an account that names none."""

    max_in_flight: int
    requests_per_minute: int
    videos_per_hour: int


class OperatorApi(access.AccessMethods, operator_pb2_grpc.OperatorServiceServicer):
    """Operations, served."""

    def __init__(
        self,
        parts: creating.Parts,
        defaults: Defaults,
        reconciler_: reconciler.Reconciler,
        issuers: Collection[str],
        recoverer_: recoverer.Recoverer,
        erasure_: erasure.Erasure,
    ) -> None:
        super().__init__(parts.store, issuers, erasure_)
        self._accounts = parts.store.accounts
        self._pages = parts.pages
        self._peers = parts.peers
        self._defaults = defaults
        self._reconciler = reconciler_
        self._recoverer = recoverer_

    async def CreateAccount(
        self, request: operator_pb2.CreateAccountRequest, context: Any
    ) -> operator_pb2.Account:
        """Makes an account, then its books; both are idempotent, so that a retry completes what was cut short."""
        fingerprint = videos.fingerprint(messages.own_fields(request))
        lanes = {messages.lane(number) for number in request.lanes} or set(DEFAULT_LANES)
        defaults = self._defaults
        values = {
            "display_name": request.display_name,
            "lanes": [lane for lane in videos.LANES if lane in lanes],
            "weight": request.weight or DEFAULT_WEIGHT,
            "max_in_flight": request.max_in_flight or defaults.max_in_flight,
            "requests_per_minute": request.requests_per_minute or defaults.requests_per_minute,
            "videos_per_hour": request.videos_per_hour or defaults.videos_per_hour,
        }
        account, earlier = await self._accounts.create(
            values, common.caller().key_id, request.request_id, fingerprint
        )
        common.check_reuse(earlier, fingerprint)
        opening = ledger_pb2.OpenAccountRequest(account_id=account.account_id)
        try:
            await self._peers.stubs.credits.OpenAccount(opening, timeout=peers.TIMEOUT_SECONDS)
        except errors.ServiceError as error:
            raise peers.for_caller(error) from error
        return access.account_message(account)

    async def Grant(
        self, request: operator_pb2.GrantRequest, context: Any
    ) -> ledger_pb2.GrantResponse:
        """Gives credits to an account."""
        grant = request.grant
        grant.operator = common.caller().key_id
        detail = {
            "request_id": grant.request_id,
            "credits": grant.credits,
            "source": _short(ledger_pb2.LotSource, grant.source, "LOT_SOURCE_"),
            "purchase": grant.purchase,
        }
        return await self._audited(
            "Grant",
            grant.account_id,
            request.why or grant.note,
            detail,
            lambda: self._peers.stubs.credits.Grant(grant, timeout=peers.TIMEOUT_SECONDS),
        )

    async def Refund(
        self, request: operator_pb2.RefundRequest, context: Any
    ) -> ledger_pb2.RefundResponse:
        """Gives captured credits back."""
        refund = request.refund
        refund.operator = common.caller().key_id
        detail = {
            "hold_id": refund.hold_id,
            "request_id": refund.request_id,
            "credits": refund.credits,
            "taken_from": _short(ledger_pb2.RefundFrom, refund.taken_from, "REFUND_FROM_"),
        }
        return await self._audited(
            "Refund",
            "",
            request.why or refund.note,
            detail,
            lambda: self._peers.stubs.credits.Refund(refund, timeout=peers.TIMEOUT_SECONDS),
        )

    async def SetAdmission(
        self, request: operator_pb2.SetAdmissionRequest, context: Any
    ) -> operator_pb2.SetAdmissionResponse:
        """Stops or starts the admission of videos."""
        await self._accounts.set_admission(request.paused, request.why, common.caller().key_id)
        return operator_pb2.SetAdmissionResponse(paused=request.paused)

    async def CheckBooks(
        self, request: operator_pb2.CheckBooksRequest, context: Any
    ) -> ledger_pb2.CheckBooksResponse:
        """Proves the books."""
        asked, stub = ledger_pb2.CheckBooksRequest(), self._peers.stubs.credits
        return await self._audited(
            "CheckBooks", "", "", {}, lambda: stub.CheckBooks(asked, timeout=CHECK_SECONDS)
        )

    async def SetFrozen(
        self, request: operator_pb2.SetFrozenRequest, context: Any
    ) -> ledger_pb2.AccountRules:
        """Freezes an account, or lets it go on."""
        asked, stub = request.request, self._peers.stubs.credits
        return await self._audited(
            "SetFrozen",
            asked.account_id,
            request.why,
            {"frozen": asked.frozen},
            lambda: stub.SetFrozen(asked, timeout=peers.TIMEOUT_SECONDS),
        )

    async def SetDailyCap(
        self, request: operator_pb2.SetDailyCapRequest, context: Any
    ) -> ledger_pb2.AccountRules:
        """Caps what an account or one of its keys may reserve in a day."""
        asked, stub = request.request, self._peers.stubs.credits
        cap = asked.credits if asked.HasField("credits") else None
        return await self._audited(
            "SetDailyCap",
            asked.account_id,
            request.why,
            {"key_id": asked.key_id, "credits": cap},
            lambda: stub.SetDailyCap(asked, timeout=peers.TIMEOUT_SECONDS),
        )

    async def AddRulebook(
        self, request: operator_pb2.AddRulebookRequest, context: Any
    ) -> ledger_pb2.Rulebook:
        """Adds a version of price book or refund policy, inactive."""
        asked, stub = request.request, self._peers.stubs.credits
        asked.operator = common.caller().key_id
        detail = {
            "kind": _short(ledger_pb2.RulebookKind, asked.kind, "RULEBOOK_KIND_"),
            "yaml_sha256": hashlib.sha256(asked.yaml.encode()).hexdigest(),
        }
        return await self._audited(
            "AddRulebook",
            "",
            request.why,
            detail,
            lambda: stub.AddRulebook(asked, timeout=peers.TIMEOUT_SECONDS),
        )

    async def ListRulebooks(
        self, request: operator_pb2.ListRulebooksRequest, context: Any
    ) -> ledger_pb2.ListRulebooksResponse:
        """Versions of price book or refund policy, newest first."""
        asked, stub = request.request, self._peers.stubs.credits
        return await self._audited(
            "ListRulebooks",
            "",
            "",
            {"kind": _short(ledger_pb2.RulebookKind, asked.kind, "RULEBOOK_KIND_")},
            lambda: stub.ListRulebooks(asked, timeout=peers.TIMEOUT_SECONDS),
        )

    async def ActivateRulebook(
        self, request: operator_pb2.ActivateRulebookRequest, context: Any
    ) -> ledger_pb2.Rulebook:
        """Puts a version in force."""
        asked, stub = request.request, self._peers.stubs.credits
        asked.operator = common.caller().key_id
        effective_from = messages.moment(asked, "effective_from")
        detail = {
            "kind": _short(ledger_pb2.RulebookKind, asked.kind, "RULEBOOK_KIND_"),
            "version": asked.version,
            "content_hash": asked.content_hash,
            "effective_from": effective_from.isoformat() if effective_from else "",
        }
        return await self._audited(
            "ActivateRulebook",
            "",
            request.why,
            detail,
            lambda: stub.ActivateRulebook(asked, timeout=peers.TIMEOUT_SECONDS),
        )

    async def ListAttempts(
        self, request: operator_pb2.ListAttemptsRequest, context: Any
    ) -> attempt_pb2.ListAttemptsResponse:
        """Attempts, newest first."""
        return await self._of_attempt("ListAttempts", request.request, "")

    async def SetRetention(
        self, request: operator_pb2.SetRetentionRequest, context: Any
    ) -> storage_pb2.Retention:
        """How long an account's assets are kept."""
        wanted, stub = request.retention, self._peers.stubs.storage
        return await self._audited(
            "SetRetention",
            wanted.account_id,
            request.why,
            {
                _short(storage_pb2.AssetKind, item.kind, "ASSET_KIND_"): item.keep_seconds
                for item in wanted.kinds
            },
            lambda: stub.SetRetention(wanted, timeout=peers.TIMEOUT_SECONDS),
        )

    async def Reconcile(
        self, request: operator_pb2.ReconcileRequest, context: Any
    ) -> AsyncIterator[operator_pb2.ReconcileResponse]:
        """One pass over all services."""
        since = messages.moment(request, "since")
        detail = {"since": since.isoformat() if since else ""}
        caller, outcome = common.caller().key_id, "BROKEN_OFF"
        audit_id = await self._accounts.audit_begins(caller, "Reconcile", "", "", detail)
        try:
            async for part in self._reconciler.run_pass(since):
                if isinstance(part, reconciler.Pass):
                    outcome = "OK"
                    yield operator_pb2.ReconcileResponse(done=_pass(part))
                else:
                    yield operator_pb2.ReconcileResponse(finding=_finding(part))
        except errors.ServiceError as error:
            outcome = error.reason
            raise peers.for_caller(error) from error
        finally:
            await self._accounts.audit_ends(audit_id, outcome)

    async def Recover(
        self, request: operator_pb2.RecoverRequest, context: Any
    ) -> AsyncIterator[operator_pb2.RecoverResponse]:
        """Makes good what restored databases forgot, and opens."""
        detail = {"dry_run": request.dry_run}
        caller, outcome = common.caller().key_id, "BROKEN_OFF"
        audit_id = await self._accounts.audit_begins(caller, "Recover", "", request.why, detail)
        try:
            async for part in self._recoverer.run(dry_run=request.dry_run):
                if isinstance(part, operator_pb2.RecoverDone):
                    outcome = "OK"
                    yield operator_pb2.RecoverResponse(done=part)
                else:
                    yield operator_pb2.RecoverResponse(video=part)
        except errors.ServiceError as error:
            outcome = error.reason
            raise peers.for_caller(error) from error
        finally:
            await self._accounts.audit_ends(audit_id, outcome)

    async def Repair(
        self, request: operator_pb2.RepairRequest, context: Any
    ) -> operator_pb2.Finding:
        """Applies the repair of a confirmed finding."""
        kept = await self._reconciler.find(request.finding_id)
        finding = kept.finding
        detail = {
            "finding_id": finding.finding_id,
            "kind": finding.kind,
            "video_id": finding.video_id,
            "repair": finding.repair,
            "says": [f"{one.side}: {one.says}" for one in finding.statements],
        }
        await self._audited(
            "Repair",
            finding.account_id,
            request.why,
            detail,
            lambda: self._reconciler.repair(kept),
        )
        return _finding(kept)

    async def GetAttempt(
        self, request: operator_pb2.GetAttemptRequest, context: Any
    ) -> attempt_pb2.AttemptDetail:
        """Everything on record of an attempt."""
        return await self._of_attempt("GetAttempt", request.request, "")

    async def ResolveAttempt(
        self, request: operator_pb2.ResolveAttemptRequest, context: Any
    ) -> attempt_pb2.Attempt:
        """Says what became of an undecided attempt."""
        return await self._of_attempt("ResolveAttempt", request.request, request.why)

    async def RetryAttempt(
        self, request: operator_pb2.RetryAttemptRequest, context: Any
    ) -> attempt_pb2.Attempt:
        """Sends the video of an undecided attempt again."""
        return await self._of_attempt("RetryAttempt", request.request, request.why)

    async def CancelAttempt(
        self, request: operator_pb2.CancelAttemptRequest, context: Any
    ) -> attempt_pb2.VideoOutcome:
        """Asks for the end of a video that the generator knows, whosever it is."""
        stub, video_id = self._peers.stubs.generator, request.video_id

        async def cancel() -> attempt_pb2.VideoOutcome:
            known = attempt_pb2.GetVideoOutcomeRequest(video_id=video_id)
            outcome = await stub.GetVideoOutcome(known, timeout=peers.TIMEOUT_SECONDS)
            asked = attempt_pb2.CancelAttemptRequest(
                video_id=video_id, account_id=outcome.account_id
            )
            return await stub.CancelAttempt(asked, timeout=peers.TIMEOUT_SECONDS)

        detail = {"video_id": video_id}
        return await self._audited("CancelAttempt", "", request.why, detail, cancel)

    async def ListProviderAccounts(
        self, request: operator_pb2.ListProviderAccountsRequest, context: Any
    ) -> attempt_pb2.ListProviderAccountsResponse:
        """State of the provider accounts."""
        asked = attempt_pb2.ListProviderAccountsRequest()
        return await self._of_attempt("ListProviderAccounts", asked, "")

    async def PauseProviderAccount(
        self, request: operator_pb2.PauseProviderAccountRequest, context: Any
    ) -> attempt_pb2.ProviderAccount:
        """Stops or starts sending to a provider account."""
        return await self._of_attempt("PauseProviderAccount", request.request, request.why)

    async def ListQuarantined(
        self, request: operator_pb2.ListQuarantinedRequest, context: Any
    ) -> operator_pb2.ListQuarantinedResponse:
        """What is kept aside of an account, to be looked at: on record, since it is the customer's."""
        return await self._audited(
            "ListQuarantined",
            request.account_id,
            request.why,
            {},
            lambda: self._quarantined(request),
        )

    async def _quarantined(
        self, request: operator_pb2.ListQuarantinedRequest
    ) -> operator_pb2.ListQuarantinedResponse:
        storage, state = self._peers.stubs.storage, storage_pb2.ASSET_STATE_QUARANTINED
        # Storage's own tokens name no listing: what reaches a caller is bound to this one.
        listing = ("quarantined", request.account_id)
        place = self._pages.place(listing, request.page_token)
        asked = storage_pb2.ListRequest(
            account_id=request.account_id,
            page_size=request.page_size,
            page_token=pages.encode(*place) if place else "",
            state=state,
        )
        found = await storage.List(asked, timeout=peers.TIMEOUT_SECONDS)
        following = pages.decode(found.next_page_token)
        answer = operator_pb2.ListQuarantinedResponse(
            next_page_token=self._pages.token(listing, *following) if following else ""
        )
        for asset in found.assets:
            sign = storage_pb2.SignUrlRequest(
                account_id=asset.account_id, asset_id=asset.asset_id, state=state
            )
            signed = await storage.SignUrl(sign, timeout=peers.TIMEOUT_SECONDS)
            answer.quarantined.add(asset=asset, url=signed.url, url_expires_at=signed.expires_at)
        return answer

    async def _of_attempt(self, method: str, asked: Any, why: str) -> Any:
        """One call of the generator's, on record with what was asked."""
        send = getattr(self._peers.stubs.generator, method)
        detail = messages.own_fields(asked)
        return await self._audited(
            method, "", why, detail, lambda: send(asked, timeout=peers.TIMEOUT_SECONDS)
        )

    async def _audited(
        self,
        method: str,
        account_id: str,
        why: str,
        detail: Mapping[str, Any],
        call: Callable[[], Awaitable[T]],
    ) -> T:
        """Calls a service behind; what was to be done is on record first, what became of it afterwards."""
        audit_id = await self._accounts.audit_begins(
            common.caller().key_id, method, account_id, why, detail
        )
        try:
            answer = await call()
        except errors.ServiceError as error:
            await self._accounts.audit_ends(audit_id, error.reason)
            raise peers.for_caller(error) from error
        await self._accounts.audit_ends(audit_id, "OK")
        return answer


def _short(enum: Any, number: int, prefix: str) -> str:
    return enum.Name(number).removeprefix(prefix)


def _finding(kept: findings.Kept) -> operator_pb2.Finding:
    finding = kept.finding
    return operator_pb2.Finding(
        finding_id=finding.finding_id,
        kind=operator_pb2.FindingKind.Value(f"FINDING_KIND_{finding.kind}"),
        video_id=finding.video_id,
        account_id=finding.account_id,
        subject=finding.subject,
        statements=[
            operator_pb2.Statement(
                side=said.side, as_of=messages.timestamp(said.as_of), says=said.says
            )
            for said in finding.statements
        ],
        repair=operator_pb2.RepairKind.Value(f"REPAIR_KIND_{finding.repair}"),
        advice=finding.advice,
        first_seen_at=messages.timestamp(kept.first_seen_at),
        last_seen_at=messages.timestamp(kept.last_seen_at),
        confirmed=kept.confirmed,
    )


def _pass(done: reconciler.Pass) -> operator_pb2.ReconcilePass:
    return operator_pb2.ReconcilePass(
        started_at=messages.timestamp(done.started_at),
        since=messages.timestamp(done.since),
        videos=done.videos,
        provider_jobs=done.provider_jobs,
        objects=done.objects,
        findings=done.findings,
        confirmed=done.confirmed,
        sides=[
            operator_pb2.ReconcileSide(
                side=side.side, as_of=messages.timestamp(side.as_of), error=side.error
            )
            for side in done.sides
        ],
        interval_seconds=done.interval.total_seconds(),
    )
