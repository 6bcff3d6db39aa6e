"""LedgerService: proto to domain and back, and who may call what."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf import timestamp_pb2

from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import vocabulary_pb2
from kit import auth, errors, pages, rpc
from services.credits import holds, ledger, operations, rules, store
from services.credits.store import statements

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
    "CheckBooks": frozenset({"gateway", "operator"}),
}


def authenticate(tokens: auth.ServiceTokens) -> rpc.Authenticate:
    """Lets in whom the table names."""

    async def check(method: str, metadata: Mapping[str, str]) -> str:
        allowed = _CALLERS.get(method.rsplit("/", 1)[-1], frozenset())
        return tokens.caller(metadata.get("authorization", ""), allowed)

    return check


class LedgerService(ledger_pb2_grpc.LedgerServiceServicer):
    """The ledger, served."""

    def __init__(self, books: store.Store) -> None:
        self._ledger = books.ledger
        self._statements = books.statements

    async def OpenAccount(self, request: ledger_pb2.OpenAccountRequest, context: Any) -> Any:
        """Makes an account's books."""
        return _balance(await self._ledger.open_account(request.account_id))

    async def Grant(self, request: ledger_pb2.GrantRequest, context: Any) -> Any:
        """Gives credits as a new lot."""
        grant = operations.Grant(
            account_id=request.account_id,
            request_id=request.request_id,
            credits=request.credits,
            source=ledger.LotSource(_name(ledger_pb2.LotSource, request.source, "LOT_SOURCE_")),
            priority=request.priority,
            expires_at=_moment(request.expires_at, "expires_at")
            if request.HasField("expires_at")
            else None,
            note=_text(request.note, "note"),
        )
        given = await self._ledger.grant(grant)
        return ledger_pb2.GrantResponse(lot_id=given.lot_id, balance=_balance(given.balance))

    async def Quote(self, request: ledger_pb2.QuoteRequest, context: Any) -> Any:
        """Prices an item without reserving."""
        quote_id, quote = await self._ledger.quote(_item(request.item))
        return ledger_pb2.PriceQuote(
            quote_id=quote_id,
            credits=quote.credits,
            price_version=quote.price_version,
            expires_at=_timestamp(quote.expires_at),
        )

    async def Reserve(self, request: ledger_pb2.ReserveRequest, context: Any) -> Any:
        """Prices and holds credits."""
        reservation = operations.Reservation(
            hold_id=request.hold_id,
            account_id=request.account_id,
            item=_item(request.item),
            not_after=_moment(request.not_after, "not_after"),
            quote_id=request.quote_id,
            max_credits=request.max_credits if request.HasField("max_credits") else None,
            labels={
                _text(key, "labels"): _text(value, "labels")
                for key, value in request.labels.items()
            },
        )
        return _hold(await self._ledger.reserve(reservation))

    async def Capture(self, request: ledger_pb2.CaptureRequest, context: Any) -> Any:
        """Takes part or all of a hold."""
        cause = _name(vocabulary_pb2.Cause, request.cause, "CAUSE_")
        return _hold(await self._ledger.capture(request.hold_id, request.credits, cause))

    async def Release(self, request: ledger_pb2.ReleaseRequest, context: Any) -> Any:
        """Gives a hold back."""
        cause = _name(vocabulary_pb2.Cause, request.cause, "CAUSE_")
        return _hold(await self._ledger.release(request.hold_id, request.account_id, cause))

    async def Refund(self, request: ledger_pb2.RefundRequest, context: Any) -> Any:
        """Gives captured credits back."""
        given = await self._ledger.refund(
            request.hold_id, request.request_id, request.credits, _text(request.note, "note")
        )
        return ledger_pb2.RefundResponse(lot_id=given.lot_id, balance=_balance(given.balance))

    async def GetBalance(self, request: ledger_pb2.GetBalanceRequest, context: Any) -> Any:
        """What an account has."""
        return _balance(await self._statements.get_balance(request.account_id))

    async def ListEntries(self, request: ledger_pb2.ListEntriesRequest, context: Any) -> Any:
        """The account's statement."""
        size = request.page_size or pages.DEFAULT_SIZE
        place = pages.decode(request.page_token)
        before = _seq(place[1]) if place else None
        lines = await self._statements.list_entries(request.account_id, before, size + 1)
        token = ""
        if len(lines) > size:
            last = lines[size - 1]
            token = pages.encode(last.created_at, str(last.seq))
        return ledger_pb2.ListEntriesResponse(
            entries=[_entry(line) for line in lines[:size]], next_page_token=token
        )

    async def ListHolds(self, request: ledger_pb2.ListHoldsRequest, context: Any) -> Any:
        """Holds, newest first."""
        size = request.page_size or pages.DEFAULT_SIZE
        before = pages.decode(request.page_token)
        state = (
            holds.HoldState(_name(ledger_pb2.HoldState, request.state, "HOLD_STATE_"))
            if request.state
            else None
        )
        found = await self._statements.list_holds(
            request.account_id or None, state, before, size + 1
        )
        token = ""
        if len(found) > size:
            last = found[size - 1]
            token = pages.encode(last.created_at, last.hold_id)
        return ledger_pb2.ListHoldsResponse(
            holds=[_hold(hold) for hold in found[:size]], next_page_token=token
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
        )


