"""The simulator's `azure_jobs` dialect."""

import dataclasses
import io
import json
import re
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from services.simulator import jobs
from tests import pictures, simulators
from tests.simulators import (
    AZURE,
    QUEUE_SECONDS,
    VERSION,
    Simulator,
    clip,
    decoded,
    eventually,
    picture,
)

simulator = simulators.simulator
no_rules_left = simulators.no_rules_left
ORDER = ("queued", "preprocessing", "running", "processing", "succeeded")


def item(name: str = "a.png", **fields: Any) -> dict[str, Any]:
    return {"frame_index": 0, "type": "image", "file_name": name, **fields}


def crop(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    names = ("left_fraction", "top_fraction", "right_fraction", "bottom_fraction")
    return {"crop_bounds": dict(zip(names, (left, top, right, bottom), strict=True))}


async def films(simulator: Simulator, job_id: str) -> list[bytes]:
    """Those of all generations."""
    job = await simulator.jobs.ended(job_id)
    paths = [f"{AZURE}/{made['id']}/content/video" for made in job["generations"]]
    return [(await simulator.jobs.until(path, 200)).content for path in paths]


async def test_text_job_goes_through_its_states(simulator: Simulator) -> None:
    began = time.monotonic()
    answer = await simulator.jobs.create("a harbour at dawn", n_variants=2)
    job, queue_over = answer.json(), time.monotonic() - began >= QUEUE_SECONDS
    assert answer.headers["apim-request-id"]
    assert re.fullmatch(r"task_[0-9a-hjkmnp-tv-z]{26}", job["id"])
    assert job["status"] == "queued" or queue_over
    fresh = {"object": "video.generation.job", "status": job["status"], "generations": []}
    given = {"prompt": "a harbour at dawn", "model": "sora", "n_variants": 2, "n_seconds": 1}
    size = {"height": 180, "width": 320, "inpaint_items": None}
    ends = {"finished_at": None, "expires_at": None, "failure_reason": None}
    at = {"id": job["id"], "created_at": job["created_at"]}
    assert job == {**fresh, **given, **size, **ends, **at}
    assert abs(job["created_at"] - time.time()) < 5

    (entry,) = await simulator.accepted("a harbour at dawn")
    early = await simulator.jobs.call("GET", f"{AZURE}/{entry['generation_ids'][0]}")
    assert early.status_code == 404

    seen: list[str] = [job["status"]]

    async def check() -> bool:
        state = (await simulator.jobs.get(job["id"])).json()
        seen.append(state["status"])
        assert bool(state["generations"]) == (state["status"] == "succeeded")
        return state["status"] == "succeeded"

    await eventually(check)
    assert seen == sorted(seen, key=ORDER.index)
    assert "running" in seen

    done = (await simulator.jobs.get(job["id"])).json()
    assert done["finished_at"] >= done["created_at"]
    assert done["expires_at"] - done["created_at"] == pytest.approx(864, abs=1)
    for made in done["generations"]:
        assert re.fullmatch(r"gen_[0-9a-hjkmnp-tv-z]{26}", made["id"])
        assert (await simulator.jobs.call("GET", f"{AZURE}/{made['id']}")).json() == made
        del made["id"], made["created_at"]
        about = {"job_id": job["id"], "prompt": "a harbour at dawn", "n_seconds": 1}
        assert made == {"object": "video.generation", "height": 180, "width": 320, **about}
    paid = (entry["dialect"], entry["n_variants"], entry["billed_micros"])
    assert paid == ("azure_jobs", 2, 200_000)
    # The other dialect does not know it.
    assert (await simulator.videos.get(job["id"])).status_code == 404


@pytest.mark.parametrize(
    ("progress", "status"),
    [(0, 1), (9, 1), (10, 2), (89, 2), (90, 3), (99, 3)],
)
def test_progress_is_shown_as_a_status(progress: int, status: int) -> None:
    assert jobs.Snapshot(jobs.IN_PROGRESS, progress).azure_status == ORDER[status]


async def test_each_variant_is_its_own_film(simulator: Simulator) -> None:
    image, content = picture(320, 180)
    answer = await simulator.jobs.send("pan", [item()], ("a.png", content), n_variants=2)
    made = [decoded(film) for film in await films(simulator, answer.json()["id"])]
    ids = [
        given["id"] for given in (await simulator.jobs.ended(answer.json()["id"]))["generations"]
    ]
    for (frames, duration, metadata, codec), generation_id in zip(made, ids, strict=True):
        assert (codec, len(frames), frames[0].size) == ("h264", 24, (320, 180))
        assert duration == pytest.approx(1.0, abs=0.05)
        assert metadata["comment"].rstrip() == f"simulated, no model; job {generation_id}"
        assert pictures.difference(frames[0], image) < 2.5
        assert pictures.difference(frames[-1], image) > 5
    assert pictures.difference(made[0][0][-1], made[1][0][-1]) > 1


async def test_content_with_its_headers(simulator: Simulator) -> None:
    job_id = await simulator.jobs.made("headers")
    path = await simulator.jobs.content_path(job_id)
    whole = await simulator.jobs.until(path, 200)
    head = await simulator.jobs.call("HEAD", path)
    for answer in (whole, head):
        assert answer.headers["content-type"] == "video/mp4"
        assert int(answer.headers["content-length"]) == len(whole.content)
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["last-modified"].endswith("GMT")
    assert head.content == b""
    part = await simulator.jobs.call("GET", path, headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    low = await simulator.jobs.call("GET", path, params={"quality": "low"})
    assert low.status_code == 200
    assert len(low.content) < len(whole.content)
    frames, _, metadata, _ = decoded(low.content)
    assert (len(frames), metadata["comment"][:9]) == (24, "simulated")
    assert (await simulator.jobs.call("GET", path, params={"quality": "x"})).status_code == 400
    thumbnail = await simulator.jobs.call("GET", path.removesuffix("video") + "thumbnail")
    assert thumbnail.headers["content-type"] == "image/jpg"
    opened = Image.open(io.BytesIO(thumbnail.content))
    assert (opened.format, opened.size) == ("JPEG", (320, 180))
    asked = [entry["quality"] for entry in await simulator.log(kind="content", id=job_id)]
    assert asked == ["high", "high", "low", "high"]


async def test_the_crop_becomes_the_first_frame(simulator: Simulator) -> None:
    image, content = picture(400, 300)
    bounds = crop(0.125, 0.25, 0.625, 0.75)
    marked = item("attempt-17.png", **bounds)
    answer = await simulator.jobs.send("crop", [marked], ("attempt-17.png", content))
    job_id = answer.json()["id"]
    shown = await simulator.jobs.listed()
    for job in (answer.json(), (await simulator.jobs.get(job_id)).json(), *shown[:1]):
        assert (job["id"], job["inpaint_items"]) == (job_id, [marked])
    (film,) = await films(simulator, job_id)
    wanted = image.crop((50, 75, 250, 225)).resize((320, 180), Image.Resampling.BICUBIC)
    assert pictures.difference(decoded(film)[0][0], wanted) < 2.5
    assert pictures.difference(decoded(film)[0][0], image.resize((320, 180))) > 5


async def test_two_images_one_after_the_other(simulator: Simulator) -> None:
    one, other = pictures.plain((200, 30, 30)), pictures.plain((30, 30, 200))
    items = [item("late.jpg", frame_index=18), item("first.jpg")]
    answer = await simulator.jobs.send("blend", items, ("first.jpg", one), ("late.jpg", other))
    (film,) = await films(simulator, answer.json()["id"])
    reds = [pictures.colour(frame)[0] for frame in decoded(film)[0]]
    assert reds[0] > 190 > reds[6] > reds[12] > 40 > reds[18]
    assert len(reds) == 24


async def test_a_late_image_comes_after_a_drawn_scene(simulator: Simulator) -> None:
    answer = await simulator.jobs.send(
        "late", [item(frame_index=12)], ("a.png", pictures.plain((20, 200, 20)))
    )
    (film,) = await films(simulator, answer.json()["id"])
    frames, _, _, _ = decoded(film)
    plain = Image.new("RGB", frames[0].size, (20, 200, 20))
    assert pictures.difference(frames[0], plain) > 20
    assert pictures.difference(frames[12], plain) < 4


async def test_the_clips_frames_lead(simulator: Simulator) -> None:
    shown, content = clip(0.5)
    answer = await simulator.jobs.send("go on", [item("c.mp4", type="video")], ("c.mp4", content))
    (film,) = await films(simulator, answer.json()["id"])
    frames, duration, _, _ = decoded(film)
    assert (len(frames), duration) == (24, pytest.approx(1.0, abs=0.05))
    for at in (0, 5, 11):
        assert pictures.difference(frames[at], shown[at].resize((320, 180))) < 4
    assert pictures.difference(frames[5], frames[0]) > 10
    assert pictures.difference(frames[20], frames[12]) < 4  # the camera moves over its last frame


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "Missing required parameter: 'prompt'."),
    ({"model": None}, "Missing required parameter: 'model'."),
    ({"model": 1}, "Invalid type for 'model': expected a string"),
    ({"height": None}, "Missing required parameter: 'height'."),
    ({"width": "320"}, "Invalid type for 'width': expected an integer, but got a string instead."),
    ({"width": 321}, "Invalid value: '321x180'. Supported values are: '480x480', '854x480',"),
    ({"n_seconds": 0}, "Invalid 'n_seconds': want 1 to 20 for 320x180, got 0."),
    ({"n_seconds": 21}, "Invalid 'n_seconds': want 1 to 20 for 320x180, got 21."),
    ({"n_seconds": 1.5}, "Invalid type for 'n_seconds': expected an integer, but got a decimal"),
    ({"n_seconds": True}, "Invalid type for 'n_seconds': expected an integer, but got a boolean"),
    ({"n_variants": "1"}, "Invalid type for 'n_variants': expected an integer"),
    ({"n_variants": 0}, "Invalid 'n_variants': want 1 to 4 for 320x180, got 0."),
    ({"n_variants": 5}, "Invalid 'n_variants': want 1 to 4 for 320x180, got 5."),
    ({"n_variants": 3, "width": 1280, "height": 720}, "Invalid 'n_variants': want 1 to 2 for"),
    ({"n_variants": 2, "width": 1080, "height": 1920}, "Invalid 'n_variants': want 1 to 1 for"),
    ({"n_seconds": 11, "width": 1080, "height": 1080}, "Invalid 'n_seconds': want 1 to 10 for"),
    ({"n_seconds": 21, "width": 720, "height": 720}, "Invalid 'n_seconds': want 1 to 20 for"),
    ({"inpaint_items": []}, "'inpaint_items' is taken in multipart/form-data only."),
    ({"prompt": "[fault:no_such]"}, "no fault is named 'no_such'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
async def test_bad_requests(simulator: Simulator, fields: dict[str, Any], message: str) -> None:
    before = await simulator.count()
    answer = await simulator.jobs.create(**{"prompt": "bad request", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "param", "type"}
    assert error["message"].startswith(message)
    assert (error["type"], error["param"]) == ("video_generation_user_error", next(iter(fields)))
    assert await simulator.count() == before


IMAGE = ("a.png", picture(64, 64)[1])
TWO = [item(), item("b.png")]
BAD_MEDIA: list[tuple[Any, list[tuple[str, bytes]], str]] = [
    (None, [IMAGE], "Missing required parameter: 'inpaint_items'."),
    ("[{", [IMAGE], "Invalid 'inpaint_items': want one field with a JSON array in it."),
    ({}, [IMAGE], "Invalid type for 'inpaint_items': expected an array of at least one object"),
    ([], [IMAGE], "Invalid type for 'inpaint_items': expected an array of at least one object"),
    ([1], [IMAGE], "Invalid type for 'inpaint_items[0]': expected an object"),
    ([{"type": "image"}], [IMAGE], "Missing required parameter: 'inpaint_items[0].file_name'."),
    ([item(type="gif")], [IMAGE], "Invalid value: 'gif'. Supported values are: 'image' and 'vi"),
    ([item(seed=1)], [IMAGE], "Unknown parameter: 'inpaint_items[0].seed'."),
    ([item(frame_index="0")], [IMAGE], "Invalid type for 'inpaint_items[0].frame_index'"),
    ([item(frame_index=24)], [IMAGE], "Invalid 'inpaint_items[0].frame_index': want 0 to 23."),
    ([item("b.png")], [IMAGE], "Invalid 'files': no inpaint item names 'a.png'."),
    (TWO, [IMAGE], "Invalid 'inpaint_items[1].file_name': no file is named 'b.png'."),
    ([item()], [], "Missing required parameter: 'files'."),
    (None, [], "Missing required parameter: 'files'."),
    ([item()], [IMAGE, IMAGE], "Invalid 'files': two have one name."),
    ([*TWO, item("c.png")], [IMAGE], "Invalid 'inpaint_items': want at most 2 images, or one"),
    ([item(), item("c.mp4", type="video")], [IMAGE], "Invalid 'inpaint_items': want at most 2"),
    ([item(**crop(-0.1, 0, 1, 1))], [IMAGE], "Invalid 'inpaint_items[0].crop_bounds.left_fra"),
    ([item(**crop(0, 0, 1, 1.1))], [IMAGE], "Invalid 'inpaint_items[0].crop_bounds.bottom_fra"),
    ([item(**crop(0.5, 0, 0.5, 1))], [IMAGE], "Invalid 'inpaint_items[0].crop_bounds': want left"),
    ([item(**crop(0, 0.6, 1, 0.5))], [IMAGE], "Invalid 'inpaint_items[0].crop_bounds': want left"),
    ([item(crop_bounds=[0])], [IMAGE], "Invalid type for 'inpaint_items[0].crop_bounds'"),
    ([item()], [("a.png", b"no image")], "Invalid image: the file could not be decoded."),
    ([item(type="video")], [IMAGE], "Invalid video: the file could not be decoded."),
    ([item(type="video")], [("a.png", clip(5.2, 10)[1])], "Invalid video: want at most 5 seconds"),
    ([item(type="video")], [("a.png", clip(1)[1][:900])], "Invalid video: the file could not be"),
]


@pytest.mark.parametrize(("items", "files", "message"), BAD_MEDIA)
async def test_bad_media(
    simulator: Simulator, items: Any, files: list[tuple[str, bytes]], message: str
) -> None:
    before = await simulator.count()
    answer = await simulator.jobs.send("bad media", items, *files)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith(message)
    assert await simulator.count() == before


async def test_multipart_numbers_are_text(simulator: Simulator) -> None:
    content = IMAGE[1]
    for bad in ({"n_seconds": "1.0"}, {"width": "-320"}, {"n_variants": "x"}):
        answer = await simulator.jobs.send("x", [item()], ("a.png", content), **bad)
        assert answer.json()["error"]["message"].startswith("Invalid type for '")
    body = {**simulator.jobs.tiny, "prompt": "x", "inpaint_items[0][type]": "image"}
    parts = {name: (None, str(value)) for name, value in body.items()}
    answer = await simulator.http.post(f"{AZURE}/jobs", files=parts, params=VERSION)
    assert answer.json()["error"]["message"] == "Missing required parameter: 'files'."
    # A clip of five seconds to the frame is not too long.
    answer = await simulator.jobs.send(
        "x", [item("c.mp4", type="video")], ("c.mp4", clip(5, 12)[1])
    )
    assert answer.status_code == 200, answer.text


async def test_list_pages_and_filters(simulator: Simulator) -> None:
    headers = {"Api-Key": "other-key"}
    async with httpx.AsyncClient(base_url=simulator.url, headers=headers, params=VERSION) as http:
        other = simulators.Jobs(dataclasses.replace(simulator, http=http))
        empty = (await http.get(f"{AZURE}/jobs")).json()
        assert empty == {"object": "list", "data": [], "has_more": False}
        made = [await other.made(f"page {n}") for n in range(12)][::-1]

        async def page(**params: str | int) -> tuple[list[str], bool]:
            answer = (await other.call("GET", f"{AZURE}/jobs", params=params)).json()
            ids = [job["id"] for job in answer["data"]]
            assert (answer["first_id"], answer["last_id"]) == (ids[0], ids[-1])
            return ids, answer["has_more"]

        assert await page() == (made[:10], True)
        assert await page(after=made[9]) == (made[10:], False)
        assert await page(after=made[1], limit=3) == (made[2:5], True)
        assert await page(before=made[5], limit=3) == (made[2:5], True)
        assert await page(before=made[2]) == (made[:2], False)
        assert await page(after=made[1], before=made[4]) == (made[2:4], False)
        await other.ended(made[0])
        stuck = await other.made("[fault:stuck]")
        failing = await other.made("[fault:fails_later]")
        await other.ended(failing)
        assert await page(statuses="failed") == ([failing], False)
        assert await page(statuses="running,processing,failed") == ([failing, stuck], False)
        assert (await other.delete(stuck)).status_code == 204
        assert (await other.get(stuck)).status_code == 404
        assert (await page(limit=1, after=stuck))[0] == made[:1]
        assert (await page(limit=1, statuses="succeeded"))[0] == made[:1]
        generation = (await other.ended(made[0]))["generations"][0]["id"]
    # Nobody else's, and no video of the other dialect.
    for path in (f"{AZURE}/jobs/{made[0]}", f"{AZURE}/{generation}", f"/v1/videos/{made[0]}"):
        assert (await simulator.jobs.call("GET", path)).status_code == 404
    assert not {job["id"] for job in await simulator.videos.listed()} & set(made)
    for bad in ("limit=0", "limit=101", "after=task_0", "before=x", "statuses=done"):
        query = dict([bad.split("=")])
        answer = await simulator.jobs.call("GET", f"{AZURE}/jobs", params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, bad.split("=")[0])


async def test_delete_removes_job_and_films(simulator: Simulator) -> None:
    job_id = await simulator.jobs.made("soon deleted")
    path = await simulator.jobs.content_path(job_id)
    await simulator.jobs.until(path, 200)
    gone = await simulator.jobs.delete(job_id)
    assert (gone.status_code, gone.content) == (204, b"")
    for left in (path, path.removesuffix("/content/video"), f"{AZURE}/jobs/{job_id}"):
        assert (await simulator.jobs.call("GET", left)).status_code == 404
    assert (await simulator.jobs.delete(job_id)).status_code == 404


async def test_the_front_door(simulator: Simulator) -> None:
    path = f"{simulator.url}{AZURE}/jobs"
    async with httpx.AsyncClient() as http:
        for headers in ({"api-key": "sim-key"}, {"API-KEY": "sim-key"}):
            assert (await http.get(path, params=VERSION, headers=headers)).status_code == 200
        for headers in ({}, {"api-key": "wrong"}, {"authorization": "sim-key"}):
            answer = await http.get(path, params=VERSION, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "401"
        unknown = {"error": {"code": "404", "message": "Resource not found"}}
        for params in ({}, {"api-version": "v1"}, {"api-version": "2024-10-21"}):
            answer = await http.get(path, params=params, headers={"api-key": "sim-key"})
            assert (answer.status_code, answer.json()) == (404, unknown)
    astray = await simulator.http.get("/openai/v1/no/such", params=VERSION)
    assert (astray.status_code, astray.json()) == (404, {"detail": "Not Found"})
    assert (await simulator.http.get("/openai/v1/no/such")).json() == unknown


async def test_refusals_in_the_dialects_words(simulator: Simulator) -> None:
    unknown = await simulator.jobs.create("x", model="sora-9")
    retired = await simulator.jobs.create("[fault:model_gone] azure")
    for answer, model in ((unknown, "sora-9"), (retired, "sora")):
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (404, "video_generation_user_error")
        message = f"The API deployment '{model}' for this resource does not exist."
        assert error["message"].startswith(message)
    moderated = (await simulator.jobs.create("[fault:moderated_now] azure")).json()["error"]
    assert moderated["inner_error"]["code"] == "ResponsibleAIPolicyViolation"
    limited = (await simulator.jobs.create("[fault:rate_limited=300] azure")).json()["error"]
    assert limited["code"] == "429"
    assert limited["message"].endswith("Try again in 3 seconds.")
    busy = (await simulator.jobs.create("[fault:too_many_tasks] azure")).json()["error"]
    words = {"message": "Too many running tasks", "type": "video_generation_user_error"}
    assert busy == {**words, "param": None, "code": None}


def test_a_log_of_before_the_dialect_is_taken_up() -> None:
    """An older simulator's directory still serves, its images too."""
    about = {"size": "64x64", "seconds": "1", "prompt": "old", "metadata": {}, "faults": {}}
    times = {"created_at": 1.0, "starts_at": 2.0, "due_at": 3.0, "retained_seconds": 4.0}
    entry = {"id": "video_0", "key_name": "main", "model": "sora-2", **about, **times}
    entry |= {"error": None, "billed_micros": 1, "foreign": False, "reference_sha256": "abc"}
    job = jobs.from_entry(entry)
    assert (job.dialect, job.film_ids) == ("openai_videos", ("video_0",))
    assert job.inputs == (jobs.Input("abc"),)
    # And what is written now comes back as it was.
    assert jobs.from_entry(json.loads(json.dumps(jobs.as_entry(job)))) == job
