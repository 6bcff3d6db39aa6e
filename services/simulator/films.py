"""The films on disk: rendered in the background, one per job, shared work for equal requests."""

import concurrent.futures
import logging
import os
import pathlib
import threading

from services.simulator import config, jobs, render

_log = logging.getLogger("simulator")


class Films:
    """Threads suffice: encoding and scaling release the interpreter's lock, and threads die with
    a killed process, where a pool of processes would be left behind.
    """

    def __init__(self, settings: config.Settings) -> None:
        self._settings = settings
        self._renders = settings.data_dir / "renders"
        self._films = settings.data_dir / "films"
        self._references = settings.data_dir / "references"
        for folder in (self._renders, self._films, self._references):
            folder.mkdir(parents=True, exist_ok=True)
            for left_by_a_crash in folder.glob("*.partial"):
                left_by_a_crash.unlink()
        self._pool = concurrent.futures.ThreadPoolExecutor(
            settings.render_workers, thread_name_prefix="render"
        )
        # By scene; an entry is None while it is queued or rendering. Written by the threads too,
        # one key at a time, which the interpreter makes atomic.
        self._rendered_at: dict[str, float | None] = {}
        self._failed: set[str] = set()
        self._stopping = threading.Event()

    def keep_reference(self, sha256: str, content: bytes) -> None:
        """Stores a reference image under its hash, durably: a job in the log may need it."""
        path = self._references / sha256
        if path.exists():
            return
        # Two requests may bring the same image at once, each its own partial file.
        partial = path.with_suffix(f".{threading.get_ident()}.partial")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def start(self, job: jobs.Job) -> None:
        """Sees to it that the job's film gets made. Idempotent."""
        scene = self._scene(job)
        if scene.key in self._rendered_at:
            return
        path = self._render_path(scene)
        if path.exists():
            self._rendered_at[scene.key] = path.stat().st_mtime
            return
        self._rendered_at[scene.key] = None
        self._pool.submit(self._render, scene)

    def ready_at(self, job: jobs.Job) -> float | None:
        """When the render was done (real time), None until then. Cheap."""
        return self._rendered_at.get(self._scene(job).key)

    def failed(self, job: jobs.Job) -> bool:
        """Whether rendering broke: the job then fails, plainly."""
        return self._scene(job).key in self._failed

    def film(self, job: jobs.Job) -> pathlib.Path:
        """The job's own file, written on the first call. Not for the event loop."""
        path = self._films / f"{job.id}.mp4"
        if not path.exists():
            render.write_film(self._render_path(self._scene(job)), path, job.id)
        return path

    def drop(self, job: jobs.Job) -> None:
        """Removes the job's own file; the shared render stays."""
        (self._films / f"{job.id}.mp4").unlink(missing_ok=True)

    def close(self) -> None:
        """Gives up what is queued and what is at work; a restart renders it anew."""
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _render(self, scene: render.Scene) -> None:
        path = self._render_path(scene)
        try:
            render.render(scene, path, self._stopping.is_set)
        except render.StoppedError:
            return
        except Exception:
            _log.exception("render_failed")
            self._failed.add(scene.key)
            return
        self._rendered_at[scene.key] = path.stat().st_mtime

    def _render_path(self, scene: render.Scene) -> pathlib.Path:
        return self._renders / f"{scene.key}.mp4"

    def _scene(self, job: jobs.Job) -> render.Scene:
        reference = job.reference_sha256
        return render.Scene(
            width=job.width,
            height=job.height,
            seconds=int(job.seconds),
            frames_per_second=self._settings.frames_per_second,
            reference=None if reference is None else self._references / reference,
            text="" if reference or not self._settings.draw_prompt else job.prompt[:2000],
            focus=render.focus_of(job.prompt) if self._settings.draw_prompt else 0,
        )
