"""The video's events, as messages of the contract. Only the generator writes them, numbered per video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from google.protobuf import timestamp_pb2

from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.storage.v1 import storage_pb2


def timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    """A moment as the contracts carry it."""
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def moment(stamp: timestamp_pb2.Timestamp) -> datetime:
    """A contract's timestamp as a moment."""
    return stamp.ToDatetime(tzinfo=UTC)


def cause(name: str) -> vocabulary_pb2.Cause.ValueType:
    """The contract's value of a cause's short name."""
    return vocabulary_pb2.Cause.Value(f"CAUSE_{name}")


def stage(name: str) -> vocabulary_pb2.VideoStage.ValueType:
    """The contract's value of a stage's short name."""
    return vocabulary_pb2.VideoStage.Value(f"VIDEO_STAGE_{name}")


def lane_name(lane: vocabulary_pb2.Lane.ValueType) -> str:
    """A lane's short name."""
    return vocabulary_pb2.Lane.Name(lane).removeprefix("LANE_")


def progress_version(attempt: int, version: int) -> int:
    """Grows over all attempts of a video."""
    return attempt * 1_000_000 + version


def kind_name(event: event_pb2.Event) -> str:
    """The last token of the event's subject."""
    return event_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower()


def queued(
    lane: vocabulary_pb2.Lane.ValueType, model: str, position: int, expected_at: datetime | None
) -> event_pb2.Event:
    """The generator has the job."""
    detail = event_pb2.Queued(
        lane=lane,
        model=model,
        queue_position=position,
        expected_at=timestamp(expected_at) if expected_at else None,
    )
    return event_pb2.Event(kind=event_pb2.EVENT_KIND_QUEUED, queued=detail)


def started(attempt: int, provider_account: str) -> event_pb2.Event:
    """Its turn has come."""
    return event_pb2.Event(
        kind=event_pb2.EVENT_KIND_STARTED,
        started=event_pb2.Started(attempt=attempt, provider_account=provider_account),
    )


def completed(
    outputs: Mapping[int, storage_pb2.Asset],
    spec: vocabulary_pb2.VideoSpec,
    cancel_requested: bool,
    renditions: Mapping[int, Sequence[storage_pb2.Asset]],
) -> event_pb2.Event:
    """What there is of it is stored; by variant."""
    detail = event_pb2.Completed(
        outputs=[
            output(asset, variant, renditions.get(variant, ()))
            for variant, asset in sorted(outputs.items())
        ],
        variants_requested=spec.variants,
        seconds_requested=spec.seconds,
        cancel_requested=cancel_requested,
        model=spec.model,
    )
    return event_pb2.Event(kind=event_pb2.EVENT_KIND_COMPLETED, completed=detail)


def recovered(outputs: Mapping[int, storage_pb2.Asset]) -> event_pb2.Event:
    """A render that turned up after the verdict is kept; by variant."""
    detail = event_pb2.Recovered(
        outputs=[output(asset, variant) for variant, asset in sorted(outputs.items())]
    )
    return event_pb2.Event(kind=event_pb2.EVENT_KIND_RECOVERED, recovered=detail)


def failed(cause_name: str, stage_name: str, message: str, retryable: bool) -> event_pb2.Event:
    """It ended without an output."""
    detail = event_pb2.Failed(
        cause=cause(cause_name), stage=stage(stage_name), message=message, retryable=retryable
    )
    return event_pb2.Event(kind=event_pb2.EVENT_KIND_FAILED, failed=detail)


def cancelled(cause_name: str, stage_name: str) -> event_pb2.Event:
    """The caller cancelled it."""
    detail = event_pb2.Cancelled(cause=cause(cause_name), stage=stage(stage_name))
    return event_pb2.Event(kind=event_pb2.EVENT_KIND_CANCELLED, cancelled=detail)


def output(
    asset: storage_pb2.Asset, variant: int, renditions: Sequence[storage_pb2.Asset] = ()
) -> event_pb2.Output:
    """A stored video with its measured facts, and its smaller versions."""
    return event_pb2.Output(
        asset_id=asset.asset_id,
        variant=variant,
        sha256=asset.sha256,
        size_bytes=asset.size_bytes,
        media_type=asset.media_type,
        width=asset.width,
        height=asset.height,
        duration_ms=asset.duration_ms,
        fps=asset.fps,
        codec=asset.codec,
        has_audio=asset.has_audio,
        poster_asset_id=asset.poster_asset_id,
        expires_at=_expires_at(asset),
        renditions=[
            event_pb2.Rendition(
                asset_id=each.asset_id,
                width=each.width,
                height=each.height,
                sha256=each.sha256,
                size_bytes=each.size_bytes,
                expires_at=_expires_at(each),
            )
            for each in sorted(renditions, key=lambda each: -each.height)
        ],
    )


def _expires_at(asset: storage_pb2.Asset) -> timestamp_pb2.Timestamp | None:
    return asset.expires_at if asset.HasField("expires_at") else None
