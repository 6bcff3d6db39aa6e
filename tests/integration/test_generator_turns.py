"""Whose turn it is, at which provider account, and the quota that all replicas share: SQL on a real Postgres."""

from __future__ import annotations

import asyncio
import collections
from datetime import UTC, datetime, timedelta

import pytest

from framewire.events.v1 import vocabulary_pb2
from services.generator import standings
from tests.generator_world import HOUR, World, fingerprint, job, server, world

__all__ = ["server", "world"]

A, B, C = "a" * 26, "b" * 26, "c" * 26
NOW = timedelta(0)


async def turns(world: World, count: int) -> list[str]:
    """Accounts in the order of their turns."""
    order: list[str] = []
    for _ in range(count):
        attempt = await world.pick()
        assert attempt is not None
        order.append(attempt.account_id)
    return order


async def test_jobs_that_come_together_are_accepted_by_one_commit_each_in_its_place(
    world: World,
) -> None:
    known = await world.accept()
    jobs = [job() for _ in range(6)]
    answers = await asyncio.gather(
        *(
            world.store.videos.accept(one, "sora", fingerprint(one))
            for one in [*jobs, known, jobs[3]]
        )
    )
    assert answers == [True] * 6 + [False] * 2
    found = await world.pool.fetch(
        "SELECT video_id, queue_position, xmin::text AS written FROM attempts WHERE video_id <> $1",
        known.video_id,
    )
    assert {row["video_id"] for row in found} == {one.video_id for one in jobs}
    assert sorted(row["queue_position"] for row in found) == [1, 2, 3, 4, 5, 6]
    # The first goes at once; who comes meanwhile shares the next.
    assert len({row["written"] for row in found}) == 2
    for one in jobs:
        assert await world.events(one.video_id) == ["queued"]


async def test_a_batch_delays_another_accounts_video_by_two_turns_at_most(world: World) -> None:
    # C was served long ago and is idle since, A has been served much: neither may cost B or A its place.
    await world.accept(account_id=C)
    for _ in range(50):
        await world.accept(account_id=A)
    await turns(world, 51)
    for _ in range(100):
        await world.accept(account_id=B)
    assert await turns(world, 3) == [B] * 3
    await world.accept(account_id=A)
    assert A in await turns(world, 3)
    await world.accept(account_id=C)
    assert C in await turns(world, 3)
    for _ in range(20):
        await world.accept(account_id=A)
    counted = collections.Counter(await turns(world, 20))
    assert abs(counted[A] - counted[B]) <= 2


async def test_weights_share_a_lane(world: World) -> None:
    for _ in range(30):
        await world.accept(account_id=A, weight=300)
        await world.accept(account_id=B, weight=100)
    counted = collections.Counter(await turns(world, 24))
    assert 17 <= counted[A] <= 19


async def test_lanes_are_served_by_weight_and_none_starves(world: World) -> None:
    for lane in (vocabulary_pb2.LANE_BATCH, vocabulary_pb2.LANE_STANDARD, vocabulary_pb2.LANE_VIP):
        for _ in range(20):
            await world.accept(lane=lane)
    picked = [await world.pick() for _ in range(24)]
    counted = collections.Counter(attempt.lane for attempt in picked if attempt)
    assert counted["VIP"] == pytest.approx(16, abs=1)
    assert counted["STANDARD"] == pytest.approx(6, abs=1)
    assert counted["BATCH"] == pytest.approx(2, abs=1)
    assert picked[0] is not None
    assert picked[0].lane == "VIP"


async def test_an_account_takes_its_oldest_first(world: World) -> None:
    made = [await world.accept() for _ in range(4)]
    picked = [await world.pick() for _ in range(4)]
    assert [a.video_id for a in picked if a] == [job.video_id for job in made]
    assert await world.pick() is None


async def test_nothing_is_picked_at_a_paused_closed_or_full_account(world: World) -> None:
    await world.accept()
    accounts = world.store.accounts
    assert await accounts.pause("main", True)
    assert not await accounts.pause("nobody", True)
    assert await world.pick() is None
    reason = standings.why_closed(await world.standing(), world.account())
    assert reason == "paused by an operator"
    assert await accounts.pause("main", False)

    await accounts.trouble("main", "401", HOUR, HOUR)
    await accounts.trouble("main", "429", NOW, HOUR, timedelta(seconds=1))  # only ever tightens
    assert await world.pick() is None
    left = await world.pool.fetchval(
        "SELECT submits_after - clock_timestamp() FROM provider_accounts WHERE provider_account = 'main'"
    )
    assert left > timedelta(minutes=59)
    assert (await world.standing()).closed_reason == "401"
    await world.pool.execute("UPDATE provider_accounts SET submits_after = '-infinity'")
    await accounts.went_well("main")

    world.limits = {"main": 1}
    assert await world.pick() is not None
    await world.accept()
    assert await world.pick() is None
    world.limits = {"main": 1, "second": 1}
    second = await world.pick()
    assert second is not None
    assert second.provider_account == "second"


async def test_two_dispatchers_never_overfill_an_account(world: World) -> None:
    world.limits = {"main": 3}
    for _ in range(12):
        await world.accept()
    picked = await asyncio.gather(*(world.pick() for _ in range(30)))
    assert sum(attempt is not None for attempt in picked) <= 3
    assert (await world.standing()).jobs_in_flight <= 3


async def test_a_pinned_attempt_goes_to_its_account_or_nowhere(world: World) -> None:
    attempt = await world.unknown()
    assert await world.store.queue.put_back(attempt, NOW, "again", key_pinned=True)
    world.limits = {"second": 5}
    assert await world.pick() is None
    world.limits = {"second": 5, "main": 1}
    again = await world.pick()
    assert again is not None
    assert (again.provider_account, again.key_pinned) == ("main", True)
    # The key counts from the first send, and is not used past its time.
    await world.pool.execute("UPDATE attempts SET submitted_at = submitted_at - interval '2 hours'")
    assert not await world.begin(again)
    assert await world.begin(again, key_good_for=3 * HOUR)
    first_sent = (await world.attempt(again.video_id)).submitted_at
    assert first_sent is not None
    assert datetime.now(UTC) - first_sent > 2 * HOUR


async def test_twins_wait_without_costing_a_turn(world: World) -> None:
    first = await world.sending(prompt="the same", account_id=A)
    await world.accept(prompt="the same", account_id=A)
    other = await world.accept(account_id=A)
    # The twin is older, and is passed over.
    assert (await world.pick() or first).video_id == other.video_id
    assert await world.pick() is None
    world.limits = {"main": 9, "second": 9}
    elsewhere = await world.pick()
    assert elsewhere is not None
    assert elsewhere.provider_account == "second"


async def test_progress_waits_for_no_other_writer(world: World) -> None:
    held, free = await world.rendering(), await world.rendering()
    seen = [(render, 50) for render in await world.store.renders.in_flight("main", NOW)]
    async with world.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "SELECT 1 FROM attempts WHERE attempt_id = $1 FOR UPDATE", held.attempt_id
        )
        async with asyncio.timeout(5):
            told = await world.store.renders.progress(seen)
    assert [progress.video_id for progress in told] == [free.video_id]
