"""Pauses and outages: SIGSTOP past every lease, and the bus losing its whole disk."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from framewire import client as clients
from framewire import types
from tests import containers, invariants
from tests import system as systems
from tests.fault import kills, orders
from tests.waiting import eventually

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    async with kills.fragile(tmp_path_factory.mktemp("pauses")) as running:
        yield running


async def test_gateway_stopped_between_reserve_and_publish(fragile: systems.System) -> None:
    """For twice the sweep's age: the video is queued once or given up with its credits free, never both."""
    prompt = f"gateway stopped {uuid.uuid4().hex}"
    async with await fragile.account(100) as client:
        fragile.arm("gateway.admit.after_reserve", "stop")
        creating = asyncio.create_task(client.generate(prompt, **kills.TINY))
        await eventually(lambda: fragile.is_stopped("gateway"))
        ages = float(systems.SETTINGS["gateway"]["GATEWAY_ADMIT_SECONDS"])
        await orders.database_clock(fragile, 2 * ages + 2)
        fragile.supervisor.resume("gateway")
        video = await asyncio.wait_for(creating, 60)
        await fragile.quiet()
        balance = await client.balance()
    assert video.state == "COMPLETED"
    assert balance.available_credits == 100 - video.credits.captured
    assert len(await fragile.paid_jobs(prompt)) == 1


async def test_generator_stopped_after_the_write_ahead(fragile: systems.System) -> None:
    """Past its lease, before the first byte of its POST: it wakes up, does not send, and says so."""
    prompt = f"generator stopped {uuid.uuid4().hex}"
    async with await fragile.account(100) as client:
        fragile.arm("generator.submit.after_commit", "stop")
        creating = asyncio.create_task(client.generate(prompt, **kills.TINY))
        await eventually(lambda: fragile.is_stopped("generator"))
        await orders.database_clock(fragile, 5)  # its lease is 3 s
        fragile.supervisor.resume("generator")
        video = await asyncio.wait_for(creating, 60)
        await fragile.quiet()
    assert video.state == "COMPLETED"
    assert len(await fragile.paid_jobs(prompt)) == 1


async def test_a_lost_answer_is_found_in_the_list(fragile: systems.System) -> None:
    """The job exists, its answer never came: found in the list and adopted, not sent again."""
    prompt = f"[fault:lost_answer] answer lost {uuid.uuid4().hex}"
    async with await fragile.account(100) as client:
        video = await asyncio.wait_for(client.generate(prompt, **kills.TINY), 60)
    assert video.state == "COMPLETED"
    assert len(await fragile.paid_jobs(prompt)) == 1


async def test_the_bus_loses_its_disk_while_videos_are_queued(fragile: systems.System) -> None:
    async with await fragile.account(1000) as client:
        await fragile.supervisor.stop("generator")
        videos = [
            await client.create_video(f"queued {uuid.uuid4().hex}", **kills.TINY) for _ in range(5)
        ]
        await containers.lose_disk(fragile.bus)
        await fragile.supervisor.start("generator")
        for video in videos:
            assert (await _ended(client, video.video_id)).state == "COMPLETED"
        await fragile.quiet()


async def test_the_bus_loses_its_disk_while_events_are_unsettled(fragile: systems.System) -> None:
    async with await fragile.account(1000) as client:
        await fragile.supervisor.stop("credits")
        await fragile.supervisor.start("credits")
        videos = [
            await client.create_video(f"unsettled {uuid.uuid4().hex}", **kills.TINY)
            for _ in range(3)
        ]
        await fragile.supervisor.stop("credits")

        async def all_told() -> bool:
            async with fragile.database("generator") as database:
                return not await database.fetchval(
                    """
                    SELECT count(*) FROM videos v LEFT JOIN outbox o ON o.ce_id = v.video_id || ':' || v.seq
                    WHERE v.state <> 'COMPLETED' OR o.published_at IS NULL
                    """
                )

        await eventually(all_told, within_seconds=60)
        await containers.lose_disk(fragile.bus)
        await fragile.supervisor.start("credits")
        for video in videos:
            ended = await _ended(client, video.video_id)
            assert (ended.state, ended.credits.settlement) == ("COMPLETED", "DONE")
        await fragile.quiet()


async def test_every_invariant_holds_after_all_pauses(fragile: systems.System) -> None:
    await fragile.quiet()
    found = await invariants.violations(fragile)
    # The stream was lost twice and told again: what is in it now starts anew, and is whole.
    assert found == []


async def _ended(client: clients.Client, video_id: str) -> types.Video:
    """The video when it is over and settled."""
    return [video async for video in client.watch_video(video_id)][-1]
