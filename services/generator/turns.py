"""Whose turn comes when: what fair shares mean for a place in the queue, and for the moment when it is over. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

LANE_WEIGHTS: Mapping[str, float] = {"VIP": 8.0, "STANDARD": 3.0, "BATCH": 1.0}


@dataclass(frozen=True, slots=True)
class Rate:
    """What a pool does for a model."""

    turns_per_second: float
    render_seconds: float
    free: int
    """Jobs that could be given at once."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """How many videos of one account wait in a lane, and its weight there."""

    count: int
    weight: float


Counts = Mapping[str, Mapping[str, Waiting]]
"""Who waits, by lane and account."""


def position(ahead: int, weight: float, others: Mapping[str, Waiting]) -> int:
    """Videos of its lane that come before one that has `ahead` of its own account before it.

    While the account has `ahead` turns, another one has as many as their weights say, or as it has videos.
    """
    return ahead + sum(
        min(other.count, int(ahead * other.weight / weight)) for other in others.values()
    )


def turns_before(
    place: int, lane: str, waiting: Mapping[str, int], weights: Mapping[str, float]
) -> int:
    """Videos of the whole pool that come before the one at `place` of its lane."""
    own = weights[lane]
    return place + sum(
        min(count, int(place * weights[other] / own))
        for other, count in waiting.items()
        if other != lane
    )


def wait_seconds(turns: int, free: int, turns_per_second: float) -> float | None:
    """How long until its turn, when so many come before; None: nothing is served, nobody knows."""
    if turns < free:
        return 0.0
    if turns_per_second <= 0:
        return None
    return (turns - free + 1) / turns_per_second


def estimate(
    ahead: int, lane: str, account_id: str, counts: Counts, rate: Rate | None
) -> tuple[int, float | None]:
    """The place in its lane of one that has `ahead` of its account before it, and the seconds until it is done."""
    in_lane = counts.get(lane, {})
    weight = in_lane[account_id].weight if account_id in in_lane else 1.0
    others = {name: item for name, item in in_lane.items() if name != account_id}
    place = position(ahead, weight, others)
    if rate is None:
        return place, None
    totals = {name: sum(item.count for item in items.values()) for name, items in counts.items()}
    wait = wait_seconds(
        turns_before(place, lane, totals, LANE_WEIGHTS), rate.free, rate.turns_per_second
    )
    return place, None if wait is None else wait + rate.render_seconds


def of_next(
    lane: str, account_id: str, weight: float, counts: Counts, rate: Rate | None
) -> tuple[int, float | None]:
    """The place in its lane of a video of the account that came now, and the seconds until it is done."""
    in_lane = dict(counts.get(lane, {}))
    ahead = in_lane[account_id].count if account_id in in_lane else 0
    in_lane[account_id] = Waiting(ahead + 1, weight)
    return estimate(ahead, lane, account_id, {**counts, lane: in_lane}, rate)


def turns_per_second(
    slots: int, render_seconds: float, requests_per_second: float, creates_per_second: float
) -> float:
    """What one account serves: its slots come free once a render, and each video costs a create and a download."""
    rates = [slots / render_seconds, requests_per_second / 2]
    if creates_per_second:
        rates.append(creates_per_second)
    return min(rates)


def together(rates: Sequence[Rate]) -> Rate:
    """What several accounts do for a model; the time of a render is that of most of the jobs."""
    total = sum(rate.turns_per_second for rate in rates)
    seconds = sum(rate.render_seconds * rate.turns_per_second for rate in rates)
    typical = seconds / total if total else min(rate.render_seconds for rate in rates)
    return Rate(total, typical, sum(rate.free for rate in rates))


def worth_telling(
    place_before: int,
    expected_before: datetime | None,
    place: int,
    expected: datetime | None,
    now: datetime,
) -> bool:
    """Whether a place, or a moment, has moved enough for a row's write and a message."""
    if place_before != place or (expected_before is None) != (expected is None):
        return True
    if expected is None or expected_before is None:
        return False
    moved = abs((expected - expected_before).total_seconds())
    return moved > max(2.0, (expected - now).total_seconds() / 5)
