"""Killing a service at a crash point: what the crash tests share, and the matrix of points."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests import invariants, pictures
from tests import system as systems

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
RECOVERY = {
    "generator": ("generator.recover.after_video", "generator.recover.before_open"),
    "credits": (
        "gateway.recover.after_hold",
        "credits.recover.before_open",
        "gateway.recover.before_open",
    ),
    "gateway": ("gateway.recover.after_video", "gateway.recover.before_open"),
}
"""By the service whose database is restored: where recovery is struck (test_restores.py); the point names who dies."""
ELSEWHERE = {
    # Reached only when something else has failed before: test_pauses.py and the services' own tests.
    "gateway.abandon.before_release",
    "generator.resolve.after_adopt",
    "generator.webhook.before_commit",
    "generator.webhook.after_commit",
    "generator.resolve.before_put_back",
    "generator.stop.before_cancel",
    "generator.stop.after_cancel",
    "generator.fetch.after_spool",
    "generator.late.before_commit",
    "generator.late.after_commit",
    "credits.release.before_commit",
    "storage.quarantine.after_object",
    *(point for points in RECOVERY.values() for point in points),
    "gateway.delete.after_commit",
    "gateway.delete.after_assets",
    # tests/integration/test_gateway_webhooks.py
    "gateway.webhook.after_record",
    "gateway.webhook.before_settle",
    "gateway.delete.before_prompt",
    "gateway.erase.after_begin",
    "gateway.erase.after_assets",
}
LEDGER = (
    "credits.grant.before_commit",
    "credits.grant.after_commit",
    "credits.capture.before_commit",
    "credits.refund.before_commit",
)
STORAGE: dict[str, tuple[str, ...]] = {
    "put": (
        "storage.put.after_row",
        "storage.put.after_keys",
        "storage.put.before_poster",
        "storage.put.after_object",
        "storage.put.before_ready",
        "storage.put.after_ready",
    ),
    "large_put": ("storage.put.after_part",),
    "refused_put": ("storage.put.after_give_up",),
    "fit": ("storage.put.after_keys", "storage.fit.after_object", "storage.put.before_ready"),
    "create_upload": ("storage.upload.after_row",),
    "complete": (
        "storage.complete.before_take",
        "storage.put.after_row",
        "storage.put.after_object",
        "storage.put.after_ready",
        "storage.complete.after_take",
        "storage.complete.after_object",
    ),
    "refused_complete": ("storage.complete.after_refusal",),
    "delete": (
        "storage.delete.after_commit",
        "storage.delete.after_object",
        "storage.delete.after_row",
    ),
    "erase": ("storage.erase.after_commit",),
    "expire": ("storage.expire.after_commit",),
    "sweep_put": ("storage.sweep.after_give_up", "storage.sweep.after_objects"),
    "sweep_upload": ("storage.sweep.after_upload",),
}
"""Where storage is killed in each of its calls and in its sweeper: tests/integration/test_storage_kills.py."""
RULES = (
    "credits.account_rules.before_commit",
    "credits.rulebook.before_commit",
    "credits.activation.before_commit",
)
"""Where the ledger can be killed while an operator sets what it goes by."""


def cases(*services: str) -> list[tuple[str, str]]:
    """The crash points of some services, with the service that each kills."""
    return [(service, point) for service in services for point in MATRIX[service]]


def storage_cases(*calls: str) -> list[tuple[str, str]]:
    """Crash points of storage alone, with the call that each is struck in."""
    return [(call, point) for call in calls for point in STORAGE[call]]


@asynccontextmanager
async def fragile(data_dir: Path) -> AsyncIterator[systems.System]:
    """A system that tests break and that gets up again."""
    async with systems.running(data_dir) as running:
        async with await running.account(100) as client:
            # A finished job of ours in the provider's list: without one, absence can never be proved.
            await client.generate(f"sentinel {uuid.uuid4().hex}", **TINY)
        yield running


async def kill_and_check(system: systems.System, service: str, point: str, out: Path) -> None:
    """Kills the service there while a video is made: it ends, one billed job, one charge, its owner's picture."""
    prompt = f"killed at {point} {uuid.uuid4().hex}"
    colour = (200, 60, 30)
    async with await system.account(100) as client:
        image = await client.upload_image(pictures.plain(colour))
        system.arm(point)
        making = client.generate(prompt, out=out, image_id=image.image_id, **TINY)
        video, _ = await asyncio.wait_for(
            asyncio.gather(making, system.revive(service)), timeout=60
        )
        assert video.state == "COMPLETED", video.failure
        await system.quiet()
        balance = await client.balance()
        assert balance.available_credits == 100 - video.credits.captured
        assert balance.held_credits == 0
        assert video.credits.captured == video.credits.reserved > 0
    assert len(await system.paid_jobs(prompt)) == 1
    seen = pictures.colour(pictures.frames(out)[0])
    assert max(abs(one - other) for one, other in zip(seen, colour, strict=True)) < 12


async def check_all(system: systems.System) -> None:
    """Every invariant, and that every failpoint that was armed has struck."""
    await system.quiet()
    assert system.disarm() == ""
    assert await invariants.violations(system) == []
