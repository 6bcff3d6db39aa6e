"""Webhooks by the SDK and the CLI, received by the script of examples/: a real gateway, Postgres and NATS."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import h11
import pytest
import pytest_asyncio
import typer.testing

from framewire import client as clients
from framewire import errors
from framewire.cli import app
from services.gateway import deliverer, posting
from services.gateway.store import deliveries
from tests import gateway_world, webhook_receiver
from tests.gateway_world import World
from tests.waiting import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    settings = {
        "GATEWAY_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "GATEWAY_WEBHOOK_POLL_SECONDS": "0.1",
        "GATEWAY_WEBHOOK_RETRY_SECONDS": "0.1",
        "GATEWAY_INCARNATION_SECONDS": "0.2",
    }
    async with gateway_world.running(tmp_path_factory.mktemp("tools"), settings) as running:
        yield running


async def run(member: Any, world: World, *arguments: str) -> str:
    """A command's output."""
    env = {"FRAMEWIRE_ADDRESS": world.address, "FRAMEWIRE_API_KEY": member.secret}
    runner = typer.testing.CliRunner(env=env)
    result = await asyncio.to_thread(runner.invoke, app.app, ["webhook", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


async def test_a_receiver_of_the_examples_takes_what_the_commands_send(world: World) -> None:
    member = await world.member()
    made = json.loads(await run(member, world, "create", "http://127.0.0.1:9/in", "--json"))
    endpoint, secret = made["endpoint"]["endpoint_id"], made["secret"]
    receiver = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / "receive_webhooks.py"), "--port", "0",
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "FRAMEWIRE_WEBHOOK_SECRET": secret},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert receiver.stdout is not None
    lines = receiver.stdout
    try:
        port = (await asyncio.wait_for(lines.readline(), 30)).split()[-1].decode()
        async with clients.Client(world.address, member.secret) as client:
            hooks = client.webhooks
            url = f"http://127.0.0.1:{port}/in"
            changed = await hooks.update(endpoint, url=url, kinds=["failed", "settled"])
            assert (changed.url, changed.kinds) == (url, ("FAILED", "SETTLED"))
            video = await member.create()
            await world.tell(video, "failed", 1)
            line = (await asyncio.wait_for(lines.readline(), 30)).decode()
            assert line == f"failed {video.video_id} {video.video_id}:1\n"

            async def delivered() -> Any:
                return [each async for each in hooks.deliveries(endpoint, "delivered")]

            (delivery,) = await eventually(delivered)
            assert [each.status for each in delivery.tries] == [204]
            # A repeat is taken, and not printed: the next line is the test's.
            assert delivery.delivery_id in await run(
                member, world, "redeliver", delivery.delivery_id
            )
            assert "1 events" in await run(member, world, "replay", endpoint, "2026-01-01T00:00:00")

            async def again() -> Any:
                return any(each.attempts >= 2 for each in await delivered())

            await eventually(again)
            await run(member, world, "test", endpoint)
            assert (await asyncio.wait_for(lines.readline(), 30)).startswith(b"test ")
            # After a rotation without grace the receiver's secret is wrong, and it says 400.
            rotated = await hooks.rotate(endpoint, grace=timedelta())
            assert rotated.secret != secret
            test = await hooks.test(endpoint)

            async def refused() -> Any:
                found = [each async for each in hooks.deliveries(endpoint, "pending")]
                return [
                    each for each in found if each.delivery_id == test.delivery_id and each.tries
                ]

            assert (await eventually(refused))[0].tries[0].status == 400
    finally:
        receiver.terminate()
        await receiver.wait()


async def test_the_commands_show_what_there_is(world: World) -> None:
    member = await world.member()
    shown = await run(
        member,
        world,
        "create",
        "http://127.0.0.1:9/in",
        "--kind",
        "completed",
        "--description",
        "x",
    )
    assert "whsec_" in shown
    assert "completed" in shown
    async with clients.Client(world.address, member.secret) as client:
        (endpoint,) = await client.webhooks.endpoints()
        assert endpoint == await client.webhooks.get(endpoint.endpoint_id)
        assert endpoint.endpoint_id in await run(member, world, "list")
        assert "completed" in await run(member, world, "show", endpoint.endpoint_id)
        await run(member, world, "update", endpoint.endpoint_id, "--description", "y")
        changed = await client.webhooks.get(endpoint.endpoint_id)
        assert (changed.description, changed.kinds, changed.url) == (
            *("y", endpoint.kinds, endpoint.url),
        )
        assert "no (owner)" in await run(member, world, "enable", endpoint.endpoint_id, "--off")
        with pytest.raises(errors.FramewireError) as refused:
            await client.webhooks.test(endpoint.endpoint_id)
        assert refused.value.reason == "WEBHOOK_DISABLED"
        assert "yes" in await run(member, world, "enable", endpoint.endpoint_id)
        assert "whsec_" in await run(member, world, "rotate", endpoint.endpoint_id)
        sent = json.loads(await run(member, world, "test", endpoint.endpoint_id, "--json"))
        assert (sent["kind"], sent["endpoint_id"]) == ("TEST", endpoint.endpoint_id)
        assert "test" in await run(member, world, "deliveries", endpoint.endpoint_id)
        await run(member, world, "delete", endpoint.endpoint_id)
        assert await client.webhooks.endpoints() == ()
        with pytest.raises(errors.FramewireError) as refused:
            await client.webhooks.create("http://127.0.0.1:9/in", ["nonsense"])
        assert "completed" in str(refused.value).lower()


