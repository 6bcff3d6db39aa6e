"""The media workers as real processes: they answer, die, hang, run out, and the pool goes on."""

import asyncio
import io
import os
import signal
import struct
import sys
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import av
import pytest
from PIL import Image

from services.storage.media import confine, facts, marks, sandbox
from services.storage.media.facts import Reason
from tests.waiting import eventually

MARK = facts.Mark("sora-2", "vid_01", "ab" * 32, datetime(2026, 7, 1, tzinfo=UTC))


@pytest.fixture(scope="module")
async def workers(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[sandbox.MediaWorkers, Path]]:
    scratch = tmp_path_factory.mktemp("scratch")
    async with sandbox.MediaWorkers(scratch, sandbox.Settings(size=2)) as pool:
        yield pool, scratch


def image_file(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    Image.new("RGB", size, (200, 30, 30)).save(path, "JPEG")
    return path


def opened(path: Path) -> tuple[str | None, tuple[int, int]]:
    with Image.open(path) as image:
        return image.format, image.size


def video_file(path: Path) -> Path:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(12):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (index * 20, 0, 0)))
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def test_every_operation_answers(workers: tuple[sandbox.MediaWorkers, Path]) -> None:
    pool, scratch = workers
    image, video, out = image_file(scratch / "a"), video_file(scratch / "b"), scratch / "out"
    assert (await pool.inspect_image(image)).media_type == "image/jpeg"
    clean = await pool.sanitise_image(image, out)
    assert clean.size_bytes == out.stat().st_size
    fitted = await pool.fit_image(image, out, 128, 72, facts.FitMode.CONTAIN)
    assert (fitted.width, fitted.height, opened(out)) == (128, 72, ("JPEG", (128, 72)))
    cropped = await pool.fit_image(image, out, 5, 5, crop=facts.Crop(0, 0, 10, 10))
    assert (cropped.media_type, cropped.width) == ("image/jpeg", 5)
    assert (await pool.inspect_video(video)).frame_count == 12
    assert (await pool.poster(video, out)).width == 64
    assert opened(out) == ("JPEG", (64, 64))
    marked = await pool.mark_video(video, out, MARK)
    assert marked.size_bytes == out.stat().st_size
    assert marks.read_mark(out) == MARK
    clean = await pool.clean_video(video, scratch / "clean")
    assert (clean.media_type, clean.width, clean.codec) == ("video/mp4", 64, "h264")
    fitted_video = await pool.fit_video(video, out, 32, 48, facts.FitMode.CONTAIN_BLURRED)
    assert (fitted_video.width, fitted_video.height, fitted_video.duration_ms) == (32, 48, 500)
    await pool.mark_video(video, marked_video := scratch / "marked", MARK)
    smaller = await pool.make_rendition(marked_video, out, 32)
    assert (smaller.width, smaller.height, smaller.codec) == (32, 32, "h264")
    assert marks.read_mark(out) == MARK
    assert not facts.partial_path(out).exists()


async def test_refusals_keep_their_reason_and_the_worker(
    workers: tuple[sandbox.MediaWorkers, Path],
) -> None:
    pool, scratch = workers
    path = scratch / "x"
    path.write_bytes(b"<html>")
    before = pool.pids
    with pytest.raises(facts.MediaRefused) as refused:
        await pool.inspect_image(path)
    assert refused.value.reason is Reason.NOT_AN_IMAGE
    with pytest.raises(facts.MediaRefused) as refused:
        await pool.mark_video(path, scratch / "never", MARK)
    assert refused.value.reason is Reason.NOT_A_VIDEO
    assert not list(scratch.glob("never*"))
    assert pool.pids == before


async def test_impossible_arguments_do_not_reach_a_worker(
    workers: tuple[sandbox.MediaWorkers, Path],
) -> None:
    pool, scratch = workers
    with pytest.raises(ValueError, match="scratch directory"):
        await pool.inspect_image(scratch / ".." / "secret")
    with pytest.raises(ValueError, match="width and height"):
        await pool.fit_image(scratch / "a", scratch / "b", 0, 5)


