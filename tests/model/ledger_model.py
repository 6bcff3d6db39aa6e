"""One account as simply as it can be told: what the ledger must do. Times in hours; never is infinity."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Lot:
    priority: int
    expires: float
    born: float
    available: int


@dataclass
class Hold:
    parts: list[tuple[Lot, int, float]] = field(default_factory=list)  # (lot, credits, life left)
    reserved: int = 0
    captured: int = 0
    refunded: int = 0
    state: str = "HELD"


@dataclass
class Model:
    now: float = 0.0
    lots: list[Lot] = field(default_factory=list)
    revenue: int = 0

    def available(self) -> int:
        return sum(lot.available for lot in self.lots if lot.expires > self.now)

    def reserve(self, price: int) -> Hold:
        if price > self.available():
            return Hold(state="REFUSED")
        hold = Hold(reserved=price)
        for lot in sorted(self.lots, key=lambda lot: (lot.priority, lot.expires, lot.born)):
            if lot.expires > self.now and (taken := min(price, lot.available)):
                hold.parts.append((lot, taken, lot.expires - self.now))
                lot.available, price = lot.available - taken, price - taken
        return hold

    def settle(self, hold: Hold, captured: int) -> None:
        hold.state, hold.captured = "CAPTURED" if captured else "RELEASED", captured
        self.revenue += captured
        for lot, pinned, life in hold.parts:
            captured -= (taken := min(captured, pinned))
            until, left = self.now + max(24.0, life), lot.available * (lot.expires > self.now)
            if pinned > taken and left and lot.expires < until:
                self.lots.append(Lot(lot.priority, until, lot.born, pinned - taken))
            elif pinned > taken:
                lot.expires, lot.available = max(lot.expires, until), left + pinned - taken

    def refund(self, hold: Hold, credits_: int) -> None:
        hold.refunded, self.revenue = hold.refunded + credits_, self.revenue - credits_
        pinned = [credits_ for _, credits_, _ in hold.parts]
        taken = [one for n, one in enumerate(hold.parts) if sum(pinned[:n]) < hold.captured]
        lot, _, life = max(taken, key=lambda part: part[2])
        self.lots.append(Lot(lot.priority, self.now + max(24.0, life), self.now, credits_))
