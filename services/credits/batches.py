"""A batch: books of some accounts that were read together, and what operations make of them until they are written.

Pure: no I/O, no clock; time and fresh ids come with it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from kit import errors
from services.credits import caps, holds, ledger, rules


@dataclass(frozen=True, slots=True)
class Request:
    """A call that is remembered by its request id."""

    account_id: str
    method: str
    request_id: uuid.UUID

    def known(self, batch: Batch, fingerprint: str) -> str | None:
        """The lot that this request made before. Raises AlreadyExists when another request had its id."""
        if self not in batch.requests:
            return None
        before, lot_id = batch.requests[self]
        if before != fingerprint:
            raise errors.AlreadyExists(
                "REQUEST_ID_REUSED",
                "this request_id was used with another request: use a new one for a new request",
            )
        return lot_id


@dataclass(frozen=True, slots=True)
class Settled:
    """A hold became final, and left its account so many available credits."""

    hold: holds.Hold
    available: int


@dataclass(frozen=True, slots=True)
class RanLow:
    """An account's available credits fell below the threshold."""

    books: ledger.Books


@dataclass(frozen=True, slots=True)
class Rulebooks:
    """The versions in force ("": none yet), and every version that operations of the batch may name."""

    price_version: str
    policy_version: str
    prices: Mapping[str, rules.PriceBook]
    policies: Mapping[str, rules.RefundPolicy]
    quote_key: bytes


@dataclass(slots=True)
class Batch:
    """Accounts with their holds and requests as they were read, and what operations have made of them since."""

    now: datetime
    before: Mapping[str, ledger.Books]
    holds: dict[str, holds.Hold]
    parts: dict[str, tuple[ledger.Part, ...]]
    requests: dict[Request, tuple[str, str]]
    """(fingerprint, lot) of those that were posted before."""
    unsettled: Mapping[str, rules.Verdict]
    """Verdicts that came before their holds."""
    rulebooks: Rulebooks
    spending: caps.Spending
    balance_low_credits: int
    new_id: Callable[[], str]
    books: dict[str, ledger.Books] = field(init=False)
    expired: dict[str, int] = field(init=False)
    """Credits that were due when the batch was opened; they are gone whatever the operations do."""
    new_holds: set[str] = field(default_factory=set[str])
    changed_holds: set[str] = field(default_factory=set[str])
    changed_parts: set[str] = field(default_factory=set[str])
    new_requests: list[Request] = field(default_factory=list[Request])
    facts: list[Settled | RanLow] = field(default_factory=list[Settled | RanLow])
    """What is to be told on the bus."""
    origins: dict[tuple[str, int], ledger.Origin] = field(
        default_factory=dict[tuple[str, int], ledger.Origin]
    )
    """Where transfers came from, by account and number; those that no operation posted have none."""

    def __post_init__(self) -> None:
        self.books, self.expired = dict(self.before), {}
        for account_id, books in self.before.items():
            alive = ledger.expire_due(books, self.now)
            self.expired[account_id] = books.available - alive.available
            self.post(alive)

    def account(self, account_id: str) -> ledger.Books:
        """An account's books. Raises NotFound/ACCOUNT_NOT_FOUND."""
        if account_id not in self.books:
            raise account_unknown(account_id)
        return self.books[account_id]

    def hold(self, hold_id: str) -> holds.Hold:
        """A hold. Raises NotFound/HOLD_NOT_FOUND."""
        if hold_id not in self.holds:
            raise hold_unknown(hold_id)
        return self.holds[hold_id]

    def post(self, books: ledger.Books) -> None:
        """Takes over what the ledger made of an account."""
        before = self.books[books.account_id].available
        self.books[books.account_id] = books
        if books.available < self.balance_low_credits <= before:
            self.facts.append(RanLow(books))

    def keep(self, hold: holds.Hold, parts: tuple[ledger.Part, ...] | None = None) -> None:
        """Takes over what became of a hold, and of the parts that it pins where they changed."""
        before = self.holds.get(hold.hold_id)
        known = before is not None and hold.hold_id not in self.new_holds
        self.spending.count(before, hold)
        self.holds[hold.hold_id] = hold
        (self.changed_holds if known else self.new_holds).add(hold.hold_id)
        if parts is not None:
            self.parts[hold.hold_id] = parts
            if known:
                self.changed_parts.add(hold.hold_id)

    def settle(
        self, hold: holds.Hold, captured: int, cause: str, verdict: rules.Verdict | None
    ) -> holds.Hold:
        """Ends a hold with so much of it taken."""
        books, parts = ledger.settle(
            self.books[hold.account_id],
            hold.hold_id,
            self.parts.get(hold.hold_id, ()),
            captured,
            cause,
            self.now,
            self.new_id,
        )
        fields = verdict.fields() if verdict is not None else None
        hold = holds.settled(hold, captured, cause, fields, self.now)
        self.keep(hold, parts)
        self.post(books)
        self.facts.append(Settled(hold, books.available))
        return hold

    def settle_by_policy(self, hold: holds.Hold, verdict: rules.Verdict) -> holds.Hold:
        """Ends a hold as the policy that it was made under says."""
        assert hold.item is not None, "only VOID holds have no item"
        policy = self.rulebooks.policies[hold.policy_version or ""]
        captured = policy.captured(hold.reserved, rules.item_from(hold.item), verdict)
        return self.settle(hold, captured, verdict.cause, verdict)

    def remember(self, request: Request, fingerprint: str, lot_id: str) -> None:
        """Binds a request id to what it made."""
        self.requests[request] = (fingerprint, lot_id)
        self.new_requests.append(request)


def account_unknown(account_id: str) -> errors.NotFound:
    """What is raised where an account must be there."""
    return errors.NotFound(
        "ACCOUNT_NOT_FOUND", f"there is no account {account_id}: open it first with OpenAccount"
    )


def hold_unknown(hold_id: str) -> errors.NotFound:
    """What is raised where a hold must be there."""
    return errors.NotFound("HOLD_NOT_FOUND", f"there is no hold {hold_id}")
