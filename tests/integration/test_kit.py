"""kit against the real servers: migrations, the bus and its loss, the outbox, errors over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from nats.aio.msg import Msg
from prometheus_client import REGISTRY

from framewire import errors as public_errors
from framewire import subjects
from framewire.generator.v1 import attempt_pb2, attempt_pb2_grpc
from kit import auth, bus, errors, migrate, outbox, pages, postgres, rpc
from services.local import nats as local_nats
from tests import containers
from tests.waiting import eventually

OUTBOX = """
CREATE TABLE outbox (ce_id text PRIMARY KEY, ordering_key text NOT NULL, seq bigint NOT NULL, shard smallint NOT NULL,
    subject text NOT NULL, headers jsonb NOT NULL, data bytea NOT NULL, created_at timestamptz NOT NULL,
    published_at timestamptz, stream_sequence bigint);
CREATE TABLE outbox_stream (stream text PRIMARY KEY, created text NOT NULL);
"""
Broker = containers.Nats | local_nats.Nats
SECRET = "a secret of at least thirty-two characters"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Any]:
    running = containers.postgres(tmp_path_factory.mktemp("postgres"))
    await running.start()
    yield running
    await running.destroy()


@pytest_asyncio.fixture(loop_scope="session")
async def database(server: Any, request: pytest.FixtureRequest) -> str:
    name = f"kit_{abs(hash(request.node.name)) % 10**10}"
    await server.create_database(name)
    return server.database_url(name)


@pytest_asyncio.fixture(loop_scope="session")
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    running = containers.nats(tmp_path)
    await running.start()
    yield running
    await running.stop()


def _write(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)


async def test_migrations_are_applied_once_and_together(database: str, tmp_path: Path) -> None:
    files = tmp_path / "migrations"
    _write(files, "0001_create_things.sql", "CREATE TABLE things (id int);")
    _write(files, "0002_add_more.sql", "ALTER TABLE things ADD more text;")
    both = await asyncio.gather(migrate.migrate(database, files), migrate.migrate(database, files))
    assert sorted(map(len, both)) == [0, 2]


async def test_an_edited_migration_is_refused(database: str, tmp_path: Path) -> None:
    files = tmp_path / "migrations"
    _write(files, "0001_create_things.sql", "CREATE TABLE things (id int);")
    await migrate.migrate(database, files)
    _write(files, "0001_create_things.sql", "CREATE TABLE things (id bigint);")
    with pytest.raises(migrate.MigrationError, match="was changed"):
        await migrate.migrate(database, files)


async def test_a_roll_out_waits_for_what_its_version_knows(database: str, tmp_path: Path) -> None:
    files = tmp_path / "migrations"
    _write(files, "0001_create_things.sql", "CREATE TABLE things (id int);")
    assert await migrate.missing(database, files) == ["0001_create_things.sql"]
    await migrate.migrate(database, files)
    assert await migrate.missing(database, files) == []
    _write(files, "0002_add_others.sql", "CREATE TABLE others (id int);")
    assert await migrate.missing(database, files) == ["0002_add_others.sql"]
    assert len(await migrate.missing("postgresql://nobody@127.0.0.1:1/x", files)) == 2


async def test_a_migration_that_fails_leaves_nothing(database: str, tmp_path: Path) -> None:
    files = tmp_path / "migrations"
    _write(files, "0001_create_things.sql", "CREATE TABLE things (id int); SELECT 1 / 0;")
    with pytest.raises(Exception, match="division"):
        await migrate.migrate(database, files)
    _write(files, "0001_create_things.sql", "CREATE TABLE things (id int);")
    assert await migrate.migrate(database, files) == ["0001_create_things.sql"]


def _row(key: str, seq: int) -> outbox.Row:
    subject = subjects.event_subject("a" * 26, "queued")
    return outbox.Row(f"{key}:{seq}", key, seq, subject, f"{key} {seq}".encode())


async def _told(connected: bus.Bus, count: int) -> list[Msg]:
    subscription = await connected.jetstream.subscribe(
        "framewire.events.v1.>", ordered_consumer=True
    )
    try:
        return [await subscription.next_msg(timeout=5) for _ in range(count)]
    finally:
        await subscription.unsubscribe()


async def test_the_outbox_shows_what_waits_also_while_the_bus_is_away(database: str) -> None:
    nowhere = "nats://127.0.0.1:1"
    async with postgres.pool(database, "test", 2) as pool, bus.connect(nowhere, "test") as away:
        await pool.execute(OUTBOX)
        async with pool.acquire() as connection, connection.transaction():
            await outbox.add_all(connection, [outbox.headed(_row("a", seq)) for seq in (1, 2)])
        await pool.execute("UPDATE outbox SET created_at = created_at - interval '1 hour'")
        assert not await outbox.Relay(pool, away, subjects.EVENTS_STREAM).run_once()
        assert REGISTRY.get_sample_value("framewire_outbox_waiting") == 2
        oldest = REGISTRY.get_sample_value("framewire_outbox_oldest_seconds")
        assert oldest is not None
        assert oldest >= 3600
        assert REGISTRY.get_sample_value("framewire_bus_connected") == 0


async def test_the_outbox_tells_in_order_and_once(database: str, broker: Broker) -> None:
    async with (
        postgres.pool(database, "test", 4) as pool,
        bus.connect(broker.url, "test") as connected,
    ):
        await pool.execute(OUTBOX)
        relay = outbox.Relay(pool, connected, subjects.EVENTS_STREAM)
        async with pool.acquire() as connection, connection.transaction():
            for seq in (3, 1, 2):
                for key in ("x", "y", "z"):
                    await outbox.add(connection, _row(key, seq))
        # Two replicas at once: a shard has one relay at a time.
        await asyncio.gather(relay.run_once(), outbox.Relay(pool, connected, "EVENTS").run_once())
        await relay.run_once()
        told = [message.data.decode() for message in await _told(connected, 9)]
        for key in ("x", "y", "z"):
            assert [line for line in told if line[0] == key] == [
                f"{key} {seq}" for seq in (1, 2, 3)
            ]
        assert (await connected.jetstream.stream_info("EVENTS")).state.messages == 9


async def test_a_bus_that_lost_its_disk_is_told_again(database: str, broker: Broker) -> None:
    async with (
        postgres.pool(database, "test", 4) as pool,
        bus.connect(broker.url, "test") as connected,
    ):
        await pool.execute(OUTBOX)
        relay = outbox.Relay(pool, connected, subjects.EVENTS_STREAM)
        async with pool.acquire() as connection:
            await outbox.add(connection, _row("x", 1))
        await relay.run_once()
        await containers.lose_disk(broker)

        async def told_again() -> bool:
            await relay.run_once()
            return (await connected.jetstream.stream_info("EVENTS")).state.messages == 1

        async def retried() -> bool:
            try:
                return await told_again()
            except bus.BusError:
                return False

        await eventually(retried)
        assert (await _told(connected, 1))[0].headers["ce-id"] == "x:1"


async def test_a_consumer_survives_a_restart_and_an_error(broker: Broker) -> None:
    seen: list[str] = []

    async def handle(message: Msg) -> None:
        seen.append(message.data.decode())
        if seen.count("again") == 1 and message.data == b"again":
            raise bus.Retry(0.05)
        if seen.count("broken") == 1 and message.data == b"broken":
            raise ValueError("a handler's mistake")

    stopping = asyncio.Event()
    async with bus.connect(broker.url, "test") as connected:
        loop = bus.PullLoop(
            connected, "JOBS", "tester", [subjects.JOBS_SUBJECT], handle, retry_seconds=0.05
        )
        running = asyncio.create_task(loop.run(stopping))
        await connected.opened.wait()
        await connected.ensure_streams()
        for text in ("again", "broken"):
            await connected.publish(subjects.JOBS_SUBJECT, text.encode(), {}, text)

        async def handled(text: str, times: int) -> bool:
            return seen.count(text) >= times

        await eventually(lambda: handled("again", 2))
        await eventually(lambda: handled("broken", 2))
        await containers.lose_disk(broker)

        async def published() -> bool:
            try:
                await connected.publish(subjects.JOBS_SUBJECT, b"after", {}, "after")
            except bus.BusError:
                return False
            return True

        await eventually(published)
        await eventually(lambda: handled("after", 1))
        stopping.set()
        await asyncio.wait_for(running, 10)


async def test_a_bus_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    """A service starts while NATS is not there, says at once that it cannot publish, and both come right."""
    broker, heard = containers.nats(tmp_path), asyncio.Event()
    await broker.start()
    url = broker.url
    await broker.stop()
    stopping = asyncio.Event()

    async def hear(_: Msg) -> None:
        heard.set()

    async with bus.connect(url, "test") as connected:
        listening = asyncio.create_task(connected.listen("framewire.test", hear, stopping))
        with pytest.raises(bus.BusError):
            await asyncio.wait_for(
                connected.publish(subjects.JOBS_SUBJECT, b"x", {}, "x", timeout_seconds=60), 1
            )
        await broker.start()

        async def told() -> bool:
            await connected.tell("framewire.test", b"x")
            return heard.is_set()

        await eventually(told)
        stopping.set()
        await asyncio.wait_for(listening, 5)
    await broker.stop()


class Raising(attempt_pb2_grpc.AttemptServiceServicer):
    """Raises what it is asked for."""

    async def GetVideoOutcome(self, request, context):
        raise errors.FailedPrecondition(
            "HOLD_RELEASED", "too late", retry_after_seconds=1.5, hold="h"
        )

    async def CancelAttempt(self, request, context):
        raise RuntimeError("secret of ours")


@pytest_asyncio.fixture(loop_scope="session")
async def address() -> AsyncIterator[str]:
    tokens = auth.ServiceTokens("tester", SECRET)

    async def authenticate(_: str, metadata: Mapping[str, str]) -> str:
        return tokens.caller(metadata.get("authorization", ""), ("tester",))

    running = grpc.aio.server(interceptors=[rpc.ServerInterceptor(authenticate)])
    attempt_pb2_grpc.add_AttemptServiceServicer_to_server(Raising(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    yield f"127.0.0.1:{port}"
    await running.stop(0)


async def test_errors_cross_the_wire_whole(address: str) -> None:
    async with rpc.channel(address, auth.ServiceTokens("tester", SECRET)) as channel:
        stub = attempt_pb2_grpc.AttemptServiceStub(channel)
        with pytest.raises(errors.FailedPrecondition) as caught:
            await stub.GetVideoOutcome(
                attempt_pb2.GetVideoOutcomeRequest(video_id="a" * 26), timeout=5
            )
    assert (caught.value.reason, caught.value.message) == ("HOLD_RELEASED", "too late")
    assert caught.value.retry_after_seconds == 1.5
    assert caught.value.metadata == {"hold": "h"}


async def test_our_own_mistakes_stay_inside(address: str) -> None:
    async with rpc.channel(address, auth.ServiceTokens("tester", SECRET)) as channel:
        stub = attempt_pb2_grpc.AttemptServiceStub(channel)
        request = attempt_pb2.CancelAttemptRequest(video_id="a" * 26, account_id="b" * 26)
        with pytest.raises(errors.Internal) as caught:
            await stub.CancelAttempt(request, timeout=5)
    assert "secret" not in caught.value.message
    assert len(caught.value.metadata["error_id"]) == 26


async def test_the_contract_is_enforced_before_the_service(address: str) -> None:
    async with rpc.channel(address, auth.ServiceTokens("tester", SECRET)) as channel:
        stub = attempt_pb2_grpc.AttemptServiceStub(channel)
        with pytest.raises(errors.InvalidArgument) as caught:
            await stub.GetVideoOutcome(attempt_pb2.GetVideoOutcomeRequest(video_id="no"), timeout=5)
    assert caught.value.violations[0][0] == "video_id"


@pytest.mark.parametrize(
    ("service", "secret", "reason"),
    [
        ("tester", "another secret of more than thirty-two characters", "CREDENTIALS_INVALID"),
        ("stranger", SECRET, "ROLE_NOT_ALLOWED"),
    ],
)
async def test_only_known_services_may_call(
    address: str, service: str, secret: str, reason: str
) -> None:
    async with rpc.channel(address, auth.ServiceTokens(service, secret)) as channel:
        stub = attempt_pb2_grpc.AttemptServiceStub(channel)
        with pytest.raises(errors.ServiceError) as caught:
            await stub.GetVideoOutcome(
                attempt_pb2.GetVideoOutcomeRequest(video_id="a" * 26), timeout=5
            )
    assert caught.value.reason == reason


async def test_a_call_without_a_token_is_refused(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = attempt_pb2_grpc.AttemptServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetVideoOutcome(
                attempt_pb2.GetVideoOutcomeRequest(video_id="a" * 26), timeout=5
            )
    assert public_errors.from_rpc(caught.value).reason == "CREDENTIALS_INVALID"


def test_page_tokens_that_were_tampered_with_are_refused() -> None:
    for token in ("x", "////", "bm90IGEgdG9rZW4=", "é"):
        with pytest.raises(errors.InvalidArgument):
            pages.decode(token)
