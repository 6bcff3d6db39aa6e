"""Each database restored from a backup while videos are under way; its recovery struck at every point and run again."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from framewire import client as clients
from framewire import errors, recovery, types
from tests import invariants, restores
from tests import system as systems
from tests.fault import kills
from tests.waiting import eventually

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(300)]

CASES = [
    (restored, point) for restored, points in kills.RECOVERY.items() for point in ("", *points)
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    async with kills.fragile(tmp_path_factory.mktemp("restores")) as running:
        yield running


async def ended(client: clients.Client, video_id: str) -> types.Video:
    async def has_ended() -> types.Video:
        video = await client.get_video(video_id)
        assert video.state == "COMPLETED", f"{video.state} {video.stage} {video.failure}"
        assert video.credits.captured, "not settled yet"
        return video

    return await eventually(has_ended, within_seconds=120)


async def recovered(system: systems.System, point: str) -> recovery.Recovery:
    """Runs `recover`. With a point it is struck there: it fails, the service dies and comes back, it is run again."""
    recover = system.operator.operations.recover
    if not point:
        return await recover(why="a drill")
    system.arm(point)
    first = asyncio.ensure_future(recover(why="a drill"))
    await system.revive(point.split(".", 1)[0])
    broken = (await asyncio.gather(first, return_exceptions=True))[0]
    assert isinstance(broken, errors.FramewireError), f"{point}: {broken}"
    assert system.disarm() == ""

    async def again() -> recovery.Recovery | None:
        try:
            return await recover(why="a drill, again")
        except errors.FramewireError as error:
            if error.code.name != "UNAVAILABLE":
                raise
            return None  # the service comes back

    return await eventually(again, within_seconds=60)


@pytest.mark.parametrize(
    ("service", "point"), CASES, ids=[f"{service}-{point or 'whole'}" for service, point in CASES]
)
async def test_nothing_is_paid_or_charged_twice(
    system: systems.System, service: str, point: str
) -> None:
    """Of three videos one was made since the backup, one is being made, one waits: each is made and charged once."""
    backup = restores.Backup(system, service)
    prompts = [
        f"restored {service} {kind} {uuid.uuid4().hex}" for kind in ("made", "sent", "waits")
    ]
    ids_ = [clients.new_request_id() for _ in prompts]
    async with await system.account(100) as client:
        await backup.take()
        await eventually(lambda: answers(client))
        made = await client.generate(prompts[0], request_id=ids_[0], **kills.TINY)
        sent = await client.create_video(prompts[1], request_id=ids_[1], **kills.TINY)

        async def is_paid() -> bool:
            return len(await system.paid_jobs(prompts[1])) == 1

        await eventually(is_paid)
        await restores.pause(system, True)
        waits = await client.create_video(prompts[2], request_id=ids_[2], **kills.TINY)
        await backup.restore()
        assert await restores.closed(system, service) != ""
        if service != "generator":  # whose jobs wait on the bus
            with pytest.raises(errors.FramewireError) as refused:
                await client.create_video(f"meanwhile {uuid.uuid4().hex}", **kills.TINY)
            assert refused.value.code.name == "UNAVAILABLE"
        await recovered(system, point)
        assert await restores.closed(system, service) == ""
        await restores.pause(system, False)
        for video, prompt, request_id in zip((made, sent, waits), prompts, ids_, strict=True):
            again = await client.create_video(prompt, request_id=request_id, **kills.TINY)
            assert again.video_id == video.video_id
            await ended(client, video.video_id)
            assert len(await system.paid_jobs(prompt)) == 1
        await system.quiet()
        balance = await client.balance()
        price = made.credits.reserved
        assert (balance.available_credits, balance.held_credits) == (100 - 3 * price, 0)
    assert (await system.check_books()).balanced
    assert await invariants.violations(system) == []


async def answers(client: clients.Client) -> bool:
    """The gateway is back, and what stands behind it."""
    try:
        await client.quote_video("a look", **kills.TINY)
    except errors.FramewireError:
        return False
    return True
