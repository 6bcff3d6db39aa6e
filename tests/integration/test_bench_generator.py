"""The generator's benchmark itself: its small mode runs, and loses nothing. What it measures then means nothing."""

from __future__ import annotations

import math

import pytest

from bench import generator

COUNTED = ("not finished", "lost, yet billed", "not delivered")


def test_the_ceiling_is_that_of_the_tighter_limit() -> None:
    quota, slots = generator.quota_bound(generator.FULL), generator.slot_bound(generator.FULL)
    assert (quota.ceiling, slots.ceiling) == (30, 10)
    assert generator.percentile((1, 2, 3, 4), 0.5) == 3
    assert generator.percentile((1, 2, 3, 4), 0.99) == 4


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", generator.PARTS)
async def test_the_small_mode_runs(part: str) -> None:
    measured = await generator.measure(generator.SMALL, [part])
    assert measured
    assert all(math.isfinite(one.value) for one in measured)
    counts = [one for one in measured if any(word in one.metric for word in COUNTED)]
    assert [one.metric for one in counts if one.holds is False] == []
    assert bool(counts) == (part in ("pace", "flight"))
