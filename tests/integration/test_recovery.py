"""The generator's database restored: nothing is sent until `framewire recover`, and nothing is paid twice."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from framewire import client as clients
from framewire import errors, recovery, templates, types
from framewire.generator.v1 import job_pb2
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


@pytest.mark.long
async def test_a_recovered_video_keeps_how_it_was_asked_for(system: systems.System) -> None:
    """Its template, with the filled prompt, what it makes anew, and what it may cost, over both ways in which a video
    that was forgotten is made again: gateway and generator know it of each other.

    The version is from after the gateway's backup: its template is forgotten, and the video still says which it was.
    """
    generator, gateway = (restores.Backup(system, name) for name in ("generator", "gateway"))
    name, animal, request_id = "cat", uuid.uuid4().hex, str(uuid.uuid4())
    variables = [templates.Variable("animal", max_length=40)]
    use = types.TemplateUse(name, {"animal": animal})
    async with await system.account(100) as client:
        failed = await refused(client, max_credits=50)
        await client.create_template(name, "a first {animal}", variables, **TINY)
        await generator.take()
        await gateway.take()
        await restores.pause(system, True)
        await client.create_template(name, "a second {animal}", variables, **TINY)
        asked = await client.create_video(template=use, request_id=request_id)
        assert asked.template == types.TemplateVersion(name, 2)
        anew = await client.retry_video(failed.video_id)

        async def has_job() -> bool:
            has_both = await kept(system, anew.video_id) is not None
            return has_both and await kept(system, asked.video_id) == (
                name,
                2,
                f"a second {animal}",
            )

        await eventually(has_job)
        await generator.restore()
        await restores.pause(system, True)
        assert await kept(system, asked.video_id) is None
        assert await restores.closed(system, "generator") != ""
        assert actions(await system.operator.operations.recover(), asked) >= {"RECREATED"}
        assert await has_job()
        await gateway.restore()
        assert await restores.closed(system, "gateway") != ""
        done = await system.operator.operations.recover()
        assert actions(done, asked) == actions(done, anew) == {"READMITTED"}
        await restores.pause(system, False)
        again = await client.create_video(template=use, request_id=request_id)
        assert again.video_id == asked.video_id, "the first version is the latest again"
        assert await ended(client, asked.video_id) == "COMPLETED"
        video = await client.get_video(asked.video_id)
        assert (video.template, video.spec) == (asked.template, asked.spec)
        assert video.spec.prompt == f"a second {animal}"
        assert (await client.get_video(anew.video_id)).retry_of == failed.video_id
        async with system.database("gateway") as database:
            query = "SELECT max_credits FROM videos WHERE video_id = $1"
            ceilings = [
                await database.fetchval(query, each.video_id) for each in (failed, anew, asked)
            ]
        assert ceilings == [50, 50, None]
        listed = client.list_videos(template=name, template_version=2)
        assert [one.video_id async for one in listed] == [asked.video_id]
    assert len(await system.paid_jobs(f"a second {animal}")) == 1
    assert await system.paid_jobs(f"a first {animal}") == []
    await system.quiet()
    assert await invariants.violations(system) == []


async def refused(client: clients.Client, **fields: Any) -> types.Video:
    """A video that the provider's moderation refused."""
    video = await client.create_video(
        f"[fault:moderated_now] refused {uuid.uuid4().hex}", **fields, **TINY
    )
    assert await ended(client, video.video_id) == "FAILED"
    return video


async def kept(system: systems.System, video_id: str) -> tuple[str, int, str] | None:
    """Template, version and prompt of a video as the generator has them; None: it does not know the video."""
    async with system.database("generator") as database:
        row = await database.fetchval("SELECT job FROM videos WHERE video_id = $1", video_id)
    if row is None:
        return None
    job = job_pb2.Job.FromString(row)
    return job.admission.template_name, job.admission.template_version, job.spec.prompt


def actions(done: recovery.Recovery, video: types.Video) -> set[str]:
    """What was done for a video."""
    return {one.action for one in done.videos if one.video_id == video.video_id}
