"""docs/errors.md, the contract's reasons and what the code raises are the same."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from framewire.events.v1 import reason_pb2
from kit import errors
from tests import bad_input

ROOT = Path(__file__).parents[2]
NOT_RAISED = "not raised yet"
PREFIX = "ERROR_REASON_"
REASONS = {name.removeprefix(PREFIX) for name in reason_pb2.ErrorReason.keys()[1:]}
CODES = {cls.__name__: code for code, cls in errors.BY_CODE.items()}


def raised() -> Iterator[tuple[str, str, str]]:
    """(where, code, reason) of every error of `kit.errors` that is made with a literal reason."""
    for folder in ("kit", "services"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id="errors"), attr=name),
                        args=[ast.Constant(value=str(reason)), *_],
                    ) if name in CODES:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", CODES[name], reason


def test_every_reason_is_in_the_table() -> None:
    assert {row.reason for row in bad_input.table()} == REASONS


def test_every_error_that_is_raised_is_a_row_of_the_table() -> None:
    rows = {(row.code, row.reason) for row in bad_input.table() if row.tested != NOT_RAISED}
    found = list(raised())
    assert len(found) > 50, "the search finds nothing"
    assert [one for one in found if one[1:] not in rows] == []


def test_rows_are_one_each_and_say_what_to_do() -> None:
    rows = bad_input.table()
    assert len({row.what for row in rows}) == len(rows)
    assert [row.what for row in rows if row.code not in errors.BY_CODE or len(row.to_do) < 10] == []


def test_every_row_is_tested_where_it_says_so() -> None:
    """Those of test_bad_input.py have a case each, which is tested there."""
    for row in bad_input.table():
        if row.tested == NOT_RAISED:
            assert row.reason not in {reason for _, _, reason in raised()}, row
        elif row.tested != bad_input.HERE:
            assert re.search(rf"\b{row.reason}\b", (ROOT / row.tested).read_text()), row


def test_the_contract_says_the_code_of_each_reason() -> None:
    proto = (ROOT / "proto" / "framewire" / "events" / "v1" / "reason.proto").read_text()
    said = {
        reason: code for code, reason in re.findall(rf"// ([A-Z_]+): .*\n  {PREFIX}(\w+) =", proto)
    }
    codes = {
        row.reason: {each.code for each in bad_input.table() if each.reason == row.reason}
        for row in bad_input.table()
    }
    assert [reason for reason, code in said.items() if code not in codes[reason]] == []
    assert said.keys() == REASONS