async def test_a_missing_file_is_our_fault(workers: tuple[sandbox.MediaWorkers, Path]) -> None:
    pool, scratch = workers
    with pytest.raises(facts.MediaWorkerFailed, match="FileNotFoundError"):
        await pool.inspect_image(scratch / "nothing")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_workers_are_confined_and_know_no_secrets(
    workers: tuple[sandbox.MediaWorkers, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STORAGE_SECRET_KEY", "hunter2")
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1)) as pool:
        process = Path(f"/proc/{pool.pids[0]}")
        status = dict(
            line.split(":\t", 1) for line in (process / "status").read_text().splitlines()
        )
        limits = (process / "limits").read_text()
        assert b"hunter2" not in (process / "environ").read_bytes()
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert str(1536 * 1024 * 1024) in limits
    assert "Max open files            64 " in limits


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp")
async def test_a_confined_process_has_no_network_and_starts_no_programs(tmp_path: Path) -> None:
    code = (
        "import os, socket, subprocess\n"
        "from services.storage.media import confine\n"
        "confine.confine(confine.Limits(), os.getppid())\n"
        "for attempt in (socket.socket, lambda: os.execv('/bin/true', ['true'])):\n"
        "    try: attempt()\n"
        "    except PermissionError: print('refused')\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        output, _ = await process.communicate()
    assert output.split() == [b"refused", b"refused"]


async def test_an_idle_worker_that_was_killed_is_replaced(
    workers: tuple[sandbox.MediaWorkers, Path],
) -> None:
    pool, scratch = workers
    image = image_file(scratch / "k")
    before = pool.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    found = await asyncio.gather(*(pool.inspect_image(image) for _ in range(4)))
    assert [each.width for each in found] == [64] * 4
    assert not set(pool.pids) & set(before)


async def stopped_mid_request(
    pool: sandbox.MediaWorkers, path: Path
) -> tuple[asyncio.Task[facts.ImageFacts], int]:
    """A call whose worker is frozen: a hang that no decoder bug needs to be found for."""
    pid = pool.pids[0]
    os.kill(pid, signal.SIGSTOP)
    task = asyncio.ensure_future(pool.inspect_image(path))
    await asyncio.sleep(0)
    return task, pid


async def test_a_worker_killed_during_a_request_costs_one_retry(tmp_path: Path) -> None:
    image = image_file(tmp_path / "a")
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1)) as pool:
        task, pid = await stopped_mid_request(pool, image)
        os.kill(pid, signal.SIGKILL)
        assert (await task).width == 64


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [
        (signal.SIGKILL, facts.MediaWorkerFailed, None),
        (signal.SIGSEGV, facts.MediaRefused, Reason.IMAGE_TRUNCATED),
    ],
)
async def test_bytes_that_bring_down_two_workers_are_judged(
    tmp_path: Path, number: signal.Signals, error: type[Exception], reason: Reason | None
) -> None:
    image, endless = image_file(tmp_path / "a"), tmp_path / "endless"
    os.mkfifo(endless)  # opening it lasts until somebody writes into it: nobody does
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1)) as pool:
        first = pool.pids[0]
        task = asyncio.ensure_future(pool.inspect_image(endless))
        await asyncio.sleep(0)
        os.kill(first, number)
        await eventually(lambda: pool.pids not in ([], [first]))
        os.kill(pool.pids[0], number)
        with pytest.raises(error) as raised:
            await task
        assert getattr(raised.value, "reason", None) is reason
        assert (await pool.inspect_image(image)).width == 64


async def test_a_hang_ends_at_the_timeout_and_leaves_nothing(tmp_path: Path) -> None:
    image = image_file(tmp_path / "a")
    settings = sandbox.Settings(size=1, timeout_seconds=0.2)
    async with sandbox.MediaWorkers(tmp_path, settings) as pool:
        pid = pool.pids[0]
        os.kill(pid, signal.SIGSTOP)
        facts.partial_path(tmp_path / "out").write_bytes(b"half")
        with pytest.raises(facts.MediaRefused) as refused:
            await pool.sanitise_image(image, tmp_path / "out")
        assert refused.value.reason is Reason.MEDIA_TOO_EXPENSIVE
        assert gone(pid)
        assert not list(tmp_path.glob("out*"))
        assert (await pool.inspect_image(image)).width == 64


