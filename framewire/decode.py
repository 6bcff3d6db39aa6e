"""Messages of the contracts as frozen data. A dataclass takes the message's fields of the same names."""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf import message, struct_pb2, timestamp_pb2

T = TypeVar("T")


def decode(kind: type[T], source: message.Message) -> T:
    """An instance of the dataclass `kind`. Enum values lose their prefix, UNSPECIFIED becomes ""."""
    described = source.DESCRIPTOR.fields_by_name
    values = {
        name: _field(source, described[name], inner, optional)
        for name, inner, optional in _plan(kind)
    }
    return kind(**values)


def enum_name(described: Any, number: int) -> str:
    """The value's short name; the number itself when the sender knows more values than we do."""
    if number == 0:
        return ""
    if number not in described.values_by_number:
        return str(number)
    prefix = described.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return described.values_by_number[number].name.removeprefix(prefix)


def moment(stamp: timestamp_pb2.Timestamp) -> datetime:
    """An aware datetime, in UTC."""
    return stamp.ToDatetime(tzinfo=UTC)


@functools.cache
def _plan(kind: type) -> tuple[tuple[str, type | None, bool], ...]:
    """(name, nested dataclass, may be None) of each field."""
    hints = typing.get_type_hints(kind)
    plan: list[tuple[str, type | None, bool]] = []
    for one in fields(kind):
        hint = hints[one.name]
        choices = typing.get_args(hint) or (hint,)
        inner = next((choice for choice in choices if is_dataclass(choice)), None)
        optional = isinstance(hint, types.UnionType) and types.NoneType in choices
        plan.append((one.name, typing.cast("type | None", inner), optional))
    return tuple(plan)


def _field(source: Any, described: Any, inner: type | None, optional: bool) -> Any:
    value = getattr(source, described.name)
    if described.message_type is not None and described.message_type.GetOptions().map_entry:
        return {key: _value(described, value[key], inner) for key in value}
    if described.is_repeated:
        return tuple(_value(described, item, inner) for item in value)
    if optional and described.has_presence and not source.HasField(described.name):
        return None
    return _value(described, value, inner)


def _value(described: Any, value: Any, inner: type | None) -> Any:
    if isinstance(value, timestamp_pb2.Timestamp):
        return moment(value)
    if isinstance(value, struct_pb2.Value):
        kind = value.WhichOneof("kind")
        number = kind == "number_value" and value.number_value.is_integer()
        return int(value.number_value) if number else getattr(value, kind or "string_value")
    if inner is not None:
        return decode(inner, value)
    if described.enum_type is not None:
        return enum_name(described.enum_type, value)
    return value
