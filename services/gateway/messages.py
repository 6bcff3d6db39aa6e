"""Messages of the contracts to the domain and back."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format, message, struct_pb2, timestamp_pb2, unknown_fields

from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import account_pb2, template_pb2, video_pb2
from framewire.generator.v1 import job_pb2
from kit import errors
from services.gateway import auth, catalogue, inputs, videos
from services.gateway.store import rows

_KINDS = frozenset(kind.value for kind in videos.Kind)


def timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A moment as the contracts carry it."""
    if moment is None:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def moment(container: Any, field: str) -> datetime | None:
    """A timestamp field, None where it is not set. Raises InvalidArgument where it is no time of the calendar."""
    if not container.HasField(field):
        return None
    try:
        return getattr(container, field).ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise _invalid(field, "must be a time between the years 1 and 9999") from None


def _invalid(field: str, rule: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("INVALID_FIELD", f"{field}: {rule}", violations=[(field, rule)])


def own_fields(request: message.Message) -> dict[str, Any]:
    """What the caller sent, for the fingerprint: without the request's id, with fields that we do not know yet."""
    copy = type(request)()
    copy.CopyFrom(request)
    for field in ("request_id", "validate_only", "reject_duplicates_within"):
        if field in copy.DESCRIPTOR.fields_by_name:
            copy.ClearField(field)
    try:
        known = json_format.MessageToDict(copy, preserving_proto_field_name=True)
    except (json_format.SerializeToJsonError, ValueError):
        raise _invalid(
            "request", "has a value that JSON cannot carry (NaN, or a bad time)"
        ) from None
    for field, value in known.items():
        if _has_nul(value):  # which Postgres does not keep
            raise _invalid(field, "must not contain the character U+0000")
    return {"known": known, "unknown": sorted(_unknown(copy))}


def _has_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_nul(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_nul(item) for item in value)
    return isinstance(value, str) and "\0" in value


def _unknown(part: message.Message, path: str = "") -> list[str]:
    found = [
        f"{path}{item.field_number}:{item.wire_type}:{item.data!r}"
        for item in unknown_fields.UnknownFieldSet(part)
    ]
    for field, value in part.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        inner = value if field.is_repeated else [value]
        for index, item in enumerate(inner):
            found += _unknown(item, f"{path}{field.number}.{index}.")
    return found


def lane(number: vocabulary_pb2.Lane.ValueType) -> str:
    """A lane's short name; the default one where none was set."""
    if number == vocabulary_pb2.LANE_UNSPECIFIED:
        return videos.DEFAULT_LANE
    return vocabulary_pb2.Lane.Name(number).removeprefix("LANE_")


def lane_number(name: str) -> vocabulary_pb2.Lane.ValueType:
    """The contract's value of a lane's short name."""
    return vocabulary_pb2.Lane.Value(f"LANE_{name}")


def asked_spec(spec: vocabulary_pb2.VideoSpec) -> videos.Spec:
    """What a caller asks for."""
    return videos.Spec(
        prompt=spec.prompt,
        model=spec.model,
        input_image_id=spec.input_image_id,
        width=spec.width,
        height=spec.height,
        seconds=spec.seconds,
        variants=spec.variants,
        options={name: option(value) for name, value in spec.options.items()},
        inputs=asked_inputs(spec.inputs),
        rendition_heights=tuple(spec.rendition_heights),
    )


def listing(request: video_pb2.ListVideosRequest, account_id: str) -> videos.Listing:
    """What a caller wants listed."""
    state = vocabulary_pb2.VideoState.Name(request.state).removeprefix("VIDEO_STATE_")
    return videos.Listing(
        account_id=account_id,
        state=state if request.state else "",
        created_from=moment(request, "created_from"),
        created_to=moment(request, "created_to"),
        model=request.model,
        labels=tuple(sorted(request.labels.items())),
        client_reference=request.client_reference,
        template_name=request.template,
        template_version=request.template_version,
        oldest_first=request.order == video_pb2.VIDEO_ORDER_OLDEST_FIRST,
    )


def asked_inputs(given: Iterable[vocabulary_pb2.VideoInput]) -> tuple[inputs.Input, ...]:
    """What a video is to start from."""
    return tuple(_input(each) for each in given)


def _input(each: vocabulary_pb2.VideoInput) -> inputs.Input:
    crop = each.crop
    fit = vocabulary_pb2.FitMode.Name(each.fit or vocabulary_pb2.FIT_MODE_COVER)
    return inputs.Input(
        asset_id=each.image_id or each.input_video_id,
        is_video=each.HasField("input_video_id"),
        frame_index=each.frame_index,
        fit=fit.removeprefix("FIT_MODE_"),
        crop=(crop.left_fraction, crop.top_fraction, crop.right_fraction, crop.bottom_fraction)
        if each.HasField("crop")
        else inputs.WHOLE,
    )


def _input_message(each: inputs.Input) -> vocabulary_pb2.VideoInput:
    made = vocabulary_pb2.VideoInput(
        frame_index=each.frame_index, fit=vocabulary_pb2.FitMode.Value(f"FIT_MODE_{each.fit}")
    )
    if each.is_video:
        made.input_video_id = each.asset_id
    else:
        made.image_id = each.asset_id
    if each.crop != inputs.WHOLE:
        left, top, right, bottom = each.crop
        made.crop.left_fraction, made.crop.top_fraction = left, top
        made.crop.right_fraction, made.crop.bottom_fraction = right, bottom
    return made


def spec_inputs(spec: vocabulary_pb2.VideoSpec) -> tuple[inputs.Input, ...]:
    """What a stored spec starts from."""
    return inputs.asked(spec.input_image_id, asked_inputs(spec.inputs))


def option(value: struct_pb2.Value) -> catalogue.OptionValue | None:
    """An option's value, or a variable's; None for one that neither takes (a list, an object, null)."""
    kind = value.WhichOneof("kind")
    if kind not in ("number_value", "string_value", "bool_value"):
        return None
    return getattr(value, kind)


def option_text(value: struct_pb2.Value) -> str:
    """An option's value as the price book writes it."""
    kind = value.WhichOneof("kind")
    if kind == "bool_value":
        return "true" if value.bool_value else "false"
    return f"{value.number_value:.15g}" if kind == "number_value" else value.string_value


def spec_message(spec: videos.Spec) -> vocabulary_pb2.VideoSpec:
    """A normalised spec as the contracts carry it."""
    made = vocabulary_pb2.VideoSpec(
        prompt=spec.prompt,
        model=spec.model,
        input_image_id=spec.input_image_id,
        width=spec.width,
        height=spec.height,
        seconds=spec.seconds,
        variants=spec.variants,
        inputs=[_input_message(each) for each in spec.inputs],
        rendition_heights=spec.rendition_heights,
    )
    for name, value in (spec.options or {}).items():
        if isinstance(value, bool):
            made.options[name].bool_value = value
        elif isinstance(value, str):
            made.options[name].string_value = value
        elif value is not None:
            made.options[name].number_value = float(value)
    return made


def stored_spec(video: videos.Video) -> vocabulary_pb2.VideoSpec:
    """The spec that was stored when the video was admitted."""
    return vocabulary_pb2.VideoSpec.FromString(video.spec)


def wordless(video: videos.Video) -> bytes:
    """The stored spec without its prompt and options: what stays of a deleted video."""
    spec = stored_spec(video)
    spec.ClearField("prompt")
    spec.ClearField("options")
    return spec.SerializeToString()


def job(video: videos.Video) -> job_pb2.Job:
    """The job, rebuilt from the row: the same each time."""
    return job_pb2.Job(
        video_id=video.video_id,
        account_id=video.account_id,
        spec=stored_spec(video),
        lane=lane_number(video.lane),
        weight=video.weight,
        start_by=timestamp(video.start_by),
        admitted_at=timestamp(video.created_at),
        admission=job_pb2.Admission(
            request_id=video.request_id,
            principal=video.principal,
            fingerprint=video.fingerprint,
            key_id=video.key_id,
            labels=video.labels,
            client_reference=video.client_reference,
            quoted_credits=video.quoted_credits or 0,
            price_version=video.price_version,
            policy_version=video.policy_version,
            template_name=video.template_name,
            template_version=video.template_version,
            retry_of=video.retry_of,
            max_credits=video.max_credits,
        ),
    )


def outputs(video: videos.Video) -> list[event_pb2.Output]:
    """What was made, in order of variant."""
    made = event_pb2.Completed.FromString(video.outputs).outputs
    return sorted(made, key=lambda output: output.variant)


def late_outputs(video: videos.Video) -> list[event_pb2.Output]:
    """What turned up after the verdict, in order of variant."""
    made = event_pb2.Recovered.FromString(video.late_outputs).outputs
    return sorted(made, key=lambda output: output.variant)


def video_message(video: videos.Video) -> video_pb2.Video:
    """A row as its callers see it. An abandoned one was given up before it began: CANCELLED."""
    state = "CANCELLED" if video.state in videos.HIDDEN else video.state.value
    failure = None
    if video.failure_cause is not None:
        failure = video_pb2.VideoFailure(
            cause=vocabulary_pb2.Cause.Value(f"CAUSE_{video.failure_cause}"),
            message=video.failure_message,
            retryable=video.failure_retryable,
        )
    gone = video.deleted_at is not None
    return video_pb2.Video(
        video_id=video.video_id,
        account_id=video.account_id,
        state=vocabulary_pb2.VideoState.Value(f"VIDEO_STATE_{state}"),
        stage=vocabulary_pb2.VideoStage.Value(f"VIDEO_STAGE_{video.stage}"),
        progress_percent=video.progress_percent,
        queue_position=video.queue_position,
        expected_at=timestamp(video.expected_at),
        revision=video.revision,
        spec=stored_spec(video),
        lane=lane_number(video.lane),
        credits=_credits(video),
        outputs=() if gone else outputs(video),
        late_outputs=() if gone else event_pb2.Recovered.FromString(video.late_outputs).outputs,
        failure=failure,
        cancel_requested=video.cancel_requested,
        similar_to=video.similar_to,
        retry_of=video.retry_of,
        labels=video.labels,
        client_reference=video.client_reference,
        created_at=timestamp(video.created_at),
        started_at=timestamp(video.started_at),
        finished_at=timestamp(video.finished_at),
        updated_at=timestamp(video.updated_at),
        deleted_at=timestamp(video.deleted_at),
        start_by=timestamp(video.start_by),
        template=template_version(video.template_name, video.template_version),
    )


def template_version(name: str, version: int) -> template_pb2.TemplateVersion | None:
    """What a video was made from; None: no template."""
    return template_pb2.TemplateVersion(name=name, version=version) if name else None


def _credits(video: videos.Video) -> video_pb2.VideoCredits:
    quoted = video.quoted_credits or 0
    return video_pb2.VideoCredits(
        quoted=quoted,
        reserved=quoted,
        captured=video.captured_credits,
        released=video.released_credits,
        settlement=vocabulary_pb2.Settlement.Value(f"SETTLEMENT_{video.settlement}"),
    )


def fact(event: event_pb2.Event) -> videos.Fact | None:
    """An event as far as it changes a video; None for kinds that change none."""
    if event.kind not in event_pb2.EventKind.values():
        return None
    kind = event_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")
    if kind not in _KINDS:
        return None
    cause = event.cancelled.cause if event.HasField("cancelled") else event.failed.cause
    if cause not in vocabulary_pb2.Cause.values():
        cause = vocabulary_pb2.CAUSE_INTERNAL
    late = event.HasField("recovered")
    made = event.recovered.SerializeToString() if late else event.completed.SerializeToString()
    return videos.Fact(
        kind=videos.Kind(kind),
        seq=event.seq,
        occurred_at=event.occurred_at.ToDatetime(tzinfo=UTC),
        queue_position=event.queued.queue_position,
        expected_at=event.queued.expected_at.ToDatetime(tzinfo=UTC)
        if event.queued.HasField("expected_at")
        else None,
        outputs=made,
        cause=vocabulary_pb2.Cause.Name(cause).removeprefix("CAUSE_"),
        message=event.failed.message,
        retryable=event.failed.retryable,
        cancel_requested=event.completed.cancel_requested or event.HasField("cancelled"),
        captured_credits=event.settled.captured_credits,
        released_credits=event.settled.released_credits,
    )


_LIMITS = tuple(field.name for field in account_pb2.Limits.DESCRIPTOR.fields)


def limits(found: rows.Account | rows.ApiKey) -> account_pb2.Limits:
    """The limits of an account or a key; those that it has not are not set."""
    return account_pb2.Limits(**{name: getattr(found, name, None) for name in _LIMITS})


def asked_limits(asked: account_pb2.Limits) -> dict[str, int]:
    """Those that are set."""
    return {field.name: value for field, value in asked.ListFields()}


def role(number: account_pb2.Role.ValueType) -> auth.Role:
    """A role; MEMBER where none is named."""
    if number == account_pb2.ROLE_UNSPECIFIED:
        return auth.Role.MEMBER
    return auth.Role(account_pb2.Role.Name(number).removeprefix("ROLE_"))
