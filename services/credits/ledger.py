"""What a movement of credits is: lots, holds, and transfers whose lines sum to zero.

Pure: no I/O, no clock, no randomness; time and fresh ids are arguments. `Books` are one account as it was read under
its lock; every function answers the books that result, with the transfers that led there, for the store to write down.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from kit import errors

DEFAULT_PRIORITY = 50
RETURNED_LIFE_AT_LEAST = timedelta(hours=24)
"""What a release or a refund gives back lives at least so long: no failure of ours expires a customer's credits."""

_NEVER = datetime.max.replace(tzinfo=UTC)


class LotSource(enum.StrEnum):
    """Where a lot came from."""

    PURCHASE = "PURCHASE"
    PROMOTION = "PROMOTION"
    SUBSCRIPTION = "SUBSCRIPTION"
    CORRECTION = "CORRECTION"


class TransferKind(enum.StrEnum):
    """Kinds of movements."""

    GRANT = "GRANT"
    RESERVE = "RESERVE"
    CAPTURE = "CAPTURE"
    RELEASE = "RELEASE"
    REFUND = "REFUND"
    EXPIRE = "EXPIRE"


class Book(enum.StrEnum):
    """Where credits can be. The first two are the customer's, lot by lot; the others are the company's."""

    AVAILABLE = "available"
    HELD = "held"
    REVENUE = "revenue"
    BREAKAGE = "breakage"
    LOSS = "loss"
    PURCHASES = "purchases"
    PROMOTIONS = "promotions"
    SUBSCRIPTIONS = "subscriptions"
    CORRECTIONS = "corrections"


_BOOK_OF_SOURCE = {
    LotSource.PURCHASE: Book.PURCHASES,
    LotSource.PROMOTION: Book.PROMOTIONS,
    LotSource.SUBSCRIPTION: Book.SUBSCRIPTIONS,
    LotSource.CORRECTION: Book.CORRECTIONS,
}


@dataclass(frozen=True, slots=True)
class Lot:
    """Credits that came together and go together."""

    lot_id: str
    source: LotSource
    priority: int
    expires_at: datetime | None
    created_at: datetime
    granted: int
    available: int = 0
    held: int = 0
    parent_lot_id: str | None = None

    def moved(self, available: int, held: int) -> Lot:
        """With so many credits more available and held."""
        return Lot(
            self.lot_id,
            self.source,
            self.priority,
            self.expires_at,
            self.created_at,
            self.granted,
            self.available + available,
            self.held + held,
            self.parent_lot_id,
        )


@dataclass(frozen=True, slots=True)
class Line:
    """One entry: so many credits more (or fewer) in a book. Customers' books name the lot."""

    book: Book
    credits: int
    lot_id: str | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a movement came from: the trace of its call or event, the principal who asked, what was paid for it."""

    trace_id: str = ""
    operator: str = ""
    purchase: str = ""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One movement. Its lines sum to zero."""

    kind: TransferKind
    lines: tuple[Line, ...]
    hold_id: str | None = None
    cause: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        total = 0
        for line in self.lines:
            assert line.credits, self
            total += line.credits
        assert self.lines, self
        assert total == 0, self

    def change(self, book: Book) -> int:
        """How many credits it adds to this book."""
        return sum([line.credits for line in self.lines if line.book is book])


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a lot that a hold pins. `lifetime_left` is the lot's at the reservation; None: it never expires."""

    lot_id: str
    credits: int
    lifetime_left: timedelta | None
    captured: int = 0
    released: int = 0


@dataclass(frozen=True, slots=True)
class Balance:
    """What an account has, without what is due."""

    account_id: str
    available: int
    held: int
    next_expiry_at: datetime | None = None
    next_expiry_credits: int = 0


@dataclass(frozen=True, slots=True)
class Books:
    """One account: its numbers, the lots that matter, and what was posted since it was read."""

    account_id: str
    available: int = 0
    held: int = 0
    last_seq: int = 0
    frozen: bool = False
    lots: Mapping[str, Lot] = field(default_factory=dict[str, Lot])
    transfers: tuple[Transfer, ...] = ()
    order: tuple[str, ...] | None = field(default=None, compare=False)
    """The lots as they burn, once they were sorted; postings keep it, a new lot or a new end makes it unknown."""
    daily_caps: Mapping[str, int] = field(default_factory=dict[str, int])

    def burning_order(self) -> Iterator[Lot]:
        """The lots that have something available: by priority, then expiry, then age."""
        order = self.order if self.order is not None else _sorted(self.lots)
        return (lot for lot_id in order if (lot := self.lots[lot_id]).available)


