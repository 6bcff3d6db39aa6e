"""What callers want of the ledger, each judged on a batch of books that has what those before it made of them.

Pure. Each operation has its own verdict: it answers, or raises a ServiceError. A refusal may leave something behind (a
refused hold is remembered). Any other exception spoils the batch: nothing of it is written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, ClassVar, Protocol

from kit import errors
from services.credits import batches, caps, holds, ledger, quotes, rules


class Operation(Protocol):
    """One call: the rows that it needs, and its verdict on a batch that has them."""

    kind: ClassVar[str]
    opens_account: ClassVar[bool]
    """Whether an account that is missing is opened, empty."""

    @property
    def account_id(self) -> str:
        """The one account that it moves credits of."""
        ...

    @property
    def hold_id(self) -> str | None:
        """The hold that it is about."""
        ...

    @property
    def request(self) -> batches.Request | None:
        """What it is remembered by, where that is not its hold."""
        ...

    @property
    def origin(self) -> ledger.Origin:
        """Who asked for it and what was paid; the trace is known to whoever posts it."""
        ...

    def judge(self, batch: batches.Batch) -> Any:
        """Answers or raises a ServiceError; changes the batch only by what is to be written."""
        ...


@dataclass(frozen=True, slots=True)
class _Operation:
    kind: ClassVar[str] = ""
    opens_account: ClassVar[bool] = False
    origin: ledger.Origin = field(default=ledger.Origin(), kw_only=True)

    @property
    def request(self) -> batches.Request | None:
        return None


@dataclass(frozen=True, slots=True)
class Given:
    """A lot that a grant or refund made, and the balance now."""

    lot_id: str
    balance: ledger.Balance


@dataclass(frozen=True, slots=True)
class Opening(_Operation):
    """An account's books are to be there."""

    kind: ClassVar[str] = "open"
    opens_account: ClassVar[bool] = True
    account_id: str
    hold_id: str | None = None

    def judge(self, batch: batches.Batch) -> ledger.Balance:
        """The balance."""
        return ledger.balance(batch.account(self.account_id))


@dataclass(frozen=True, slots=True)
class Grant(_Operation):
    """Credits to be given."""

    kind: ClassVar[str] = "grant"
    account_id: str
    request_id: str
    credits: int
    source: ledger.LotSource
    priority: int = 0
    expires_at: datetime | None = None
    note: str = ""
    hold_id: None = None

    @property
    def request(self) -> batches.Request:
        """Idempotent by (account, request_id)."""
        return batches.Request(self.account_id, "GRANT", uuid.UUID(self.request_id))

    def fingerprint(self) -> str:
        """What another Grant of the same request id must agree with."""
        expires_at = self.expires_at.isoformat() if self.expires_at else None
        return ledger.fingerprint(
            {
                "credits": self.credits,
                "source": self.source,
                "priority": self.priority,
                "expires_at": expires_at,
                "note": self.note,
                **({"purchase": self.origin.purchase} if self.origin.purchase else {}),
            }
        )

    def judge(self, batch: batches.Batch) -> Given:
        """The lot that it made, now or before, and the balance."""
        books = batch.account(self.account_id)
        lot_id = self.request.known(batch, self.fingerprint())
        if lot_id is None:
            lot = ledger.Lot(
                lot_id=batch.new_id(),
                source=self.source,
                priority=self.priority or ledger.DEFAULT_PRIORITY,
                expires_at=self.expires_at,
                created_at=batch.now,
                granted=self.credits,
            )
            lot_id, books = lot.lot_id, ledger.grant(books, lot, self.note, batch.now)
            batch.post(books)
            batch.remember(self.request, self.fingerprint(), lot_id)
        return Given(lot_id, ledger.balance(books))


