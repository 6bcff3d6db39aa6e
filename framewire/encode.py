"""Plain values as the contracts carry them; the counterpart of `decode`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import grpc
from google.protobuf import struct_pb2, timestamp_pb2

from framewire import errors, transport, types
from framewire.events.v1 import vocabulary_pb2


def spec(prompt: str, fields: Mapping[str, Any]) -> vocabulary_pb2.VideoSpec:
    """What a video is to be."""
    try:
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
        )
    except UnicodeError:
        raise invalid("INVALID_FIELD", "spec: a text is not valid UTF-8; send it anew") from None
    except ValueError as error:
        raise invalid("INVALID_FIELD", f"spec: a number is far too large: {error}") from None


def option(value: types.OptionValue) -> struct_pb2.Value:
    """A parameter of a model."""
    if isinstance(value, bool):
        return struct_pb2.Value(bool_value=value)
    if isinstance(value, str):
        return struct_pb2.Value(string_value=value)
    return struct_pb2.Value(number_value=value)


def lane(name: str) -> vocabulary_pb2.Lane.ValueType:
    """The contract's value of a lane's name."""
    return value(vocabulary_pb2.Lane, "LANE_", name, "lane")


def value(enum: Any, prefix: str, name: str, field: str) -> Any:
    """The enum's number of a short name, in any case; "" is UNSPECIFIED."""
    full = f"{prefix}{name.upper() or 'UNSPECIFIED'}"
    if full in enum.keys():  # noqa: SIM118 (an enum wrapper is no mapping)
        return enum.Value(full)
    known = ", ".join(key.removeprefix(prefix) for key in enum.keys()[1:])
    raise invalid("INVALID_FIELD", f"{field}: there is no {name!r}; there are: {known}")


def timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """As the contract carries it."""
    if moment is None:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment.astimezone())  # a naive time is the caller's local one
    return stamp


def invalid(reason: str, message: str) -> errors.FramewireError:
    """What is wrong in a call that was not sent."""
    return transport.failure(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


def period(since: datetime | None, until: datetime | None) -> dict[str, Any]:
    """The fields `from` and `to`, of which the first is a word of Python's."""
    return {"from": timestamp(since), "to": timestamp(until)}