async def test_an_abandoned_call_frees_its_worker(tmp_path: Path) -> None:
    image = image_file(tmp_path / "a")
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1)) as pool:
        task, pid = await stopped_mid_request(pool, image)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gone(pid)
        assert (await pool.inspect_image(image)).width == 64


async def test_memory_is_bounded_and_the_next_request_works(tmp_path: Path) -> None:
    side = 7000
    rows = zlib.compress(bytes((side * 3 + 1) * side), 1)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    heavy, light = tmp_path / "heavy", image_file(tmp_path / "light")
    heavy.write_bytes(data)
    limits = confine.Limits(memory_bytes=300 * 1024 * 1024)
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1, limits=limits)) as pool:
        with pytest.raises(facts.MediaRefused) as refused:
            await pool.fit_image(heavy, tmp_path / "out", 64, 64)
        assert refused.value.reason is Reason.MEDIA_TOO_EXPENSIVE
        assert (await pool.inspect_image(light)).width == 64
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1)) as pool:
        assert (await pool.fit_image(heavy, tmp_path / "out", 64, 64)).width == 64


async def test_cpu_time_is_bounded_for_each_request(tmp_path: Path) -> None:
    light = image_file(tmp_path / "light", (500, 400))
    limits = confine.Limits(cpu_seconds=0)
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1, limits=limits)) as pool:
        with pytest.raises(facts.MediaRefused) as refused:
            await pool.fit_image(light, tmp_path / "out", 8192, 8192)
        assert refused.value.reason is Reason.MEDIA_TOO_EXPENSIVE
        assert (await pool.inspect_image(light)).width == 500


async def test_an_output_that_is_too_long_is_refused(tmp_path: Path) -> None:
    noise = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(noise, "JPEG")
    (tmp_path / "a").write_bytes(noise.getvalue())
    limits = confine.Limits(file_bytes=10_000)
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1, limits=limits)) as pool:
        with pytest.raises(facts.MediaRefused) as refused:
            await pool.sanitise_image(tmp_path / "a", tmp_path / "out")
    assert refused.value.reason is Reason.MEDIA_TOO_EXPENSIVE
    assert not list(tmp_path.glob("out*"))


async def test_a_full_queue_says_so(tmp_path: Path) -> None:
    image = image_file(tmp_path / "a")
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1, max_waiting=1)) as pool:
        task, pid = await stopped_mid_request(pool, image)
        waiting = asyncio.ensure_future(pool.inspect_image(image))
        await asyncio.sleep(0)
        with pytest.raises(facts.MediaBusy):
            await pool.inspect_image(image)
        os.kill(pid, signal.SIGCONT)
        assert [(await each).width for each in (task, waiting)] == [64, 64]


async def test_workers_are_recycled_and_end_with_the_pool(tmp_path: Path) -> None:
    image = image_file(tmp_path / "a")
    settings = sandbox.Settings(size=1, requests_per_worker=2)
    async with sandbox.MediaWorkers(tmp_path, settings) as pool:
        seen = []
        for _ in range(4):
            seen.append(pool.pids[0])
            await pool.inspect_image(image)
        assert len(set(seen)) == 2
        last = pool.pids[0]
    assert all(gone(pid) for pid in (*seen, last))
    with pytest.raises(facts.MediaWorkerFailed):
        await pool.inspect_image(image)


async def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from services.storage.media import sandbox\n"
        "async def main():\n"
        "    settings = sandbox.Settings(size=1)\n"
        "    async with sandbox.MediaWorkers(Path(sys.argv[1]), settings) as pool:\n"
        "        print(pool.pids[0], flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(tmp_path)),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    assert parent.stdout is not None
    async with asyncio.timeout(20):
        child = int(await parent.stdout.readline())
        # Frozen, it cannot notice that its input ended: only the kernel can end it.
        os.kill(child, signal.SIGSTOP)
        parent.kill()
        await parent.wait()
    await eventually(lambda: gone(child) or "\tZ" in Path(f"/proc/{child}/status").read_text())