@functools.lru_cache(maxsize=1024)
def _item_json(item: rules.Item) -> str:
    """As `ledger.fingerprint` writes it; few different items are asked for again and again."""
    return json.dumps(item.fields(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


@dataclass(frozen=True, slots=True)
class Reservation(_Operation):
    """Credits to be set aside for a video."""

    kind: ClassVar[str] = "reserve"
    opens_account: ClassVar[bool] = True
    hold_id: str
    account_id: str
    item: rules.Item
    not_after: datetime
    quote_id: str = ""
    max_credits: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    key_id: str = ""
    fingerprint: str = field(init=False)
    """What another Reserve of the same hold must agree with: `ledger.fingerprint` of account_id and item."""

    def __post_init__(self) -> None:
        # Here and not in `judge`, which runs while the account is locked.
        text = f'{{"account_id":{json.dumps(self.account_id)},"item":{_item_json(self.item)}}}'
        object.__setattr__(self, "fingerprint", hashlib.sha256(text.encode()).hexdigest())

    def judge(self, batch: batches.Batch) -> holds.Hold:
        """The hold. Every refusal but that of a mismatched id is remembered under it and repeated for ever."""
        known = batch.holds.get(self.hold_id)
        if known is not None:
            return holds.check_replay(known, self.account_id, self.fingerprint)
        version, policy = batch.rulebooks.price_version, batch.rulebooks.policy_version
        if not version or not policy:
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE", "the ledger has no price book yet", retry_after_seconds=1
            )
        books = batch.account(self.account_id)
        price, parts, refused = 0, (), None
        try:
            holds.check_admission(books.frozen, batch.now, self.not_after)
            version, price = self._price(batch.rulebooks, batch.now)
            caps.check(books.daily_caps, self.account_id, self.key_id, price, batch.spending)
            books, parts = ledger.reserve(books, self.hold_id, price, batch.now)
        except errors.ServiceError as error:
            refused = error
            version = batch.rulebooks.price_version
        hold = holds.Hold(
            hold_id=self.hold_id,
            account_id=self.account_id,
            state=holds.HoldState.HELD,
            created_at=batch.now,
            fingerprint=self.fingerprint,
            item=self.item.fields(),
            labels=self.labels,
            key_id=self.key_id,
            reserved=0 if refused else price,
            price_version=version,
            policy_version=policy,
            not_after=self.not_after,
        )
        if refused is not None:
            hold = holds.refuse(hold, refused, batch.now)
            batch.keep(hold, ())
            assert hold.refusal is not None
            raise hold.refusal.error()
        batch.keep(hold, parts)
        batch.post(books)
        verdict = batch.unsettled.get(self.hold_id)
        if verdict is not None and verdict.account_id == self.account_id:
            hold = batch.settle_by_policy(hold, verdict)
        return hold

    def _price(self, rulebooks: batches.Rulebooks, now: datetime) -> tuple[str, int]:
        """The price, and the version of the book that it is from. Raises what the reservation is refused with."""
        version = rulebooks.price_version
        if self.quote_id:
            item = hashlib.sha256(_item_json(self.item).encode()).hexdigest()
            quote = quotes.check(rulebooks.quote_key, self.quote_id, item, now)
            version = quote.price_version
        price = rulebooks.prices[version].price(self.item)
        holds.check_price(price, self.max_credits)
        return version, price


@dataclass(frozen=True, slots=True)
class Restoration(Reservation):
    """Credits that a restored ledger forgot to hold, at the price of before; not refused for time or caps."""

    credits: int = 0
    price_version: str = ""
    policy_version: str = ""

    def judge(self, batch: batches.Batch) -> holds.Hold:
        """The hold, now or before. A refusal is not remembered: credits that are granted again make it good."""
        known = batch.holds.get(self.hold_id)
        if known is not None:
            return holds.check_replay(known, self.account_id, self.fingerprint)
        books, parts = ledger.reserve(
            batch.account(self.account_id), self.hold_id, self.credits, batch.now
        )
        hold = holds.Hold(
            hold_id=self.hold_id,
            account_id=self.account_id,
            state=holds.HoldState.HELD,
            created_at=batch.now,
            fingerprint=self.fingerprint,
            item=self.item.fields(),
            labels=self.labels,
            key_id=self.key_id,
            reserved=self.credits,
            price_version=self.price_version,
            policy_version=self.policy_version,
            not_after=self.not_after,
        )
        batch.keep(hold, parts)
        batch.post(books)
        verdict = batch.unsettled.get(self.hold_id)
        if verdict is not None and verdict.account_id == self.account_id:
            hold = batch.settle_by_policy(hold, verdict)
        return hold


@dataclass(frozen=True, slots=True)
class Capture(_Operation):
    """So many of the held credits are to be taken and the rest given back; 0 is a release."""

    kind: ClassVar[str] = "capture"
    hold_id: str
    account_id: str
    credits: int
    cause: str

    def judge(self, batch: batches.Batch) -> holds.Hold:
        """The hold, captured now or before."""
        hold = batch.hold(self.hold_id)
        if not holds.check_capture(hold, self.credits):
            return hold
        return batch.settle(hold, self.credits, self.cause, None)


@dataclass(frozen=True, slots=True)
class Release(_Operation):
    """A hold is to be given back; one that is not known becomes VOID, so that a Reserve that comes late is refused."""

    kind: ClassVar[str] = "release"
    opens_account: ClassVar[bool] = True
    hold_id: str
    account_id: str
    cause: str

    def judge(self, batch: batches.Batch) -> holds.Hold:
        """The hold, with nothing held any more."""
        hold = batch.holds.get(self.hold_id)
        if hold is None:
            hold = holds.Hold(
                self.hold_id,
                batch.account(self.account_id).account_id,
                holds.HoldState.VOID,
                batch.now,
                cause=self.cause,
                settled_at=batch.now,
            )
            batch.keep(hold, ())
            return hold
        if not holds.check_release(hold, self.account_id):
            return hold
        return batch.settle(hold, 0, self.cause, None)


@dataclass(frozen=True, slots=True)
class Settlement(_Operation):
    """A video has ended: its hold is settled by the policy on it."""

    kind: ClassVar[str] = "settle"
    verdict: rules.Verdict

    @property
    def account_id(self) -> str:
        """Whose video it says it was."""
        return self.verdict.account_id

    @property
    def hold_id(self) -> str:
        """The video's."""
        return self.verdict.video_id

    def judge(self, batch: batches.Batch) -> holds.Hold | None:
        """The hold, settled now or before; None: there is none."""
        hold = batch.holds.get(self.hold_id)
        if hold is None or not holds.check_settle(hold, self.account_id):
            return hold
        return batch.settle_by_policy(hold, self.verdict)


@dataclass(frozen=True, slots=True)
class Refund(_Operation):
    """Captured credits are to be given back."""

    kind: ClassVar[str] = "refund"
    hold_id: str
    account_id: str
    request_id: str
    credits: int
    note: str
    taken_from: ledger.Book = ledger.Book.REVENUE

    @property
    def request(self) -> batches.Request:
        """Idempotent by (account, request_id)."""
        return batches.Request(self.account_id, "REFUND", uuid.UUID(self.request_id))

    def judge(self, batch: batches.Batch) -> Given:
        """The correction lot that it made, now or before, and the balance."""
        fields = {"hold_id": self.hold_id, "credits": self.credits, "note": self.note}
        if self.taken_from is not ledger.Book.REVENUE:
            fields["taken_from"] = self.taken_from
        hold, fingerprint = batch.hold(self.hold_id), ledger.fingerprint(fields)
        books = batch.account(self.account_id)
        lot_id = self.request.known(batch, fingerprint)
        if lot_id is None:
            holds.check_refund(hold, self.credits)
            parts, lot_id = batch.parts.get(self.hold_id, ()), batch.new_id()
            books = ledger.refund(
                *(books, self.hold_id, parts, self.credits, self.note, batch.now, lot_id),
                self.taken_from,
            )
            batch.keep(replace(hold, refunded=hold.refunded + self.credits))
            batch.post(books)
            batch.remember(self.request, fingerprint, lot_id)
        return Given(lot_id, ledger.balance(books))


@dataclass(frozen=True, slots=True)
class Expiry(_Operation):
    """An idle account's due lots are to expire; every batch does so for its own accounts."""

    kind: ClassVar[str] = "expire"
    account_id: str
    hold_id: str | None = None

    def judge(self, batch: batches.Batch) -> int:
        """The credits that are gone."""
        return batch.expired.get(self.account_id, 0)