@pytest.mark.parametrize(
    ("retry_after", "date", "seconds"),
    [
        ("3", None, 3),
        ("Fri, 27 Nov 2026 10:01:00 GMT", "Fri, 27 Nov 2026 10:00:00 GMT", 60),
        ("Fri, 27 Nov 2026 10:00:00 GMT", "Fri, 27 Nov 2026 10:01:00 GMT", 0),
        ("Fri, 27 Nov 2026 10:01:00 GMT", None, 0),
        ("Fri, 27 Nov 2026 10:01:00 GMT", "soon", 0),
        ("-1", "Fri, 27 Nov 2026 10:00:00 GMT", 0),
        ("99999999999", "Fri, 27 Nov 2026 10:00:00 GMT", 0),
        (None, "Fri, 27 Nov 2026 10:00:00 GMT", 0),
    ],
)
def test_retry_after_in_all_its_forms(
    retry_after: str | None, date: str | None, seconds: float
) -> None:
    headers = [("retry-after", retry_after), ("date", date)]
    answer = h11.Response(
        status_code=503, headers=[(name, value) for name, value in headers if value]
    )
    assert posting._seconds(answer) == seconds


async def test_a_restored_gateway_delivers_nothing_until_its_recovery(world: World) -> None:
    async with webhook_receiver.running() as receiver:
        member = await world.member()
        await run(member, world, "create", f"{receiver.url}/in", "--kind", "failed")
        video = await member.create()
        await world.pool.execute(
            "UPDATE incarnation SET recovery_since = clock_timestamp(), recovery_reason = 'a test'"
        )

        async def recovering() -> bool:
            try:
                await member.create()
            except errors.FramewireError as error:
                return error.reason == "RECOVERY"
            return False

        await eventually(recovering)
        await world.tell(video, "failed", 1)

        async def due() -> Any:
            return await world.pool.fetchval(
                "SELECT count(*) FROM webhook_deliveries WHERE state = 'PENDING' AND attempts = 0"
            )

        await eventually(due)
        assert not receiver.posts["/in"]
        await world.pool.execute(
            "UPDATE incarnation SET recovery_since = NULL, recovery_reason = ''"
        )
        await eventually(lambda: receiver.posts["/in"])


async def test_operators_see_how_endpoints_fare(world: World) -> None:
    kept = deliveries.DeliveryStore(world.pool)
    before = await kept.endpoints()
    members = [await world.member() for _ in deliverer.CONDITIONS]
    for member in members:
        await run(member, world, "create", "http://127.0.0.1:9/in", "--kind", "failed")
    for member, change in zip(
        members[1:],
        (
            "failures = 3",
            "disabled_why = 'OWNER'",
            "disabled_why = 'GONE'",
            "disabled_why = 'FAILING'",
        ),
        strict=True,
    ):
        disabled = ", disabled_at = clock_timestamp()" if "why" in change else ""
        await world.pool.execute(
            f"UPDATE webhook_endpoints SET {change}{disabled} WHERE account_id = $1",
            member.account_id,
        )
    found = await kept.endpoints()
    more = {name: count - before.get(name, 0) for name, count in found.items()}
    assert more == dict.fromkeys(deliverer.CONDITIONS, 1)


async def test_what_is_old_or_of_a_removed_endpoint_is_purged(world: World) -> None:
    async with webhook_receiver.running() as receiver:
        one, two = await world.member(), await world.member()
        for member in (one, two):
            await run(member, world, "create", f"{receiver.url}/purged", "--kind", "failed")
            await world.tell(await member.create(), "failed", 1)
        await eventually(lambda: len(receiver.posts["/purged"]) == 2)
        kept = deliveries.DeliveryStore(world.pool)
        await kept.purge()

        async def left(table: str) -> int:
            query = f"SELECT count(*) FROM {table} WHERE account_id = ANY($1::text[])"
            return await world.pool.fetchval(query, [one.account_id, two.account_id])

        assert (await left("webhook_events"), await left("webhook_endpoints")) == (2, 2)
        await world.pool.execute(
            "UPDATE webhook_events SET recorded_at = recorded_at - interval '36 days' WHERE account_id = $1",
            one.account_id,
        )
        async with clients.Client(world.address, two.secret) as client:
            (endpoint,) = await client.webhooks.endpoints()
            await client.webhooks.delete(endpoint.endpoint_id)
        while await kept.purge():
            pass
        assert (await left("webhook_events"), await left("webhook_endpoints")) == (1, 1)
        ends = """
            SELECT count(*) FROM webhook_deliveries JOIN webhook_events USING (event_id)
            WHERE account_id = ANY($1::text[])
            """
        assert await world.pool.fetchval(ends, [one.account_id, two.account_id]) == 0
