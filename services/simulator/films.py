"""The films on disk: rendered in the background, one a variant, shared work for equal requests."""

import concurrent.futures
import logging
import os
import pathlib
import threading

from services.simulator import config, jobs, render, scenes

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
        """Stores an input under its hash, durably: a job in the log may need it."""
        path = self._references / sha256
        if path.exists():
            return
        # Two requests may bring the same input at once, each its own partial file.
        partial = path.with_suffix(f".{threading.get_ident()}.partial")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def start(self, job: jobs.Job) -> None:
        """Sees to it that the job's films get made. Idempotent."""
        for scene in self._scenes(job):
            if scene.key in self._rendered_at:
                continue
            path = self._render_path(scene)
            if path.exists():
                self._rendered_at[scene.key] = path.stat().st_mtime
                continue
            self._rendered_at[scene.key] = None
            self._pool.submit(self._render, scene)

    def ready_at(self, job: jobs.Job) -> float | None:
        """When the last of the renders was done (real time), None until then. Cheap."""
        latest = job.created_at  # of a job that has no film at all
        for scene in self._scenes(job):
            rendered_at = self._rendered_at.get(scene.key)
            if rendered_at is None:
                return None
            latest = max(latest, rendered_at)
        return latest

    def failed(self, job: jobs.Job) -> bool:
        """Whether rendering broke: the job then fails, plainly."""
        return any(scene.key in self._failed for scene in self._scenes(job))

    def film(self, job: jobs.Job, variant: int = 0, *, low: bool = False) -> pathlib.Path:
        """The variant's own file, written on the first call. Not for the event loop."""
        film_id = job.film_ids[variant]
        path = self._films / f"{film_id}.mp4"
        if not path.exists():
            rendered = self._render_path(self._scenes(job)[variant])
            render.write_film(rendered, path, film_id, self._settings.film_bytes)
        if not low:
            return path
        smaller = self._films / f"{film_id}.low.mp4"
        if not smaller.exists():
            render.write_low_quality(path, smaller)
        return smaller

    def drop(self, job: jobs.Job) -> None:
        """Removes the job's own files; the shared renders stay."""
        for film_id in job.film_ids:
            (self._films / f"{film_id}.mp4").unlink(missing_ok=True)
            (self._films / f"{film_id}.low.mp4").unlink(missing_ok=True)

    def close(self) -> None:
        """Gives up what is queued and what is at work; a restart renders it anew."""
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _render(self, scene: scenes.Scene) -> None:
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

    def _render_path(self, scene: scenes.Scene) -> pathlib.Path:
        return self._renders / f"{scene.key}.mp4"

    def _scenes(self, job: jobs.Job) -> list[scenes.Scene]:
        """One a film. The variants of a job differ in the way that the camera goes."""
        given = sorted(job.inputs, key=lambda item: item.frame_index)
        shots = tuple(
            scenes.Shot(
                self._references / item.sha256, item.type == "video", item.frame_index, item.crop
            )
            for item in given
        )
        draw = self._settings.draw_prompt
        opens_with_input = bool(given) and given[0].frame_index == 0
        return [
            scenes.Scene(
                width=job.width,
                height=job.height,
                seconds=int(job.seconds),
                frames_per_second=self._settings.frames_per_second,
                shots=shots,
                text="" if opens_with_input or not draw else job.prompt[:2000],
                move=scenes.move_of(job.prompt if draw else "", variant),
            )
            for variant in range(len(job.film_ids))
        ]
