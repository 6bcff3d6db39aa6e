"""Batches that are judged while the one before is being written: they stand on what it leaves, or are judged again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY

from kit import errors, ids, postgres
from services.credits import rules
from services.credits.store import Store, grouping, judging
from tests.credits_world import ONE, World, server, world
from tests.waiting import eventually

__all__ = ["server", "world"]  # fixtures


REPLAYED = "framewire_credits_batches_replayed_total"


@pytest.fixture(autouse=True)
def eager(monkeypatch: Any) -> None:
    """Whatever waits is judged ahead."""
    monkeypatch.setattr(grouping, "AHEAD_FROM", 1)


def judged(stood: str) -> float:
    return REGISTRY.get_sample_value(
        "framewire_credits_batches_judged_ahead_total", {"stood": stood}
    ) or 0.0  # fmt: skip


class Writing:
    """A batch that has its locks and its verdicts, and is held up while it writes."""

    def __init__(self, world: World, account_id: str) -> None:
        self.world = world
        self.account_id = account_id
        self.hold_id = ids.new_id()
        self.first: asyncio.Task[Any]
        self.next: list[asyncio.Task[Any]] = []

    def then(self, *calls: Any) -> None:
        """What makes up the batch after it."""
        self.next += [asyncio.create_task(call) for call in calls]

    async def answers(self) -> list[Any]:
        """Of the next batch: states, or reasons of refusals."""
        answered = await asyncio.gather(*self.next, return_exceptions=True)
        return [
            one.reason if isinstance(one, errors.ServiceError) else one.state for one in answered
        ]


async def waiting_for(world: World, what: str) -> int:
    return await world.pool.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = $1",
        what,
    )


@asynccontextmanager
async def writing(
    world: World, account_id: str = "", *, fails: bool = False
) -> AsyncIterator[Writing]:
    """Inside, a batch of one Reserve is being written; afterwards it is committed, or it fails."""
    account_id = account_id or await world.account(100)
    batch = Writing(world, account_id)
    async with world.pool.acquire() as connection:
        # Somebody else's hold of this id, not committed: the insertion of ours waits for what becomes of it.
        blocker = connection.transaction()
        await blocker.start()
        await connection.execute(
            """
            INSERT INTO holds (hold_id, account_id, state, reserved, cause, created_at, settled_at)
            VALUES ($1, $2, 'VOID', 0, 'INTERNAL', now(), now())
            """,
            batch.hold_id,
            await world.account(),
        )
        batch.first = asyncio.create_task(world.reserve(account_id, hold_id=batch.hold_id))
        await eventually(lambda: _is(waiting_for(world, "transactionid"), 1))
        yield batch
        if not all(call.done() for call in batch.next):
            # They are judged by now, and wait for the locks.
            await eventually(lambda: _is(waiting_for(world, "transactionid"), 2))
        await (blocker.commit() if fails else blocker.rollback())
    await asyncio.gather(batch.first, *batch.next, return_exceptions=True)


async def _is(query: Any, wanted: int) -> bool:
    return await query >= wanted


async def test_it_stands_on_what_the_one_before_leaves(world: World) -> None:
    stood, replayed = judged("yes"), REGISTRY.get_sample_value(REPLAYED)
    async with writing(world) as batch:
        account, moves = batch.account_id, world.books.ledger
        done = rules.Verdict(batch.hold_id, account, rules.Cause.NONE, rules.Stage.DONE, (6000,))
        batch.then(
            world.reserve(account, hold_id=batch.hold_id),
            world.reserve(account, ONE, hold_id=batch.hold_id),
            moves.settle(done),
            moves.release(batch.hold_id, account, "NONE"),
            *(world.reserve(account) for _ in range(9)),
            world.reserve(account, ONE),
        )
    assert judged("yes") == stood + 1
    assert REGISTRY.get_sample_value(REPLAYED) == replayed
    assert await batch.answers() == [
        *("HELD", "HOLD_MISMATCH", "CAPTURED", "HOLD_CAPTURED"),
        *("HELD",) * 9,
        "INSUFFICIENT_CREDITS",
    ]
    assert await world.numbers(account) == (0, 90)
    assert len(await world.told("settled")) == 1


async def test_it_is_judged_again_when_the_one_before_fails(world: World) -> None:
    stood = judged("no")
    async with writing(world, fails=True) as batch:
        batch.then(
            world.reserve(batch.account_id, hold_id=batch.hold_id),
            *(world.reserve(batch.account_id) for _ in range(10)),
        )
    assert judged("no") == stood + 1
    assert isinstance(batch.first.exception(), errors.AlreadyExists)
    # Ten are affordable, since the first one never was held.
    assert await batch.answers() == ["HOLD_MISMATCH", *("HELD",) * 10]
    assert await world.numbers(batch.account_id) == (0, 100)


async def test_it_is_judged_again_when_another_replica_comes_between(world: World) -> None:
    stood = judged("no")
    async with postgres.pool(world.url, "other", 2) as pool, writing(world) as batch:
        other = World(pool, Store(pool), world.url)
        between = asyncio.create_task(other.reserve(batch.account_id))
        await eventually(lambda: _is(waiting_for(world, "transactionid"), 2))
        batch.then(*(world.reserve(batch.account_id) for _ in range(9)))
        await eventually(lambda: _is(waiting_for(world, "tuple"), 1))
    assert (await between).state == "HELD"
    assert judged("no") == stood + 1
    assert await batch.answers() == [*("HELD",) * 8, "INSUFFICIENT_CREDITS"]
    assert await world.numbers(batch.account_id) == (0, 100)


@pytest.mark.parametrize("rule", ["frozen", "capped"])
async def test_it_is_judged_again_when_a_rule_of_the_account_changes_between(
    world: World, rule: str
) -> None:
    async with writing(world) as batch:
        accounts = world.books.accounts
        change = asyncio.create_task(
            accounts.set_frozen(batch.account_id, True)
            if rule == "frozen"
            else accounts.set_daily_cap(batch.account_id, "", 15)
        )
        await eventually(lambda: _is(waiting_for(world, "transactionid"), 2))
        batch.then(world.reserve(batch.account_id))
        await eventually(lambda: _is(waiting_for(world, "tuple"), 1))
    await change
    assert await batch.answers() == ["ACCOUNT_FROZEN" if rule == "frozen" else "CREDIT_CAP_REACHED"]


async def test_it_settles_by_a_verdict_that_came_between(world: World) -> None:
    """The event of a video whose Reserve is judged already, but not written."""
    async with writing(world) as batch:
        account, hold_id = batch.account_id, ids.new_id()
        failed = rules.Verdict(
            hold_id, account, rules.Cause.PROVIDER_ERROR, rules.Stage.RENDERING, ()
        )
        kept = asyncio.create_task(world.books.waiting.keep_unsettled(failed))
        await eventually(lambda: _is(waiting_for(world, "transactionid"), 2))
        batch.then(world.reserve(account, hold_id=hold_id))
        await eventually(lambda: _is(waiting_for(world, "tuple"), 1))
    assert await kept
    assert await batch.answers() == ["RELEASED"]
    assert await world.pool.fetchval("SELECT count(*) FROM unsettled") == 0


async def test_what_takes_too_long_is_judged_again(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(judging, "STALE_SECONDS", 0.0)
    stood = judged("no")
    async with writing(world) as batch:
        batch.then(world.reserve(batch.account_id))
    assert judged("no") == stood + 1
    assert await batch.answers() == ["HELD"]


@pytest.mark.parametrize("account", ["new", "capped"])
async def test_a_new_account_or_a_capped_one_is_judged_under_its_lock(
    world: World, account: str
) -> None:
    before = judged("yes") + judged("no")
    async with writing(world) as batch:
        other = ids.new_id()
        if account == "capped":
            await world.books.ledger.open_account(other)
            await world.grant(other, 100)
            await world.books.accounts.set_daily_cap(other, "", 10)
        batch.then(*(world.reserve(other) for _ in range(2)))
        answers = await batch.answers()
    assert answers == (
        ["HELD", "CREDIT_CAP_REACHED"] if account == "capped" else ["INSUFFICIENT_CREDITS"] * 2
    )
    assert judged("yes") + judged("no") == before


async def test_a_lot_that_the_batch_before_drains_takes_credits_back(world: World) -> None:
    account = await world.account(20)
    held = await world.reserve(account)
    async with writing(world, account) as batch:
        batch.then(world.books.ledger.release(held.hold_id, account, "NONE"))
    assert await batch.answers() == ["RELEASED"]
    assert await world.numbers(account) == (10, 10)
