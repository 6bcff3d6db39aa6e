"""The arithmetic of quotas, standings and turns: no database, no clock."""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import strategies

from framewire.events.v1 import vocabulary_pb2
from services.generator import buckets, catalogue, poll, standings, turns
from services.generator.buckets import Use

FILE = Path(catalogue.__file__).parent / "providers.yaml"
ACCOUNT = catalogue.parse(yaml.safe_load(FILE.read_text()), 1.0)["main"]
FLOORS = {Use.DOWNLOAD: 0.25, Use.SUBMIT: 0.25, Use.POLL: 0.25}
NOW = datetime(2026, 11, 20, tzinfo=UTC)


def quota(limit: float = 60, creates: float = 0) -> buckets.Quota:
    return buckets.Quota(
        buckets.pace(limit, 60), buckets.pace(creates, 60) if creates else None, FLOORS
    )


def simulate(
    takers: dict[Use, int],
    until: float,
    given: buckets.Quota,
    pause: Callable[[], float] = lambda: 0.0,
    *,
    last: bool = False,
) -> dict[Use, list[float]]:
    """So many takers of each use, who ask again once they have got one and paused. Answers when each was served.

    `last`: its submits are the last that there are.
    """
    bucket = buckets.Bucket()
    asking = [(0.0, use) for use, count in takers.items() for _ in range(count)]
    served: dict[Use, list[float]] = {use: [] for use in Use}
    while asking[0][0] <= until:
        now, use = heapq.heappop(asking)
        answer = buckets.take(bucket, given, use, now, last=last and use is Use.SUBMIT)
        bucket = answer.bucket
        again = answer.wait_seconds
        if again <= 0:
            served[use].append(now)
            again = pause()
        heapq.heappush(asking, (now + again, use))
    return served


def most_in_a_window(moments: list[float], window: float) -> int:
    moments = sorted(moments)
    return max(
        bisect.bisect_left(moments, at + window) - number for number, at in enumerate(moments)
    )


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(
    limit=strategies.integers(min_value=1, max_value=100),
    seed=strategies.integers(min_value=0, max_value=10_000),
)
def test_no_window_of_the_provider_sees_more_than_its_limit(limit: int, seed: int) -> None:
    rng = random.Random(seed)
    served = simulate(
        {Use.POLL: 2}, 200, quota(limit), lambda: rng.uniform(0, 60) if rng.random() < 0.01 else 0.0
    )[Use.POLL]
    # As they arrive: each is on its way for up to half a second longer than another.
    arrived = [at + rng.uniform(0, 0.5) for at in served]
    assert most_in_a_window(arrived, 60) <= limit


@pytest.mark.parametrize(("limit", "share"), [(10, 0.85), (60, 0.95), (300, 0.95)])
def test_who_always_has_something_to_ask_gets_nearly_all_of_the_quota(
    limit: int, share: float
) -> None:
    served = simulate({Use.SUBMIT: 2}, 300, quota(limit))[Use.SUBMIT]
    assert len(served) >= share * limit * 5


@pytest.mark.parametrize(
    "uses", [uses for n in (1, 2, 3, 4) for uses in itertools.combinations(Use, n)]
)
def test_each_use_gets_its_floor_and_what_it_leaves_is_the_others(uses: tuple[Use, ...]) -> None:
    """All of them always ask for more than there is."""
    served = simulate(dict.fromkeys(uses, 2), 200, quota())
    total = sum(len(moments) for moments in served.values())
    assert total >= 0.95 * 200
    for use in set(uses) & set(FLOORS):
        assert len(served[use]) >= 0.23 * total, (use, served)
    # What is over goes to those that come first.
    counts = [len(served[use]) for use in uses]
    assert counts[0] == max(counts)


def test_the_last_submits_go_before_downloads_which_keep_their_floor() -> None:
    takers = {Use.DOWNLOAD: 2, Use.SUBMIT: 2, Use.POLL: 2}
    served = simulate(takers, 200, quota(), last=True)
    total = sum(len(moments) for moments in served.values())
    assert total >= 0.95 * 200
    shares = {use: len(served[use]) / total for use in takers}
    assert 0.47 <= shares[Use.SUBMIT] <= 0.53
    assert min(shares[Use.DOWNLOAD], shares[Use.POLL]) >= 0.23
    # Nobody waits for one that does not come: its word is good for as long as its wait.
    asked = buckets.take(buckets.Bucket(tat=10.0), quota(), Use.SUBMIT, 0.0, last=True)
    assert asked.wait_seconds > 0
    late = asked.bucket.submits_first_until + 0.01
    assert buckets.take(asked.bucket, quota(), Use.DOWNLOAD, late).wait_seconds == 0


def test_a_download_that_fails_again_and_again_gets_what_is_left_over() -> None:
    served = simulate({Use.RETRY: 2, Use.SUBMIT: 2, Use.POLL: 2}, 200, quota())
    assert len(served[Use.RETRY]) <= 2


def test_creates_have_a_limit_of_their_own_for_which_nobody_else_waits() -> None:
    served = simulate({Use.SUBMIT: 2, Use.POLL: 2}, 300, quota(60, creates=2))
    assert most_in_a_window(served[Use.SUBMIT], 60) <= 2
    assert len(served[Use.SUBMIT]) >= 8
    assert len(served[Use.POLL]) >= 0.93 * (300 - len(served[Use.SUBMIT]))


def test_the_providers_word_only_tightens_until_the_time_that_it_states() -> None:
    bucket = buckets.Bucket()
    held = buckets.hear(bucket, quota(), buckets.Said(remaining=0, reset_seconds=30), 100.0)
    assert buckets.take(held, quota(), Use.DOWNLOAD, 100.0).wait_seconds == pytest.approx(30)
    shorter = buckets.hear(held, quota(), buckets.Said(wait_seconds=5), 100.0)
    assert shorter.held_until == held.held_until
    longer = buckets.hear(held, quota(), buckets.Said(wait_seconds=60), 100.0)
    assert longer.held_until == 160
    assert buckets.take(held, quota(), Use.POLL, 130.1).wait_seconds == 0
    # Requests that are left are no reason to wait, and a larger limit is none to hurry.
    assert (
        buckets.hear(bucket, quota(), buckets.Said(remaining=3, reset_seconds=30), 100.0) is bucket
    )
    assert buckets.hear(bucket, quota(), buckets.Said(limit_share=1.0), 100.0) is bucket


def test_a_rate_that_was_refused_comes_back_by_itself() -> None:
    slowed = buckets.hear(buckets.Bucket(), quota(), buckets.Said(refused=True), 0.0)
    assert buckets.share_now(slowed, quota(), 0.0) == buckets.SLOWED_BY
    assert buckets.SLOWED_BY < buckets.share_now(slowed, quota(), 30.0) < 1
    assert buckets.share_now(slowed, quota(), 300.0) == 1
    for _ in range(20):
        slowed = buckets.hear(slowed, quota(), buckets.Said(refused=True), 1.0)
    assert buckets.share_now(slowed, quota(), 1.0) == buckets.SMALLEST_RATE_SHARE
    stated = buckets.hear(buckets.Bucket(), quota(), buckets.Said(limit_share=0.5), 0.0)
    gap = buckets.take(
        buckets.take(stated, quota(6), Use.POLL, 0.0).bucket, quota(6), Use.POLL, 0.0
    )
    assert gap.wait_seconds == pytest.approx(2 * buckets.pace(6, 60).interval, rel=0.01)


# Standings


def standing(**fields: object) -> standings.Standing:
    plain = standings.Standing(
        provider_account="main",
        paused=False,
        closed_reason="",
        opens_in_seconds=-math.inf,
        troubles=0,
        jobs_learnt=None,
        jobs_learnt_seconds_ago=0,
        jobs_probe_seconds=0,
        jobs_in_flight=0,
        preparing=0,
        being_sent=0,
    )
    return dataclasses.replace(plain, **fields)  # pyright: ignore[reportArgumentType]


