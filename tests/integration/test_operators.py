"""Operators' commands through the gateway: what they change, what they answer, and the audit that they leave."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid

import pytest

from framewire import errors
from kit import ids
from tests import system as systems
from tests.waiting import eventually

TINY = {"model": "sora-2", "width": 320, "height": 180, "seconds": 1}


async def framewire(system: systems.System, *arguments: str) -> tuple[int, str]:
    """The command, with the operator's key: exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "framewire.cli", *arguments),
        *("--address", system.stack.gateway_address, "--api-key", system.stack.operator_key),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    return process.returncode or 0, printed.decode()


async def done(system: systems.System, *arguments: str) -> str:
    code, printed = await framewire(system, *arguments)
    assert code == 0, printed
    return printed


async def audited(system: systems.System, why: str) -> list[tuple[str, str]]:
    async with system.database("gateway") as database:
        found = await database.fetch(
            "SELECT method, outcome FROM audit WHERE why = $1 ORDER BY created_at", why
        )
    return [(row["method"], row["outcome"]) for row in found]


async def test_a_provider_is_paused_and_a_video_cancelled(system: systems.System) -> None:
    why = f"repairs {uuid.uuid4()}"
    async with await system.account(100) as client:
        assert "no: paused" in await done(system, "providers", "pause", "main", "--why", why)
        try:
            video = await client.create_video("A cat", **TINY)

            async def queued() -> bool:
                found = await done(system, "attempts", "list", "--video", video.video_id, "--json")
                return [json.loads(line)["state"] for line in found.splitlines()] == ["QUEUED"]

            await eventually(queued, within_seconds=20)
            code, printed = await framewire(
                system, "attempts", "retry", video.video_id, "--number", "1", "--accept-double-cost"
            )
            assert (code, "ATTEMPT_NOT_UNDECIDED" in printed) == (1, True), printed
            for _ in range(2):
                printed = await done(system, "attempts", "cancel", video.video_id, "--why", why)
                assert "CANCELLED" in printed
        finally:
            assert "yes" in await done(system, "providers", "resume", "main", "--why", why)
        shown = await done(system, "attempts", "show", video.video_id)
        assert "QUEUED" in shown
        assert "CANCELLED" in shown
        await system.quiet()
        assert (await client.get_video(video.video_id)).state == "CANCELLED"
    told = [("PauseProviderAccount", "OK"), *[("CancelAttempt", "OK")] * 2]
    assert await audited(system, why) == [*told, ("PauseProviderAccount", "OK")]


async def test_refusals_are_told_and_on_record(system: systems.System) -> None:
    why, video_id = f"mistake {uuid.uuid4()}", ids.new_id()
    with pytest.raises(errors.FramewireError) as refused:
        await system.operator.attempts.resolve(video_id, "GIVE_UP", why=why)
    assert refused.value.reason == "ATTEMPT_NOT_FOUND"
    assert await audited(system, why) == [("ResolveAttempt", "ATTEMPT_NOT_FOUND")]
    async with await system.account(0) as member:
        with pytest.raises(errors.FramewireError) as refused:
            await member.attempts.pause("main")
        assert refused.value.reason == "ROLE_NOT_ALLOWED"
