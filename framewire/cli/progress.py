"""A video's progress: a live bar on a terminal, a line for each change of stage elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from framewire import types
from framewire.cli import output


class Shown:
    """Shows a video while the `with` block runs. Call it with each newer state. `latest` is the last one."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.latest: types.Video | None = None
        self._lines = not self.console.is_terminal and not quiet
        self._said = ""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:11}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("uploading", total=100, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, video: types.Video) -> None:
        self.latest = video
        stage = stage_text(video)
        note = output.credits_text(video.credits)
        if video.stage == "QUEUED" and video.queue_position:
            note += f", {video.queue_position} before it"
        percent = 100 if video.state == "COMPLETED" else video.progress_percent
        self._bar.update(self._task, description=stage, completed=percent, note=note)
        if self._lines and stage != self._said:
            self._said = stage
            self.console.print(f"{video.video_id} {stage} {percent} %, {note}", highlight=False)


def stage_text(video: types.Video) -> str:
    """Where a video is, in one word."""
    if not video.is_terminal:
        return (video.stage or video.state).lower()
    return video.state.lower() if video.is_settled else "settling"
