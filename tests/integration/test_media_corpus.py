"""Bad files through the media workers and through storage: a clear reason or a good file, and nobody falls over."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kit import errors, ids
from services.storage.media import facts, sandbox
from tests import media_corpus as corpus
from tests.storage_world import (
    IMAGE,
    VIDEO,
    World,
    complete,
    create,
    incoming,
    refused,
    send,
    world,
)

__all__ = ["world"]

SETTINGS = sandbox.Settings(size=2, requests_per_worker=1_000_000)
"""None is replaced for its age, so that one that is was brought down."""
SMALL_BYTES = 200 * 1024 * 1024
"""Most memory of a worker that refuses a bomb: its decoders loaded, and a picture of what is allowed at most."""
GROWTH_BYTES = 128 * 1024 * 1024
"""Of the service's own process, which decodes nothing: its buffers for S3, after which it grows no more."""
HEAD_BYTES = 64
REFUSALS = {"NOT_AN_IMAGE", "NOT_A_VIDEO", "TOO_LARGE"}


@dataclass(slots=True)
class Judge:
    """The workers, and a place of its own for each file."""

    workers: sandbox.MediaWorkers
    place: Path
    count: int = 0

    async def image(self, body: bytes) -> facts.Reason | None:
        """Why it was refused; None: what came of it is a good image, and nothing but that."""
        path = self._file(body)
        out = path.with_suffix(".out")
        try:
            made = await self.workers.sanitise_image(path, out)
        except facts.MediaRefused as refused:
            return _reason(refused)
        finally:
            path.unlink()
        good = out.read_bytes()
        out.unlink()
        with Image.open(io.BytesIO(good)) as image:
            image.load()
            assert image.size == (made.width, made.height)
            assert image.format in ("JPEG", "PNG")
        assert [mark for mark in corpus.FOREIGN if mark in good] == []
        return None

    async def video(self, body: bytes) -> facts.Reason | None:
        """The same of a video, as of one that was made, and as of one that callers send, which is written anew."""
        path = self._file(body)
        poster, clean = path.with_suffix(".jpg"), path.with_suffix(".mp4")
        try:
            await self.workers.inspect_video(path)
            await self.workers.poster(path, poster)
            made = await self.workers.clean_video(path, clean)
        except facts.MediaRefused as refused:
            return _reason(refused)
        with av.open(str(clean)) as film:
            sides = {film.streams.video[0].width, film.streams.video[0].height}
            assert sides == {made.width, made.height}
            assert next(film.decode(video=0), None) is not None
        return None

    async def all_of(
        self, judge: Callable[[bytes], Awaitable[Any]], bodies: Iterable[bytes]
    ) -> list[Any]:
        """One after the other in each worker."""
        waiting = iter(bodies)
        found: list[Any] = []

        async def work() -> None:
            found.extend([await judge(body) for body in waiting])

        async with asyncio.TaskGroup() as group:
            for _ in self.workers.pids:
                group.create_task(work())
        return found

    def _file(self, body: bytes) -> Path:
        self.count += 1
        path = self.place / f"{self.count}"
        path.write_bytes(body)
        return path

    def peak_bytes(self) -> int:
        """Most memory that a worker has had."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.workers.pids]
        return max(int(text.split("VmHWM:")[1].split()[0]) * 1024 for text in texts)


def _reason(refused: facts.MediaRefused) -> facts.Reason:
    assert len(str(refused)) > 20, "a sentence that says what to do"
    return refused.reason


@pytest.fixture(scope="module")
async def judge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Judge]:
    place = tmp_path_factory.mktemp("corpus")
    async with sandbox.MediaWorkers(place, SETTINGS) as workers:
        yield Judge(workers, place)


@pytest.mark.parametrize("kind", corpus.images())
async def test_an_image_that_is_cut_short_anywhere(judge: Judge, kind: str) -> None:
    body = corpus.images()[kind]
    assert await judge.image(body) is None
    before = judge.workers.pids
    found = await judge.all_of(judge.image, corpus.cuts(body, 24))
    refused = [one for one in found if one is not None]
    assert len(refused) > len(found) * 0.7, "most of a file is not a file"
    assert set(refused) <= {facts.Reason.NOT_AN_IMAGE, facts.Reason.IMAGE_TRUNCATED,
                            facts.Reason.IMAGE_FORMAT_NOT_ALLOWED}  # fmt: skip
    assert judge.workers.pids == before, "a worker died of it"


@pytest.mark.parametrize("kind", corpus.videos())
async def test_a_video_that_is_cut_short_anywhere(judge: Judge, kind: str) -> None:
    body = corpus.videos()[kind]
    assert await judge.video(body) is None
    before = judge.workers.pids
    found = await judge.all_of(judge.video, corpus.cuts(body, 10))
    refused = [one for one in found if one is not None]
    assert len(refused) > len(found) * 0.5
    assert set(refused) <= {facts.Reason.NOT_A_VIDEO, facts.Reason.VIDEO_UNREADABLE}
    assert judge.workers.pids == before, "a worker died of it"


async def test_bombs_are_refused_before_they_unfold(tmp_path: Path) -> None:
    """What they say of themselves is enough: neither the pixels nor the text are unpacked."""
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1)) as workers:
        judge = Judge(workers, tmp_path)
        before = workers.pids
        found = {name: await judge.image(body) for name, body in corpus.bombs().items()}
        assert workers.pids == before, "a worker died of it"
        assert judge.peak_bytes() < SMALL_BYTES
    too_large = {name for name, one in found.items() if one is facts.Reason.IMAGE_TOO_LARGE}
    assert too_large >= {"png_pixels", "png_pixels_there", "png_wide", "png_tall", "jpeg_pixels",
                         "webp_canvas", "png_largest_numbers"}  # fmt: skip
    assert found["png_nothing"] is not None
    assert found["avif_pixels"] is not None


async def test_broken_metadata_do_not_spoil_a_whole_picture(judge: Judge) -> None:
    found = {name: await judge.image(body) for name, body in corpus.broken_exif().items()}
    assert {name: one for name, one in found.items() if one is not None} == {}


async def test_of_files_that_are_two_things_only_the_image_comes_through(judge: Judge) -> None:
    found = {name: await judge.image(body) for name, body in corpus.polyglots().items()}
    refused = {name for name, one in found.items() if one is not None}
    assert refused == {"pdf_jpeg", "gif_script", "zip_jpeg"}


async def test_what_is_no_still_image_is_refused(judge: Judge) -> None:
    found = {name: await judge.image(body) for name, body in corpus.not_images().items()}
    assert {name for name, one in found.items() if one is None} == set()
    animated = {name for name, one in found.items() if one is facts.Reason.IMAGE_ANIMATED}
    assert animated == {"apng", "webp_animated", "avif_sequence"}
    named = {name for name, one in found.items() if one is facts.Reason.IMAGE_FORMAT_NOT_ALLOWED}
    assert named == {"svg", "pdf", "gif", "gif_animated", "bmp", "tiff", "ico", "jpeg2000", "heic"}


async def test_what_is_no_video_is_refused(judge: Judge) -> None:
    files = corpus.not_videos() | corpus.not_images() | corpus.images()
    before = judge.workers.pids
    found = {name: await judge.video(body) for name, body in files.items()}
    assert {name for name, one in found.items() if one is None} == set()
    assert judge.workers.pids == before, "a worker died of it"


Changes = list[tuple[int, int]]


async def mutated(judge: Judge, name: str, changes: Changes) -> facts.Reason | None:
    """What is said of the good file with these bytes changed."""
    body = bytearray(GOOD[name])
    for place, value in changes:
        body[place % len(body)] = value
    one = judge.video if name in corpus.videos() else judge.image
    return await one(bytes(body))


GOOD = corpus.images() | corpus.videos()
BYTES = st.integers(0, 255)
RUNS = settings(
    deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@settings(RUNS, max_examples=400)
@given(
    name=st.sampled_from(sorted(GOOD)),
    changes=st.lists(st.tuples(st.integers(0, HEAD_BYTES - 1), BYTES), min_size=1, max_size=8),
)
async def test_any_change_of_the_first_bytes_is_judged(
    judge: Judge, name: str, changes: Changes
) -> None:
    before = judge.workers.pids
    reason = await mutated(judge, name, changes)
    # One that was out of memory is replaced, and nobody was told anything else.
    assert reason is facts.Reason.MEDIA_TOO_EXPENSIVE or judge.workers.pids == before


@pytest.mark.long
@settings(RUNS, max_examples=4000, derandomize=False, print_blob=True)
@given(
    name=st.sampled_from(sorted(GOOD)),
    changes=st.lists(st.tuples(st.integers(0, 10_000), BYTES), min_size=1, max_size=40),
)
async def test_any_change_anywhere_is_judged(judge: Judge, name: str, changes: Changes) -> None:
    """A decoder that falls over takes its worker with it, and nothing else: the answer is a reason all the same."""
    await mutated(judge, name, changes)


@pytest.mark.long
@pytest.mark.parametrize("kind", GOOD)
async def test_a_file_that_is_cut_short_at_any_byte(judge: Judge, kind: str) -> None:
    body = GOOD[kind]
    one = judge.video if kind in corpus.videos() else judge.image
    before = judge.workers.pids
    await judge.all_of(one, (body[:length] for length in range(len(body))))
    assert judge.workers.pids == before, "a worker died of it"


def through_storage() -> Iterator[tuple[str, Any, bytes]]:
    """(name, kind, bytes): a few of each sort, on the whole way."""
    images = corpus.bombs() | corpus.broken_exif() | corpus.polyglots() | corpus.not_images()
    for name, body in images.items():
        yield name, IMAGE, body
    for name, body in (corpus.not_videos() | corpus.not_images()).items():
        yield name, VIDEO, body
    for good in (corpus.images(), corpus.videos()):
        for name, body in good.items():
            kind = VIDEO if name in corpus.videos() else IMAGE
            yield f"{name} cut short", kind, body[: len(body) // 2]


async def test_storage_outlives_them_all(world: World) -> None:
    """Refused as the caller's fault with a reason, or stored whole; the process is the same, and as small as before."""
    process = psutil.Process(world.stack.supervisor.get("storage").pid)
    await world.put(ids.new_id(), corpus.images()["jpeg"])
    before = process.memory_info().rss
    good: set[str] = set()
    reasons: dict[str, str] = {}
    for name, kind, body in through_storage():
        account = ids.new_id()
        try:
            asset = await world.put(account, body, kind)
        except errors.InvalidArgument as why:
            reasons[name] = why.reason
            assert await world.nothing(account), name
        else:
            good.add(name)
            with Image.open(io.BytesIO(await world.get(asset))) as image:
                assert image.size == (asset.width, asset.height), name
    assert set(reasons.values()) == REFUSALS
    assert good >= corpus.broken_exif().keys() | {"jpeg_zip", "png_zip", "jpeg_html", "webp_html"}
    assert {"empty", "svg", "apng", "pdf_jpeg", "png_pixels"}.isdisjoint(good)
    assert process.is_running()
    assert process.memory_info().rss - before < GROWTH_BYTES
    assert max(child.memory_info().rss for child in process.children()) < SMALL_BYTES
    assert world.scratch() == []


@pytest.mark.parametrize(("name", "is_image"), [("png", True), ("webp", True), ("mp4", False)])
async def test_what_a_file_says_it_is_counts_for_nothing(
    world: World, name: str, is_image: bool
) -> None:
    """Announced and PUT as image/jpeg: judged by its bytes."""
    account, body = ids.new_id(), (corpus.images() | corpus.videos())[name]
    upload = await create(world, account, len(body))
    assert await send(upload.url, upload.headers, body) == 200
    if is_image:
        asset = await complete(world, account, upload.upload_id)
        with Image.open(io.BytesIO(await world.get(asset))) as image:
            assert Image.MIME[str(image.format)] == asset.media_type
        return
    with refused(errors.InvalidArgument, "NOT_AN_IMAGE"):
        await complete(world, account, upload.upload_id)
    assert incoming(world, account) == []
    assert await world.nothing(account)
