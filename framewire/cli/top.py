"""`framewire top`: live videos, credits, lanes and, for operators, providers, looked at again and again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import grpc
import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from framewire import attempts, client, errors, types
from framewire.cli import options, output, progress, running

SHOWN_VIDEOS = 20
MOST_VIDEOS = 500
BAR_WIDTH = 24
STALE_SECONDS = 5.0
"""A picture that is older than the next look by so much says so."""
_LIVE = ("PROCESSING", "PENDING")
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is shown. `providers` is None for who may not see them; `more`: live videos beyond those read."""

    at: datetime
    balance: types.Balance
    videos: tuple[types.Video, ...]
    more: bool
    lanes: dict[str, dict[str, int]]
    providers: tuple[attempts.ProviderAccount, ...] | None


class Screen:
    """The picture as wide as the terminal is then; with seconds between two looks also as high, and with its age."""

    def __init__(self, seen: Snapshot, every: float | None = None) -> None:
        self.seen = seen
        self._every = every

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seen, now, width = self.seen, datetime.now(UTC), options.max_width
        head: list[RenderableType] = [_balance(seen, width)]
        age = (now - seen.at).total_seconds()
        if self._every is not None and age > self._every + STALE_SECONDS:
            told = f"no answer for {age:.0f} s: this is how it was then; trying on"
            head.append(Text(told, style="bold red"))
        head.append(_lanes(seen))
        foot = [] if seen.providers is None else [_providers(seen.providers, width)]
        rows = SHOWN_VIDEOS
        if self._every is not None:
            # Two for the names of the columns, and for how many there are besides.
            taken = len(console.render_lines(Group(*head, *foot), options.reset_height())) + 2
            rows = max(1, options.size.height - taken)
        videos = [_videos(seen, rows, width, now)] if seen.videos else []
        yield Group(*head, *videos, *foot)


