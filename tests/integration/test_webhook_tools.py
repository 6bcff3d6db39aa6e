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

import pytest
import pytest_asyncio
import typer.testing

from framewire import client as clients
from framewire import errors
from framewire.cli import app
from tests import gateway_world
from tests.gateway_world import World
from tests.waiting import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    settings = {
        "GATEWAY_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "GATEWAY_WEBHOOK_POLL_SECONDS": "0.1",
        "GATEWAY_WEBHOOK_RETRY_SECONDS": "0.1",
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
        assert "no (owner)" in await run(member, world, "enable", endpoint.endpoint_id, "--off")
        with pytest.raises(errors.FramewireError) as refused:
            await client.webhooks.test(endpoint.endpoint_id)
        assert refused.value.reason == "WEBHOOK_DISABLED"
        assert "yes" in await run(member, world, "enable", endpoint.endpoint_id)
        assert "whsec_" in await run(member, world, "rotate", endpoint.endpoint_id)
        await run(member, world, "test", endpoint.endpoint_id)
        assert "test" in await run(member, world, "deliveries", endpoint.endpoint_id)
        await run(member, world, "delete", endpoint.endpoint_id)
        assert await client.webhooks.endpoints() == ()
        with pytest.raises(errors.FramewireError) as refused:
            await client.webhooks.create("http://127.0.0.1:9/in", ["nonsense"])
        assert "completed" in str(refused.value).lower()
