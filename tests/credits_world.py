"""A ledger for tests: a real Postgres, and for each test a migrated database of its own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, timestamp_pb2

from framewire.credits.v1 import ledger_pb2_grpc
from framewire.events.v1 import event_pb2
from kit import auth, errors, ids, migrate, pages, postgres, rpc
from services.credits import api, documents, floor, holds, ledger, operations, rules, settlement
from services.credits.store import Store
from tests import containers, lives

HERE = Path(rules.__file__).parent
TEN = rules.Item("sora-2", 1280, 720, 6, 1, rules.Lane.STANDARD)
ONE = replace(TEN, width=320, height=180, seconds=1)
HOUR = timedelta(hours=1)


@dataclass
class World:
    """A ledger in a database of its own."""

    pool: postgres.Pool
    books: Store
    url: str

    async def account(self, *credits_: int, **fields: Any) -> str:
        """A new account with a lot of each size."""
        account_id = ids.new_id()
        await self.books.ledger.open_account(account_id)
        for amount in credits_:
            await self.grant(account_id, amount, **fields)
        return account_id

    async def grant(self, account_id: str, amount: int, **fields: Any) -> operations.Given:
        request = {"request_id": str(uuid.uuid4()), "source": ledger.LotSource.PURCHASE, **fields}
        return await self.books.ledger.grant(
            operations.Grant(account_id, credits=amount, **request)
        )

    async def reserve(self, account_id: str, item: rules.Item = TEN, **fields: Any) -> holds.Hold:
        soon = datetime.now(UTC) + timedelta(seconds=30)
        request = {"hold_id": ids.new_id(), "not_after": soon, "item": item, **fields}
        return await self.books.ledger.reserve(
            operations.Reservation(account_id=account_id, **request)
        )

    async def activate(self, kind: rules.Kind, version: str, at: datetime | None = None) -> None:
        """Puts a version in force, with the hash that it has."""
        (found,) = await self.books.rulebooks.versions(kind, version)
        await self.books.rulebooks.activate(kind, version, found.content_hash, at, "test")

    async def numbers(self, account_id: str) -> tuple[int, int]:
        balance = await self.books.statements.get_balance(account_id)
        return balance.available, balance.held

    async def age(self, account_id: str, by: timedelta) -> None:
        """Lets an account's lots grow older; what a hold remembers of them stays."""
        await self.pool.execute(
            "UPDATE lots SET expires_at = expires_at - $2::interval WHERE account_id = $1",
            account_id,
            by,
        )

    async def told(self, kind: str) -> list[event_pb2.Event]:
        rows = await self.pool.fetch(
            "SELECT data FROM outbox WHERE subject LIKE '%.' || $1 ORDER BY created_at", kind
        )
        return [json_format.Parse(row["data"], event_pb2.Event()) for row in rows]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """Postgres with a template that is migrated and has its rulebooks."""
    running = containers.postgres(tmp_path_factory.mktemp("credits"))
    await running.start()
    try:
        await running.create_database("template_credits")
        url = running.database_url("template_credits")
        assert await migrate.migrate(url, HERE / "migrations")
        assert await migrate.migrate(url, HERE / "migrations") == []
        async with postgres.pool(url, "test", 1) as pool:
            await documents.load(Store(pool), HERE / "prices.yaml", HERE / "refund_policy.yaml")
        yield running
    finally:
        await running.destroy()


@pytest.fixture
async def world(server: Any) -> AsyncIterator[World]:
    name = f"credits_{uuid.uuid4().hex[:12]}"
    await server.create_database(name, "template_credits")
    url = server.database_url(name)
    async with postgres.pool(url, "test", 12) as pool:
        made = World(pool, Store(pool), url)
        yield made
        planted = await pool.fetchval("SELECT to_regclass('planted') IS NOT NULL")
        proof = await made.books.statements.check_books()
        assert planted or proof.findings == ()


def has_reason(reason: str) -> Any:
    return pytest.raises(errors.ServiceError, check=lambda error: error.reason == reason)


@asynccontextmanager
async def served(world: World, generator: Any = None) -> AsyncIterator[Callable[[str], Any]]:
    """The contract over gRPC; gives a client of a named service. `generator`: who is asked how videos ended."""
    settling = settlement.Settlement(
        world.books, unsettled_after_seconds=600, unsettled_retry_seconds=1
    )
    asking = floor.Floor(settling, world.books, generator, overdue_seconds=600, seconds=1)
    secret = "s" * 32
    tokens = auth.ServiceTokens("credits", secret)
    server = grpc.aio.server(interceptors=[rpc.ServerInterceptor(api.authenticate(tokens))])
    ledger_pb2_grpc.add_LedgerServiceServicer_to_server(
        api.LedgerService(world.books, pages.Pages(b"secret"), asking, lives.open_life(world.pool)),
        server,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channels: list[grpc.aio.Channel] = []

    def client(service: str) -> Any:
        channels.append(rpc.channel(f"127.0.0.1:{port}", auth.ServiceTokens(service, secret)))
        return ledger_pb2_grpc.LedgerServiceStub(channels[-1])

    try:
        yield client
    finally:
        for channel in channels:
            await channel.close()
        await server.stop(None)


def soon() -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + HOUR)
    return stamp


async def backdate(world: World, account: str, by: timedelta) -> None:
    """Lets all that happened in an account be longer ago."""
    await world.pool.execute(
        f"""
        SET session_replication_role = replica;
        UPDATE transfers SET created_at = created_at - interval '{by.days} days'
            WHERE account_id = '{account}';
        UPDATE holds SET created_at = created_at - interval '{by.days} days',
            settled_at = settled_at - interval '{by.days} days' WHERE account_id = '{account}';
        SET session_replication_role = origin
        """
    )
