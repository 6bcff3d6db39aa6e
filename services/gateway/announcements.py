"""What the gateway itself tells on EVENTS, as rows of its outbox."""

from __future__ import annotations

from datetime import datetime

from google.protobuf import json_format, timestamp_pb2

from framewire import subjects
from framewire.events.v1 import event_pb2
from kit import outbox
from services.gateway import videos

_SOURCE = "/framewire/gateway"


def deleted(video: videos.Video) -> outbox.Row:
    """Its owner deleted the video: told once."""
    assert video.deleted_at is not None
    event = event_pb2.Event(
        video_id=video.video_id,
        account_id=video.account_id,
        kind=event_pb2.EVENT_KIND_DELETED,
        occurred_at=_timestamp(video.deleted_at),
        deleted=event_pb2.Deleted(),
    )
    return _row(event, "deleted", f"{video.video_id}:deleted", video.video_id)


def webhook_disabled(account_id: str, endpoint_id: str, why: str, when: datetime) -> outbox.Row:
    """A webhook endpoint gets no more events, because of its answers."""
    event = event_pb2.Event(
        account_id=account_id,
        kind=event_pb2.EVENT_KIND_WEBHOOK_DISABLED,
        occurred_at=_timestamp(when),
        webhook_disabled=event_pb2.WebhookDisabled(endpoint_id=endpoint_id, why=why),
    )
    ce_id = f"{endpoint_id}:disabled:{int(when.timestamp())}"
    return _row(event, "webhook_disabled", ce_id, endpoint_id)


def _row(event: event_pb2.Event, kind: str, ce_id: str, ordering_key: str) -> outbox.Row:
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
        seq=0,
        subject=subjects.event_subject(event.account_id, kind),
        data=json_format.MessageToJson(event, indent=None).encode(),
        headers=headers,
    )


def _timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp
