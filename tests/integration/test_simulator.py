"""The simulator's `openai_videos` dialect."""

import base64
import io
import json
import re
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from tests import pictures, simulators
from tests.simulators import (
    FAST,
    QUEUE_SECONDS,
    Simulator,
    decoded,
    eventually,
    picture,
    running,
)

simulator = simulators.simulator
no_rules_left = simulators.no_rules_left
TINY = {"size": "320x180", "seconds": "1"}


# The dialect


async def test_text_job_ends_in_a_playable_film(simulator: Simulator) -> None:
    began = time.monotonic()
    answer = await simulator.videos.create("a lighthouse in the fog", model="sora-2-pro")
    job, queue_over = answer.json(), time.monotonic() - began >= QUEUE_SECONDS
    assert re.fullmatch(r"video_[0-9a-f]{48}", job["id"])
    assert int(job["id"][6:14], 16) == job["created_at"]
    assert (job["status"], job["progress"]) == ("queued", 0) or queue_over
    assert job["object"] == "video"
    assert (job["model"], job["seconds"], job["size"]) == ("sora-2-pro", "1", "320x180")
    assert job["completed_at"] is job["expires_at"] is job["error"] is None
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["openai-poll-after-ms"] == "100"
    assert (await simulator.videos.content(job["id"])).status_code == 404

    seen: list[tuple[str, int]] = []

    async def check() -> bool | None:
        state = (await simulator.videos.get(job["id"])).json()
        seen.append((state["status"], state["progress"]))
        return True if state["status"] == "completed" else None

    await eventually(check)
    order = ["queued", "in_progress", "completed"]
    assert seen == sorted(seen, key=lambda pair: (order.index(pair[0]), pair[1]))
    assert "in_progress" in {status for status, _ in seen}
    assert seen[-1] == ("completed", 100)

    film = await simulator.videos.film(job["id"])
    frames, duration, metadata, codec = decoded(film)
    assert (codec, len(frames), frames[0].size) == ("h264", 24, (320, 180))
    assert duration == pytest.approx(1.0, abs=0.05)
    assert metadata["comment"] == f"simulated, no model; job {job['id']}"
    assert film.index(b"moov") < film.index(b"mdat")
    assert pictures.difference(frames[0], frames[-1]) > 0.5


@pytest.mark.parametrize("form", ["file", "json", "brackets"])
async def test_image_job_starts_with_the_image(simulator: Simulator, form: str) -> None:
    image, content = picture(320, 180)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    fields = {"prompt": f"pan over it, as {form}", **TINY}
    if form == "file":
        answer = await simulator.videos.send_image(fields["prompt"], content)
    elif form == "brackets":
        parts = {name: (None, value) for name, value in fields.items()}
        parts["input_reference[image_url]"] = (None, url)
        answer = await simulator.http.post("/v1/videos", files=parts)
    else:
        body = {**fields, "input_reference": {"image_url": url}}
        answer = await simulator.http.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    frames, duration, _, _ = decoded(await simulator.videos.film(answer.json()["id"]))
    assert frames[0].size == (320, 180)
    assert duration == pytest.approx(1.0, abs=0.05)
    assert pictures.difference(frames[0], image) < 2.5
    assert pictures.difference(frames[-1], image) > 5
    (entry,) = await simulator.accepted(fields["prompt"])
    assert len(entry["reference_sha256"]) == 64


@pytest.mark.slow
async def test_six_seconds_of_720p(simulator: Simulator) -> None:
    image, content = picture(1280, 720)
    answer = await simulator.videos.send_image("six", content, size="1280x720", seconds="6")
    frames, duration, _, _ = decoded(await simulator.videos.film(answer.json()["id"]))
    assert len(frames) == 144
    assert duration == pytest.approx(6.0, abs=0.05)
    assert pictures.difference(frames[0], image) < 2.5


async def test_multipart_without_a_file_and_with_metadata(simulator: Simulator) -> None:
    fields = {"prompt": "no file", **TINY, "metadata[attempt]": "a-17"}
    parts = {name: (None, value) for name, value in fields.items()}
    answer = await simulator.http.post("/v1/videos", files=parts)
    assert answer.json()["metadata"] == {"attempt": "a-17"}


async def test_content_in_ranges_and_thumbnail(simulator: Simulator) -> None:
    job_id = await simulator.videos.made("ranges")
    whole = await simulator.videos.film(job_id)
    full = await simulator.videos.content(job_id)
    assert full.headers["content-type"] == "video/mp4"
    assert int(full.headers["content-length"]) == len(whole)
    part = await simulator.videos.content(job_id, range="bytes=100-199")
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    rest = await simulator.videos.content(job_id, range=f"bytes={len(whole) - 5}-")
    assert rest.content == whole[-5:]
    beyond = await simulator.videos.content(job_id, range=f"bytes={len(whole)}-")
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
    assert (await simulator.videos.get(made[0])).status_code == 404
    assert not {job["id"] for job in await simulator.videos.listed()} & set(made)


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
    answer = await simulator.videos.send_image("x", content, kind=kind)
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


async def test_the_page_says_that_it_runs_no_model(simulator: Simulator) -> None:
    await simulator.videos.made("<script>alert(1)</script>")
    page = (await simulator.http.get("/")).text
    assert "It runs no model" in page
    assert {"openai_videos", "azure_jobs"} <= set(re.findall(r"<code>(\w+)</code>", page))
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


async def test_second_simulator_on_one_directory_is_refused(simulator: Simulator) -> None:
    with pytest.raises(json.JSONDecodeError):
        async with running(simulator.folder, FAST):
            pass
