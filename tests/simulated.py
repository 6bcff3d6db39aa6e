"""The simulator as a process of its own, for tests of whoever speaks to it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
KEY = "sim-key"


@dataclass(slots=True)
class Simulator:
    """One running simulator."""

    url: str
    http: httpx.AsyncClient

    async def log(self, **params: str) -> list[dict[str, Any]]:
        return (await self.http.get("/_sim/log", params=params)).json()["entries"]

    async def accepted(self, prompt: str) -> list[dict[str, Any]]:
        """What it made, and would bill, for a prompt: the oracle."""
        return await self.log(kind="accepted", prompt=prompt)

    async def arm(self, name: str, **rule: Any) -> None:
        answer = await self.http.post("/_sim/faults", json={"name": name, **rule})
        assert answer.status_code == 201, answer.text

    async def clear(self) -> None:
        await self.http.delete("/_sim/faults")


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Simulator]:
    """A simulator on a free port, killed at the end. Settings without their prefix, in lower case."""
    given = {"port": 0, "data_dir": folder, "api_keys": KEY, **settings}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.simulator"),
        cwd=ROOT,
        env=os.environ | {f"SIMULATOR_{name.upper()}": str(value) for name, value in given.items()},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            url = json.loads(await process.stdout.readline())["url"]
        async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as http:
            yield Simulator(url, http)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
