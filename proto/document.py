"""Writes docs/api.md from the contracts: `python proto/document.py DESCRIPTORS OUT`. Run it through `make proto`.

What callers of the gateway and subscribers need: its services, the events, and what these carry of other contracts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import descriptor_pb2, text_format

from framewire.buf.validate import validate_pb2

PUBLIC = ("framewire.gateway.v1", "framewire.events.v1")
OURS = "framewire."
_HEAD = """\
# API

Written from `proto/` by `make proto`; do not edit. The gateway's services, their messages, and the events.
How to call them: metadata `authorization: Bearer <API key or OIDC token>`; every error is a `google.rpc.Status` with an
`ErrorInfo` whose reason stands in [errors.md](errors.md). Rules are those of protovalidate, enforced before a call does
anything.
"""
_TYPES = descriptor_pb2.FieldDescriptorProto
_PLAIN = {
    getattr(_TYPES, f"TYPE_{name.upper()}"): name
    for name in ("double", "float", "int64", "uint64", "int32", "bool", "string", "bytes", "uint32")
}


@dataclass
class Contracts:
    """Everything by full name, with its comment."""

    comments: dict[str, str] = field(default_factory=dict[str, str])
    messages: dict[str, descriptor_pb2.DescriptorProto] = field(
        default_factory=dict[str, descriptor_pb2.DescriptorProto]
    )
    enums: dict[str, descriptor_pb2.EnumDescriptorProto] = field(
        default_factory=dict[str, descriptor_pb2.EnumDescriptorProto]
    )
    services: dict[str, descriptor_pb2.ServiceDescriptorProto] = field(
        default_factory=dict[str, descriptor_pb2.ServiceDescriptorProto]
    )

    def add(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        """One .proto."""
        said = {
            tuple(place.path): " ".join(place.leading_comments.split())
            for place in file.source_code_info.location
        }
        for index, message in enumerate(file.message_type):
            self._message(message, file.package, (4, index), said)
        for index, enum in enumerate(file.enum_type):
            self._enum(enum, file.package, (5, index), said)
        for index, service in enumerate(file.service):
            name = f"{file.package}.{service.name}"
            self.services[name] = service
            self.comments[name] = said.get((6, index), "")
            for number, method in enumerate(service.method):
                self.comments[f"{name}.{method.name}"] = said.get((6, index, 2, number), "")

    def _message(
        self,
        message: descriptor_pb2.DescriptorProto,
        scope: str,
        path: tuple[int, ...],
        said: dict[tuple[int, ...], str],
    ) -> None:
        name = f"{scope}.{message.name}"
        self.messages[name] = message
        self.comments[name] = said.get(path, "")
        for index, one in enumerate(message.field):
            self.comments[f"{name}.{one.name}"] = said.get((*path, 2, index), "")
        for index, nested in enumerate(message.nested_type):
            self._message(nested, name, (*path, 3, index), said)
        for index, enum in enumerate(message.enum_type):
            self._enum(enum, name, (*path, 4, index), said)

    def _enum(
        self,
        enum: descriptor_pb2.EnumDescriptorProto,
        scope: str,
        path: tuple[int, ...],
        said: dict[tuple[int, ...], str],
    ) -> None:
        name = f"{scope}.{enum.name}"
        self.enums[name] = enum
        self.comments[name] = said.get(path, "")
        for index, value in enumerate(enum.value):
            self.comments[f"{name}.{value.name}"] = said.get((*path, 2, index), "")

    def reached(self) -> list[str]:
        """Messages and enums that the public contracts name, directly or not."""
        found: dict[str, None] = {}
        waiting = [
            kind.lstrip(".")
            for service in self.services.values()
            for method in service.method
            for kind in (method.input_type, method.output_type)
        ]
        waiting += [name for name in self.messages if name.startswith(PUBLIC[1])]
        while waiting:
            name = waiting.pop()
            if name in found or not name.startswith(OURS):
                continue
            found[name] = None
            if name in self.messages:
                waiting += [
                    one.type_name.lstrip(".") for one in self.messages[name].field if one.type_name
                ]
        return sorted(found, key=lambda name: (not name.startswith(PUBLIC), name))


def render(contracts: Contracts) -> Iterator[str]:
    """The page."""
    yield _HEAD
    for name, service in sorted(contracts.services.items()):
        yield f"## {service.name}\n\n`{name}`. {contracts.comments[name]}\n"
        for method in service.method:
            asked = ("stream " if method.client_streaming else "") + _link(method.input_type)
            answered = ("stream " if method.server_streaming else "") + _link(method.output_type)
            yield f"### {method.name}\n\n{asked} → {answered}\n"
            yield f"{contracts.comments[f'{name}.{method.name}']}\n"
    yield "## Messages\n"
    for name in contracts.reached():
        yield from _kind(contracts, name)


def _kind(contracts: Contracts, name: str) -> Iterator[str]:
    message, enum = contracts.messages.get(name), contracts.enums.get(name)
    if message is not None and message.options.map_entry:
        return
    yield f"### {_short(name)}\n\n{contracts.comments[name]}\n"
    if enum is not None:
        yield "| value | is |\n|---|---|"
        for value in enum.value:
            yield f"| `{value.name}` | {_cell(contracts.comments[f'{name}.{value.name}'])} |"
    elif message is not None and message.field:
        yield "| field | type | is | rules |\n|---|---|---|---|"
        for one in message.field:
            said = _cell(contracts.comments[f"{name}.{one.name}"])
            yield f"| `{one.name}` | {_type(contracts, one)} | {said} | {_rules(one)} |"
    yield ""


def _type(contracts: Contracts, one: descriptor_pb2.FieldDescriptorProto) -> str:
    name = one.type_name.lstrip(".")
    entry = contracts.messages.get(name)
    if entry is not None and entry.options.map_entry:
        key, value = (_type(contracts, part) for part in entry.field)
        return f"map of {key} to {value}"
    shown = _link(name) if name else _PLAIN[one.type]
    return f"repeated {shown}" if one.label == _TYPES.LABEL_REPEATED else shown


def _rules(one: descriptor_pb2.FieldDescriptorProto) -> str:
    if not one.options.HasExtension(validate_pb2.field):
        return ""
    rules = one.options.Extensions[validate_pb2.field]
    return f"`{_cell(text_format.MessageToString(rules, as_one_line=True).strip())}`"


def _link(name: str) -> str:
    name = name.lstrip(".")
    short = _short(name)
    return f"[{short}](#{short.lower().replace('.', '')})" if name.startswith(OURS) else f"`{name}`"


def _short(name: str) -> str:
    """`Video`; of other contracts `credits.Balance`."""
    package, _, rest = name.partition(".v1.")
    return rest if package == "framewire.gateway" else f"{package.removeprefix(OURS)}.{rest}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(descriptors: Path, out: Path) -> None:
    """Reads what protoc wrote with source info; writes the page."""
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes())
    contracts = Contracts()
    for file in files.file:
        if file.package.startswith(OURS):
            contracts.add(file)
    for name in list(contracts.services):
        if not name.startswith(PUBLIC):
            del contracts.services[name]
    out.write_text("\n".join(render(contracts)).rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
