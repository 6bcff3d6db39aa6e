"""Between the contract and the domain: each message to what it means, and back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.protobuf import timestamp_pb2

from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import vocabulary_pb2
from kit import errors, incarnation
from services.credits import caps, holds, ledger, rules, usage
from services.credits.store import accounts, rulebooks, statements


def name(enum: Any, number: int, prefix: str) -> str:
    """The short name of an enum's value."""
    return enum.Name(number).removeprefix(prefix)


def item(item: ledger_pb2.Item) -> rules.Item:
    """What is priced."""
    lane = rules.Lane(name(vocabulary_pb2.Lane, item.lane, "LANE_"))
    return rules.Item(
        model=text(item.model, "item.model"),
        width=item.width,
        height=item.height,
        seconds=item.seconds,
        variants=item.variants,
        lane=lane,
        options=tuple(
            sorted((name, text(item.options[name], "item.options")) for name in item.options)
        ),
    )


def moment(stamp: timestamp_pb2.Timestamp, field: str) -> datetime:
    """A time of the contract. Raises InvalidArgument for one that there is not."""
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise errors.InvalidArgument(
            "INVALID_FIELD",
            f"{field} is not a time between the years 1 and 9999",
            violations=[(field, "must be a time between the years 1 and 9999")],
        ) from None


def timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """As the contract carries it."""
    if moment is None:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def balance(balance: ledger.Balance) -> ledger_pb2.Balance:
    """What an account has."""
    return ledger_pb2.Balance(
        account_id=balance.account_id,
        available_credits=balance.available,
        held_credits=balance.held,
        next_expiry_at=timestamp(balance.next_expiry_at),
        next_expiry_credits=balance.next_expiry_credits,
    )


def hold(hold: holds.Hold) -> ledger_pb2.Hold:
    """A hold."""
    return ledger_pb2.Hold(
        hold_id=hold.hold_id,
        account_id=hold.account_id,
        state=ledger_pb2.HoldState.Value(f"HOLD_STATE_{hold.state}"),
        reserved_credits=hold.reserved,
        captured_credits=hold.captured,
        released_credits=hold.released,
        price_version=hold.price_version or "",
        policy_version=hold.policy_version or "",
        created_at=timestamp(hold.created_at),
        settled_at=timestamp(hold.settled_at),
        cause=vocabulary_pb2.Cause.Value(f"CAUSE_{hold.cause or 'UNSPECIFIED'}"),
        key_id=hold.key_id,
        labels=hold.labels,
        refunded_credits=hold.refunded,
    )


def entry(line: statements.StatementLine) -> ledger_pb2.Entry:
    """One line of a statement."""
    return ledger_pb2.Entry(
        transfer_id=f"{line.account_id}-{line.seq}",
        kind=ledger_pb2.TransferKind.Value(f"TRANSFER_KIND_{line.kind}"),
        available_change=line.available_change,
        held_change=line.held_change,
        video_id=line.hold_id or "",
        cause=vocabulary_pb2.Cause.Value(f"CAUSE_{line.cause or 'UNSPECIFIED'}"),
        created_at=timestamp(line.created_at),
        note=line.note,
        operator=line.operator,
        purchase=line.purchase,
        price_version=line.price_version,
        policy_version=line.policy_version,
        trace_id=line.trace_id,
    )


def text(value: str, field: str) -> str:
    """Text that a database can keep."""
    if "\0" in value:
        raise errors.InvalidArgument(
            "INVALID_FIELD",
            f"{field}: the character U+0000 cannot be kept",
            violations=[(field, "must not contain the character U+0000")],
        )
    return value


def optional_moment(message: Any, field: str) -> datetime | None:
    """A time that need not be set."""
    return moment(getattr(message, field), field) if message.HasField(field) else None


def entry_filter(request: ledger_pb2.ListEntriesRequest) -> statements.Filter:
    """Which transfers are asked for."""
    return statements.Filter(
        from_=optional_moment(request, "from"),
        to=optional_moment(request, "to"),
        hold_id=request.video_id,
        kinds=tuple(
            ledger.TransferKind(name(ledger_pb2.TransferKind, kind, "TRANSFER_KIND_"))
            for kind in request.kinds
        ),
    )


def usage_asked(request: ledger_pb2.GetUsageRequest) -> usage.Asked:
    """What usage is asked for."""
    groups = tuple(
        usage.Group(name(ledger_pb2.UsageGroup, group, "USAGE_GROUP_"))
        for group in request.group_by
    )
    return usage.Asked(
        optional_moment(request, "from"),
        optional_moment(request, "to"),
        groups or usage.DEFAULT_GROUPS,
        request.label,
    )


def usage_line(line: usage.Line) -> ledger_pb2.UsageLine:
    """One group in one month."""
    return ledger_pb2.UsageLine(
        month=line.month,
        model=line.model,
        lane=vocabulary_pb2.Lane.Value(f"LANE_{line.lane or 'UNSPECIFIED'}"),
        key_id=line.key_id,
        label_value=line.label_value,
        videos=line.videos,
        captured_credits=line.captured,
        refunded_credits=line.refunded,
    )


def account_rules(found: accounts.AccountRules) -> ledger_pb2.AccountRules:
    """What operators set for an account."""
    keys = {key: cap for key, cap in found.daily_caps.items() if key != caps.ACCOUNT}
    return ledger_pb2.AccountRules(
        account_id=found.account_id,
        frozen=found.frozen,
        daily_cap_credits=found.daily_caps.get(caps.ACCOUNT),
        key_daily_cap_credits=keys,
    )


def rulebook_kind(number: ledger_pb2.RulebookKind.ValueType) -> rules.Kind:
    """Price book or refund policy."""
    return rules.Kind(name(ledger_pb2.RulebookKind, number, "RULEBOOK_KIND_"))


def rulebook(found: rulebooks.Rulebook) -> ledger_pb2.Rulebook:
    """A version, and whether it is used."""
    return ledger_pb2.Rulebook(
        kind=ledger_pb2.RulebookKind.Value(f"RULEBOOK_KIND_{found.kind}"),
        version=found.version,
        content_hash=found.content_hash,
        loaded_at=timestamp(found.loaded_at),
        loaded_by=found.loaded_by,
        in_force=found.in_force,
        effective_from=timestamp(found.effective_from),
        activated_by=found.activated_by,
    )


def standing(found: incarnation.Standing) -> vocabulary_pb2.RecoveryStanding:
    """Whether the ledger may move credits."""
    return vocabulary_pb2.RecoveryStanding(
        open=found.open,
        incarnation_id=found.incarnation_id,
        reason=found.reason,
        since=timestamp(found.since) if found.since else None,
        restored_to=timestamp(found.restored_to) if found.restored_to else None,
    )