def _name(enum: Any, number: int, prefix: str) -> str:
    return enum.Name(number).removeprefix(prefix)


def _item(item: ledger_pb2.Item) -> rules.Item:
    lane = rules.Lane(_name(vocabulary_pb2.Lane, item.lane, "LANE_"))
    return rules.Item(
        _text(item.model, "item.model"), item.width, item.height, item.seconds, item.variants, lane
    )


def _moment(stamp: timestamp_pb2.Timestamp, field: str) -> datetime:
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise errors.InvalidArgument(
            "INVALID_FIELD",
            f"{field} is not a time between the years 1 and 9999",
            violations=[(field, "must be a time between the years 1 and 9999")],
        ) from None


def _timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    if moment is None:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def _balance(balance: ledger.Balance) -> ledger_pb2.Balance:
    return ledger_pb2.Balance(
        account_id=balance.account_id,
        available_credits=balance.available,
        held_credits=balance.held,
        next_expiry_at=_timestamp(balance.next_expiry_at),
        next_expiry_credits=balance.next_expiry_credits,
    )


def _hold(hold: holds.Hold) -> ledger_pb2.Hold:
    return ledger_pb2.Hold(
        hold_id=hold.hold_id,
        account_id=hold.account_id,
        state=ledger_pb2.HoldState.Value(f"HOLD_STATE_{hold.state}"),
        reserved_credits=hold.reserved,
        captured_credits=hold.captured,
        released_credits=hold.released,
        price_version=hold.price_version or "",
        policy_version=hold.policy_version or "",
        created_at=_timestamp(hold.created_at),
        settled_at=_timestamp(hold.settled_at),
        cause=vocabulary_pb2.Cause.Value(f"CAUSE_{hold.cause or 'UNSPECIFIED'}"),
    )


def _entry(line: statements.StatementLine) -> ledger_pb2.Entry:
    return ledger_pb2.Entry(
        transfer_id=f"{line.account_id}-{line.seq}",
        kind=ledger_pb2.TransferKind.Value(f"TRANSFER_KIND_{line.kind}"),
        available_change=line.available_change,
        held_change=line.held_change,
        video_id=line.hold_id or "",
        cause=vocabulary_pb2.Cause.Value(f"CAUSE_{line.cause or 'UNSPECIFIED'}"),
        created_at=_timestamp(line.created_at),
        note=line.note,
    )


def _seq(row_id: str) -> int:
    if not row_id.isdecimal() or not row_id.isascii() or len(row_id) > 18:
        raise errors.InvalidArgument(
            "PAGE_TOKEN_INVALID", "page_token is not one that ListEntries gave; start without it"
        )
    return int(row_id)


def _text(value: str, field: str) -> str:
    """Text that a database can keep."""
    if "\0" in value:
        raise errors.InvalidArgument(
            "INVALID_FIELD",
            f"{field}: the character U+0000 cannot be kept",
            violations=[(field, "must not contain the character U+0000")],
        )
    return value
