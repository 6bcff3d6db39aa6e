"""What credits tells on the bus, as outbox rows."""

from __future__ import annotations

from datetime import datetime

from google.protobuf import json_format, timestamp_pb2

from framewire import subjects
from framewire.events.v1 import event_pb2, vocabulary_pb2
from kit import outbox
from services.credits import holds, ledger

_SOURCE = "/framewire/credits"


def settled(hold: holds.Hold, available: int, now: datetime) -> outbox.Row:
    """A hold's captured and released credits are final. Once per video."""
    event = event_pb2.Event(
        video_id=hold.hold_id,
        account_id=hold.account_id,
        kind=event_pb2.EVENT_KIND_SETTLED,
        occurred_at=_timestamp(now),
        settled=event_pb2.Settled(
            captured_credits=hold.captured,
            released_credits=hold.released,
            cause=vocabulary_pb2.Cause.Value(f"CAUSE_{hold.cause}"),
            policy_version=hold.policy_version or "",
            available_credits=available,
        ),
    )
    return _row(event, "settled", f"{hold.hold_id}:settled", hold.hold_id, 0)


def balance_low(books: ledger.Books, threshold: int, now: datetime) -> outbox.Row:
    """The account's available credits fell below the threshold, by the transfers that led to these books."""
    event = event_pb2.Event(
        account_id=books.account_id,
        kind=event_pb2.EVENT_KIND_BALANCE_LOW,
        occurred_at=_timestamp(now),
        balance_low=event_pb2.BalanceLow(
            available_credits=books.available, threshold_credits=threshold
        ),
    )
    ce_id = f"{books.account_id}:{books.last_seq}:balance_low"
    return _row(event, "balance_low", ce_id, books.account_id, books.last_seq)


def _row(event: event_pb2.Event, kind: str, ce_id: str, ordering_key: str, seq: int) -> outbox.Row:
    headers = {
        "ce-type": f"framewire.events.v1.{kind}",
        "ce-source": _SOURCE,
        "ce-time": event.occurred_at.ToJsonString(),
    }
    if event.video_id:
        headers["ce-subject"] = event.video_id
    return outbox.Row(
        ce_id=ce_id,
        ordering_key=ordering_key,
        seq=seq,
        subject=subjects.event_subject(event.account_id, kind),
        data=json_format.MessageToJson(event, indent=None).encode(),
        headers=headers,
    )


def _timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp
