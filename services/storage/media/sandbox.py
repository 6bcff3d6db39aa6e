"""The pool of worker processes, seen from the service: every call is bounded in time and memory."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from kit import telemetry
from services.storage.media import confine, facts
from services.storage.media.facts import Reason

MAX_MESSAGE_BYTES = 64 * 1024
START_TIMEOUT_SECONDS = 30.0
REAP_TIMEOUT_SECONDS = 5.0
# How a process dies of bad memory accesses and failed assertions in a decoder.
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
_REPOSITORY = Path(__file__).parents[3]

Facts = TypeVar(
    "Facts",
    facts.ImageFacts,
    facts.VideoFacts,
    facts.Decoded,
    facts.MarkedVideo,
    facts.Tail,
    facts.MadeVideo,
)
_OF_IMAGES = frozenset({"inspect_image", "sanitise_image", "fit_image"})


@dataclass(frozen=True, slots=True)
class Signing:
    """What a worker signs with; such a worker does nothing else."""

    algorithm: str
    certificate_file: str
    key_file: str


@dataclass(frozen=True, slots=True)
class Settings:
    """How many workers, and the bounds of each call."""

    size: int = 2
    timeout_seconds: float = 30.0
    max_waiting: int = 64
    requests_per_worker: int = 200
    limits: confine.Limits = field(default_factory=confine.Limits)
    image_limits: facts.ImageLimits = field(default_factory=facts.ImageLimits)
    video_limits: facts.VideoLimits = field(default_factory=facts.VideoLimits)
    input_video_limits: facts.VideoLimits = field(default_factory=facts.VideoLimits)
    signing: Signing | None = None


class _CrashedError(Exception):
    """The worker died during a request; the return code is negative for a signal."""

    def __init__(self, returncode: int | None) -> None:
        super().__init__(f"the media worker died with code {returncode}")
        self.returncode = returncode


class _Worker:
    """One child process. Not reusable after an exception other than a refusal."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.requests = 0
        self._ready = False

    @classmethod
    async def start(cls, settings: Settings, scratch_dir: Path) -> Self:
        arguments = {
            "parent_pid": os.getpid(),
            "limits": asdict(settings.limits),
            "image_limits": asdict(settings.image_limits),
            "video_limits": asdict(settings.video_limits),
            "input_video_limits": asdict(settings.input_video_limits),
            "signing": asdict(settings.signing) if settings.signing else None,
        }
        # The environment is made from nothing: the service's holds the keys to everything stored.
        # The arena bound keeps glibc from spending the memory bound on empty arenas.
        environment = {"PYTHONPATH": str(_REPOSITORY), "MALLOC_ARENA_MAX": "2", "LANG": "C.UTF-8"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-s", "-B", "-m", "services.storage.media.worker"),
            json.dumps(arguments),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            cwd=scratch_dir,
            env=environment,
        )
        return cls(process)

    @property
    def usable(self) -> bool:
        return self.process.returncode is None

    async def wait_ready(self) -> None:
        """Starting overlaps with other work: the process is awaited when it is first needed."""
        if self._ready:
            return
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            answer = await self._receive()
        self._ready = answer.get("ready") is True
        if not self._ready:
            raise facts.MediaWorkerFailed("the media worker did not start")

    async def ask(self, request: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Raises TimeoutError and _CrashedError; the worker must then be stopped."""
        self.requests += 1
        async with asyncio.timeout(timeout_seconds):
            body = json.dumps(request).encode()
            assert self.process.stdin is not None
            try:
                self.process.stdin.write(len(body).to_bytes(4, "big") + body)
                await self.process.stdin.drain()
            except ConnectionError as error:
                raise _CrashedError(await self.stop()) from error
            return await self._receive()

    async def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        try:
            size = int.from_bytes(await self.process.stdout.readexactly(4), "big")
            if size > MAX_MESSAGE_BYTES:
                raise facts.MediaWorkerFailed("the media worker's answer is too long")
            answer = json.loads(await self.process.stdout.readexactly(size))
        except asyncio.IncompleteReadError as error:
            raise _CrashedError(await self.stop(kill=False)) from error
        except ValueError as error:
            raise facts.MediaWorkerFailed("the media worker's answer is not JSON") from error
        if not isinstance(answer, dict):
            raise facts.MediaWorkerFailed("the media worker's answer is not an object")
        return answer

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def stop(self, *, kill: bool = True) -> int | None:
        """Ends the process and answers how it ended."""
        if kill:
            self.kill()
        try:
            async with asyncio.timeout(REAP_TIMEOUT_SECONDS):
                return await self.process.wait()
        except TimeoutError:
            self.kill()
            return None


@dataclass(slots=True)
class _Slot:
    """A place in the pool; empty for the moment between a dead worker and the next."""

    worker: _Worker | None = None


class MediaWorkers:
    """Media work in killable processes. Paths must lie in the scratch directory.

    Every method is idempotent and raises MediaRefused (the bytes are at fault), MediaWorkerFailed
    (we are), MediaBusy (the queue is full) or ValueError (impossible arguments). An output file
    exists whole or not at all.
    """

    def __init__(self, scratch_dir: Path, settings: Settings | None = None) -> None:
        self._scratch_dir = scratch_dir.resolve()
        self._settings = settings or Settings()
        self._slots = [_Slot() for _ in range(self._settings.size)]
        self._idle: asyncio.Queue[_Slot] = asyncio.Queue()
        self._waiting = 0
        self._closed = False

    async def __aenter__(self) -> Self:
        try:
            for slot in self._slots:
                slot.worker = await _Worker.start(self._settings, self._scratch_dir)
            for slot in self._slots:
                await self._ready_worker(slot)
        except BaseException as error:
            await self._stop_all()
            if isinstance(error, _CrashedError | TimeoutError):
                raise facts.MediaWorkerFailed("the media worker does not start") from error
            raise
        for slot in self._slots:
            self._idle.put_nowait(slot)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop_all()

    @property
    def pids(self) -> list[int]:
        return [slot.worker.process.pid for slot in self._slots if slot.worker is not None]

    async def inspect_image(self, path: Path) -> facts.ImageFacts:
        return await self._call(facts.ImageFacts, "inspect_image", path)

    async def sanitise_image(self, path: Path, out: Path) -> facts.ImageFacts:
        """The facts are those of the new file."""
        return await self._call(facts.ImageFacts, "sanitise_image", path, out)

    async def fit_image(
        self,
        path: Path,
        out: Path,
        width: int,
        height: int,
        mode: facts.FitMode = facts.FitMode.COVER,
        crop: facts.Crop | None = None,
    ) -> facts.ImageFacts:
        """The image, or a part of it, at that size, as a JPEG."""
        facts.check_fit(width, height)
        fit = _fit(width, height, mode, crop)
        return await self._call(facts.ImageFacts, "fit_image", path, out, **fit)

    async def inspect_video(self, path: Path) -> facts.VideoFacts:
        return await self._call(facts.VideoFacts, "inspect_video", path)

    async def decode_video(self, path: Path) -> facts.Decoded:
        """The whole of it; inspect_video decodes parts."""
        return await self._call(facts.Decoded, "decode_video", path)

    async def poster(self, path: Path, out: Path) -> facts.ImageFacts:
        """The first frame as a JPEG."""
        return await self._call(facts.ImageFacts, "poster", path, out)

    async def mark_video(self, source: Path, out: Path, mark: facts.Mark) -> facts.MarkedVideo:
        return await self._call(facts.MarkedVideo, "mark_video", source, out, mark=_said(mark))

    async def mark_tail(self, source: Path, out: Path, mark: facts.Mark) -> facts.Tail:
        """What mark_video would put behind the video, alone; empty where that is not all it does."""
        return await self._call(facts.Tail, "mark_tail", source, out, mark=_said(mark))

    async def sign_video(
        self, source: Path, out: Path, original: Path, change: str
    ) -> facts.MarkedVideo:
        """A marked video, signed. Of workers that hold a key; they do nothing else."""
        about = {"original": str(self._inside(original)), "change": change}
        return await self._call(facts.MarkedVideo, "sign_video", source, out, **about)

    async def clean_video(self, path: Path, out: Path) -> facts.MadeVideo:
        """A caller's video without metadata and sound."""
        return await self._call(facts.MadeVideo, "clean_video", path, out)

    async def fit_video(
        self,
        path: Path,
        out: Path,
        width: int,
        height: int,
        mode: facts.FitMode = facts.FitMode.COVER,
        crop: facts.Crop | None = None,
    ) -> facts.MadeVideo:
        """The video, or a part of its picture, at that size, which is even."""
        facts.check_fit(width, height)
        fit = _fit(width, height, mode, crop)
        return await self._call(facts.MadeVideo, "fit_video", path, out, **fit)

    async def make_rendition(self, path: Path, out: Path, height: int) -> facts.MadeVideo:
        """A smaller version of a marked video, marked too; the height is even."""
        return await self._call(facts.MadeVideo, "make_rendition", path, out, height=height)

    async def _call(
        self, kind: type[Facts], operation: str, path: Path, out: Path | None = None, **args: Any
    ) -> Facts:
        request = {"operation": operation, "path": str(self._inside(path)), **args}
        if out is not None:
            request["out"] = str(self._inside(out))
        if self._waiting >= self._settings.max_waiting:
            raise facts.MediaBusy("all media workers are busy; try again in a few seconds")
        self._waiting += 1
        try:
            slot = await self._idle.get()
        finally:
            self._waiting -= 1
        try:
            answer = await self._ask_twice(slot, request)
        finally:
            self._idle.put_nowait(slot)
        return _parsed(kind, answer)

    async def _ask_twice(self, slot: _Slot, request: dict[str, Any]) -> dict[str, Any]:
        """A crash may be chance (an out-of-memory kill); on a fresh worker it no longer is."""
        try:
            return await self._ask(slot, request)
        except _CrashedError as crash:
            _raise_if_out_of_cpu(crash)
        try:
            return await self._ask(slot, request)
        except _CrashedError as crash:
            _raise_if_out_of_cpu(crash)
            raise _verdict(crash, request["operation"]) from crash

    async def _ask(self, slot: _Slot, request: dict[str, Any]) -> dict[str, Any]:
        done = False
        try:
            try:
                worker = await self._ready_worker(slot)
            except TimeoutError:
                raise facts.MediaWorkerFailed("the media worker does not start") from None
            with telemetry.dependency("media", request["operation"]) as passed:
                answer = await worker.ask(request, self._settings.timeout_seconds)
                passed.failed = "facts" not in answer and "refused" not in answer
            sound = "facts" in answer or "refused" in answer
            done = sound and worker.requests < self._settings.requests_per_worker
            return answer
        except TimeoutError:
            raise _too_expensive(f"{self._settings.timeout_seconds:g} seconds") from None
        finally:
            if not done:
                await self._replace(slot, request.get("out"))

    async def _ready_worker(self, slot: _Slot) -> _Worker:
        if self._closed:
            raise facts.MediaWorkerFailed("the media workers are shutting down")
        if slot.worker is None or not slot.worker.usable:
            slot.worker = await _Worker.start(self._settings, self._scratch_dir)
        await slot.worker.wait_ready()
        return slot.worker

    async def _replace(self, slot: _Slot, out: str | None) -> None:
        """The new process starts at once and loads its decoders while nobody waits for it."""
        if slot.worker is not None:
            await slot.worker.stop()
            slot.worker = None
        if out is not None:
            with contextlib.suppress(FileNotFoundError):
                facts.partial_path(out).unlink()
        if not self._closed:
            with contextlib.suppress(OSError):
                slot.worker = await _Worker.start(self._settings, self._scratch_dir)

    async def _stop_all(self) -> None:
        self._closed = True
        for slot in self._slots:
            if slot.worker is not None:
                await slot.worker.stop()

    def _inside(self, path: Path) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(self._scratch_dir):
            raise ValueError("media files must lie in the scratch directory")
        return resolved


def _said(mark: facts.Mark) -> dict[str, Any]:
    return asdict(mark) | {"created_at": mark.created_at.isoformat()}


def _fit(width: int, height: int, mode: facts.FitMode, crop: facts.Crop | None) -> dict[str, Any]:
    part = asdict(crop) if crop else None
    return {"width": width, "height": height, "mode": mode, "crop": part}


def _parsed(kind: type[Facts], answer: dict[str, Any]) -> Facts:
    try:
        if "facts" in answer:
            return kind(**answer["facts"])
        if "refused" in answer:
            raise facts.MediaRefused(Reason(answer["refused"]), str(answer["message"]))
    except (TypeError, ValueError, KeyError) as error:
        raise facts.MediaWorkerFailed("the media worker's answer makes no sense") from error
    if "exhausted" in answer:
        raise _too_expensive(f"the {answer['exhausted']} allowed")
    raise facts.MediaWorkerFailed(str(answer.get("failed", "the media worker gave no reason")))


def _too_expensive(bound: str) -> facts.MediaRefused:
    return facts.MediaRefused(
        Reason.MEDIA_TOO_EXPENSIVE,
        f"Working on this file took more than {bound}. Send a smaller or simpler one.",
    )


def _raise_if_out_of_cpu(crash: _CrashedError) -> None:
    if crash.returncode == -signal.SIGXCPU:
        raise _too_expensive("the CPU time allowed") from crash


def _verdict(crash: _CrashedError, operation: str) -> Exception:
    """The same bytes that bring down two fresh workers by a fault are to blame, else we are."""
    if crash.returncode is None or -crash.returncode not in _FAULTS:
        return facts.MediaWorkerFailed(str(crash))
    if operation in _OF_IMAGES:
        return facts.MediaRefused(
            Reason.IMAGE_TRUNCATED, "The image is damaged. Save it anew and upload the new file."
        )
    return facts.MediaRefused(
        Reason.VIDEO_UNREADABLE, "The video cannot be decoded. Fetch the complete file again."
    )
