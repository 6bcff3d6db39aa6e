"""LedgerService: proto to domain and back, and who may call what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import vocabulary_pb2
from kit import auth, errors, incarnation, pages, rpc
from kit.failpoints import failpoint
from services.credits import (
    documents,
    floor,
    holds,
    ledger,
    messages,
    operations,
    rules,
    settlement,
    store,
)
from services.credits.store import rulebooks

# The gateway checks principals and roles before it calls; `operator` is the command line inside the cluster.
_CALLERS: Mapping[str, frozenset[str]] = {
    "OpenAccount": frozenset({"gateway", "operator"}),
    "Grant": frozenset({"gateway", "operator"}),
    "Quote": frozenset({"gateway", "operator"}),
    "Reserve": frozenset({"gateway", "operator"}),
    "Capture": frozenset({"gateway", "operator"}),
    "Release": frozenset({"gateway", "operator"}),
    "Refund": frozenset({"gateway", "operator"}),
    "GetBalance": frozenset({"gateway", "operator"}),
    "ListEntries": frozenset({"gateway", "operator"}),
    "ListHolds": frozenset({"gateway", "operator"}),
    "GetUsage": frozenset({"gateway", "operator"}),
    "SetFrozen": frozenset({"gateway", "operator"}),
    "SetDailyCap": frozenset({"gateway", "operator"}),
    "ForgetLabels": frozenset({"gateway"}),
    "AddRulebook": frozenset({"gateway", "operator"}),
    "ListRulebooks": frozenset({"gateway", "operator"}),
    "ActivateRulebook": frozenset({"gateway", "operator"}),
    "CheckBooks": frozenset({"gateway", "operator"}),
    "SurveyHolds": frozenset({"gateway", "operator"}),
    "AssessHolds": frozenset({"gateway", "operator"}),
    "SettleHold": frozenset({"gateway", "operator"}),
    "GetRecovery": frozenset({"gateway", "operator"}),
    "RestoreHold": frozenset({"gateway", "operator"}),
    "EndRecovery": frozenset({"gateway", "operator"}),
}

FORGOTTEN = 1000
"""Holds that one call takes the labels off."""


def authenticate(tokens: auth.ServiceTokens) -> rpc.Authenticate:
    """Lets in whom the table names."""

    async def check(method: str, metadata: Mapping[str, str]) -> str:
        allowed = _CALLERS.get(method.rsplit("/", 1)[-1], frozenset())
        return tokens.caller(metadata.get("authorization", ""), allowed)

    return check


class LedgerService(ledger_pb2_grpc.LedgerServiceServicer):
    """The ledger, served."""

    def __init__(
        self,
        books: store.Store,
        pages_: pages.Pages,
        floor_: floor.Floor,
        life: incarnation.Incarnation,
    ) -> None:
        self._life = life
        self._ledger = books.ledger
        self._statements = books.statements
        self._accounts = books.accounts
        self._rulebooks = books.rulebooks
        self._pages = pages_
        self._survey = books.survey
        self._floor = floor_

    async def OpenAccount(self, request: ledger_pb2.OpenAccountRequest, context: Any) -> Any:
        """Makes an account's books."""
        return messages.balance(await self._ledger.open_account(request.account_id))

    async def Grant(self, request: ledger_pb2.GrantRequest, context: Any) -> Any:
        """Gives credits as a new lot."""
        grant = operations.Grant(
            account_id=request.account_id,
            request_id=request.request_id,
            credits=request.credits,
            source=ledger.LotSource(
                messages.name(ledger_pb2.LotSource, request.source, "LOT_SOURCE_")
            ),
            priority=request.priority,
            expires_at=messages.optional_moment(request, "expires_at"),
            note=messages.text(request.note, "note"),
            origin=ledger.Origin(
                operator=messages.text(request.operator, "operator"),
                purchase=messages.text(request.purchase, "purchase"),
            ),
        )
        given = await self._ledger.grant(grant)
        return ledger_pb2.GrantResponse(
            lot_id=given.lot_id, balance=messages.balance(given.balance)
        )

    async def Quote(self, request: ledger_pb2.QuoteRequest, context: Any) -> Any:
        """Prices an item without reserving."""
        quote_id, quote = await self._ledger.quote(messages.item(request.item))
        return ledger_pb2.PriceQuote(
            quote_id=quote_id,
            credits=quote.credits,
            price_version=quote.price_version,
            expires_at=messages.timestamp(quote.expires_at),
        )

    async def Reserve(self, request: ledger_pb2.ReserveRequest, context: Any) -> Any:
        """Prices and holds credits."""
        self._life.require()
        reservation = operations.Reservation(**_reservation(request))
        return messages.hold(await self._ledger.reserve(reservation))

    async def GetRecovery(self, request: ledger_pb2.GetRecoveryRequest, context: Any) -> Any:
        """Whether it may move credits."""
        return messages.standing(await self._life.standing())

    async def RestoreHold(self, request: ledger_pb2.RestoreHoldRequest, context: Any) -> Any:
        """Holds credits again that a restore forgot."""
        if self._life.open:
            raise errors.FailedPrecondition(
                "NOT_IN_RECOVERY", "the ledger's database is the one that went on"
            )
        await self._check_versions(request)
        restoration = operations.Restoration(
            **_reservation(request.reserve),
            credits=request.credits,
            price_version=messages.text(request.price_version, "price_version"),
            policy_version=messages.text(request.policy_version, "policy_version"),
        )
        return messages.hold(await self._ledger.reserve(restoration))

    async def _check_versions(self, request: ledger_pb2.RestoreHoldRequest) -> None:
        for kind, version in (
            (rules.Kind.PRICE_BOOK, request.price_version),
            (rules.Kind.REFUND_POLICY, request.policy_version),
        ):
            if not await self._rulebooks.versions(kind, version):
                raise errors.NotFound(
                    "RULEBOOK_NOT_FOUND",
                    f"{kind} {version} was forgotten, too: add and activate it again first",
                )

    async def EndRecovery(self, request: ledger_pb2.EndRecoveryRequest, context: Any) -> Any:
        """Opens."""
        await failpoint("credits.recover.before_open")
        await self._life.end_recovery()
        return messages.standing(await self._life.standing())

    async def Capture(self, request: ledger_pb2.CaptureRequest, context: Any) -> Any:
        """Takes part or all of a hold."""
        self._life.require()
        cause = messages.name(vocabulary_pb2.Cause, request.cause, "CAUSE_")
        operator = messages.text(request.operator, "operator")
        return messages.hold(
            await self._ledger.capture(request.hold_id, request.credits, cause, operator)
        )

    async def Release(self, request: ledger_pb2.ReleaseRequest, context: Any) -> Any:
        """Gives a hold back."""
        self._life.require()
        cause = messages.name(vocabulary_pb2.Cause, request.cause, "CAUSE_")
        operator = messages.text(request.operator, "operator")
        return messages.hold(
            await self._ledger.release(request.hold_id, request.account_id, cause, operator)
        )

    async def Refund(self, request: ledger_pb2.RefundRequest, context: Any) -> Any:
        """Gives captured credits back."""
        self._life.require()
        loss = request.taken_from == ledger_pb2.REFUND_FROM_LOSS
        given = await self._ledger.refund(
            request.hold_id,
            request.request_id,
            request.credits,
            messages.text(request.note, "note"),
            operator=messages.text(request.operator, "operator"),
            taken_from=ledger.Book.LOSS if loss else ledger.Book.REVENUE,
        )
        return ledger_pb2.RefundResponse(
            lot_id=given.lot_id, balance=messages.balance(given.balance)
        )

    async def GetBalance(self, request: ledger_pb2.GetBalanceRequest, context: Any) -> Any:
        """What an account has."""
        return messages.balance(await self._statements.get_balance(request.account_id))

    async def ListEntries(self, request: ledger_pb2.ListEntriesRequest, context: Any) -> Any:
        """The account's statement."""
        size = request.page_size or pages.DEFAULT_SIZE
        only = messages.entry_filter(request)
        listing = ("entries", request.account_id, only)
        place = self._pages.place(listing, request.page_token)
        lines = await self._statements.list_entries(
            request.account_id, int(place[1]) if place else None, size + 1, only
        )
        token = ""
        if len(lines) > size:
            last = lines[size - 1]
            token = self._pages.token(listing, last.created_at, str(last.seq))
        return ledger_pb2.ListEntriesResponse(
            entries=[messages.entry(line) for line in lines[:size]], next_page_token=token
        )

    async def ListHolds(self, request: ledger_pb2.ListHoldsRequest, context: Any) -> Any:
        """Holds, newest first."""
        size = request.page_size or pages.DEFAULT_SIZE
        listing = ("holds", request.account_id, request.state)
        before = self._pages.place(listing, request.page_token)
        state = (
            holds.HoldState(messages.name(ledger_pb2.HoldState, request.state, "HOLD_STATE_"))
            if request.state
            else None
        )
        found = await self._statements.list_holds(
            request.account_id or None, state, before, size + 1
        )
        token = ""
        if len(found) > size:
            last = found[size - 1]
            token = self._pages.token(listing, last.created_at, last.hold_id)
        return ledger_pb2.ListHoldsResponse(
            holds=[messages.hold(hold) for hold in found[:size]], next_page_token=token
        )

    async def GetUsage(self, request: ledger_pb2.GetUsageRequest, context: Any) -> Any:
        """What an account used."""
        period, lines = await self._statements.get_usage(
            request.account_id, messages.usage_asked(request)
        )
        return ledger_pb2.GetUsageResponse(
            lines=[messages.usage_line(line) for line in lines],
            **{"from": messages.timestamp(period.from_), "to": messages.timestamp(period.to)},
        )

    async def CheckBooks(self, request: ledger_pb2.CheckBooksRequest, context: Any) -> Any:
        """Proves the books."""
        proof = await self._statements.check_books()
        return ledger_pb2.CheckBooksResponse(
            balanced=not proof.findings,
            findings=proof.findings,
            transfers=proof.transfers,
            accounts=proof.accounts,
            open_holds=proof.open_holds,
            recomputed_holds=proof.recomputed_holds,
        )

    async def ForgetLabels(self, request: ledger_pb2.ForgetLabelsRequest, context: Any) -> Any:
        """Takes the labels off an account's holds."""
        listing = ("labels", request.account_id)
        before = self._pages.place(listing, request.page_token)
        last = await self._accounts.forget_labels(request.account_id, before, FORGOTTEN)
        token = self._pages.token(listing, *last) if last else ""
        return ledger_pb2.ForgetLabelsResponse(next_page_token=token)

    async def SetFrozen(self, request: ledger_pb2.SetFrozenRequest, context: Any) -> Any:
        """Freezes an account, or lets it go on."""
        return messages.account_rules(
            await self._accounts.set_frozen(request.account_id, request.frozen)
        )

    async def SetDailyCap(self, request: ledger_pb2.SetDailyCapRequest, context: Any) -> Any:
        """Caps what may be reserved in a day."""
        credits_ = request.credits if request.HasField("credits") else None
        return messages.account_rules(
            await self._accounts.set_daily_cap(request.account_id, request.key_id, credits_)
        )

    async def AddRulebook(self, request: ledger_pb2.AddRulebookRequest, context: Any) -> Any:
        """Adds a version of price book or refund policy, inactive."""
        kind = messages.rulebook_kind(request.kind)
        by = messages.text(request.operator, "operator") or rpc.caller()
        try:
            document = documents.read(kind, request.yaml)
            await self._rulebooks.load(kind, document, by)
        except rulebooks.RulebookExistsError as error:
            raise errors.AlreadyExists("RULEBOOK_EXISTS", str(error)) from error
        except rules.RulesError as error:
            raise errors.InvalidArgument(
                "RULEBOOK_INVALID", f"the document is not usable: {error}"
            ) from error
        return await self._rulebook(kind, document["version"])

    async def ListRulebooks(self, request: ledger_pb2.ListRulebooksRequest, context: Any) -> Any:
        """Versions, newest first."""
        found = await self._rulebooks.versions(messages.rulebook_kind(request.kind))
        return ledger_pb2.ListRulebooksResponse(
            rulebooks=[messages.rulebook(version) for version in found]
        )

    async def ActivateRulebook(
        self, request: ledger_pb2.ActivateRulebookRequest, context: Any
    ) -> Any:
        """Puts a version in force."""
        kind = messages.rulebook_kind(request.kind)
        version = messages.text(request.version, "version")
        by = messages.text(request.operator, "operator") or rpc.caller()
        at = messages.optional_moment(request, "effective_from")
        await self._rulebooks.activate(
            kind, version, request.content_hash, at, by, request.request_id
        )
        return await self._rulebook(kind, version)

    async def SurveyHolds(self, request: ledger_pb2.SurveyHoldsRequest, context: Any) -> Any:
        """Holds at a watermark."""
        size = request.page_size or pages.DEFAULT_SIZE
        before = pages.decode(request.page_token)
        since = messages.optional_moment(request, "created_since")
        if request.hold_ids:
            found, as_of = await self._survey.by_ids(request.hold_ids)
            size = len(found)
        elif since is not None:
            found, as_of = await self._survey.since(since, before, size + 1)
        else:
            found, as_of = await self._survey.open(before, size + 1)
        last = found[size - 1] if len(found) > size else None
        return ledger_pb2.SurveyHoldsResponse(
            holds=[
                ledger_pb2.SurveyedHold(
                    hold=messages.hold(hold),
                    refunded_credits=hold.refunded,
                    by_operator=hold.settled_at is not None and hold.verdict is None,
                )
                for hold in found[:size]
            ],
            as_of=messages.timestamp(as_of),
            next_page_token=pages.encode(last.created_at, last.hold_id) if last else "",
        )

    async def AssessHolds(self, request: ledger_pb2.AssessHoldsRequest, context: Any) -> Any:
        """What the policies take."""
        try:
            ends = [settlement.verdict(event) for event in request.ends]
        except settlement.UnreadableError as error:
            sentence = f"an event that no hold is settled by: {error}"
            raise errors.InvalidArgument(
                "INVALID_FIELD", f"ends: {sentence}", violations=[("ends", sentence)]
            ) from None
        return ledger_pb2.AssessHoldsResponse(
            assessments=[
                ledger_pb2.Assessment(hold_id=hold_id, captured_credits=captured)
                for hold_id, captured in await self._survey.assess(ends)
            ]
        )

    async def SettleHold(self, request: ledger_pb2.SettleHoldRequest, context: Any) -> Any:
        """Settles a hold by what the generator says."""
        self._life.require()
        return messages.hold(await self._floor.settle(request.hold_id))

    async def _rulebook(self, kind: rules.Kind, version: str) -> ledger_pb2.Rulebook:
        (found,) = await self._rulebooks.versions(kind, version)
        return messages.rulebook(found)


def _reservation(request: ledger_pb2.ReserveRequest) -> dict[str, Any]:
    return {
        "hold_id": request.hold_id,
        "account_id": request.account_id,
        "item": messages.item(request.item),
        "not_after": messages.moment(request.not_after, "not_after"),
        "quote_id": request.quote_id,
        "max_credits": request.max_credits if request.HasField("max_credits") else None,
        "labels": {
            messages.text(key, "labels"): messages.text(value, "labels")
            for key, value in request.labels.items()
        },
        "key_id": request.key_id,
    }
