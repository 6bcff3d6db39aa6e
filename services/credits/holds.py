"""Holds: credits set aside for a video, and what may still become of them.

Pure: no I/O, no clock. Each `check_` function says whether an operation is to be posted, has been, or may not be.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from kit import errors


class HoldState(enum.StrEnum):
    """Where a hold stands. All but HELD are final."""

    HELD = "HELD"
    CAPTURED = "CAPTURED"
    RELEASED = "RELEASED"
    REFUSED = "REFUSED"
    VOID = "VOID"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a reservation was refused, as it is told to every caller who asks again."""

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str]

    def error(self) -> errors.ServiceError:
        """As it is raised."""
        metadata: dict[str, Any] = dict(self.metadata)
        return errors.BY_CODE[self.code](self.reason, self.message, **metadata)


def refusal_fields(refusal: Refusal) -> dict[str, Any]:
    """As plain values, for JSON."""
    return asdict(refusal)


@dataclass(frozen=True, slots=True)
class Hold:
    """Credits set aside for one video, or the memory that they were not."""

    hold_id: str
    account_id: str
    state: HoldState
    created_at: datetime
    fingerprint: str | None = None
    item: Mapping[str, Any] | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    key_id: str = ""
    reserved: int = 0
    captured: int = 0
    released: int = 0
    refunded: int = 0
    price_version: str | None = None
    policy_version: str | None = None
    refusal: Refusal | None = None
    not_after: datetime | None = None
    cause: str | None = None
    verdict: Mapping[str, Any] | None = None
    settled_at: datetime | None = None


def check_replay(hold: Hold, account_id: str, fingerprint_: str) -> Hold:
    """What a Reserve answers whose hold is known already: the hold as it is now, or the refusal that it met."""
    if hold.account_id != account_id:
        raise _mismatch(hold.hold_id)
    if hold.state is HoldState.VOID:
        raise errors.FailedPrecondition(
            "HOLD_RELEASED",
            f"hold {hold.hold_id} was released before it was made: a new try is a new video",
        )
    if hold.fingerprint != fingerprint_:
        raise _mismatch(hold.hold_id)
    if hold.refusal is not None:
        raise hold.refusal.error()
    return hold


def check_capture(hold: Hold, credits_: int) -> bool:
    """Whether a capture is to be posted; False: it has been. Raises FailedPrecondition."""
    if hold.state is HoldState.HELD:
        if credits_ > hold.reserved:
            raise _exceeds(f"hold {hold.hold_id} has {hold.reserved} credits", held=hold.reserved)
        return True
    if hold.state is HoldState.CAPTURED:
        if credits_ != hold.captured:
            raise _captured(hold)
        return False
    if credits_:
        raise errors.FailedPrecondition(
            "HOLD_RELEASED", f"hold {hold.hold_id} is {hold.state}: nothing is left to capture"
        )
    return False


def check_release(hold: Hold, account_id: str) -> bool:
    """Whether a release is to be posted; False: nothing is held. Raises AlreadyExists, FailedPrecondition."""
    if hold.account_id != account_id:
        raise _mismatch(hold.hold_id)
    if hold.state is HoldState.CAPTURED:
        raise _captured(hold)
    return hold.state is HoldState.HELD


def check_refund(hold: Hold, credits_: int) -> None:
    """Raises FailedPrecondition/AMOUNT_EXCEEDS when this would give back more than was taken."""
    left = hold.captured - hold.refunded
    if credits_ > left:
        raise _exceeds(
            f"hold {hold.hold_id} has {left} captured credits that were not refunded yet",
            captured=hold.captured,
            refunded=hold.refunded,
        )


def check_settle(hold: Hold, account_id: str) -> bool:
    """Whether a video's end is to be posted; False: nothing is held any more. Raises AlreadyExists."""
    if hold.account_id != account_id:
        raise _mismatch(hold.hold_id)
    return hold.state is HoldState.HELD


def check_admission(frozen: bool, now: datetime, not_after: datetime) -> None:
    """Raises what refuses a reservation whatever its price."""
    if frozen:
        raise errors.PermissionDenied(
            "ACCOUNT_FROZEN", "the account is frozen by an operator: ask them"
        )
    if now > not_after:
        raise errors.FailedPrecondition(
            "RESERVE_TOO_LATE", "the reservation came after its not_after: send it as a new video"
        )


def check_price(price: int, max_credits: int | None) -> None:
    """Raises FailedPrecondition/PRICE_CHANGED when the price is above what the caller agreed to."""
    if max_credits is not None and price > max_credits:
        raise errors.FailedPrecondition(
            "PRICE_CHANGED",
            f"it costs {price} credits, which is above max_credits {max_credits}: "
            "ask for a new quote, then send it as a new video",
            needed=price,
            max_credits=max_credits,
        )


def refuse(hold: Hold, error: errors.ServiceError, now: datetime) -> Hold:
    """The hold that remembers this refusal."""
    refusal = Refusal(error.code, error.reason, error.message, error.metadata)
    return replace(hold, state=HoldState.REFUSED, refusal=refusal, settled_at=now)


def settled(
    hold: Hold, captured: int, cause: str, verdict: Mapping[str, Any] | None, now: datetime
) -> Hold:
    """The hold in its final state. A capture of 0 is a release."""
    return replace(
        hold,
        state=HoldState.CAPTURED if captured else HoldState.RELEASED,
        captured=captured,
        released=hold.reserved - captured,
        cause=cause,
        verdict=verdict,
        settled_at=now,
    )


def account_unknown(account_id: str) -> errors.NotFound:
    """What is raised where an account must be there."""
    return errors.NotFound(
        "ACCOUNT_NOT_FOUND", f"there is no account {account_id}: open it first with OpenAccount"
    )


def hold_unknown(hold_id: str) -> errors.NotFound:
    """What is raised where a hold must be there."""
    return errors.NotFound("HOLD_NOT_FOUND", f"there is no hold {hold_id}")


def _mismatch(hold_id: str) -> errors.AlreadyExists:
    return errors.AlreadyExists(
        "HOLD_MISMATCH", f"hold {hold_id} was used with another request: use a new id"
    )


def _captured(hold: Hold) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        "HOLD_CAPTURED",
        f"hold {hold.hold_id} was settled with {hold.captured} credits captured: refund instead",
        captured=hold.captured,
    )


def _exceeds(message: str, **metadata: Any) -> errors.FailedPrecondition:
    return errors.FailedPrecondition("AMOUNT_EXCEEDS", message, **metadata)
