"""A database's life against real servers: restored, lost, copied, and two replicas of one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import attempt_pb2, job_pb2
from kit import bus, errors, incarnation, loops, migrate, postgres
from services.generator import api, pools, quota
from tests import containers, generator_world
from tests.waiting import eventually

GENERATOR = generator_world.DATABASE


class Servers:
    """Both, and what is opened on them."""

    def __init__(self, database: Any, broker: Any) -> None:
        self.database = database
        self.broker = broker
        self.url = database.database_url(GENERATOR)

    async def run(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    @asynccontextmanager
    async def life(self, service: str) -> AsyncIterator[incarnation.Incarnation]:
        """A process of the service, just started."""
        async with AsyncExitStack() as stack:
            pool = await stack.enter_async_context(postgres.pool(self.url, "test", 2))
            connected = await stack.enter_async_context(bus.connect(self.broker.url, "test"))
            made = incarnation.Incarnation(service, pool, connected, 3600)
            await made.begin()
            yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    folder = tmp_path_factory.mktemp("incarnation")
    database, broker = containers.postgres(folder), containers.nats(folder)
    try:
        await asyncio.gather(database.start(), broker.start())
        await database.create_database(GENERATOR)
        await migrate.migrate(database.database_url(GENERATOR), generator_world.MIGRATIONS)
        yield Servers(database, broker)
    finally:
        await broker.stop()
        await database.destroy()


@pytest.fixture
async def service(servers: Servers, request: pytest.FixtureRequest) -> str:
    """A name of its own in the bucket for each test, and a database that has lived nowhere."""
    await servers.run("DELETE FROM incarnation")
    return "".join(letter for letter in request.node.name if letter.isalnum())


async def test_a_new_system_is_open_at_once_and_so_are_its_replicas(
    servers: Servers, service: str
) -> None:
    async with servers.life(service) as first, servers.life(service) as second:
        for _ in range(5):
            await asyncio.gather(first.run_once(), second.run_once())
        assert first.open
        assert second.open
        first.require()
    async with servers.life(service) as again:
        assert again.open


async def test_a_database_behind_what_is_kept_is_closed_until_its_recovery(
    servers: Servers, service: str
) -> None:
    async with servers.life(service) as first:
        await servers.run("CREATE TABLE before AS SELECT * FROM incarnation")
        await first.run_once()
    await servers.run("DELETE FROM incarnation; INSERT INTO incarnation SELECT * FROM before")
    async with servers.life(service) as restored, servers.life(service) as replica:
        assert not restored.open
        with pytest.raises(errors.Unavailable, match="recovery") as refused:
            replica.require()
        assert (refused.value.reason, refused.value.retry_after_seconds) == ("RECOVERY", 30)
        assert "1 steps behind" in (await restored.standing()).reason
        await restored.end_recovery()
        await restored.end_recovery()
        assert restored.open
        await replica.run_once()
        assert replica.open
    # The life before the recovery is behind as well, whatever its counter says.
    await servers.run(
        "DELETE FROM incarnation; INSERT INTO incarnation SELECT * FROM before;"
        "UPDATE incarnation SET counter = 1000; DROP TABLE before"
    )
    async with servers.life(service) as older:
        assert "before the last recovery" in (await older.standing()).reason


async def test_it_closes_when_its_database_goes_back_under_it(
    servers: Servers, service: str
) -> None:
    class Looping:
        ran = asyncio.Event()
        ended = asyncio.Event()

        async def run(self, stopping: asyncio.Event) -> None:
            self.ran.set()
            await stopping.wait()
            self.ended.set()

    async with servers.life(service) as life:
        stopping, looping = asyncio.Event(), Looping()
        running = asyncio.create_task(life.gate(looping).run(stopping))
        await eventually(looping.ran.is_set)
        await servers.run("UPDATE incarnation SET counter = 0")
        await life.run_once()
        assert not life.open
        await eventually(looping.ended.is_set)
        looping.ran.clear()
        await life.end_recovery()
        await eventually(looping.ran.is_set)
        stopping.set()
        await running


async def test_a_lost_nats_is_no_restore(servers: Servers, service: str) -> None:
    async with servers.life(service) as life:
        await life.run_once()
        await life._bus.jetstream.delete_key_value(incarnation.BUCKET)  # pyright: ignore[reportPrivateUsage]
        await life.run_once()
        assert life.open
    async with servers.life(service) as again:
        assert again.open
    # And it is kept anew: a restore is seen again.
    await servers.run("UPDATE incarnation SET counter = 0")
    async with servers.life(service) as restored:
        assert not restored.open


async def test_a_lost_database_is_seen(servers: Servers, service: str) -> None:
    async with servers.life(service):
        pass
    await servers.run("DELETE FROM incarnation")
    async with servers.life(service) as life:
        standing = await life.standing()
        assert "knows of no life" in standing.reason
        assert standing.restored_to is not None
        assert standing.since is not None
        assert (standing.since - standing.restored_to).days == 35


async def test_without_nats_it_is_not_known_and_nothing_is_done(
    servers: Servers, service: str
) -> None:
    await servers.broker.kill()
    try:
        async with servers.life(service) as life:
            assert not life.open
            with pytest.raises(errors.Unavailable, match="recovery"):
                life.require()
    finally:
        await servers.broker.start()


async def test_nothing_is_recovered_where_nothing_was_restored(servers: Servers) -> None:
    async with postgres.pool(servers.url, "test", 4) as pool:
        world = generator_world.World(pool, servers.url)
        opened = pools.Pools({}, {})
        shared = quota.Quota(world.store.accounts, opened)
        async with servers.life("generator") as life:
            served = api.AttemptApi(world.store, opened, shared, loops.Wake(), life)
            known = attempt_pb2.KnownVideo(
                job=job_pb2.Job(), state=vocabulary_pb2.VIDEO_STATE_PENDING
            )
            with pytest.raises(errors.FailedPrecondition) as refused:
                await served.RecoverVideos(attempt_pb2.RecoverVideosRequest(videos=[known]), None)
            assert refused.value.reason == "NOT_IN_RECOVERY"
            assert not (await served.EndRecovery(attempt_pb2.EndRecoveryRequest(), None)).videos
