"""What tells a restored database: the table of cases of ADR 16."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest

from kit import incarnation

HERE = "system/1"
KEPT = incarnation.Life("a", 2, 7)
ROW = incarnation.Row(KEPT, HERE, "bucket", datetime.now(UTC), None, "")


def with_life(*life: str | int) -> incarnation.Row:
    return dataclasses.replace(ROW, life=incarnation.Life(*life))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("row", "kept", "says"),
    [
        pytest.param(None, None, "", id="a new system"),
        pytest.param(None, KEPT, "knows of no life", id="database lost, or from before"),
        pytest.param(ROW, None, "", id="NATS lost: kept anew"),
        pytest.param(ROW, KEPT, "", id="both the same"),
        pytest.param(with_life("a", 2, 8), KEPT, "", id="killed between row and bucket"),
        pytest.param(
            with_life("a", 2, 6), KEPT, "1 steps behind", id="restored, or lost fail-over"
        ),
        pytest.param(with_life("z", 1, 99), KEPT, "before the last recovery", id="an older life"),
        pytest.param(with_life("z", 3, 1), KEPT, "", id="killed while it opened"),
        pytest.param(with_life("z", 2, 7), KEPT, "another database", id="two systems, one bucket"),
        pytest.param(dataclasses.replace(ROW, written_in="system/2"), KEPT, "copy", id="a copy"),
        pytest.param(
            dataclasses.replace(ROW, written_in="system/2"), None, "copy", id="a copy, NATS lost"
        ),
    ],
)
def test_cases(row: incarnation.Row | None, kept: incarnation.Life | None, says: str) -> None:
    why = incarnation.why_behind(row, kept, HERE)
    assert says in why
    assert bool(why) == bool(says)
