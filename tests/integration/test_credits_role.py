"""The ledger as it runs in production: connected as a role that can add to history and change nothing of it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from kit import ids, migrate, postgres
from services.credits import documents, ledger, operations, rules
from services.credits.store import Store
from tests import containers
from tests.credits_world import HERE, TEN, World

ROLE = "framewire_credits"
WRITTEN_OVER = {"accounts", "lots", "holds", "hold_lots", "outbox", "outbox_stream", "incarnation"}
WRITTEN_OVER |= {"daily_spending"}
DELETED = {"unsettled", "outbox"}
NOT_ADDED_TO = {"ledger_keys", "migrations"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A database that its owner has migrated, on a server that has the role."""
    running = containers.postgres(tmp_path_factory.mktemp("role"))
    await running.start()
    try:
        await running.create_database("credits")
        owners = running.database_url("credits")
        connection = await asyncpg.connect(owners)
        await connection.execute(f"CREATE ROLE {ROLE} NOLOGIN")
        await connection.close()
        await migrate.migrate(owners, HERE / "migrations")
        async with postgres.pool(owners, "owner", 1) as pool:
            await documents.load(Store(pool), HERE / "prices.yaml", HERE / "refund_policy.yaml")
        yield owners
    finally:
        await running.destroy()


@pytest_asyncio.fixture(loop_scope="session")
async def world(url: str) -> AsyncIterator[World]:
    """The ledger, each of whose connections is the role's."""

    async def be_the_role(connection: Any) -> None:
        await postgres.prepare(connection)
        await connection.execute(f"SET SESSION AUTHORIZATION {ROLE}")

    async with asyncpg.create_pool(url, min_size=1, max_size=4, init=be_the_role) as pool:
        yield World(pool, Store(pool), url)


async def test_a_life_under_that_role(world: World) -> None:
    """Everything that writes, once: what the role may not do would be refused."""
    account = await world.account(100)
    await world.books.accounts.set_daily_cap(account, "", 90)
    first, second, third = [await world.reserve(account) for _ in range(3)]
    await world.books.ledger.capture(first.hold_id, 4, "NONE")
    await world.books.ledger.release(second.hold_id, account, "INTERNAL")
    await world.books.ledger.refund(first.hold_id, str(uuid.uuid4()), 2, "sorry")
    verdict = rules.Verdict(third.hold_id, account, rules.Cause.NONE, rules.Stage.DONE, (6000,))
    await world.books.ledger.settle(verdict)
    late = ids.new_id()
    await world.books.waiting.keep_unsettled(
        rules.Verdict(late, account, rules.Cause.NONE, rules.Stage.DONE, (6000,))
    )
    assert (await world.reserve(account, TEN, hold_id=late)).captured == 10
    await world.books.waiting.claim_overdue(0, 10)
    await world.books.waiting.park("s", 1, "not an Event", b"x")
    await world.books.ledger.expire_due(account)
    promotion = operations.Grant(account, str(uuid.uuid4()), 5, ledger.LotSource.PROMOTION)
    await world.books.ledger.grant(promotion)
    assert (await world.books.statements.check_books()).findings == ()


async def test_what_it_may_do_to_each_table(world: World) -> None:
    rows = await world.pool.fetch(
        """
        SELECT c.relname AS name, p.wish, has_table_privilege($1, c.oid, p.wish) AS may
        FROM pg_class c CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) AS p(wish)
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
        """,
        ROLE,
    )
    may: dict[str, set[str]] = {}
    for row in rows:
        may.setdefault(row["wish"], set())
        if row["may"]:
            may[row["wish"]].add(row["name"])
    tables = {row["name"] for row in rows} - {"migrations"}
    assert may["SELECT"] >= tables
    assert may["INSERT"] >= tables - NOT_ADDED_TO
    assert may["UPDATE"] == WRITTEN_OVER
    assert may["DELETE"] == DELETED
    assert may["TRUNCATE"] == set()
