"""The generator's database restored: nothing is sent until `framewire recover`, and nothing is paid twice."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from framewire import client as clients
from framewire import errors
from tests import invariants, restores
from tests import system as systems
from tests.waiting import eventually

TINY = {"model": "sora-2", "width": 320, "height": 180, "seconds": 1}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    async with systems.running(tmp_path_factory.mktemp("recovery")) as running:
        async with await running.account(100) as client:
            # A finished job of ours in the provider's list: without one, absence can never be proved.
            await client.generate(f"sentinel {uuid.uuid4().hex}", **TINY)
        yield running


async def attempts(system: systems.System, video_id: str) -> list[str]:
    async with system.database("generator") as database:
        found = await database.fetch(
            "SELECT state FROM attempts WHERE video_id = $1 ORDER BY number", video_id
        )
        return [row["state"] for row in found]


async def ended(client: clients.Client, video_id: str) -> str:
    async def has_ended() -> str:
        video = await client.get_video(video_id)
        assert video.state in ("COMPLETED", "FAILED", "CANCELLED"), f"{video.state} {video.stage}"
        return video.state

    return await eventually(has_ended, within_seconds=90)


def prompts(count: int) -> list[str]:
    return [f"recovered {number} {uuid.uuid4().hex}" for number in range(count)]


async def test_nothing_to_recover_from(system: systems.System) -> None:
    found = await system.operator.operations.recover()
    assert found.videos == ()
    assert [one.standing.open for one in found.done.services] == [True, True, True]


async def test_a_restored_generator_sends_nothing_twice(system: systems.System) -> None:
    backup = restores.Backup(system, "generator")
    queued_then, made_since, asked_later = prompts(3)
    async with await system.account(100) as client:
        await restores.pause(system, True)
        first = await client.create_video(queued_then, **TINY)

        async def is_queued() -> bool:
            return await attempts(system, first.video_id) == ["QUEUED"]

        await eventually(is_queued)
        await backup.take()
        await restores.pause(system, False)
        second = await client.generate(made_since, **TINY)  # forgotten, and COMPLETED
        assert await ended(client, first.video_id) == "COMPLETED"
        third = await client.create_video(f"under way {uuid.uuid4().hex}", **TINY)

        async def is_paid() -> bool:
            return len(await system.paid_jobs(third.spec.prompt)) == 1

        await eventually(is_paid)
        await backup.restore()
        await restores.pause(system, False)
        assert "copy" in await restores.closed(system, "generator")
        later = await client.create_video(asked_later, **TINY)
        with pytest.raises(errors.FramewireError) as refused:
            await system.operator.attempts.cancel(first.video_id)
        assert refused.value.reason == "RECOVERY"
        looked = await system.operator.operations.recover(dry_run=True)
        assert await restores.closed(system, "generator") != "", "a dry run opens nothing"
        assert await attempts(system, later.video_id) == []
        assert await attempts(system, first.video_id) == ["QUEUED"]

        done = await system.operator.operations.recover(why="a drill")
        assert {one.video_id: one.action for one in looked.videos if one.action != "ADOPTED"} == {
            one.video_id: one.action for one in done.videos if one.action != "ADOPTED"
        }
        actions = {(one.video_id, one.action) for one in done.videos}
        assert {(first.video_id, "ENDED"), (second.video_id, "ENDED")} <= actions
        assert {(first.video_id, "ADOPTED"), (second.video_id, "ADOPTED")} <= actions
        assert (third.video_id, "RECREATED") in actions or (third.video_id, "ENDED") in actions
        assert (await system.operator.operations.recover()).videos == ()
        for video in (third, later):
            assert await ended(client, video.video_id) == "COMPLETED"
        for prompt in (queued_then, made_since, third.spec.prompt, asked_later):
            assert len(await system.paid_jobs(prompt)) == 1, prompt
    await system.quiet()
    assert await invariants.violations(system) == []
