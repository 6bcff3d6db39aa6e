"""Group commit: what is posted together, with a verdict for each; and what of it fails, fails alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from prometheus_client import REGISTRY

from kit import errors, failpoints, ids, postgres
from services.credits import holds, ledger, operations, rules
from services.credits.store import Store, grouping
from tests.credits_world import ONE, TEN, World, has_reason, server, world
from tests.waiting import eventually

__all__ = ["server", "world"]  # fixtures


@asynccontextmanager
async def held_up(world: World, account_id: str) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """The account's shard is in the middle of a batch: whatever is posted inside makes up the next one.

    Answers where to put the tasks; they are all done at the end.
    """
    tasks: list[asyncio.Task[Any]] = []
    async with world.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "SELECT FROM accounts WHERE account_id = $1 FOR UPDATE", account_id
        )
        first = asyncio.create_task(world.books.ledger.open_account(account_id))
        await eventually(lambda: _waits_for_a_lock(world))
        yield tasks
        await asyncio.sleep(0)
    await first
    await asyncio.gather(*tasks, return_exceptions=True)


async def _waits_for_a_lock(world: World, backends: int = 1) -> bool:
    return await world.pool.fetchval(
        """
        SELECT count(*) >= $1 FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'
        """,
        backends,
    )


def outcome(task: asyncio.Task[Any]) -> str:
    error = task.exception()
    if isinstance(error, errors.ServiceError):
        return error.reason
    return type(error).__name__ if error is not None else task.result().state


async def transactions(world: World) -> int:
    return await world.pool.fetchval("SELECT count(DISTINCT xmin::text) FROM holds")


async def test_what_comes_together_is_one_transaction_with_a_verdict_each(world: World) -> None:
    account = await world.account(25)
    async with held_up(world, account) as tasks:
        for item in (TEN, TEN, TEN, ONE, replace(TEN, model="unheard-of")):
            tasks.append(asyncio.create_task(world.reserve(account, item)))
    assert [outcome(task) for task in tasks] == [
        *("HELD", "HELD", "INSUFFICIENT_CREDITS", "HELD", "NO_PRICE"),
    ]
    assert await transactions(world) == 1
    assert await world.numbers(account) == (4, 21)
    # The refused ones are remembered like any other.
    assert await world.pool.fetchval("SELECT count(*) FROM holds WHERE state = 'REFUSED'") == 2


async def test_a_whole_life_in_one_batch(world: World) -> None:
    account, hold_id, early = await world.account(100), ids.new_id(), ids.new_id()
    moves = world.books.ledger
    done = rules.Verdict(hold_id, account, rules.Cause.NONE, rules.Stage.DONE, (6000,))
    async with held_up(world, account) as tasks:
        for work in (
            world.reserve(account, hold_id=hold_id),
            world.reserve(account, hold_id=hold_id),
            world.reserve(account, ONE, hold_id=hold_id),
            moves.release(early, account, "INTERNAL"),
            world.reserve(account, hold_id=early),
            moves.settle(done),
            moves.release(hold_id, account, "NONE"),
        ):
            tasks.append(asyncio.create_task(work))
    assert [outcome(task) for task in tasks] == [
        *("HELD", "HELD", "HOLD_MISMATCH", "VOID", "HOLD_RELEASED", "CAPTURED", "HOLD_CAPTURED"),
    ]
    assert await world.numbers(account) == (90, 0)
    assert len(await world.told("settled")) == 1
    kinds = await world.pool.fetch("SELECT kind FROM transfers WHERE hold_id = $1", hold_id)
    assert [row["kind"] for row in kinds] == ["RESERVE", "CAPTURE"]


async def test_one_hold_id_of_two_accounts_in_one_batch(world: World) -> None:
    account, hold_id = await world.account(100), ids.new_id()
    other = ids.new_id()
    async with held_up(world, account) as tasks:
        tasks.append(asyncio.create_task(world.reserve(account, hold_id=hold_id)))
        tasks.append(asyncio.create_task(world.reserve(other, hold_id=hold_id)))
        tasks.append(asyncio.create_task(world.reserve(other)))
    # The other account was only made by this batch.
    assert [outcome(task) for task in tasks] == ["HELD", "HOLD_MISMATCH", "INSUFFICIENT_CREDITS"]


async def test_what_the_database_refuses_is_refused_alone(world: World) -> None:
    account = await world.account(100)
    async with held_up(world, account) as tasks:
        for hold_id in (ids.new_id(), "NOT A HOLD ID", ids.new_id()):
            tasks.append(asyncio.create_task(world.reserve(account, hold_id=hold_id)))
    assert [outcome(task) for task in tasks] == ["HELD", "CheckViolationError", "HELD"]
    assert await world.numbers(account) == (80, 20)


async def test_a_batch_takes_as_many_statements_as_a_single_call(world: World) -> None:
    counted: list[str] = []

    class Counting(asyncpg.Connection):
        async def execute(self, query: str, *args: Any, **options: Any) -> Any:
            counted.append(query)
            return await super().execute(query, *args, **options)

        async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
            counted.append(query)
            return await super().fetch(query, *args, **options)

        async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
            counted.append(query)
            return await super().fetchrow(query, *args, **options)

    account = await world.account(1000, 1000, 1000)
    async with asyncpg.create_pool(
        world.url, init=postgres.prepare, connection_class=Counting, min_size=1, max_size=1
    ) as pool:
        served = World(pool, Store(pool), world.url)
        await served.reserve(account)  # reads the rulebooks, once
        for callers in (1, 100):
            counted.clear()
            await asyncio.gather(*(served.reserve(account) for _ in range(callers)))
            # What the pool does to a connection that it gets back comes after the answers.
            posted = [query for query in counted if "pg_advisory_unlock_all" not in query]
            assert len(posted) == 5, posted


@pytest.mark.parametrize("ahead_from", [1, grouping.AHEAD_FROM])
async def test_replicas_over_crossing_accounts_neither_deadlock_nor_lose(
    world: World, monkeypatch: Any, ahead_from: int
) -> None:
    monkeypatch.setattr(grouping, "AHEAD_FROM", ahead_from)
    accounts = [await world.account(40) for _ in range(6)] + [ids.new_id() for _ in range(6)]
    async with postgres.pool(world.url, "other", 8) as pool:
        replicas = [world, World(pool, Store(pool), world.url)]
        shared = [ids.new_id() for _ in range(40)]

        async def call(number: int) -> Any:
            replica, account = replicas[number % 2], accounts[(number * 7) % len(accounts)]
            # Some ids are asked for on several accounts, by both replicas, in opposite orders.
            place = number // 4 % len(shared)
            hold_id = shared[place if number % 2 else -1 - place]
            return await replica.reserve(
                account, ONE, hold_id=hold_id if number % 4 < 2 else ids.new_id()
            )

        answers = await asyncio.gather(
            *(call(number) for number in range(480)), return_exceptions=True
        )
    reasons = {one.reason for one in answers if isinstance(one, errors.ServiceError)}
    assert reasons == {"INSUFFICIENT_CREDITS", "HOLD_MISMATCH"}
    assert all(isinstance(one, holds.Hold | errors.ServiceError) for one in answers), answers
    deadlocks = await world.pool.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert deadlocks == 0
    held = await world.pool.fetchval("SELECT count(*) FROM holds WHERE state = 'HELD'")
    assert held == sum([(await world.numbers(one))[1] for one in accounts]) > 100


async def test_two_replicas_that_want_the_same_accounts_take_them_in_one_order(
    world: World,
) -> None:
    accounts = [await world.account(100)]
    for _ in range(15):
        accounts.append(ids.new_id())
        await world.books.ledger.open_account(accounts[-1])
        await world.grant(accounts[-1], 100)
    async with postgres.pool(world.url, "other", 8) as pool:
        replicas = [world, World(pool, Store(pool), world.url)]
        replayed = REGISTRY.get_sample_value("framewire_credits_batches_replayed_total")
        for middle in sorted(accounts)[3:13:2]:
            async with world.pool.acquire() as connection, connection.transaction():
                # Both batches have some of their locks when they come to this one.
                statement = "SELECT FROM accounts WHERE account_id = $1 FOR UPDATE"
                await connection.execute(statement, middle)
                calls = [
                    asyncio.create_task(replica.reserve(account, ONE))
                    for replica in replicas
                    for account in accounts
                ]
                await eventually(lambda: _waits_for_a_lock(world, 2))
            assert {answer.state for answer in await asyncio.gather(*calls)} == {"HELD"}
    assert REGISTRY.get_sample_value("framewire_credits_batches_replayed_total") == replayed


async def test_who_leaves_takes_only_his_own_call_back(world: World) -> None:
    account = await world.account(100)
    async with held_up(world, account) as tasks:
        leaves, stays = (asyncio.create_task(world.reserve(account)) for _ in range(2))
        tasks.append(stays)
        await asyncio.sleep(0)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
    assert outcome(stays) == "HELD"
    assert await world.numbers(account) == (90, 10)


async def test_who_leaves_a_batch_that_has_begun_is_posted(world: World) -> None:
    account, hold_id = await world.account(100), ids.new_id()
    async with world.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM accounts WHERE account_id = $1 FOR UPDATE", account)
        leaves, stays = (
            asyncio.create_task(world.reserve(account, hold_id=one))
            for one in (hold_id, ids.new_id())
        )
        await eventually(lambda: _waits_for_a_lock(world))
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
    assert (await stays).state == "HELD"
    assert await world.numbers(account) == (80, 20)
    assert (await world.reserve(account, hold_id=hold_id)).state == "HELD"


async def test_after_a_batch_of_several_more_may_come_but_who_is_alone_never_waits(
    world: World, monkeypatch: Any
) -> None:
    monkeypatch.setattr(grouping, "GATHER_SECONDS", 20.0)
    account = await world.account(100)
    async with asyncio.timeout(10):
        for _ in range(3):
            await world.reserve(account, ONE)
    await asyncio.gather(*(world.reserve(account, ONE) for _ in range(3)))
    before = await transactions(world)
    first = asyncio.create_task(world.reserve(account, ONE))
    other = World(world.pool, Store(world.pool), world.url)
    for _ in range(3):
        await other.reserve(account, ONE)
    assert not first.done()
    # So many end the wait.
    monkeypatch.setattr(grouping, "AHEAD_FROM", 2)
    await asyncio.gather(first, world.reserve(account, ONE))
    assert await transactions(world) == before + 3 + 1


async def test_a_full_queue_sends_away_at_once(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(grouping, "MOST_WAITING", 3)
    account = await world.account(100)
    async with held_up(world, account) as tasks:
        for _ in range(3):
            tasks.append(asyncio.create_task(world.reserve(account)))
        await asyncio.sleep(0)
        with has_reason("OVERLOADED") as sent_away:
            await world.reserve(account)
        assert isinstance(sent_away.value, errors.Unavailable)
        assert sent_away.value.retry_after_seconds
    assert [outcome(task) for task in tasks] == ["HELD"] * 3
    assert await world.numbers(account) == (70, 30)
    assert (await world.reserve(account)).state == "HELD"


async def test_what_was_committed_unheard_is_answered_again_not_posted_again(
    world: World, monkeypatch: Any, tmp_path: Path
) -> None:
    """The process fails right after the commit, before anyone is answered."""
    account = await world.account(100)
    armed = tmp_path / "failpoints"
    armed.write_text("credits.reserve.after_commit=error\n")
    monkeypatch.setattr(failpoints, "_armed_file", str(armed))
    async with held_up(world, account) as tasks:
        for _ in range(4):
            tasks.append(asyncio.create_task(world.reserve(account)))
    assert armed.read_text() == ""
    assert [outcome(task) for task in tasks] == ["HELD"] * 4
    assert await transactions(world) == 1
    assert await world.numbers(account) == (60, 40)


async def test_a_connection_that_breaks_takes_only_its_batch_along(world: World) -> None:
    account = await world.account(100)
    async with world.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM accounts WHERE account_id = $1 FOR UPDATE", account)
        cut = asyncio.create_task(world.reserve(account, hold_id=(lost := ids.new_id())))
        await eventually(lambda: _waits_for_a_lock(world))
        # It is in the queue by now, and goes over a new connection.
        later = asyncio.create_task(world.reserve(account))
        await asyncio.sleep(0)
        await connection.execute(
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock'
            """
        )
        await asyncio.wait([cut])
    unavailable = postgres.translate(cut.exception())  # pyright: ignore[reportArgumentType]
    assert isinstance(unavailable, errors.Unavailable)
    assert (await later).state == "HELD"
    assert (await world.reserve(account, hold_id=lost)).state == "HELD"
    assert await world.numbers(account) == (80, 20)


