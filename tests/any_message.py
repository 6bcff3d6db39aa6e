"""Any message of a contract, drawn from its descriptor and its own rules: half of them as callers would send them, half
with something in them that is beyond every bound."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import descriptor, message_factory
from hypothesis import strategies as st

from framewire.buf.validate import validate_pb2

MAX_DEPTH = 4
MOST = 3
_ID = "^[a-z0-9]{26}$"
_BOUNDS = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}
Field = descriptor.FieldDescriptor
_INTEGERS = {
    Field.TYPE_INT32: "int32",
    Field.TYPE_INT64: "int64",
    Field.TYPE_UINT32: "uint32",
    Field.TYPE_UINT64: "uint64",
}
# What has broken parsers, databases and logs before.
NASTY = (
    "", " ", "\0", "a\0b", "\n", "%", "'; DROP TABLE videos; --", "\\", "{", "}}", "{0.__class__}", "\u202e", "😀" * 9,
    "\ufeff", "ß" * 130, "é", "a" * 600, "-1", "0", "null", "../../etc/passwd", "fw_" + "a" * 40, "@", "|", "1e999",
)  # fmt: skip


class Messages:
    """Strategies for messages. `known`: words by the name of their field, and ids, that stand for something here."""

    def __init__(self, known: Mapping[str, Sequence[Any]], ids: Sequence[str]) -> None:
        self._known = known
        self._ids = ids

    def of(self, described: descriptor.Descriptor) -> st.SearchStrategy[Any]:
        """Instances of a message."""
        return st.booleans().flatmap(lambda wild: self._message(described, wild, 0))

    def _message(
        self, described: descriptor.Descriptor, wild: bool, depth: int
    ) -> st.SearchStrategy[Any]:
        @st.composite
        def drawn(draw: Any) -> Any:
            made = message_factory.GetMessageClass(described)()
            for field in self._chosen(draw, described, wild):
                self._set(draw, made, field, wild, depth)
            return made

        return drawn()

    def _chosen(self, draw: Any, described: descriptor.Descriptor, wild: bool) -> Iterator[Field]:
        """The fields that are set: what the contract requires, of a oneof one, most that are known, half of others."""
        chosen = {
            group.name: draw(st.sampled_from([*group.fields, *([None] if wild else [])]))
            for group in described.oneofs
            if len(group.fields) > 1
        }
        for field in described.fields:
            group = field.containing_oneof
            if group is not None and len(group.fields) > 1:
                if chosen[group.name] is field:
                    yield field
            elif _is_required(field):
                if not wild or draw(st.integers(0, 9)):
                    yield field
            elif draw(st.integers(0, 3 if field.name in self._known else 1)):
                yield field

    def _set(self, draw: Any, made: Any, field: Field, wild: bool, depth: int) -> None:
        rules, inner = _rules(field), field.message_type
        if inner is not None and depth == MAX_DEPTH:
            return
        place = getattr(made, field.name)
        if inner is not None and inner.GetOptions().map_entry:
            keys = self._value(inner.fields_by_name["key"], rules.map.keys, wild)
            value = inner.fields_by_name["value"]
            for key in draw(st.lists(keys, max_size=MOST)):
                if value.message_type is None:
                    place[key] = draw(self._value(value, rules.map.values, wild))
                else:
                    place[key].CopyFrom(draw(self._message(value.message_type, wild, depth + 1)))
        elif field.is_repeated:
            each = (
                self._message(inner, wild, depth + 1)
                if inner is not None
                else self._value(field, rules.repeated.items, wild)
            )
            least = 0 if wild else int(rules.repeated.min_items)
            unique = rules.repeated.unique and not wild
            place.extend(draw(st.lists(each, min_size=least, max_size=MOST, unique=unique)))
        elif inner is None:
            setattr(made, field.name, draw(self._value(field, rules, wild)))
        else:
            place.CopyFrom(draw(self._message(inner, wild, depth + 1)))

    def _value(self, field: Field, rules: Any, wild: bool) -> st.SearchStrategy[Any]:
        usual, beyond = self._usual(field, rules)
        if not wild:
            return usual
        return st.integers(0, 3).flatmap(lambda number: usual if number else beyond)

    def _usual(self, field: Field, rules: Any) -> tuple[st.SearchStrategy[Any], ...]:
        """What callers send, and what they should not."""
        kind = field.type
        if kind == field.TYPE_BOOL:
            return (st.booleans(),) * 2
        if kind == field.TYPE_ENUM:
            never = set(rules.enum.not_in)
            numbers = [value.number for value in field.enum_type.values]
            good = [number for number in numbers if number not in never]
            return st.sampled_from(good), st.sampled_from([0, -1, 99, 2**31 - 1])
        if kind == field.TYPE_BYTES:
            return (st.binary(min_size=1, max_size=64), st.binary(max_size=64))
        if kind in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
            return st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats()
        if kind in _INTEGERS:
            return _integers(field, _INTEGERS[kind], rules, self._known.get(field.name, ()))
        assert kind == field.TYPE_STRING, field.full_name
        return self._text(field, rules.string), st.sampled_from((*NASTY, *self._ids))

    def _text(self, field: Field, rules: Any) -> st.SearchStrategy[str]:
        if rules.uuid:
            return st.uuids().map(str)
        words = [word for word in self._known.get(field.name, ()) if isinstance(word, str)]
        words += [*getattr(rules, "in")] or (
            self._ids if _ID in rules.pattern and not words else []
        )
        if not rules.pattern:
            return st.sampled_from(words or ["a", "why"])
        words = [word for word in words if re.search(rules.pattern, word)]
        return st.sampled_from(words) if words else st.from_regex(rules.pattern, fullmatch=True)


def _integers(
    field: Field, name: str, rules: Any, words: Sequence[Any]
) -> tuple[st.SearchStrategy[int], ...]:
    lowest, highest = _BOUNDS[name]
    bounds = getattr(rules, name)
    low = bounds.gte if bounds.HasField("gte") else lowest
    high = bounds.lte if bounds.HasField("lte") else highest
    if field.containing_type.full_name.startswith("google.protobuf."):
        an_hour_on = int(time.time()) + 3600
        words, high = ((0, 999_999_999), 0) if field.name == "nanos" else ((0, an_hour_on), 0)
    good = [one for one in words if isinstance(one, int) and low <= one] or [low, high]
    return st.sampled_from(sorted({*good})), st.integers(lowest, highest)


def _rules(field: Field) -> Any:
    return field.GetOptions().Extensions[validate_pb2.field]


def _is_required(field: Field) -> bool:
    """Whether the contract refuses a message without it."""
    rules = _rules(field)
    text = rules.string
    return bool(
        rules.required
        or text.uuid
        or text.min_len
        or text.min_bytes
        or (text.pattern and not re.search(text.pattern, ""))
        or rules.repeated.min_items
        or 0 in rules.enum.not_in
        or rules.int32.gte > 0
        or rules.int64.gte > 0
    )
