"""Caps on what may be reserved in a day, of an account and of each API key for it. Pure.

The day is UTC's, by the ledger's clock. What counts is what was reserved in it and has not been released since; the
caller reads that under the account's lock, which makes the cap exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from kit import errors
from services.credits import holds

ACCOUNT = ""
"""Stands for all keys together."""
MOST_KEYS = 100
MARKED_AFTER = 64
"""So many transfers are summed up again and again before the sum is kept."""


@dataclass(slots=True)
class Spending:
    """What was spent on one day, by account and key, of those whose caps ask for it."""

    began: datetime
    credits: dict[tuple[str, str], int]
    marks: list[tuple[str, str, int, int]] = field(default_factory=list[tuple[str, str, int, int]])
    """(account, key, number of the newest transfer, credits) of sums that are worth to be kept, as they were read."""

    def count(self, before: holds.Hold | None, hold: holds.Hold) -> None:
        """Takes over what a hold became. What was reserved on another day does not count."""
        if not self.credits or hold.created_at < self.began:
            return
        change = hold.reserved - hold.released
        if before is not None:
            change -= before.reserved - before.released
        for name in {ACCOUNT, hold.key_id}:
            if (hold.account_id, name) in self.credits:
                self.credits[hold.account_id, name] += change


def with_cap(caps: Mapping[str, int], key_id: str, credits_: int | None) -> Mapping[str, int]:
    """The caps with this one set, or without it. Raises InvalidArgument when there would be too many."""
    others = {name: cap for name, cap in caps.items() if name != key_id}
    if credits_ is None:
        return others
    changed = {**others, key_id: credits_}
    if len(changed) - (ACCOUNT in changed) > MOST_KEYS:
        rule = f"would be one of more than {MOST_KEYS} capped keys: lift another cap first"
        raise errors.InvalidArgument(
            "INVALID_FIELD", f"key_id {rule}", violations=[("key_id", rule)]
        )
    return changed


def met(caps: Mapping[str, int], key_id: str) -> set[str]:
    """The names of the caps that a video of this key meets: of them it must be known what was spent."""
    return {name for name in (ACCOUNT, key_id) if name in caps} if caps else set()


def day(now: datetime) -> datetime:
    """When the day of this moment began."""
    return now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def check(
    caps: Mapping[str, int], account_id: str, key_id: str, price: int, spending: Spending
) -> None:
    """Raises ResourceExhausted/CREDIT_CAP_REACHED with what is left and when the day ends."""
    for name in sorted(met(caps, key_id)):
        left = max(0, caps[name] - spending.credits[account_id, name])
        if price <= left:
            continue
        ends = spending.began.astimezone(UTC) + timedelta(days=1)
        resets_at = ends.isoformat().replace("+00:00", "Z")
        whose = "API key" if name else "account"
        raise errors.ResourceExhausted(
            "CREDIT_CAP_REACHED",
            f"{price} credits are needed and {left} are left of the {caps[name]} that the {whose} may "
            f"use in a day: wait until {resets_at}, or ask an operator, then send it as a new video",
            scope="KEY" if name else "ACCOUNT",
            cap=caps[name],
            left=left,
            needed=price,
            resets_at=resets_at,
        )
