"""What the CLI prints: facts and tables for people, JSON for programs, errors with what to do."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import grpc
import typer
from rich.console import Console
from rich.table import Table

from framewire import errors, types
from framewire.cli import hints
from framewire.events import types as event_types

EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


def console() -> Console:
    """Standard output; where it is no terminal, wide enough that nothing is cut."""
    return Console(
        width=None if sys.stdout.isatty() else 240, highlight=False, markup=False, emoji=False
    )


def print_json(item: Any) -> None:
    """One line; keys as in the dataclasses, times in ISO 8601."""
    print(json.dumps(_plain(item), ensure_ascii=False, default=_text), flush=True)


class Lines:
    """Prints items one by one as they come, for programs: JSON lines, or CSV whose first line has the names."""

    def __init__(self, kind: type[Any], *, as_csv: bool) -> None:
        self._names = [field.name for field in dataclasses.fields(kind)] if as_csv else []
        self._writer = csv.writer(sys.stdout)
        self._begun = not as_csv

    def __call__(self, item: Any) -> None:
        if not self._names:
            print_json(item)
            return
        self.end()
        self._writer.writerow(_cell(getattr(item, name)) for name in self._names)

    def end(self) -> None:
        """Where there was nothing, the names alone; a call that failed prints nothing at all."""
        if not self._begun:
            self._writer.writerow(self._names)
            self._begun = True


def lines(kind: type[Any], *, as_json: bool, as_csv: bool) -> Lines | None:
    """What prints for programs; None: people get a table at the end."""
    if as_json and as_csv:
        raise usage("give --json or --csv, not both")
    return Lines(kind, as_csv=as_csv) if as_json or as_csv else None


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is marked as text."""
    text = _text(value) if isinstance(value, datetime) else value
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@")) else text


def _plain(item: Any) -> Any:
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return dataclasses.asdict(item)
    if isinstance(item, tuple | list):
        return [_plain(one) for one in item]
    return item


def _text(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values, one to a line, without those that are empty."""
    shown = [(name, str(value)) for name, value in facts if value not in ("", None, ())]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:{width}}  {value}")


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table whose cells are never cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console().print(table)


def clock(moment: datetime | None) -> str:
    """A moment in local time."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def size_text(size_bytes: int) -> str:
    """Bytes as people read them."""
    if size_bytes < 10_000:
        return f"{size_bytes} bytes"
    return f"{size_bytes / 1e6:.2f} MB"


def output_text(output: types.Output) -> str:
    """The measured facts of a video in one line."""
    sound = "sound" if output.has_audio else "no sound"
    return (
        f"{output.width}x{output.height}, {output.duration_ms / 1000:.2f} s, {output.fps:g} fps, "
        f"{output.codec}, {sound}, {size_text(output.size_bytes)}"
    )


def counted(credits_: int) -> str:
    """Credits as people say them."""
    return "1 credit" if credits_ == 1 else f"{credits_} credits"


def credits_text(credits_: types.VideoCredits) -> str:
    """What a video costs, as far as that is known."""
    if credits_.settlement == "DONE":
        return f"{counted(credits_.captured)} charged"
    return f"{counted(credits_.reserved or credits_.quoted)} held"


def video_facts(video: types.Video) -> list[tuple[str, object]]:
    """A video, for people."""
    spec = video.spec
    size = f"{spec.width}x{spec.height}, {spec.seconds} s"
    facts: list[tuple[str, object]] = [
        ("video", video.video_id),
        ("state", video.state if video.is_terminal else f"{video.state}, {video.stage.lower()}"),
        ("progress", "" if video.is_terminal else f"{video.progress_percent} %"),
        ("model", f"{spec.model}, {size}, lane {video.lane}"),
        ("template", f"{video.template.name}@{video.template.version}" if video.template else ""),
        ("credits", credits_text(video.credits)),
        ("created", clock(video.created_at)),
        ("finished", clock(video.finished_at)),
        ("cancel", "asked for" if video.cancel_requested else ""),
    ]
    if video.failure is not None:
        facts.append(("failure", f"{video.failure.message} ({video.failure.cause})"))
    for output in (*video.outputs, *video.late_outputs):
        facts += [("output", output_text(output)), ("sha256", output.sha256)]
    return facts


def event_text(event: event_types.Event) -> str:
    """What an event says beyond its kind, in a few words."""
    match event.detail:
        case event_types.Queued(lane=lane, model=model, queue_position=before):
            return f"lane {lane}, {model}, {before} before it"
        case event_types.Started(attempt=attempt, provider_account=provider):
            return f"attempt {attempt} at {provider}"
        case event_types.Completed(outputs=outputs) | event_types.Recovered(outputs=outputs):
            return "; ".join(output_text(output) for output in outputs)
        case event_types.Failed(cause=cause, message=message):
            return f"{message} ({cause})"
        case event_types.Cancelled(cause=cause):
            return cause
        case event_types.Settled(
            captured_credits=taken, released_credits=back, available_credits=left
        ):
            return f"{counted(taken)} charged, {back} given back, {left} available"
        case event_types.Expired(asset_id=asset):
            return f"asset {asset}"
        case event_types.BalanceLow(available_credits=left, threshold_credits=threshold):
            return f"{counted(left)} available, below {threshold}"
        case event_types.WebhookDisabled(endpoint_id=endpoint, why=why):
            return f"webhook endpoint {endpoint}: {why}"
        case _:
            return ""


def event_line(event: event_types.Event) -> str:
    """An event in one line."""
    when = event.occurred_at.astimezone().strftime("%H:%M:%S.%f")[:-3] if event.occurred_at else ""
    return f"{when:12}  {event.kind:11}  {event.video_id or event.account_id}  {event_text(event)}"


def print_error(message: str, reason: str = "", hint: str = "") -> None:
    """One line that says what is wrong, and one that says what to do."""
    line = " ".join(message.split())
    print(f"error: {line} ({reason})" if reason else f"error: {line}", file=sys.stderr)
    if hint:
        print(hint, file=sys.stderr)


def usage(message: str) -> typer.Exit:
    """Says in one line why the command cannot be run as it was given; to be raised."""
    print_error(message)
    return typer.Exit(EXIT_USAGE)


def report(error: errors.FramewireError, address: str = "") -> int:
    """Prints a failed call and answers the exit code."""
    away = (
        error.code is grpc.StatusCode.UNAVAILABLE and error.reason == "DEPENDENCY_UNAVAILABLE"
    ) or error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    message = error.message
    if "last error: " in message or "DNS resolution" in message:  # grpc's own words
        message = f"cannot reach the gateway at {address}: {message.rpartition('error: ')[2]}"
    print_error(message, error.reason, _hint(error))
    return EXIT_UNREACHABLE if away else EXIT_REFUSED


def _hint(error: errors.FramewireError) -> str:
    facts = error.metadata
    if error.reason == "INSUFFICIENT_CREDITS":
        return (
            f"It needs {facts.get('needed', '?')} credits, {facts.get('available', '?')} are available; "
            "an operator gives more: framewire grant CREDITS"
        )
    if "captured_credits" in facts:  # a video that ended without an output
        again = (
            " The same request may succeed when sent again." if facts["retryable"] == "true" else ""
        )
        return f"{counted(int(facts['captured_credits']))} charged for {facts['video_id']}.{again}"
    if error.retry_after_seconds:
        return f"Try again in {math.ceil(error.retry_after_seconds)} s."
    if "error_id" in facts:
        return f"Our fault; tell an operator the error id {facts['error_id']}."
    return hints.HINTS.get(error.reason, "")