def _sorted(lots: Mapping[str, Lot]) -> tuple[str, ...]:
    return tuple(lot.lot_id for lot in sorted(lots.values(), key=_burning_key))


def _burning_key(lot: Lot) -> tuple[int, datetime, datetime, str]:
    return (lot.priority, lot.expires_at or _NEVER, lot.created_at, lot.lot_id)


def balance(books: Books) -> Balance:
    """What these books say; `expire_due` first."""
    lots = [lot for lot in books.burning_order() if lot.expires_at is not None]
    first = min(lots, key=lambda lot: lot.expires_at or _NEVER, default=None)
    return Balance(
        books.account_id,
        books.available,
        books.held,
        first.expires_at if first else None,
        first.available if first else 0,
    )


def fingerprint(fields: Mapping[str, object]) -> str:
    """SHA-256 over a request's own fields, whatever their order."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def expire_due(books: Books, now: datetime) -> Books:
    """Moves what is available in due lots to breakage. Comes first in every posting."""
    due = [
        lot
        for lot in books.lots.values()
        if lot.expires_at is not None and lot.expires_at <= now and lot.available
    ]
    for lot in sorted(due, key=_burning_key):
        lines = (
            Line(Book.AVAILABLE, -lot.available, lot.lot_id),
            Line(Book.BREAKAGE, lot.available),
        )
        books = _post(books, Transfer(TransferKind.EXPIRE, lines))
    return books


def grant(books: Books, lot: Lot, note: str, now: datetime) -> Books:
    """Opens a lot with all that it grants available. Raises InvalidArgument when it would be dead at birth."""
    if lot.expires_at is not None and lot.expires_at <= now:
        raise errors.InvalidArgument(
            "INVALID_FIELD",
            "expires_at is already over: leave it out for credits that never expire",
            violations=[("expires_at", "must be in the future")],
        )
    lines = (
        Line(Book.AVAILABLE, lot.granted, lot.lot_id),
        Line(_BOOK_OF_SOURCE[lot.source], -lot.granted),
    )
    return _post(_with_lot(books, lot), Transfer(TransferKind.GRANT, lines, note=note))


def reserve(
    books: Books, hold_id: str, credits_: int, now: datetime
) -> tuple[Books, tuple[Part, ...]]:
    """Pins credits for a hold. A hold of 0 posts nothing. Raises FailedPrecondition/INSUFFICIENT_CREDITS."""
    if credits_ > books.available:
        raise errors.FailedPrecondition(
            "INSUFFICIENT_CREDITS",
            f"{credits_} credits are needed and {books.available} are available: "
            "add credits, then send it as a new video",
            needed=credits_,
            available=books.available,
        )
    order = books.order if books.order is not None else _sorted(books.lots)
    parts: list[Part] = []
    missing = credits_
    for lot_id in order:
        if not missing:
            break
        lot = books.lots[lot_id]
        if not lot.available:
            continue
        taken = min(missing, lot.available)
        left = lot.expires_at - now if lot.expires_at is not None else None
        parts.append(Part(lot.lot_id, taken, left))
        missing -= taken
    assert not missing, "available is more than the lots have"
    if not parts:
        return books, ()
    lines = [Line(Book.AVAILABLE, -part.credits, part.lot_id) for part in parts]
    lines += [Line(Book.HELD, part.credits, part.lot_id) for part in parts]
    transfer = Transfer(TransferKind.RESERVE, tuple(lines), hold_id=hold_id)
    return _post(books, transfer, order), tuple(parts)


def settle(
    books: Books,
    hold_id: str,
    parts: Iterable[Part],
    captured: int,
    cause: str,
    now: datetime,
    new_id: Callable[[], str],
) -> tuple[Books, tuple[Part, ...]]:
    """Takes `captured` of what a hold pins, first from what would have burnt first, and gives the rest back."""
    settled = _split(tuple(parts), captured)
    taken = [Line(Book.HELD, -part.captured, part.lot_id) for part in settled if part.captured]
    if taken:
        lines = (*taken, Line(Book.REVENUE, captured))
        books = _post(books, Transfer(TransferKind.CAPTURE, lines, hold_id=hold_id, cause=cause))
    returned: list[Line] = []
    for part in settled:
        if part.released:
            books, lot_id = _place_to_return(books, part, now, new_id)
            returned += [
                Line(Book.HELD, -part.released, part.lot_id),
                Line(Book.AVAILABLE, part.released, lot_id),
            ]
    if returned:
        transfer = Transfer(TransferKind.RELEASE, tuple(returned), hold_id=hold_id, cause=cause)
        books = _post(books, transfer)
    return books, settled


def refund(
    books: Books,
    hold_id: str,
    parts: Iterable[Part],
    credits_: int,
    note: str,
    now: datetime,
    lot_id: str,
    taken_from: Book = Book.REVENUE,
) -> Books:
    """Gives captured credits back as a correction lot, with the longest life (and its priority) that they had.

    Out of what was earned; or, with LOSS, that stays earned and the platform bears it.
    """
    taken = [part for part in parts if part.captured]
    assert credits_ <= sum(part.captured for part in taken), "refund above what was captured"
    longest = max(taken, key=_lifetime)
    lot = Lot(
        lot_id=lot_id,
        source=LotSource.CORRECTION,
        priority=books.lots[longest.lot_id].priority,
        expires_at=_returned_until(longest, now),
        created_at=now,
        granted=credits_,
    )
    lines = (Line(taken_from, -credits_), Line(Book.AVAILABLE, credits_, lot_id))
    transfer = Transfer(TransferKind.REFUND, lines, hold_id=hold_id, note=note)
    return _post(_with_lot(books, lot), transfer)


def _split(parts: tuple[Part, ...], captured: int) -> tuple[Part, ...]:
    assert 0 <= captured <= sum(part.credits for part in parts), "capture above the hold"
    settled: list[Part] = []
    for part in parts:
        taken = min(captured, part.credits)
        captured -= taken
        settled.append(replace(part, captured=taken, released=part.credits - taken))
    return tuple(settled)


def _lifetime(part: Part) -> timedelta:
    return timedelta.max if part.lifetime_left is None else part.lifetime_left


def _returned_until(part: Part, now: datetime) -> datetime | None:
    if part.lifetime_left is None:
        return None
    try:
        return now + max(part.lifetime_left, RETURNED_LIFE_AT_LEAST)
    except OverflowError:
        return _NEVER


def _place_to_return(
    books: Books, part: Part, now: datetime, new_id: Callable[[], str]
) -> tuple[Books, str]:
    """The lot that a part goes back to: its own, which lives on as long as it must.

    Where other credits wait in that lot they keep their own end, and the part gets a lot beside it: else one credit,
    held and released each day, would keep a whole promotion alive for ever.
    """
    lot, until = books.lots[part.lot_id], _returned_until(part, now)
    if until is None or lot.expires_at is None or lot.expires_at >= until:
        return books, lot.lot_id
    if not lot.available:
        return _with_lot(books, replace(lot, expires_at=until)), lot.lot_id
    child = replace(
        lot,
        lot_id=new_id(),
        expires_at=until,
        granted=part.released,
        available=0,
        held=0,
        parent_lot_id=lot.lot_id,
    )
    return _with_lot(books, child), child.lot_id


def _with_lot(books: Books, lot: Lot) -> Books:
    return replace(books, lots={**books.lots, lot.lot_id: lot}, order=None)


def _post(books: Books, transfer: Transfer, order: tuple[str, ...] | None = None) -> Books:
    """The books with a transfer, and with the lots' order where it became known."""
    lots, all_available, all_held = dict(books.lots), 0, 0
    moves: dict[str, list[int]] = {}
    for line in transfer.lines:
        if line.lot_id is not None:
            move = moves.setdefault(line.lot_id, [0, 0])
            move[line.book is Book.HELD] += line.credits
    for lot_id, (available, held) in moves.items():
        lot = lots[lot_id] = lots[lot_id].moved(available, held)
        assert lot.available >= 0, transfer
        assert lot.held >= 0, transfer
        all_available += available
        all_held += held
    after = Books(
        books.account_id,
        books.available + all_available,
        books.held + all_held,
        books.last_seq + 1,
        books.frozen,
        lots,
        (*books.transfers, transfer),
        order or books.order,
        books.daily_caps,
    )
    assert after.available >= 0, transfer
    assert after.held >= 0, transfer
    return after
