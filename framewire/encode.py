"""What callers say, as messages of the contracts. What cannot be said is refused here, as a server would refuse it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypedDict

import grpc
from google.protobuf import duration_pb2, struct_pb2, timestamp_pb2

from framewire import errors, transport, types
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import template_pb2, video_pb2


class SpecFields(TypedDict, total=False):
    """What a video is to be, beside its prompt. What is left out is the model's default."""

    image_id: str
    model: str
    width: int
    height: int
    seconds: int
    variants: int
    options: Mapping[str, types.OptionValue]
    inputs: Sequence[types.VideoInput]
    rendition_heights: Sequence[int]


class VideoFields(SpecFields, total=False):
    """What a video is to be and how it is to be made. Lanes: "VIP", "STANDARD", "BATCH". A template is the prompt."""

    template: types.TemplateUse | None
    lane: str
    max_credits: int | None
    quote_id: str
    start_by: datetime | None
    labels: Mapping[str, str]
    client_reference: str
    reject_duplicates_within: timedelta | None


class ListFields(TypedDict, total=False):
    """Which videos are listed; what is left out filters nothing."""

    created_from: datetime | None
    created_to: datetime | None
    model: str
    labels: Mapping[str, str]
    client_reference: str
    template: str
    template_version: int
    oldest_first: bool


def listing(account_id: str, state: str, fields: ListFields) -> video_pb2.ListVideosRequest:
    """Which videos, and in which order."""
    newest, oldest = video_pb2.VIDEO_ORDER_NEWEST_FIRST, video_pb2.VIDEO_ORDER_OLDEST_FIRST
    return video_pb2.ListVideosRequest(
        account_id=account_id,
        state=enum_value(vocabulary_pb2.VideoState, "VIDEO_STATE_", state, "state"),
        created_from=timestamp(fields.get("created_from")),
        created_to=timestamp(fields.get("created_to")),
        model=fields.get("model", ""),
        labels=fields.get("labels", {}),
        client_reference=fields.get("client_reference", ""),
        template=fields.get("template", ""),
        template_version=fields.get("template_version", 0),
        order=oldest if fields.get("oldest_first") else newest,
    )


def wanted(account_id: str, prompt: str, fields: VideoFields) -> video_pb2.CreateVideoRequest:
    """A video, without its request_id."""
    return video_pb2.CreateVideoRequest(
        account_id=account_id,
        spec=spec(prompt, fields),
        template=template(fields.get("template")),
        lane=lane(fields.get("lane", "")),
        max_credits=fields.get("max_credits"),
        quote_id=fields.get("quote_id", ""),
        start_by=timestamp(fields.get("start_by")),
        labels=fields.get("labels", {}),
        client_reference=fields.get("client_reference", ""),
        reject_duplicates_within=duration(fields.get("reject_duplicates_within")),
    )


@contextlib.contextmanager
def carried(what: str) -> Iterator[None]:
    """Raises FramewireError/INVALID_FIELD for what a message cannot carry."""
    try:
        yield
    except UnicodeError:
        raise invalid("INVALID_FIELD", f"{what}: a text is not valid UTF-8; send it anew") from None
    except (ValueError, OverflowError) as error:
        raise invalid("INVALID_FIELD", f"{what}: a number is far too large: {error}") from None
    except TypeError as error:
        raise invalid("INVALID_FIELD", f"{what}: not what the field takes: {error}") from None


def template(use: types.TemplateUse | None) -> template_pb2.TemplateUse | None:
    """A template with its values."""
    if use is None:
        return None
    with carried("template"):
        return template_pb2.TemplateUse(
            name=use.name,
            version=use.version,
            variables={name: option(value) for name, value in use.variables.items()},
        )


def spec(prompt: str, fields: SpecFields) -> vocabulary_pb2.VideoSpec:
    """What a video is to be. Raises FramewireError/INVALID_FIELD for what a message cannot carry."""
    with carried("spec"):
        options = {name: option(value) for name, value in fields.get("options", {}).items()}
        return vocabulary_pb2.VideoSpec(
            prompt=prompt,
            input_image_id=fields.get("image_id", ""),
            model=fields.get("model", ""),
            width=fields.get("width", 0),
            height=fields.get("height", 0),
            seconds=fields.get("seconds", 0),
            variants=fields.get("variants", 0),
            options=options,
            inputs=[video_input(each) for each in fields.get("inputs", ())],
            rendition_heights=fields.get("rendition_heights", ()),
        )


def video_input(each: types.VideoInput) -> vocabulary_pb2.VideoInput:
    """What a video starts from. Raises FramewireError/INVALID_FIELD as a server would."""
    asset = {"image_id": each.image_id, "input_video_id": each.input_video_id}
    if all(asset.values()):
        raise invalid("INVALID_FIELD", "inputs: each is an image or a video, not both")
    crop = each.crop
    return vocabulary_pb2.VideoInput(
        **{name: asset_id for name, asset_id in asset.items() if asset_id},
        frame_index=each.frame_index,
        fit=enum_value(vocabulary_pb2.FitMode, "FIT_MODE_", each.fit, "fit"),
        crop=vocabulary_pb2.CropBounds(**dataclasses.asdict(crop)) if crop is not None else None,
    )


def option(value: types.OptionValue) -> struct_pb2.Value:
    """A value of an option or a variable."""
    if isinstance(value, bool):
        return struct_pb2.Value(bool_value=value)
    if isinstance(value, str):
        return struct_pb2.Value(string_value=value)
    return struct_pb2.Value(number_value=value)


def lane(name: str) -> vocabulary_pb2.Lane.ValueType:
    """The lane of a short name, in any case; "" is UNSPECIFIED."""
    return enum_value(vocabulary_pb2.Lane, "LANE_", name, "lane")


def enum_value(enum: Any, prefix: str, name: str, field: str) -> Any:
    """The enum's number of a short name, in any case; "" is UNSPECIFIED."""
    full = f"{prefix}{name.upper() or 'UNSPECIFIED'}"
    if full in enum.keys():  # noqa: SIM118 (an enum wrapper is no mapping)
        return enum.Value(full)
    known = ", ".join(key.removeprefix(prefix) for key in enum.keys()[1:])
    raise invalid("INVALID_FIELD", f"{field}: there is no {name!r}; there are: {known}")


def duration(given: timedelta | None) -> duration_pb2.Duration | None:
    """A length of time."""
    if given is None:
        return None
    made = duration_pb2.Duration()
    made.FromTimedelta(given)
    return made


def timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A point in time; a naive one is the caller's local time."""
    if moment is None:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment.astimezone())
    return stamp


def invalid(reason: str, message: str) -> errors.FramewireError:
    """A refusal as a server would give it."""
    return transport.failure(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


def period(since: datetime | None, until: datetime | None) -> dict[str, Any]:
    """The fields `from` and `to`, of which the first is a word of Python's."""
    return {"from": timestamp(since), "to": timestamp(until)}