def test_slots_that_were_learnt_grow_back_one_at_a_time() -> None:
    account = dataclasses.replace(ACCOUNT, max_jobs_in_flight=10)
    assert standings.slots(standing(), account) == 10
    learnt = {"jobs_learnt": 2, "jobs_probe_seconds": 60.0}
    for seconds, usable in ((0.0, 2), (59.0, 2), (61.0, 3), (200.0, 5), (1e9, 10)):
        item = standing(**learnt, jobs_learnt_seconds_ago=seconds)
        assert standings.slots(item, account) == usable


@pytest.mark.parametrize(
    ("fields", "capped", "words"),
    [
        ({}, {}, ""),
        ({"paused": True}, {}, "operator"),
        ({"opens_in_seconds": 3.0, "closed_reason": "HTTP 401"}, {}, "HTTP 401"),
        ({"opens_in_seconds": -0.1, "closed_reason": "HTTP 401"}, {}, ""),
        (
            {"cost_micros_hour": 100},
            {"max_cost_micros_per_hour": 100},
            "100 of 100 micros in this hour",
        ),
        (
            {"cost_micros_hour": 91},
            {"max_cost_micros_per_hour": 100},
            "hour",
        ),  # with what is to come
        ({"cost_micros_hour": 90}, {"max_cost_micros_per_hour": 100}, ""),
        ({"cost_micros_day": 100}, {"max_cost_micros_per_day": 100}, "day"),
        ({"jobs_day": 5}, {"jobs_per_day": 5}, "5 of 5 a day"),
        ({"jobs_day": 4}, {"jobs_per_day": 5}, ""),
    ],
)
def test_why_an_account_is_closed(
    fields: dict[str, object], capped: dict[str, int], words: str
) -> None:
    account = dataclasses.replace(ACCOUNT, **capped)
    reason = standings.why_closed(standing(**fields), account, cost_micros=10)
    assert bool(reason) == bool(words)
    assert words in reason


def test_after_trouble_one_job_is_sent_to_see() -> None:
    account = dataclasses.replace(ACCOUNT, max_jobs_in_flight=10)
    assert standings.room(standing(jobs_in_flight=4), account, 8) == 6
    assert standings.room(standing(jobs_in_flight=4, troubles=1), account, 8) == 1
    assert standings.room(standing(jobs_in_flight=4, troubles=1, being_sent=1), account, 8) == 0
    assert standings.room(standing(jobs_in_flight=10), account, 8) == 0
    assert standings.room(standing(preparing=2), account, 2) == 0


def test_jobs_are_shared_out_by_weight_among_those_that_can_take_them() -> None:
    def named(name: str, **fields: object) -> catalogue.ProviderAccount:
        return dataclasses.replace(ACCOUNT, name=name, **fields)  # pyright: ignore[reportArgumentType]

    accounts = {"a": named("a", weight=3.0), "b": named("b", weight=1.0)}
    given = {"a": 0, "b": 0}
    for _ in range(40):
        items = [
            standing(provider_account=name, jobs_in_flight=count) for name, count in given.items()
        ]
        able = standings.able(items, accounts, {"a": 9, "b": 9}, NOW)
        given[next(name for model, name in able if model == "sora-2")] += 1
        if given["a"] == 10:
            break
    assert given["b"] in (3, 4)


def test_a_model_is_given_to_nobody_who_cannot_finish_it_in_time() -> None:
    model = ACCOUNT.models["sora-2"]
    gone = dataclasses.replace(model, retires_at=NOW + timedelta(seconds=model.render_seconds))
    account = dataclasses.replace(ACCOUNT, models={**ACCOUNT.models, "sora-2": gone})
    able = standings.able([standing()], {"main": account}, {"main": 9}, NOW)
    assert [name for name, _ in able] == ["sora-2-pro"]
    earlier = NOW - timedelta(seconds=1)
    assert standings.still_served(account, "sora-2", earlier)


def test_no_more_are_prepared_than_get_their_request_before_their_lease_is_over() -> None:
    slow = dataclasses.replace(ACCOUNT, quota=quota(6))
    assert standings.most_preparing(slow, 60, 8) == 1
    assert standings.most_preparing(dataclasses.replace(ACCOUNT, quota=quota(600)), 60, 8) == 8
    creates = dataclasses.replace(ACCOUNT, quota=quota(600, creates=2))
    assert standings.most_preparing(creates, 60, 8) == 1