def test_a_reservations_fingerprint_is_the_ledgers() -> None:
    """Stored ones stay valid: it is put together by hand only to be quick."""
    soon = datetime.now(UTC) + timedelta(minutes=1)
    for item in (TEN, ONE, replace(TEN, model='odd "\u00e9\\')):
        made = operations.Reservation(ids.new_id(), 'odd "\u00e9\\', item, soon)
        fields = {"account_id": made.account_id, "item": item.fields()}
        assert made.fingerprint == ledger.fingerprint(fields)


async def test_the_database_itself_refuses_what_does_not_belong_together(world: World) -> None:
    account, other = await world.account(30), await world.account(5)
    hold, fresh = await world.reserve(account), ids.new_id()
    lot = await world.pool.fetchval("SELECT lot_id FROM lots WHERE account_id = $1", other)

    def entries(seq: int, *lines: tuple[str, str, int], first: int = 0) -> str:
        values = [
            f"('{account}', {seq}, {place}, '{book}', {lot_id}, {credits_})"
            for place, (book, lot_id, credits_) in enumerate(lines, first)
        ]
        columns = "(account_id, seq, line, book, lot_id, credits)"
        return f"INSERT INTO entries {columns} VALUES {', '.join(values)}"

    def copied_hold(**fields: str) -> str:
        values = json.dumps({"hold_id": fresh, **fields})
        return f"INSERT INTO holds SELECT (jsonb_populate_record(h, '{values}')).* FROM holds h"

    transfer = (
        "WITH t AS (INSERT INTO transfers (account_id, seq, kind, available_change, held_change,"
        f" created_at) VALUES ('{account}', 9, 'EXPIRE', -5, 0, now()))"
    )
    own = await world.pool.fetchval("SELECT lot_id FROM lots WHERE account_id = $1", account)
    pair = (("revenue", "NULL", 5), ("loss", "NULL", -5))
    right = (("available", repr(own), -5), ("breakage", "NULL", 5))
    refused = {
        asyncpg.CheckViolationError: [
            # Later than its transfer; without one; of another sum than the transfer says; lopsided.
            entries(1, *pair, first=7),
            entries(9, *pair),
            f"{transfer} {entries(9, *pair)}",
            f"{transfer} {entries(9, pair[0])}",
            # As its transfer says, and as often as that: what does not begin with line 0 would come on top of it.
            f"{transfer} {entries(9, *right, first=2)}",
            f"{transfer} {entries(9, *right)}; {entries(9, *right, first=2)}",
        ],
        asyncpg.ForeignKeyViolationError: [
            # Another account's lot; then an account, a price version and a hold that there are not.
            f"{transfer} {entries(9, ('available', repr(lot), -5), ('breakage', 'NULL', 5))}",
            f"INSERT INTO hold_lots VALUES ('{hold.hold_id}', 5, '{lot}', 1, NULL)",
            copied_hold(account_id=fresh),
            copied_hold(price_version="unheard-of"),
            f"INSERT INTO hold_lots VALUES ('{fresh}', 0, '{lot}', 1, NULL)",
        ],
        asyncpg.RestrictViolationError: [
            "DELETE FROM lots",
            "DELETE FROM accounts",
            "DELETE FROM hold_lots",
            f"UPDATE accounts SET account_id = '{fresh}'",
            "UPDATE lots SET account_id = account_id",
            "UPDATE holds SET price_version = 'other'",
            "UPDATE hold_lots SET credits = 1",
        ],
    }
    for error, statements in refused.items():
        for statement in statements:
            with pytest.raises(error):
                await world.pool.execute(statement)
