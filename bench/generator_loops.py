"""The two seeds' way of making a video, as small clients: one loop for each video in progress, held until it ends.

Verbatim: a poll every 2 s, 60 tries, and any answer but 200 is an error, a 429 too. Polite: the same, but a 429
anywhere is waited out as the provider asks, and the tries have no end.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import httpx

from bench import generator_stack

POLL_SECONDS = 2.0
TRIES = 60


class Failed(Exception):
    """The loop gave this video up."""


@dataclass(slots=True)
class Tally:
    """What became of the videos."""

    finished: int = 0
    failed: int = 0
    seconds: float = 0.0
    """Real seconds, of the whole run."""


class Loop:
    """One of the two ways, with a key of its own."""

    def __init__(self, base_url: str, key: str, time_factor: float, *, polite: bool) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=30,
        )
        self._factor = time_factor
        self._polite = polite

    async def make(self, count: int, at_once: int) -> Tally:
        """Makes so many videos, with a worker for each that the provider renders at once."""
        tally, left = Tally(), iter(range(count))

        async def work() -> None:
            for _ in left:
                try:
                    await self._video()
                    tally.finished += 1
                except (Failed, httpx.HTTPError):
                    tally.failed += 1

        started = time.monotonic()
        async with self._http, asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        tally.seconds = time.monotonic() - started
        return tally

    async def _video(self) -> None:
        spec = generator_stack.job().spec
        fields = {"model": spec.model, "prompt": spec.prompt, "seconds": str(spec.seconds)}
        fields["size"] = f"{spec.width}x{spec.height}"
        video_id = (await self._ask("POST", "/videos", fields)).json()["id"]
        tries = 0
        while self._polite or tries < TRIES:
            await asyncio.sleep(POLL_SECONDS / self._factor)
            status = (await self._ask("GET", f"/videos/{video_id}")).json()["status"]
            if status == "completed":
                await self._ask("GET", f"/videos/{video_id}/content")
                return
            if status == "failed":
                raise Failed(status)
            tries += 1
        raise Failed("timeout")

    async def _ask(
        self, method: str, path: str, fields: dict[str, str] | None = None
    ) -> httpx.Response:
        while True:
            answer = await self._http.request(method, path, json=fields)
            if answer.status_code == 200:
                return answer
            if answer.status_code != 429 or not self._polite:
                raise Failed(f"HTTP {answer.status_code}")
            # "Too many running tasks" says no time: as long as between polls.
            wait_ms = float(
                answer.headers.get("retry-after-ms", POLL_SECONDS * 1000 / self._factor)
            )
            await asyncio.sleep(wait_ms / 1000)
