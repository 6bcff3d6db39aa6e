"""A simulator as a client meets it: a real process on loopback, spoken to by HTTP in both dialects."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import av
import httpx
import pytest
from PIL import Image

from tests import waiting

ROOT = pathlib.Path(__file__).parents[1]
# Provider time runs 100 times as fast: a queue of 5 s and a render of 16 s take 0.2 s.
FAST = {
    "TIME_FACTOR": "100",
    "API_KEYS": "main:sim-key,other:other-key",
    "IDEMPOTENCY_KEYS": "true",
    "ECHO_MARKER": "true",
    "POLL_AFTER_SECONDS": "10",
    "RENDER_SECONDS_BASE": "4",
    "AZURE_MAX_CONCURRENT_JOBS": "0",
    "AZURE_RENDER_SECONDS_PER_SECOND": "40",
}
QUEUE_SECONDS = 5.0 / 100  # so long at least is a job queued
AZURE = "/openai/v1/video/generations"
VERSION = {"api-version": "preview"}


@dataclasses.dataclass(slots=True)
class Client:
    """What both dialects can do, under one name each."""

    simulator: Simulator

    tiny: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"size": "320x180", "seconds": "1"}
    )
    jobs_path: str = "/v1/videos"
    dialect: str = "openai_videos"
    params: dict[str, str] = dataclasses.field(default_factory=dict)

    async def create(self, prompt: str, **fields: Any) -> httpx.Response:
        return await self.post({"prompt": prompt, **self.tiny, **fields})

    async def post(self, body: Mapping[str, Any], **options: Any) -> httpx.Response:
        http = self.simulator.http
        return await http.post(self.jobs_path, json=body, params=self.params, **options)

    async def made(self, prompt: str, **fields: Any) -> str:
        answer = await self.create(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        params = {**self.params, **options.pop("params", {})}
        return await self.simulator.http.request(method, path, params=params, **options)

    async def get(self, job_id: str) -> httpx.Response:
        return await self.call("GET", f"{self.jobs_path}/{job_id}")

    async def delete(self, job_id: str) -> httpx.Response:
        return await self.call("DELETE", f"{self.jobs_path}/{job_id}")

    async def content_path(self, job_id: str) -> str:
        return f"{self.jobs_path}/{job_id}/content"

    async def content(self, job_id: str, **headers: str) -> httpx.Response:
        return await self.call("GET", await self.content_path(job_id), headers=headers)

    async def until(self, path: str, status: int) -> httpx.Response:
        async def check() -> httpx.Response | None:
            answer = await self.call("GET", path)
            return answer if answer.status_code == status else None

        return await eventually(check)

    async def ended(self, job_id: str) -> dict[str, Any]:
        async def check() -> dict[str, Any] | None:
            job = (await self.get(job_id)).json()
            final = ("completed", "succeeded", "failed", "cancelled")
            return job if job["status"] in final else None

        return await eventually(check)

    async def film(self, job_id: str) -> bytes:
        return (await self.until(await self.content_path(job_id), 200)).content

    async def listed(self, **params: str | int) -> list[dict[str, Any]]:
        answer = await self.call("GET", self.jobs_path, params={"limit": 100, **params})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def failure(self, job: Mapping[str, Any]) -> str | None:
        """Why the job failed, in the words of the dialect."""
        return None if job["error"] is None else job["error"]["code"]


@dataclasses.dataclass(slots=True)
class Videos(Client):
    """`openai_videos`."""

    async def send_image(self, prompt: str, content: bytes, **fields: str) -> httpx.Response:
        files = {"input_reference": ("a.png", content, fields.pop("kind", "image/png"))}
        data = {"prompt": prompt, **self.tiny, **fields}
        return await self.simulator.http.post(self.jobs_path, data=data, files=files)


@dataclasses.dataclass(slots=True)
class Jobs(Client):
    """`azure_jobs`."""

    tiny: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"model": "sora", "width": 320, "height": 180, "n_seconds": 1}
    )
    jobs_path: str = f"{AZURE}/jobs"
    dialect: str = "azure_jobs"
    params: dict[str, str] = dataclasses.field(default_factory=lambda: dict(VERSION))

    async def content_path(self, job_id: str) -> str:
        """Known only when the job has succeeded."""
        job = await self.ended(job_id)
        return f"{AZURE}/{job['generations'][0]['id']}/content/video"

    async def send(
        self, prompt: str, items: Any, *files: tuple[str, bytes], **fields: Any
    ) -> httpx.Response:
        """A multipart creation; `items` that is no text becomes JSON, None is left out."""
        data = {"prompt": prompt, **self.tiny, **fields}
        if items is not None:
            data["inpaint_items"] = items if isinstance(items, str) else json.dumps(items)
        parts: list[tuple[str, Any]] = [
            (name, (None, str(value))) for name, value in data.items() if value is not None
        ]
        parts += [("files", (name, content, "image/png")) for name, content in files]
        return await self.simulator.http.post(self.jobs_path, files=parts, params=self.params)

    def failure(self, job: Mapping[str, Any]) -> str | None:
        return job["failure_reason"]


@dataclasses.dataclass(slots=True)
class Simulator:
    """One running process."""

    process: asyncio.subprocess.Process
    folder: pathlib.Path
    url: str
    http: httpx.AsyncClient

    @property
    def videos(self) -> Videos:
        return Videos(self)

    @property
    def jobs(self) -> Jobs:
        return Jobs(self)

    def client(self, dialect: str) -> Client:
        return {"openai_videos": self.videos, "azure_jobs": self.jobs}[dialect]

    async def log(self, **params: str) -> list[dict[str, Any]]:
        return (await self.http.get("/_sim/log", params=params)).json()["entries"]

    async def accepted(self, prompt: str) -> list[dict[str, Any]]:
        return await self.log(kind="accepted", prompt=prompt)

    async def count(self) -> int:
        return (await self.http.get("/_sim/state")).json()["accepted"]

    async def arm(self, **rule: Any) -> None:
        answer = await self.http.post("/_sim/faults", json=rule)
        assert answer.status_code == 201, answer.text


async def eventually(check: Callable[[], Awaitable[Any]]) -> Any:
    """The first answer that is true, soon after it is."""
    return await waiting.eventually(check, within_seconds=60, every_seconds=0.02)


@contextlib.asynccontextmanager
async def running(folder: pathlib.Path, settings: Mapping[str, str]) -> AsyncIterator[Simulator]:
    """A simulator on a free port, killed at the end."""
    given = {"PORT": "0", "DATA_DIR": str(folder), **settings}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.simulator"),
        cwd=ROOT,
        env=os.environ | {f"SIMULATOR_{name}": value for name, value in given.items()},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            url = json.loads(await process.stdout.readline())["url"]
        headers = {"authorization": "Bearer sim-key"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=10) as http:
            yield Simulator(process, folder, url, http)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture(scope="session")
async def simulator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Simulator]:
    """For all tests of one file, which leave no rules behind."""
    async with running(tmp_path_factory.mktemp("simulator"), FAST) as started:
        yield started


@pytest.fixture(autouse=True)
async def no_rules_left(simulator: Simulator) -> AsyncIterator[None]:
    yield
    await simulator.http.delete("/_sim/faults")


def picture(width: int, height: int) -> tuple[Image.Image, bytes]:
    """Something with shapes in it, and the same as PNG."""
    image = Image.radial_gradient("L").resize((width, height))
    image = Image.merge("RGB", (image, image.transpose(Image.Transpose.ROTATE_180), image))
    image.paste((220, 40, 30), (width // 8, height // 4, width // 3, height // 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image, buffer.getvalue()


def clip(seconds: float, rate: int = 24) -> tuple[list[Image.Image], bytes]:
    """A film whose brightness rises from frame to frame, and the same as MP4."""
    count = round(seconds * rate)
    shown = [Image.new("RGB", (160, 90), (30 + 180 * at // count, 60, 90)) for at in range(count)]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
        for image in shown:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    return shown, buffer.getvalue()


def decoded(film: bytes) -> tuple[list[Image.Image], float, Mapping[str, str], str]:
    """Every frame, the duration, the metadata, the codec."""
    with av.open(io.BytesIO(film), "r") as container:
        stream = container.streams.video[0]
        duration = float(container.duration or 0) / 1e6
        frames = [frame.to_image() for frame in container.decode(stream)]
        return frames, duration, dict(container.metadata), stream.codec_context.name
