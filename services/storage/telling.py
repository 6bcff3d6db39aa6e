"""What storage tells on the bus, as outbox rows. Pure."""

from __future__ import annotations

from datetime import datetime

from google.protobuf import json_format, timestamp_pb2

from framewire import subjects
from framewire.events.v1 import event_pb2
from kit import outbox
from services.storage import assets


def expired(asset: assets.Asset, video_id: str, now: datetime) -> outbox.Row:
    """An asset reached the end of its retention. Once per asset."""
    moment = timestamp_pb2.Timestamp()
    moment.FromDatetime(now)
    event = event_pb2.Event(
        video_id=video_id,
        account_id=asset.account_id,
        kind=event_pb2.EVENT_KIND_EXPIRED,
        occurred_at=moment,
        expired=event_pb2.Expired(asset_id=asset.asset_id),
    )
    headers = {
        "ce-type": "framewire.events.v1.expired",
        "ce-source": "/framewire/storage",
        "ce-time": moment.ToJsonString(),
    }
    if video_id:
        headers["ce-subject"] = video_id
    return outbox.Row(
        # A rendition that is made anew after its end has the same id: the moment tells the ends apart.
        ce_id=f"{asset.asset_id}:expired:{int(now.timestamp())}",
        ordering_key=video_id or asset.asset_id,
        seq=0,
        subject=subjects.event_subject(asset.account_id, "expired"),
        data=json_format.MessageToJson(event, indent=None).encode(),
        headers=headers,
    )
