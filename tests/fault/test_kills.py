"""kill -9 at every crash point of the life of a video: it ends, one billed job, one charge, nothing adrift."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from framewire import client as clients
from framewire import types
from tests import invariants, pictures
from tests import system as systems

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
TINY = {"model": "sora-2", "width": 320, "height": 180, "seconds": 1}

MATRIX = {
    "gateway": (
        "gateway.admit.after_insert",
        "gateway.admit.after_pin",
        "gateway.admit.after_reserve",
        "gateway.admit.before_commit",
        "gateway.admit.after_commit",
        "gateway.admit.after_publish",
        "gateway.project.before_commit",
        "gateway.project.after_commit",
    ),
    "generator": (
        "generator.accept.before_commit",
        "generator.accept.after_commit",
        "generator.accept.before_ack",
        "generator.pick.before_commit",
        "generator.pick.after_commit",
        "generator.prepare.after_fit",
        "generator.submit.before_commit",
        "generator.submit.after_commit",
        "generator.submit.after_post",
        "generator.submit.after_job_row",
        "generator.submit.after_accepted",
        "generator.poll.before_finished",
        "generator.poll.after_finished",
        "generator.fetch.before_put",
        "generator.fetch.after_put",
        "generator.finish.before_commit",
        "generator.finish.after_commit",
    ),
    "credits": (
        "credits.reserve.before_commit",
        "credits.reserve.after_commit",
        "credits.settle.before_commit",
        "credits.settle.after_commit",
    ),
    "storage": (
        "storage.put.after_row",
        "storage.put.after_object",
        "storage.put.before_ready",
        "storage.put.after_ready",
        "storage.fit.after_object",
    ),
}
ELSEWHERE = {
    # Reached only when something else has failed before: test_pauses.py and the services' own tests.
    "gateway.abandon.before_release",
    "generator.resolve.after_adopt",
    "generator.resolve.before_put_back",
}
CASES = [(service, point) for service, points in MATRIX.items() for point in points]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    """A system that these tests break and that gets up again."""
    async with systems.running(tmp_path_factory.mktemp("fragile")) as running:
        async with await running.account(100) as client:
            # A finished job of ours in the provider's list: without one, absence can never be proved.
            await client.generate(f"sentinel {uuid.uuid4().hex}", **TINY)
        yield running


@pytest.mark.parametrize(("service", "point"), CASES, ids=[point for _, point in CASES])
async def test_kill(fragile: systems.System, service: str, point: str, tmp_path: Path) -> None:
    prompt = f"killed at {point} {uuid.uuid4().hex}"
    colour = (200, 60, 30)
    async with await fragile.account(100) as client:
        image = await client.upload_image(pictures.plain(colour))
        fragile.arm(point)
        out = tmp_path / "film.mp4"
        video, _ = await asyncio.wait_for(
            asyncio.gather(
                _generated(client, prompt, image.image_id, out), fragile.revive(service)
            ),
            timeout=60,
        )
        assert video.state == "COMPLETED", video.failure
        await fragile.quiet()
        balance = await client.balance()
        assert balance.available_credits == 100 - video.credits.captured
        assert balance.held_credits == 0
        assert video.credits.captured == video.credits.reserved > 0
    assert len(await fragile.paid_jobs(prompt)) == 1
    seen = pictures.colour(pictures.frames(out)[0])
    assert max(abs(one - other) for one, other in zip(seen, colour, strict=True)) < 12


async def _generated(client: clients.Client, prompt: str, image_id: str, out: Path) -> types.Video:
    return await client.generate(prompt, out=out, image_id=image_id, **TINY)


async def test_every_invariant_holds_after_all_kills(fragile: systems.System) -> None:
    await fragile.quiet()
    assert fragile.disarm() == ""
    assert await invariants.violations(fragile) == []


def test_every_crash_point_is_in_the_matrix() -> None:
    """A failpoint that no test kills at proves nothing."""
    sources = [*ROOT.glob("services/**/*.py"), *ROOT.glob("kit/*.py")]
    marked = {
        name
        for source in sources
        for name in re.findall(r'await failpoint\(\s*"([a-z_.]+)"', source.read_text())
    }
    tested = {point for _, point in CASES} | ELSEWHERE
    assert marked - tested == set(), "crash points that no test kills at"
    assert tested - marked == set(), "crash points that are not in the code any more"