def test_the_price_is_by_second_and_variant() -> None:
    spec = vocabulary_pb2.VideoSpec(model="sora-2", seconds=8, variants=2)
    assert standings.price(ACCOUNT, spec) == 16 * ACCOUNT.models["sora-2"].cost_micros_per_second


# Turns


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    ahead=strategies.integers(0, 50),
    weights=strategies.lists(strategies.integers(1, 10), min_size=1, max_size=6),
    counts=strategies.lists(strategies.integers(0, 80), min_size=6, max_size=6),
)
def test_a_place_in_the_queue_is_what_weighted_virtual_time_gives(
    ahead: int, weights: list[int], counts: list[int]
) -> None:
    """Against the real order: one turn after the other to whoever has had the least for its weight."""
    others = {
        str(number): turns.Waiting(counts[number], weight)
        for number, weight in enumerate(weights[1:])
    }
    own = weights[0]
    served = dict.fromkeys(others, 0)
    mine = before = 0
    while True:
        clocks = [
            (served[name] / item.weight, name)
            for name, item in others.items()
            if served[name] < item.count
        ]
        if not clocks or mine / own <= min(clocks)[0]:
            if mine == ahead:
                break
            mine += 1
        else:
            served[min(clocks)[1]] += 1
        before += 1
    place = turns.position(ahead, own, others)
    assert abs(place - before) <= len(others) + 1


def test_lanes_and_rates_make_the_wait() -> None:
    weights = {"VIP": 8.0, "STANDARD": 3.0, "BATCH": 1.0}
    waiting = {"VIP": 100, "STANDARD": 10, "BATCH": 50}
    assert turns.turns_before(9, "STANDARD", waiting, weights) == 9 + 24 + 3
    assert turns.turns_before(0, "BATCH", waiting, weights) == 0
    # 10 slots of 60 s; 60 requests a minute; 2 creates a minute.
    assert turns.turns_per_second(10, 60, 1.0, 0) == pytest.approx(1 / 6)
    assert turns.turns_per_second(100, 60, 1.0, 0) == pytest.approx(1 / 2)
    assert turns.turns_per_second(100, 60, 1.0, 2 / 60) == pytest.approx(1 / 30)
    assert turns.wait_seconds(3, 4, 0.1) == 0
    assert turns.wait_seconds(4, 4, 0.1) == pytest.approx(10)
    assert turns.wait_seconds(4, 0, 0.0) is None


# Polling


@pytest.mark.parametrize(
    ("sent_since", "singly"),
    [
        ([40, 39, 38], 0),  # one page shows all
        ([101, 100, 99], 0),  # a second page costs what a question costs
        ([950, 60, 59], 1),  # one that hangs for an hour is asked for by itself
        ([2000, 1900, 90], 2),
        ([1000, 999, 998], 0),
    ],
)
def test_a_pass_costs_the_fewest_requests(sent_since: list[int], singly: int) -> None:
    moments = [NOW + timedelta(minutes=number) for number in range(len(sent_since))]
    assert poll.cut(moments, sent_since) == singly


def test_a_video_that_came_now_stands_behind_those_of_its_own_account() -> None:
    rate = turns.Rate(turns_per_second=0.1, render_seconds=60, free=2)
    counts = {"STANDARD": {"a": turns.Waiting(5, 100), "b": turns.Waiting(9, 100)}}
    before = {"STANDARD": dict(counts["STANDARD"])}
    assert turns.of_next("STANDARD", "a", 100, counts, rate) == (10, (10 - 2 + 1) / 0.1 + 60)
    assert turns.of_next("STANDARD", "new", 100, counts, rate) == (0, 60)
    assert turns.of_next("VIP", "a", 100, counts, rate) == (0, 60)
    # With twice the weight, half as many of the other account come in between.
    assert turns.of_next("STANDARD", "a", 200, counts, rate)[0] == 5 + 2
    assert turns.of_next("STANDARD", "a", 100, counts, None) == (10, None)
    closed = turns.Rate(turns_per_second=0.0, render_seconds=60, free=0)
    assert turns.of_next("BATCH", "a", 100, counts, closed) == (0, None)
    assert counts == before
