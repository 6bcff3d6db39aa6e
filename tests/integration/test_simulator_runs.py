"""Quotas, expiry, other servers' ways and durability of the simulator, each with a process of its own."""

import asyncio
import functools
import pathlib
import signal
from typing import Any

import httpx
import pytest

from services.simulator import quirks
from tests.simulators import AZURE, FAST, Client, Simulator, decoded, eventually, picture, running

TOO_MANY = {
    "message": "Too many running tasks",
    "type": "video_generation_user_error",
    "param": None,
    "code": None,
}


def item(name: str) -> dict[str, Any]:
    return {"frame_index": 0, "type": "image", "file_name": name}


async def taken(client: Client) -> bool:
    return (await client.create("later")).status_code == 200


async def test_limits_per_minute_and_at_once(tmp_path: pathlib.Path) -> None:
    """Each dialect has its own of both."""
    settings = {
        **FAST,
        "TIME_FACTOR": "15",
        "REQUESTS_PER_MINUTE": "6",
        "MAX_CONCURRENT_JOBS": "2",
        "AZURE_REQUESTS_PER_MINUTE": "8",
        "AZURE_MAX_CONCURRENT_JOBS": "1",
    }
    async with running(tmp_path, settings) as limited:
        answers = [await limited.videos.create(f"job {n}") for n in range(7)]
        assert [answer.status_code for answer in answers] == [200] * 2 + [429] * 5
        assert answers[2].json()["error"] == TOO_MANY
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "5"
        last = answers[-1]
        assert last.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(last.headers["retry-after-ms"]) <= 4000
        assert last.headers["retry-after"] in ("1", "2", "3", "4")

        others = [await limited.jobs.create(f"job {n}") for n in range(9)]
        assert [answer.status_code for answer in others] == [200] + [429] * 8
        assert [answer.json()["error"] for answer in others[1:8]] == [TOO_MANY] * 7
        assert others[8].json()["error"]["code"] == "429"
        assert 1 <= int(others[8].headers["retry-after-ms"]) <= 4000

        for client in (limited.videos, limited.jobs):
            await eventually(functools.partial(taken, client))


async def test_content_expires_and_jobs_vanish(tmp_path: pathlib.Path) -> None:
    settings = {
        **FAST,
        "RETENTION_SECONDS": "50",
        "AZURE_RETENTION_SECONDS": "150",
        "AZURE_MAX_CONCURRENT_JOBS": "2",
        "CONTENT_LAG_SECONDS": "0",
    }
    async with running(tmp_path, settings) as forgetful:
        task = await forgetful.jobs.made("soon gone")
        stuck = await forgetful.jobs.made("[fault:stuck]")
        assert (await forgetful.jobs.create("x")).status_code == 429
        path = await forgetful.jobs.content_path(task)
        await forgetful.jobs.until(path, 200)
        job_id = await forgetful.videos.made("soon gone")
        await forgetful.videos.film(job_id)
        await forgetful.videos.until(f"/v1/videos/{job_id}/content", 404)
        assert (await forgetful.videos.get(job_id)).json()["status"] == "completed"
        for gone in (path, path.removesuffix("/content/video"), f"{AZURE}/jobs/{task}"):
            await forgetful.jobs.until(gone, 404)
        await forgetful.jobs.until(f"{AZURE}/jobs/{stuck}", 404)
        assert await forgetful.jobs.listed() == []
        assert not list((tmp_path / "films").iterdir())
        # What is gone no longer counts as running, not even what never ended.
        assert [(await forgetful.jobs.create("new")).status_code for _ in range(2)] == [200] * 2


async def test_other_servers_of_the_protocol(tmp_path: pathlib.Path) -> None:
    names = ",".join(sorted(quirks.BENDS - {"string_error"}))
    settings = {**FAST, "QUIRKS": names, "CONTENT_LAG_SECONDS": "0", "FILM_BYTES": "1000000"}
    async with running(tmp_path, settings) as odd:
        made = await odd.videos.create("odd", seconds=1)
        assert made.status_code == 202
        job = made.json()
        assert (job["status"], job["duration"]) == ("submitted", 1.0)
        assert not {"seconds", "error", "expires_at"} & set(job)
        assert "detail" in (await odd.videos.get("video_0")).json()
        failing = (await odd.videos.create("[fault:moderated_later]")).json()["id"]
        failed = (await odd.videos.until(f"/v1/videos/{failing}", 500)).json()
        assert (failed["status"], failed["error"]["code"]) == ("failed", 400)
        moved = await odd.videos.until(f"/v1/videos/{job['id']}/content", 302)
        film = (await odd.http.get(moved.headers["location"])).content
        assert len(film) == 1_000_000, "padded"
        assert len(decoded(film)[0]) == 24, "and playable"
        requests = (await odd.http.get("/_sim/state")).json()["requests"]
        assert (requests["main create"], requests["main content"] >= 2) == (2, True)
        assert (await odd.videos.get(job["id"])).json()["status"] == "succeeded"
        gone = await odd.http.delete(f"/v1/videos/{job['id']}")
        assert (gone.json()["id"], gone.json()["status"]) == (job["id"], "deleted")


async def test_other_servers_of_azure_jobs(tmp_path: pathlib.Path) -> None:
    names = "flat_errors,failed_generations,no_inpaint_echo,omit_nulls,create_202,redirect_content"
    settings = {**FAST, "QUIRKS": names, "AZURE_API_VERSION_REQUIRED": "false"}
    async with running(tmp_path, settings) as odd:
        answer = await odd.jobs.send("odd", [item("a.png")], ("a.png", picture(64, 64)[1]))
        assert answer.status_code == 202
        assert not {"inpaint_items", "finished_at"} & set(answer.json())
        path = await odd.jobs.content_path(answer.json()["id"])
        moved = await odd.jobs.until(path, 302)
        assert (await odd.http.get(moved.headers["location"])).content[4:8] == b"ftyp"
        failing = (await odd.jobs.create("[fault:fails_later]", n_variants=2)).json()["id"]
        failed = await odd.jobs.ended(failing)
        assert (failed["status"], len(failed["generations"])) == ("failed", 2)
        failed_path = f"{AZURE}/{failed['generations'][0]['id']}/content/video"
        assert (await odd.http.get(failed_path)).status_code == 404
        for version in ({}, {"api-version": "v1"}):
            unknown = await odd.http.get(f"{AZURE}/jobs/task_0", params=version)
            error = {"code": None, "type": "video_generation_user_error", "param": "job_id"}
            assert unknown.json() == {**error, "message": "Job with id 'task_0' not found."}
        moderated = (await odd.jobs.create("[fault:moderated_now]")).json()
        assert moderated["inner_error"]["code"] == "ResponsibleAIPolicyViolation"
        strange = await odd.http.get(f"{AZURE}/jobs", params={"api-version": "2024-10-21"})
        assert strange.json()["error"]["message"] == "Resource not found"


async def storm(first: Simulator, worker: int, answered: dict[str, str]) -> None:
    """Creations one after the other, by an odd worker in the one dialect, by an even in the other."""
    content = picture(320, 180)[1]
    for number in range(1000):
        prompt = f"storm {worker}-{number}"
        if worker % 2:
            answer = await first.videos.send_image(prompt, content)
        else:
            answer = await first.jobs.send(prompt, [item(prompt)], (prompt, content))
        assert answer.status_code == 200, answer.text
        answered[answer.json()["id"]] = prompt
        if len(answered) == 40:
            first.process.send_signal(signal.SIGKILL)


async def storms(first: Simulator, answered: dict[str, str]) -> None:
    async with asyncio.TaskGroup() as group:
        for worker in range(4):
            group.create_task(storm(first, worker, answered))


async def test_kill_9_keeps_every_job_once(tmp_path: pathlib.Path) -> None:
    """Killed amid a storm of creations: what was answered is there, once, and ends."""
    answered: dict[str, str] = {}
    async with running(tmp_path, FAST) as first:
        twin = await first.videos.made("crash [fault:twin_job][fault:poll_404]")
        assert (await first.videos.get(twin)).status_code == 404
        await first.arm(name="error_before", match="after the crash", times=3)
        assert (await first.videos.create("after the crash")).status_code == 500
        gone = [await client.made("deleted") for client in (first.videos, first.jobs)]
        await first.videos.delete(gone[0])
        await first.jobs.delete(gone[1])
        done = await first.jobs.content_path(await first.jobs.made("done before"))
        before = (await first.jobs.until(done, 200)).content
        with pytest.raises(ExceptionGroup) as caught:
            await storms(first, answered)
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
        tasks = {job["id"]: job for job in await second.jobs.listed()}
        videos = await second.videos.listed()
        listed = {*tasks, *(job["id"] for job in videos)}
        assert set(logged) <= listed
        assert not set(gone) & listed
        marked = [job for job in tasks.values() if job["inpaint_items"]]
        assert len(marked) > 5
        assert all(job["inpaint_items"][0]["file_name"] == job["prompt"] for job in marked)
        assert (await second.videos.get(twin)).status_code == 200
        assert sum(job["prompt"].startswith("crash") for job in videos) == 2
        again = [(await second.jobs.create("after the crash")).status_code for _ in range(3)]
        assert again == [500, 500, 200]
        assert (await second.jobs.call("GET", done)).content == before
        for job_id in (next(iter(answered)), list(answered)[-1], next(iter(tasks))):
            client = second.client("azure_jobs" if job_id in tasks else "openai_videos")
            frames, _, metadata, _ = decoded(await client.film(job_id))
            assert frames[0].size == (320, 180)
            shown = (await client.content_path(job_id)).split("/")
            assert metadata["comment"].split()[-1] in shown
        numbers = [entry["n"] for entry in await second.log()]
        assert numbers == list(range(1, len(numbers) + 1))
