"""Quota, circuits, caps, learnt limits, the queue's estimates and the poll passes, as rows of a real Postgres."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from framewire.events.v1 import event_pb2, vocabulary_pb2
from services.generator import buckets, pools, standings, turns
from services.generator import quota as quotas
from services.generator.providers import contract
from services.generator.store import estimates
from tests.generator_world import HOUR, LEASE, OVER, World, server, world

__all__ = ["server", "world"]

A, B, C = "a" * 26, "b" * 26, "c" * 26
NOW = timedelta(0)
SECOND = timedelta(seconds=1)


async def why_closed(world: World, name: str = "main") -> str:
    return standings.why_closed(await world.standing(name), world.account(name))


async def opens(world: World, name: str = "main") -> None:
    """The pause is over."""
    await world.pool.execute(
        "UPDATE provider_accounts SET submits_after = '-infinity' WHERE provider_account = $1", name
    )


async def pause_seconds(world: World) -> float:
    return (await world.standing()).opens_in_seconds


# The bucket


async def take(world: World, quota: buckets.Quota, use: buckets.Use, name: str = "main") -> float:
    """As Quota does it; answers the seconds to wait."""
    accounts = world.store.accounts
    while True:
        bucket, version, now = await accounts.bucket(name)
        answer = buckets.take(bucket, quota, use, now)
        if answer.bucket is bucket or await accounts.write_bucket(name, answer.bucket, version):
            return answer.wait_seconds


async def test_takers_of_all_replicas_together_never_exceed_the_quota(world: World) -> None:
    quota = buckets.Quota(buckets.Pace(0.02, 2), None, {buckets.Use.POLL: 0.25})
    taken: list[float] = []
    began = time.monotonic()

    async def taker(use: buckets.Use) -> None:
        while time.monotonic() < began + 0.6:
            if await take(world, quota, use) <= 0:
                taken.append(time.monotonic())

    await asyncio.gather(*(taker(buckets.Use(number % 3)) for number in range(8)))
    span = taken[-1] - began
    assert len(taken) <= span / 0.02 + 2.5
    assert len(taken) > 2, "the quota is there to be used"


class Speaking:
    """A provider that says once when it wants to be polled."""

    def __init__(self) -> None:
        self._said = [contract.Limits(poll_after_seconds=30)]

    def heard(self) -> contract.Limits:
        return self._said.pop() if self._said else contract.Limits()


async def test_when_to_poll_is_known_to_the_poller_whoever_heard_it(world: World) -> None:
    account = world.account("main")
    providers = cast("dict[str, contract.Provider]", {"main": Speaking()})
    shared = quotas.Quota(world.store.accounts, pools.Pools({"main": account}, providers))
    assert shared.poll_after_seconds(account) == 0
    assert await shared.take(account, buckets.Use.SUBMIT)
    assert await shared.take(account, buckets.Use.DOWNLOAD)
    assert 25 < shared.poll_after_seconds(account) <= 30


async def test_the_bucket_is_kept_as_it_was_written(world: World) -> None:
    bucket, version, now = await world.store.accounts.bucket("main")
    assert bucket.tat == buckets.NEVER
    uses = {use: now + use for use in (buckets.Use.DOWNLOAD, buckets.Use.SUBMIT, buckets.Use.POLL)}
    changed = buckets.Bucket(
        tat=now + 1,
        creates_tat=now + 2,
        held_until=now + 3,
        rate_share=0.5,
        rate_share_at=now,
        owed_at=uses,
        waits_until={**uses, buckets.Use.POLL: buckets.NEVER},
    )
    assert await world.store.accounts.write_bucket("main", changed, version)
    assert not await world.store.accounts.write_bucket("main", bucket, version), "another was first"
    read, _, _ = await world.store.accounts.bucket("main")
    for name in ("tat", "creates_tat", "held_until", "rate_share", "rate_share_at"):
        assert getattr(read, name) == pytest.approx(getattr(changed, name), abs=1e-4)
    assert read.owed_at == pytest.approx(changed.owed_at, abs=1e-4)
    assert read.waits_until == pytest.approx(changed.waits_until, abs=1e-4)
    # What holds all requests closes the account for submits too.
    assert 0 < await pause_seconds(world) <= 3


# Circuits


async def test_trouble_closes_an_account_for_longer_each_time_and_one_job_goes_first_to_see(
    world: World,
) -> None:
    trouble = world.store.accounts.trouble
    for _ in range(3):
        await world.accept()
    # Many that were on their way when the key was revoked are one trouble.
    for _ in range(5):
        await trouble("main", "HTTP 401", 10 * SECOND, HOUR)
    assert 9 < await pause_seconds(world) <= 10
    assert await why_closed(world) == "HTTP 401"
    assert await world.pick() is None
    await opens(world)
    assert await why_closed(world) == ""
    probe = await world.pick()
    assert probe is not None
    assert await world.pick() is None, "one, to see"
    await trouble("main", "HTTP 401", 10 * SECOND, HOUR)
    assert await world.store.queue.put_back(probe, NOW, "HTTP 401", key_pinned=False)
    assert 19 < await pause_seconds(world) <= 20
    for _ in range(12):
        await opens(world)
        await trouble("main", "HTTP 401", 10 * SECOND, HOUR)
    assert 3590 < await pause_seconds(world) <= 3600
    await opens(world)
    assert await world.pick() is not None
    await world.store.accounts.went_well("main")
    assert await world.pick() is not None
    assert await world.pick() is not None


async def test_another_account_takes_what_a_closed_one_gave_back_unless_it_may_have_been_sent(
    world: World,
) -> None:
    world.limits = {"main": 5, "second": 5}
    world.fields = {"main": {"weight": 100.0}}
    attempt = await world.sending()
    undecided = await world.unknown()
    assert {attempt.provider_account, undecided.provider_account} == {"main"}
    await world.store.accounts.trouble("main", "HTTP 401", HOUR, HOUR)
    assert await world.store.queue.put_back(attempt, NOW, "HTTP 401", key_pinned=False)
    elsewhere = await world.pick()
    assert elsewhere is not None
    assert (elsewhere.video_id, elsewhere.provider_account) == (attempt.video_id, "second")
    assert await world.pick() is None, "UNKNOWN goes nowhere"
    assert await world.state(undecided.video_id) == "UNKNOWN"


async def test_slots_are_learnt_from_the_providers_word_and_tried_again_later(world: World) -> None:
    for _ in range(5):
        await world.accept()
    picked = [await world.pick() for _ in range(4)]
    for attempt in picked:
        assert attempt is not None
        assert await world.begin(attempt)
    last = picked[-1]
    assert last is not None
    learn = world.store.accounts.too_many_jobs
    assert await learn("main", last.attempt_id, timedelta(seconds=60), HOUR) == 3
    assert await world.store.queue.put_back(last, NOW, "too many", key_pinned=False)
    assert standings.slots(await world.standing(), world.account()) == 3
    assert await world.pick() is None
    await world.pool.execute(
        "UPDATE provider_accounts SET jobs_learnt_at = jobs_learnt_at - interval '61 s'"
    )
    one_more = await world.pick()
    assert one_more is not None
    assert await world.pick() is None
    # It was too many again: the next try comes later.
    assert await learn("main", one_more.attempt_id, timedelta(seconds=60), HOUR) == 3
    assert (await world.standing()).jobs_probe_seconds == 120


# Caps


async def test_money_is_capped_per_hour_and_day_and_counts_what_is_in_preparation(
    world: World,
) -> None:
    price = world.account().models["sora-2"].cost_micros_per_second
    world.fields = {"main": {"max_cost_micros_per_hour": 2 * price}}
    world.limits = {"main": 9}
    made = [await world.accept() for _ in range(5)]
    assert await world.pick() is not None
    second = await world.pick()
    assert second is not None
    assert await world.pick() is None
    assert (await world.standing()).cost_micros_hour == 2 * price
    assert "the cap on money is reached" in await why_closed(world)
    # What goes back costs nothing; what was sent does, also when it is not known what became of it.
    assert await world.store.queue.put_back(second, NOW, "", key_pinned=False)
    assert await why_closed(world) == ""
    again = await world.pick()
    assert again is not None
    assert await world.begin(again)
    assert await world.pick() is None
    await world.pool.execute(
        "UPDATE attempts SET submitted_at = submitted_at - interval '61 min', lease_until = '-infinity'"
        " WHERE submitted_at IS NOT NULL"
    )
    assert await world.pick() is not None, "the hour is over"
    world.fields = {"main": {"max_cost_micros_per_day": price}}
    assert await world.pick() is None
    assert "in this day" in await why_closed(world)
    # Another account has its own money; a video that waits fails at start_by only.
    world.limits["second"] = 9
    assert (await world.pick() or second).provider_account == "second"
    assert {await world.state(job.video_id) for job in made} <= {
        "QUEUED",
        "PREPARING",
        "SUBMITTING",
    }


async def test_a_job_dearer_than_what_is_left_waits_and_nobody_goes_before_it(world: World) -> None:
    price = world.account().models["sora-2"].cost_micros_per_second
    world.fields = {"main": {"max_cost_micros_per_hour": 5 * price}}
    await world.accept(seconds=4)
    await world.accept(seconds=4)
    await world.accept(seconds=1)
    assert await world.pick() is not None
    assert await world.pick() is None


async def test_jobs_are_capped_per_day(world: World) -> None:
    world.fields = {"main": {"jobs_per_day": 2}}
    attempt = await world.rendering()
    assert await world.store.renders.finished(attempt, datetime.now(UTC) + HOUR)
    await world.accept()
    await world.accept()
    assert await world.pick() is not None
    assert await world.pick() is None
    assert "2 of 2 a day" in await why_closed(world)


# Pools


async def test_a_model_that_nobody_can_take_blocks_no_other(world: World) -> None:
    only_pro = {"sora-2-pro": world.account().models["sora-2-pro"]}
    world.fields = {"second": {"models": only_pro}}
    world.limits = {"main": 9, "second": 9}
    await world.store.accounts.pause("main", True)
    waiting = [await world.accept(account_id=A) for _ in range(20)]
    pro = await world.accept(account_id=A, model="sora-2-pro")
    picked = await world.pick()
    assert picked is not None
    assert (picked.video_id, picked.provider_account) == (pro.video_id, "second")
    assert await world.pick() is None
    await world.store.accounts.pause("main", False)
    assert (await world.pick() or picked).video_id == waiting[0].video_id


async def test_turns_are_shared_over_the_models_of_a_pool(world: World) -> None:
    for _ in range(10):
        await world.accept(account_id=A)
    for _ in range(2):
        await world.accept(account_id=B, model="sora-2-pro")
    order = [(await world.pick()).account_id for _ in range(4)]  # pyright: ignore[reportOptionalMemberAccess]
    assert sorted(order) == [A, A, B, B]


async def test_a_model_without_a_future_ends_what_waits_for_it(world: World) -> None:
    made = await world.accept()
    other = await world.accept(model="sora-2-pro")
    outlived = world.store.queue.outlived
    assert await outlived({}, 10) == []
    assert await outlived({"sora-2": datetime.now(UTC) + HOUR}, 10) == []
    (found,) = await outlived({"sora-2": datetime.now(UTC)}, 10)
    assert found.video_id == made.video_id != other.video_id


async def test_what_waits_moves_with_its_model_into_another_pool(world: World) -> None:
    made = await world.accept()
    await world.pool.execute("UPDATE attempts SET model = ''")  # accepted by an older release
    await world.store.queue.settle_in({"sora-2": "elsewhere"})
    assert (await world.attempt(made.video_id)).pool == "elsewhere"
    await world.store.queue.settle_in({"sora-2": "sora"})
    assert (await world.pick() or await world.attempt(made.video_id)).state == "PREPARING"


# Estimates


async def test_a_new_one_is_told_its_place_and_when_it_may_be_done(world: World) -> None:
    first = await world.accept(account_id=A)
    queued = (await world.last_event(first.video_id)).queued
    assert (queued.queue_position, queued.HasField("expected_at")) == (0, False)
    await world.store.estimates.set_rate("sora", "sora-2", turns.Rate(0.1, 60.0, 2))
    for _ in range(9):
        await world.accept(account_id=A)
    # Between two counts each that comes is counted.
    last = (await world.last_event((await world.accept(account_id=A)).video_id)).queued
    assert last.queue_position == 10
    seconds = last.expected_at.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert seconds.total_seconds() == pytest.approx((10 - 2 + 1) / 0.1 + 60, abs=3)
    # Another account need not wait for the batch, and another lane neither.
    other = (await world.last_event((await world.accept(account_id=B)).video_id)).queued
    assert other.queue_position == 0
    second = (await world.last_event((await world.accept(account_id=B)).video_id)).queued
    assert second.queue_position == 2
    # What ListModels says of the next one is what that is told when it comes.
    counts, rates = await world.store.estimates.counted()
    place, told = turns.of_next("STANDARD", B, 100, counts["sora"], rates["sora", "sora-2"])
    third = (await world.last_event((await world.accept(account_id=B)).video_id)).queued
    assert third.queue_position == place
    seconds = third.expected_at.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert seconds.total_seconds() == pytest.approx(told, abs=3)
    vip = await world.accept(account_id=A, lane=vocabulary_pb2.LANE_VIP)
    assert (await world.last_event(vip.video_id)).queued.queue_position == 0


async def test_those_that_wait_are_told_when_it_changes(world: World) -> None:
    made = [await world.accept(account_id=A) for _ in range(3)]
    store = world.store.estimates
    assert await store.claim("sora", HOUR)
    assert not await store.claim("sora", HOUR), "one replica counts"
    assert await store.claim("sora", OVER)
    await world.pick()
    counts, _ = await store.count("sora")
    assert counts["STANDARD"][A] == turns.Waiting(2, 100)
    queued = await store.queued("sora", 10, 10)
    assert sorted((item.video_id, item.ahead) for item in queued) == sorted(
        [(made[1].video_id, 0), (made[2].video_id, 1)]
    )
    assert len(await store.queued("sora", 1, 0)) == 1
    at = datetime.now(UTC) + HOUR
    told = await store.write([estimates.Estimate(item, item.ahead, at) for item in queued])
    assert [event_pb2.Progress(version=1).version < item.version for item in told] == [True, True]
    assert {item.queue_position for item in told} == {0, 1}
    assert (await world.attempt(made[2].video_id)).expected_at == at


async def test_the_time_of_a_render_is_the_median_of_the_newest(world: World) -> None:
    assert await world.store.estimates.render_seconds("main", "sora-2") is None
    for seconds in (10, 20, 300):
        attempt = await world.rendering()
        assert await world.store.renders.finished(attempt, datetime.now(UTC) + HOUR)
        await world.pool.execute(
            "UPDATE attempts SET submitted_at = rendered_at - $2::interval WHERE attempt_id = $1",
            attempt.attempt_id,
            timedelta(seconds=seconds),
        )
    assert await world.store.estimates.render_seconds("main", "sora-2") == pytest.approx(20)
    assert await world.store.estimates.render_seconds("second", "sora-2") is None


# Poll passes


async def test_one_replica_has_the_poll_pass_until_it_ends_or_is_lost(world: World) -> None:
    renders = world.store.renders
    claims = await asyncio.gather(*(renders.claim_poll("main", LEASE) for _ in range(6)))
    (held,) = [claim for claim in claims if claim]
    assert held is not None
    await renders.end_poll("main", held, HOUR, NOW)
    assert not await renders.claim_poll("main", LEASE)
    await world.pool.execute("UPDATE provider_accounts SET next_poll_at = '-infinity'")
    slow = await renders.claim_poll("main", OVER)
    assert slow is not None
    quick = await renders.claim_poll("main", LEASE)
    assert quick is not None
    # The slow one has lost it, and cannot end the other's.
    assert await renders.renew_poll("main", slow, LEASE) is None
    await renders.end_poll("main", slow, NOW, NOW)
    assert not await renders.claim_poll("main", LEASE)
    assert await renders.renew_poll("main", quick, LEASE) is not None


async def test_those_in_flight_are_read_in_little_with_when_each_may_be_asked(world: World) -> None:
    first, second = await world.rendering(), await world.rendering()
    await world.store.renders.asked(second.attempt_id, HOUR)
    found = await world.store.renders.in_flight("main", NOW)
    assert [item.attempt_id for item in found] == [first.attempt_id, second.attempt_id]
    assert found[0].ask_after_seconds <= 0 < 3500 < found[1].ask_after_seconds
    soon = await world.store.renders.in_flight("main", 60 * SECOND)
    assert 50 < soon[0].ask_after_seconds <= 60
    moments = [item.submitted_at for item in found]
    assert await world.store.renders.sent_since("main", moments) == [2, 1]
    assert await world.store.renders.sent_since("second", moments) == [0, 0]
    assert (await world.store.renders.load(first.attempt_id)).job == first.job
