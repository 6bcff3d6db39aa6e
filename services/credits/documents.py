"""Reads price books and refund policies from YAML, and loads those that come with the service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kit import telemetry
from services.credits import rules, store

log = telemetry.logger(__name__)

_MOST_CHARACTERS = 65_536
_DEEPEST = 16
_FILES = "files"


async def load(books: store.Store, prices: Path, refund_policy: Path) -> None:
    """Loads both files; a version that is new is inactive unless it is the first. Idempotent. Raises RulesError."""
    for kind, file in (
        (rules.Kind.PRICE_BOOK, prices),
        (rules.Kind.REFUND_POLICY, refund_policy),
    ):
        text = await asyncio.to_thread(file.read_text)
        try:
            document = read(kind, text)
            if await books.rulebooks.load(kind, document, _FILES):
                log.info("rulebook_loaded", kind=kind, version=document["version"])
        except rules.RulesError as error:
            raise rules.RulesError(f"{file}: {error}") from error


def read(kind: rules.Kind, text: str) -> Mapping[str, Any]:
    """The document, checked whole. Raises RulesError naming what is wrong and the line where."""
    try:
        root = _compose(text)
        # Nothing but text, numbers, lists and mappings comes out of a safe loader's node.
        loader = yaml.SafeLoader("")
        try:
            document = loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise rules.RulesError(f"line {line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise rules.RulesError(
            f"it is not YAML that can be read: {' '.join(str(error).split())}"
        ) from error
    check = rules.price_book if kind is rules.Kind.PRICE_BOOK else rules.refund_policy
    try:
        check(document)
    except rules.RulesError as error:
        raise rules.RulesError(f"line {_line(root, error.path)}: {error}") from error
    return document


def _compose(text: str) -> yaml.Node:
    """The tree of nodes. Refuses what is too large to be read safely, and keys that are there twice."""
    if len(text) > _MOST_CHARACTERS:
        raise rules.RulesError(f"it has more than {_MOST_CHARACTERS} characters")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            raise rules.RulesError(f"line {line}: anchors and aliases (&, *) are not taken")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise rules.RulesError(f"line {line}: it is nested too deeply")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        raise rules.RulesError("it is empty")
    _refuse_twins(root)
    return root


def _refuse_twins(node: yaml.Node) -> None:
    """A key that is there twice hides one of its values."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twins(item)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise rules.RulesError(f"line {line}: the key {key.value!r} is there twice")
                seen.add(key.value)
            _refuse_twins(value)


def _line(node: yaml.Node, path: rules.Path) -> int:
    """The line of what the path leads to, or of the last thing on the way that is there."""
    line = node.start_mark.line + 1
    for part in path:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    line, found = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            found = node.value[part] if part < len(node.value) else None
            line = found.start_mark.line + 1 if found is not None else line
        if found is None:
            break
        node = found
    return line