def top(
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show live videos, credits, lanes and providers until Ctrl-C; where it is no terminal, once."""
    console = output.console()
    single = once or as_json or not console.is_terminal

    async def work(opened: client.Client) -> None:
        if as_json:
            output.print_json(await look(opened))
        elif single:
            console.print(Screen(await look(opened)))
        else:
            await _follow(opened, console, every)

    running.with_client(work, address, api_key, account)


async def _follow(opened: client.Client, console: Console, every: float) -> None:
    """The screen is drawn each second by a thread of its own: it also tells that no answer comes."""
    screen = Screen(await look(opened), every)
    with Live(screen, console=console, screen=True, refresh_per_second=1) as live:
        while True:
            await asyncio.sleep(every)
            try:
                screen.seen = await look(opened)
            except errors.FramewireError as error:
                if error.code not in _AWAY:
                    raise
            else:
                live.refresh()


async def look(opened: client.Client) -> Snapshot:
    """Everything as it is now."""
    found: list[types.Video] = []
    for state in _LIVE:
        async for video in opened.list_videos(state=state):
            if len(found) == MOST_VIDEOS:
                break
            found.append(video)
    lanes: dict[str, Counter[str]] = {}
    for video in found:
        lanes.setdefault(video.lane, Counter())[progress.stage_text(video)] += 1
    return Snapshot(
        at=datetime.now(UTC),
        balance=await opened.balance(),
        videos=tuple(found),
        more=len(found) == MOST_VIDEOS,
        lanes={lane: dict(counts) for lane, counts in lanes.items()},
        providers=await _provider_accounts(opened),
    )


async def _provider_accounts(opened: client.Client) -> tuple[attempts.ProviderAccount, ...] | None:
    try:
        return await opened.attempts.provider_accounts()
    except errors.FramewireError as error:
        if error.code is grpc.StatusCode.PERMISSION_DENIED:
            return None
        raise


def _balance(seen: Snapshot, width: int) -> RenderableType:
    balance = seen.balance
    when, whose = f"{seen.at:%H:%M:%S} UTC", balance.account_id
    has = f"{output.counted(balance.available_credits)} available, {balance.held_credits} held"
    if width < 110:
        return Text(f"{when}  {whose}  {has}")
    line = Table.grid(padding=(0, 2))
    total = balance.available_credits + balance.held_credits
    line.add_row(when, whose, _bar(balance.available_credits, total), has)
    return line


def _lanes(seen: Snapshot) -> RenderableType:
    if not seen.lanes:
        return Text("no video is under way", style="dim")
    grid = Table.grid(padding=(0, 2))
    for lane, counts in sorted(seen.lanes.items(), reverse=True):
        told = ", ".join(f"{count} {stage}" for stage, count in sorted(counts.items()))
        grid.add_row(Text(lane.lower(), style="bold"), Text(told))
    return grid


def _videos(seen: Snapshot, rows: int, width: int, now: datetime) -> RenderableType:
    columns: tuple[tuple[str, int, Callable[[types.Video], RenderableType]], ...] = (
        ("video", 0, lambda video: video.video_id),
        ("lane", 57, lambda video: video.lane.lower()),
        ("model", 100, lambda video: video.spec.model),
        ("stage", 40, progress.stage_text),
        ("done", 47, _percent),
        ("", 140, lambda video: _bar(video.progress_percent, 100) if _percent(video) else ""),
        ("before it", 112, _before),
        ("expected", 69, lambda video: _until(video.expected_at, now)),
        ("credits", 78, lambda video: str(video.credits.reserved)),
    )
    table = _table(columns, seen.videos[:rows], width)
    hidden = len(seen.videos) - rows
    if hidden <= 0:
        return table
    return Group(table, Text(f"and {hidden} more{', at least' if seen.more else ''}"))


def _providers(found: Sequence[attempts.ProviderAccount], width: int) -> RenderableType:
    columns: tuple[tuple[str, int, Callable[[attempts.ProviderAccount], RenderableType]], ...] = (
        ("provider", 0, lambda one: one.provider_account),
        ("state", 0, _state),
        ("at once", 0, lambda one: f"{one.jobs_in_flight} of {one.usable_jobs_in_flight}"),
        ("", 110, lambda one: _bar(one.jobs_in_flight, one.usable_jobs_in_flight)),
        ("jobs in 24 h", 60, lambda one: _of(one.jobs_day, one.jobs_per_day)),
        ("$ in 1 h", 78, lambda one: _dollars(one.cost_micros_hour, one.max_cost_micros_per_hour)),
        ("$ in 24 h", 78, lambda one: _dollars(one.cost_micros_day, one.max_cost_micros_per_day)),
    )
    return _table(columns, found, width)


def _table(
    columns: Iterable[tuple[str, int, Callable[[T], RenderableType]]],
    items: Iterable[T],
    width: int,
) -> Table:
    """Columns of which each has a width of the terminal below which it is left out; one line to a row."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    shown = [(name, cell) for name, least, cell in columns if width >= least]
    for name, _ in shown:
        table.add_column(name, no_wrap=True)
    for item in items:
        table.add_row(*(cell(item) for _, cell in shown))
    return table


def _state(one: attempts.ProviderAccount) -> Text:
    return Text("open", style="green") if one.open else Text(one.closed_reason, style="red")


def _percent(video: types.Video) -> str:
    return "" if video.stage == "QUEUED" else f"{video.progress_percent} %"


def _before(video: types.Video) -> str:
    return str(video.queue_position) if video.stage == "QUEUED" else ""


def _until(moment: datetime | None, now: datetime) -> str:
    """How long until then, in one word and a number."""
    if moment is None:
        return ""
    seconds = (moment - now).total_seconds()
    if seconds <= 0:
        return "any time"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"in {seconds / length:.0f} {unit}"
    return f"in {seconds:.0f} s"


def _bar(part: int, whole: int) -> ProgressBar:
    return ProgressBar(total=max(whole, 1), completed=min(part, max(whole, 1)), width=BAR_WIDTH)


def _of(part: int, cap: int) -> str:
    return f"{part} of {cap}" if cap else str(part)


def _dollars(micros: int, cap: int) -> str:
    spent = f"{micros / 1e6:.2f}"
    return f"{spent} of {cap / 1e6:.2f}" if cap else spent
