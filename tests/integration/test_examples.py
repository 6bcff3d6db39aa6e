"""The scripts of examples/, run as their readers run them, against the whole system."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
import uuid
from pathlib import Path

from framewire import client as clients
from tests import pictures
from tests import system as systems

EXAMPLES = Path(__file__).parents[2] / "examples"


async def run(name: str, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of an example."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("FRAMEWIRE_")
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / name), *arguments,
        env=inherited | {"PYTHONPATH": str(EXAMPLES.parent)} | env,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode or 0, out.decode(), err.decode()


async def caller(system: systems.System, credits: int) -> tuple[clients.Client, dict[str, str]]:
    """An account, and the environment of a script that works for it."""
    account = await system.operator.create_account(f"example {uuid.uuid4().hex[:8]}")
    await system.operator.grant(account.account_id, credits)
    key = await system.operator.create_api_key(account_id=account.account_id)
    address = system.stack.gateway_address
    env = {"FRAMEWIRE_ADDRESS": address, "FRAMEWIRE_API_KEY": key.secret}
    return clients.Client(address, key.secret, account_id=account.account_id), env


async def test_an_image_becomes_6_s_of_1280x720_for_10_credits(
    system: systems.System, tmp_path: Path
) -> None:
    client, env = await caller(system, 25)
    prompt, out = f"the camera rises {uuid.uuid4().hex}".ljust(500, "."), tmp_path / "rocket.mp4"
    async with client:
        code, said, trouble = await run(
            "sora2_credits.py", str(EXAMPLES / "rocket.jpg"), prompt, str(out), **env
        )
        assert (code, trouble) == (0, "")
        assert (await client.balance()).available_credits == 15
        (video,) = [video async for video in client.list_videos()]
    assert (video.spec.model, video.outputs[0].width, video.outputs[0].height) == (
        "sora-2", 1280, 720,
    )  # fmt: skip
    assert video.spec.input_image_id
    assert abs(video.outputs[0].duration_ms - 6000) <= 100
    lines = said.splitlines()
    assert lines[0] == "balance before: 25 credits"
    assert lines[-3:-1] == ["taken: 10 credits", "balance after: 15 credits"]
    assert any(re.fullmatch(r"pending \w+ \d+ %", line) for line in lines), "no progress is shown"
    assert lines[-4] == "completed done 100 %"
    assert hashlib.sha256(out.read_bytes()).hexdigest() == video.outputs[0].sha256
    assert len(await system.paid_jobs(prompt)) == 1


async def test_what_cannot_be_made_is_said_in_one_line(
    system: systems.System, tmp_path: Path
) -> None:
    client, env = await caller(system, 5)
    image, out = str(EXAMPLES / "rocket.jpg"), tmp_path / "none.mp4"
    async with client:
        code, _, trouble = await run("sora2_credits.py", image, "too dear", str(out), **env)
        assert code == 1
        assert trouble.endswith("(INSUFFICIENT_CREDITS)\n")
        assert trouble.count("\n") == 1
        code, _, trouble = await run("sora2_credits.py", image, "x" * 501, str(out), **env)
        assert code == 2
        assert "501 characters" in trouble
        assert (await client.balance()).available_credits == 5
    assert not out.exists()


async def test_sora_1_makes_1_s_of_1080x1080(system: systems.System, tmp_path: Path) -> None:
    client, env = await caller(system, 20)
    prompt, out = f"a calm sea {uuid.uuid4().hex}", tmp_path / "sea.mp4"
    async with client:
        code, said, trouble = await run("sora1_square.py", prompt, str(out), **env)
        assert (code, trouble) == (0, "")
        (video,) = [video async for video in client.list_videos()]
        assert (await client.balance()).available_credits == 20 - video.credits.captured
    assert said.splitlines()[0] == f"price: {video.credits.captured} credits"
    assert said.splitlines()[-1].startswith(f"saved: {out} (1080x1080, ")
    assert abs(video.outputs[0].duration_ms - 1000) <= 100
    assert (video.spec.model, video.spec.seconds) == ("sora-1", 1)
    assert pictures.frames(out)[0].size == (1080, 1080)
    assert len(await system.paid_jobs(prompt)) == 1


async def test_a_template_is_filled_for_each_video_of_a_batch(system: systems.System) -> None:
    client, env = await caller(system, 25)
    async with client:
        code, said, trouble = await run(
            "templates.py", "fog", "snow", "rain", "--size", "320x180", **env
        )
        assert (code, trouble) == (0, "")
        videos = [video async for video in client.list_videos(template="launch")]
        assert [template.version async for template in client.list_templates()] == [1]
    lines = said.splitlines()
    assert lines[0] == "template: launch version 1"
    assert lines[1].startswith(
        "snow: refused: launch version 1: template.variables.weather: must be"
    )
    assert lines[1].endswith("(VARIABLES_INVALID)")
    prompts = [f"The camera rises along the rocket at 3 m/s, in {each}" for each in ("fog", "rain")]
    assert sorted(lines[2:4]) == [f"completed: {prompt}" for prompt in prompts]
    assert lines[4:] == ["made from this version: 2"]
    assert sorted(video.spec.prompt for video in videos) == prompts
    assert {video.template and video.template.version for video in videos} == {1}


async def test_a_subscriber_hears_of_a_completed_video(system: systems.System) -> None:
    client, _ = await caller(system, 5)
    async with client:
        video = await client.generate("heard of", model="sora-2", width=320, height=180, seconds=1)
    assert video.created_at is not None
    code, said, trouble = await run(
        "subscribe.py",
        *("--account", client.account_id, "--since", video.created_at.isoformat(), "--count", "1"),
        FRAMEWIRE_NATS_URL=system.stack.addresses.nats_url,
    )
    assert (code, trouble) == (0, "")
    assert said == f"completed {video.video_id} 320x180, 1 s sha256 {video.outputs[0].sha256}\n"
