"""The simulator as a client meets it: a real process on loopback, spoken to by HTTP."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import av
import av.error
import httpx
import pytest
from PIL import Image, ImageChops, ImageStat

from services.simulator import faults, quirks

ROOT = pathlib.Path(__file__).parents[2]
TINY = {"size": "320x180", "seconds": "1"}
# Provider time runs 100 times as fast: a queue of 5 s and a render of 32 s take 0.4 s.
FAST = {
    "TIME_FACTOR": "100",
    "API_KEYS": "main:sim-key,other:other-key",
    "IDEMPOTENCY_KEYS": "true",
    "ECHO_MARKER": "true",
    "POLL_AFTER_SECONDS": "10",
}


@dataclasses.dataclass(slots=True)
class Simulator:
    """One running process."""

    process: asyncio.subprocess.Process
    url: str
    http: httpx.AsyncClient

    async def create(self, prompt: str, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/videos", json={"prompt": prompt, **TINY, **fields})

    async def send_image(self, prompt: str, content: bytes, **fields: str) -> httpx.Response:
        files = {"input_reference": ("a.png", content, fields.pop("kind", "image/png"))}
        data = {"prompt": prompt, **TINY, **fields}
        return await self.http.post("/v1/videos", data=data, files=files)

    async def until(self, path: str, status: int) -> httpx.Response:
        async def check() -> httpx.Response | None:
            answer = await self.http.get(path)
            return answer if answer.status_code == status else None

        return await eventually(check)

    async def made(self, prompt: str, **fields: Any) -> str:
        answer = await self.create(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    async def get(self, job_id: str) -> httpx.Response:
        return await self.http.get(f"/v1/videos/{job_id}")

    async def content(self, job_id: str, **headers: str) -> httpx.Response:
        return await self.http.get(f"/v1/videos/{job_id}/content", headers=headers)

    async def ended(self, job_id: str) -> dict[str, Any]:
        async def check() -> dict[str, Any] | None:
            job = (await self.get(job_id)).json()
            return job if job["status"] in ("completed", "failed") else None

        return await eventually(check)

    async def film(self, job_id: str) -> bytes:
        return (await self.until(f"/v1/videos/{job_id}/content", 200)).content

    async def listed(self, **params: str | int) -> list[dict[str, Any]]:
        answer = await self.http.get("/v1/videos", params={"limit": 100, **params})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    async def log(self, **params: str) -> list[dict[str, Any]]:
        return (await self.http.get("/_sim/log", params=params)).json()["entries"]

    async def accepted(self, prompt: str) -> list[dict[str, Any]]:
        return await self.log(kind="accepted", prompt=prompt)

    async def arm(self, **rule: Any) -> None:
        answer = await self.http.post("/_sim/faults", json=rule)
        assert answer.status_code == 201, answer.text


async def eventually(check: Callable[[], Awaitable[Any]], seconds: float = 15) -> Any:
    """The first answer that is not None."""
    deadline = time.monotonic() + seconds
    while (found := await check()) is None:
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)
    return found


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
            yield Simulator(process, url, http)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture(scope="session")
async def simulator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Simulator]:
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


def decoded(film: bytes) -> tuple[list[Image.Image], float, Mapping[str, str], str]:
    """Every frame, the duration, the metadata, the codec."""
    with av.open(io.BytesIO(film), "r") as container:
        stream = container.streams.video[0]
        duration = float(container.duration or 0) / 1e6
        frames = [frame.to_image() for frame in container.decode(stream)]
        return frames, duration, dict(container.metadata), stream.codec_context.name


def distance(one: Image.Image, other: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


# The dialect


async def test_text_job_ends_in_a_playable_film(simulator: Simulator) -> None:
    answer = await simulator.create("a lighthouse in the fog", model="sora-2-pro")
    job = answer.json()
    assert re.fullmatch(r"video_[0-9a-f]{48}", job["id"])
    assert int(job["id"][6:14], 16) == job["created_at"]
    assert (job["object"], job["status"], job["progress"]) == ("video", "queued", 0)
    assert (job["model"], job["seconds"], job["size"]) == ("sora-2-pro", "1", "320x180")
    assert job["completed_at"] is job["expires_at"] is job["error"] is None
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["openai-poll-after-ms"] == "100"
    assert (await simulator.content(job["id"])).status_code == 404

    seen: list[tuple[str, int]] = []

    async def check() -> bool | None:
        state = (await simulator.get(job["id"])).json()
        seen.append((state["status"], state["progress"]))
        return True if state["status"] == "completed" else None

    await eventually(check)
    order = ["queued", "in_progress", "completed"]
    assert seen == sorted(seen, key=lambda pair: (order.index(pair[0]), pair[1]))
    assert "in_progress" in {status for status, _ in seen}
    assert seen[-1] == ("completed", 100)

    film = await simulator.film(job["id"])
    frames, duration, metadata, codec = decoded(film)
    assert (codec, len(frames), frames[0].size) == ("h264", 24, (320, 180))
    assert duration == pytest.approx(1.0, abs=0.05)
    assert metadata["comment"] == f"simulated, no model; job {job['id']}"
    assert film.index(b"moov") < film.index(b"mdat")
    assert distance(frames[0], frames[-1]) > 0.5


@pytest.mark.parametrize("form", ["file", "json", "brackets"])
async def test_image_job_starts_with_the_image(simulator: Simulator, form: str) -> None:
    image, content = picture(320, 180)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    fields = {"prompt": f"pan over it, as {form}", **TINY}
    if form == "file":
        answer = await simulator.send_image(fields["prompt"], content)
    elif form == "brackets":
        parts = {name: (None, value) for name, value in fields.items()}
        parts["input_reference[image_url]"] = (None, url)
        answer = await simulator.http.post("/v1/videos", files=parts)
    else:
        body = {**fields, "input_reference": {"image_url": url}}
        answer = await simulator.http.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    frames, duration, _, _ = decoded(await simulator.film(answer.json()["id"]))
    assert frames[0].size == (320, 180)
    assert duration == pytest.approx(1.0, abs=0.05)
    assert distance(frames[0], image) < 2.5
    assert distance(frames[-1], image) > 5
    (entry,) = await simulator.accepted(fields["prompt"])
    assert len(entry["reference_sha256"]) == 64


async def test_six_seconds_of_720p_render_fast(simulator: Simulator) -> None:
    image, content = picture(1280, 720)
    answer = await simulator.send_image("six", content, size="1280x720", seconds="6")
    frames, duration, _, _ = decoded(await simulator.film(answer.json()["id"]))
    assert len(frames) == 144
    assert duration == pytest.approx(6.0, abs=0.05)
    assert distance(frames[0], image) < 2.5


async def test_multipart_without_a_file_and_with_metadata(simulator: Simulator) -> None:
    fields = {"prompt": "no file", **TINY, "metadata[attempt]": "a-17"}
    parts = {name: (None, value) for name, value in fields.items()}
    answer = await simulator.http.post("/v1/videos", files=parts)
    assert answer.json()["metadata"] == {"attempt": "a-17"}


async def test_content_in_ranges_and_thumbnail(simulator: Simulator) -> None:
    job_id = await simulator.made("ranges")
    whole = await simulator.film(job_id)
    full = await simulator.content(job_id)
    assert full.headers["content-type"] == "video/mp4"
    assert int(full.headers["content-length"]) == len(whole)
    part = await simulator.content(job_id, range="bytes=100-199")
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    rest = await simulator.content(job_id, range=f"bytes={len(whole) - 5}-")
    assert rest.content == whole[-5:]
    beyond = await simulator.content(job_id, range=f"bytes={len(whole)}-")
    assert beyond.status_code == 416
    thumbnail = await simulator.http.get(f"/v1/videos/{job_id}/content?variant=thumbnail")
    assert thumbnail.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (320, 180)


async def test_list_pages_both_ways_and_per_key(simulator: Simulator) -> None:
    async with httpx.AsyncClient(
        base_url=simulator.url, headers={"authorization": "Bearer other-key"}
    ) as other:
        empty = (await other.get("/v1/videos")).json()
        ids = {"first_id": None, "last_id": None}
        assert empty == {"object": "list", "data": [], **ids, "has_more": False}
        made = [
            (await other.post("/v1/videos", json={"prompt": f"page {n}", **TINY})).json()["id"]
            for n in range(5)
        ]
        for order, wanted in (("asc", made), ("desc", made[::-1])):
            seen: list[str] = []
            more = True
            while more:
                params = {"limit": 2, "order": order} | ({"after": seen[-1]} if seen else {})
                page = (await other.get("/v1/videos", params=params)).json()
                assert page["first_id"] == page["data"][0]["id"]
                assert page["last_id"] == page["data"][-1]["id"]
                seen += [job["id"] for job in page["data"]]
                more = page["has_more"]
            assert seen == wanted
        # A cursor that was deleted between two pages still works.
        gone = await other.delete(f"/v1/videos/{made[2]}")
        assert gone.json() == {"id": made[2], "object": "video.deleted", "deleted": True}
        assert (await other.get(f"/v1/videos/{made[2]}")).status_code == 404
        after = (await other.get(f"/v1/videos?order=asc&after={made[2]}")).json()
        assert [job["id"] for job in after["data"]] == made[3:]
        none = (await other.get("/v1/videos?limit=0")).json()
        assert (none["data"], none["has_more"]) == ([], True)
    assert (await simulator.get(made[0])).status_code == 404
    assert not {job["id"] for job in await simulator.listed()} & set(made)


SECONDS = "'1', '2', '3', '4', '5', '6', '8', '10', '12', '16', {} '20'"


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"seconds": "7"}, f"Invalid value: '7'. Supported values are: {SECONDS.format('and')}."),
    (
        {"seconds": 4},
        f"Invalid type for 'seconds': expected one of {SECONDS.format('or')}, but got",
    ),
    ({"size": "1x1"}, "Invalid value: '1x1'. Supported values are: '"),
    ({"size": "1920x1080"}, "Invalid value: '1920x1080'."),
    ({"model": "a"}, "Invalid value: 'a'. Supported values are: 'sora-2' and 'sora-2-pro'."),
    ({"prompt": None}, "Missing required parameter: 'prompt'."),
    ({"prompt": "x" * 32_001}, "Invalid 'prompt'"),
    ({"prompt": "\ud800"}, "Invalid 'prompt'"),
    ({"prompt": "[fault:no_such]"}, "no fault is named 'no_such'"),
    ({"prompt": "[fault:hang=x]"}, "a fault token is"),
    ({"input_reference": {"image_url": "x", "file_id": "y"}}, "Invalid 'input_reference'"),
    ({"input_reference": "x"}, "Invalid type for 'input_reference': expected a file"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
async def test_bad_requests_get_the_services_words(
    simulator: Simulator, fields: dict[str, Any], message: str
) -> None:
    content = json.dumps({"prompt": "bad request", **TINY, **fields})
    before = (await simulator.http.get("/_sim/state")).json()["accepted"]
    answer = await simulator.http.post(
        "/v1/videos", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith(message)
    assert (error["type"], error["param"]) == ("invalid_request_error", next(iter(fields)))
    assert (await simulator.http.get("/_sim/state")).json()["accepted"] == before


MISMATCH = "Inpaint image must match the requested width and height"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (picture(64, 64)[1], "image/png", MISMATCH),
        (b"no image", "image/png", "Invalid image"),
        (picture(320, 180)[1][:900], "image/png", "Invalid image"),
        (picture(320, 180)[1], "text/plain", "Invalid file 'a.png': unsupported mimetype"),
    ],
)
async def test_bad_references_are_refused(
    simulator: Simulator, content: bytes, kind: str, message: str
) -> None:
    answer = await simulator.send_image("x", content, kind=kind)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


async def test_keys_and_routes_are_checked(simulator: Simulator) -> None:
    for headers in ({"authorization": "Bearer wrong"}, {"authorization": "sim-key"}):
        answer = await simulator.http.get("/v1/videos", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for bad in ("limit=101", "limit=-1", "limit=x", "order=up", "after=video_0"):
        assert (await simulator.http.get(f"/v1/videos?{bad}")).status_code == 400
    for route in ("GET /v1/videos/video_0", "GET /v1/x", "DELETE /v1/videos/x"):
        answer = await simulator.http.request(*route.split())
        assert answer.status_code == 404
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_idempotency_key_makes_one_job(simulator: Simulator) -> None:
    headers = {"idempotency-key": "once"}
    body = {"prompt": "keyed", **TINY}
    answers = await asyncio.gather(
        *(simulator.http.post("/v1/videos", json=body, headers=headers) for _ in range(8))
    )
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(await simulator.accepted("keyed")) == 1
    other = await simulator.http.post("/v1/videos", json={**body, "seconds": "4"}, headers=headers)
    assert other.status_code == 409


async def test_the_page_says_that_it_runs_no_model(simulator: Simulator) -> None:
    await simulator.made("<script>alert(1)</script>")
    page = (await simulator.http.get("/")).text
    assert "It runs no model" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


# Faults


@pytest.mark.parametrize(
    ("name", "status", "jobs"),
    [
        ("unauthorized", 401, 0),
        ("rate_limited=300", 429, 0),
        ("rate_limited_bare", 429, 0),
        ("too_many_tasks", 429, 0),
        ("model_gone", 404, 0),
        ("error_before=503", 503, 0),
        ("error_after", 500, 1),
        ("poll_404", 200, 1),
    ],
)
async def test_creation_answers_wrongly_once(
    simulator: Simulator, name: str, status: int, jobs: int
) -> None:
    prompt = f"wrong once [fault:{name}]"
    answer = await simulator.create(prompt)
    assert answer.status_code == status
    assert len(await simulator.accepted(prompt)) == jobs
    if status == 429:
        waits = (answer.headers.get("retry-after"), answer.headers.get("retry-after-ms"))
        assert waits == (("3", "3000") if "=" in name else (None, None))
    again = await simulator.create(prompt)
    assert again.status_code == 200
    assert len(await simulator.accepted(prompt)) == jobs + 1
    if name != "poll_404":
        assert len(await simulator.log(kind="fault", prompt=prompt)) == 1


async def test_moderation_now_is_for_ever(simulator: Simulator) -> None:
    for _ in range(2):
        answer = await simulator.create("[fault:moderated_now]")
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("The request is blocked by our")


async def test_unauthorized_for_a_while(simulator: Simulator) -> None:
    job_id = await simulator.made("before the key is refused")
    assert (await simulator.create("[fault:unauthorized=40]")).status_code == 401
    assert (await simulator.get(job_id)).status_code == 401
    await simulator.until(f"/v1/videos/{job_id}", 200)


async def test_lost_answer_leaves_a_job(simulator: Simulator) -> None:
    prompt = "lost [fault:lost_answer]"
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await simulator.create(prompt)
    assert len(await simulator.accepted(prompt)) == 1
    assert (await simulator.create(prompt)).status_code == 200


@pytest.mark.parametrize(("name", "jobs"), [("hang", 1), ("hang_before", 0)])
async def test_hang_until_the_client_gives_up(simulator: Simulator, name: str, jobs: int) -> None:
    prompt = f"[fault:{name}]"
    with pytest.raises(httpx.ReadTimeout):
        await simulator.http.post("/v1/videos", json={"prompt": prompt, **TINY}, timeout=0.4)
    assert len(await simulator.accepted(prompt)) == jobs


@pytest.mark.parametrize(
    ("name", "code"),
    [("moderated_later", "moderation_blocked"), ("fails_later", "internal_error")],
)
async def test_job_fails_later(simulator: Simulator, name: str, code: str) -> None:
    job = await simulator.ended(await simulator.made(f"[fault:{name}]"))
    assert (job["status"], job["error"]["code"]) == ("failed", code)
    assert (await simulator.content(job["id"])).status_code == 404
    (entry,) = await simulator.accepted(f"[fault:{name}]")
    assert entry["billed_micros"] == 0


async def test_stuck_job_never_ends(simulator: Simulator) -> None:
    stuck, control = await simulator.made("[fault:stuck]"), await simulator.made("control")
    await simulator.ended(control)
    job = (await simulator.get(stuck)).json()
    assert job["status"] == "in_progress"


@pytest.mark.parametrize(("name", "status"), [("poll_404=2", 404), ("poll_error=502*2", 502)])
async def test_polls_go_wrong(simulator: Simulator, name: str, status: int) -> None:
    job_id = await simulator.made(f"[fault:{name}]")
    assert [(await simulator.get(job_id)).status_code for _ in range(3)] == [status, status, 200]


async def test_content_goes_wrong(simulator: Simulator) -> None:
    names = ("403", "html", "empty", "cut", "corrupt")
    job_id = await simulator.made("".join(f"[fault:content_{name}]" for name in names))
    await simulator.until(f"/v1/videos/{job_id}/content", 403)
    page, empty = await simulator.content(job_id), await simulator.content(job_id)
    assert (page.status_code, page.headers["content-type"][:9]) == (200, "text/html")
    assert (empty.status_code, empty.content) == (200, b"")
    with pytest.raises(httpx.RemoteProtocolError):
        await simulator.content(job_id)
    corrupt = await simulator.content(job_id)
    with pytest.raises(av.error.FFmpegError):
        decoded(corrupt.content)
    whole = await simulator.content(job_id)
    assert len(whole.content) == len(corrupt.content)
    decoded(whole.content)


async def test_content_comes_late(simulator: Simulator) -> None:
    job_id = await simulator.made("[fault:content_404=30]")
    await simulator.ended(job_id)
    since = time.monotonic()
    assert (await simulator.content(job_id)).status_code == 404
    await simulator.film(job_id)
    assert time.monotonic() - since > 0.15


async def test_lists_lag_drop_shorten_and_fail(simulator: Simulator) -> None:
    lagging = await simulator.made("[fault:list_lag=60]")
    dropped = await simulator.made("[fault:list_drop]")
    plain = await simulator.made("plain")
    first = {job["id"] for job in await simulator.listed(limit=20)}
    assert first & {lagging, dropped, plain} == {plain}
    second = {job["id"] for job in await simulator.listed(limit=20)}
    assert second & {dropped, plain} == {dropped, plain}

    async def shown() -> bool | None:
        return True if lagging in {job["id"] for job in await simulator.listed()} else None

    await eventually(shown)
    await simulator.arm(name="list_lag", value=6000, match="plain")
    assert plain not in {job["id"] for job in await simulator.listed(limit=20)}
    await simulator.arm(name="list_drop", value=1)
    assert await simulator.listed() == []
    await simulator.made("[fault:list_error=503]")
    assert (await simulator.http.get("/v1/videos")).status_code == 503
    await simulator.made("[fault:list_short=1]")
    assert [len(await simulator.listed()) for _ in range(2)] == [1, 1]


async def test_strangers_in_the_list(simulator: Simulator) -> None:
    prompt = "mine [fault:twin_job]"
    mine = await simulator.made(prompt)
    twins = [job for job in await simulator.listed(limit=10) if job["prompt"] == prompt]
    assert len(twins) == 2
    assert len({(job["model"], job["size"], job["seconds"]) for job in twins}) == 1
    assert [entry["id"] for entry in await simulator.accepted(prompt)] == [mine]
    await simulator.arm(name="foreign_jobs", value=2)
    newest = await simulator.listed(limit=2)
    assert all(job["prompt"].startswith("A stranger's film") for job in newest)
    assert len(await simulator.log(kind="foreign", prompt="A stranger's film")) == 2


async def test_rules_match_count_and_draw_by_seed(simulator: Simulator) -> None:
    await simulator.arm(name="error_before", match="some of these", probability=0.5, times=0)
    await simulator.arm(name="rate_limited_bare", match="twice", times=2)
    drawn = [(await simulator.create("some of these")).status_code for _ in range(12)]
    rule = (await simulator.http.get("/_sim/faults")).json()["faults"][0]
    wanted = [random.Random(f"0:{rule['id']}:{n}").random() < 0.5 for n in range(12)]
    assert [status == 500 for status in drawn] == wanted
    assert rule["strikes"] == sum(wanted)
    counted = [(await simulator.create("twice")).status_code for _ in range(3)]
    assert counted == [429, 429, 200]
    await simulator.http.delete("/_sim/faults")
    assert (await simulator.create("some of these")).status_code == 200
    for bad in ({"name": "x"}, {"name": "hang", "tmes": 1}, {"name": "hang", "times": -1}, []):
        assert (await simulator.http.post("/_sim/faults", json=bad)).status_code == 400


def test_every_fault_is_documented_and_tested() -> None:
    """By name: a fault that is in no table row or in no test here is a defect."""
    rows = re.findall(r"^\| ([a-z0-9_]+) +\|", faults.__doc__ or "", re.MULTILINE)
    assert set(rows) - {"name"} == set(faults.DEFAULT_VALUES)
    source = pathlib.Path(__file__).read_text().replace('"content_{name}', "")
    spelt = {f"content_{name}" for name in ("403", "html", "empty", "cut", "corrupt")}
    assert not [name for name in set(rows) - {"name"} - spelt if name not in source]


# Quotas, expiry and durability, each with a process of its own


async def test_limits_per_minute_and_at_once(tmp_path: pathlib.Path) -> None:
    settings = {**FAST, "REQUESTS_PER_MINUTE": "6", "MAX_CONCURRENT_JOBS": "2"}
    async with running(tmp_path, settings) as limited:
        answers = [await limited.create(f"job {n}") for n in range(7)]
        assert [answer.status_code for answer in answers] == [200] * 2 + [429] * 5
        error = {"message": "Too many running tasks", "type": "video_generation_user_error"}
        assert answers[2].json()["error"] == {**error, "param": None, "code": None}
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "5"
        last = answers[-1]
        assert last.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(last.headers["retry-after-ms"]) <= 600
        assert last.headers["retry-after"] == "1"

        async def check() -> bool | None:
            return True if (await limited.create("later")).status_code == 200 else None

        await eventually(check)


async def test_content_expires(tmp_path: pathlib.Path) -> None:
    settings = {**FAST, "RETENTION_SECONDS": "30", "CONTENT_LAG_SECONDS": "0"}
    async with running(tmp_path, settings) as forgetful:
        job_id = await forgetful.made("soon gone")
        await forgetful.film(job_id)
        await forgetful.until(f"/v1/videos/{job_id}/content", 404)
        assert (await forgetful.get(job_id)).json()["status"] == "completed"
        assert not list((tmp_path / "films").iterdir())


async def test_other_servers_of_the_protocol(tmp_path: pathlib.Path) -> None:
    names = ",".join(sorted(quirks.NAMES - {"string_error"}))
    async with running(tmp_path, {**FAST, "QUIRKS": names, "CONTENT_LAG_SECONDS": "0"}) as odd:
        made = await odd.create("odd", seconds=1)
        assert made.status_code == 202
        job = made.json()
        assert (job["status"], job["duration"]) == ("submitted", 1.0)
        assert not {"seconds", "error", "expires_at"} & set(job)
        assert "detail" in (await odd.get("video_0")).json()
        failing = (await odd.create("[fault:moderated_later]")).json()["id"]
        failed = (await odd.until(f"/v1/videos/{failing}", 500)).json()
        assert (failed["status"], failed["error"]["code"]) == ("failed", 400)
        moved = await odd.until(f"/v1/videos/{job['id']}/content", 302)
        assert (await odd.http.get(moved.headers["location"])).content[4:8] == b"ftyp"
        assert (await odd.get(job["id"])).json()["status"] == "succeeded"
        gone = await odd.http.delete(f"/v1/videos/{job['id']}")
        assert (gone.json()["id"], gone.json()["status"]) == (job["id"], "deleted")


async def test_kill_9_keeps_every_job_once(tmp_path: pathlib.Path) -> None:
    """Killed amid a storm of creations: what was answered is there, once, and ends."""
    _, content = picture(320, 180)
    answered: dict[str, str] = {}
    async with running(tmp_path, FAST) as first:
        twin = await first.made("crash [fault:twin_job][fault:poll_404]")
        assert (await first.get(twin)).status_code == 404
        await first.arm(name="error_before", match="after the crash", times=3)
        assert (await first.create("after the crash")).status_code == 500
        gone = await first.made("deleted")
        await first.http.delete(f"/v1/videos/{gone}")

        async def storm(worker: int) -> None:
            for number in range(1000):
                prompt = f"storm {worker}-{number}"
                answer = await first.send_image(prompt, content)
                assert answer.status_code == 200, answer.text
                answered[answer.json()["id"]] = prompt
                if len(answered) == 40:
                    first.process.send_signal(signal.SIGKILL)

        async def storms() -> None:
            async with asyncio.TaskGroup() as group:
                for worker in range(4):
                    group.create_task(storm(worker))

        with pytest.raises(ExceptionGroup) as caught:
            await storms()
        assert caught.group_contains(httpx.TransportError)
    with (tmp_path / "oplog.jsonl").open("ab") as log:
        log.write(b'{"n":99999,"kind":"accepted","id":"vid')  # as a crash leaves it
    async with running(tmp_path, FAST) as second:
        entries = await second.accepted("storm")
        logged = {entry["id"]: entry["prompt"] for entry in entries}
        assert len(logged) == len(entries)
        assert answered.items() <= logged.items()
        assert len(set(logged.values())) == len(logged)
        assert len(logged) <= len(answered) + 4
        listed = {job["id"] for job in await second.listed()}
        assert set(logged) <= listed
        assert gone not in listed
        assert (await second.get(twin)).status_code == 200
        assert len([job for job in await second.listed() if job["prompt"].startswith("crash")]) == 2
        again = [(await second.create("after the crash")).status_code for _ in range(3)]
        assert again == [500, 500, 200]
        for job_id in (next(iter(answered)), list(answered)[-1]):
            frames, _, metadata, _ = decoded(await second.film(job_id))
            assert frames[0].size == (320, 180)
            assert job_id in metadata["comment"]
        numbers = [entry["n"] for entry in await second.log()]
        assert numbers == list(range(1, len(numbers) + 1))


async def test_second_simulator_on_one_directory_is_refused(tmp_path: pathlib.Path) -> None:
    async with running(tmp_path, FAST):
        with pytest.raises(json.JSONDecodeError):
            async with running(tmp_path, FAST):
                pass
