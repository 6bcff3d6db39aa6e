"""`framewire top`: live videos, credits, lanes and, for operators, providers, looked at again and again."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import grpc
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from framewire import attempts, client, errors, types
from framewire.cli import options, output, progress, running

SHOWN_VIDEOS = 20
MOST_VIDEOS = 500
BAR_WIDTH = 24
_LIVE = ("PROCESSING", "PENDING")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is shown. `providers` is None for who may not see them; `more`: live videos beyond those read."""

    at: datetime
    balance: types.Balance
    videos: tuple[types.Video, ...]
    more: bool
    lanes: dict[str, dict[str, int]]
    providers: tuple[attempts.ProviderAccount, ...] | None


def top(
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show live videos, credits, lanes and providers until Ctrl-C; where it is no terminal, once."""
    console = Console()
    single = once or as_json or not console.is_terminal

    async def work(opened: client.Client) -> None:
        if as_json:
            output.print_json(await look(opened))
        elif single:
            console.print(render(await look(opened)))
        else:
            await _follow(opened, console, every)

    running.with_client(work, address, api_key, account)


async def _follow(opened: client.Client, console: Console, every: float) -> None:
    with Live(render(await look(opened)), console=console, screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(every)
            live.update(render(await look(opened)), refresh=True)


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
        providers=await _providers(opened),
    )


async def _providers(opened: client.Client) -> tuple[attempts.ProviderAccount, ...] | None:
    try:
        return await opened.attempts.provider_accounts()
    except errors.FramewireError as error:
        if error.code is grpc.StatusCode.PERMISSION_DENIED:
            return None
        raise


def render(seen: Snapshot) -> RenderableType:
    """The picture."""
    parts: list[RenderableType] = [_balance(seen), _lanes(seen), _videos(seen)]
    if seen.providers is not None:
        parts.append(_providers_table(seen.providers))
    return Group(*parts)


def _balance(seen: Snapshot) -> RenderableType:
    balance = seen.balance
    total = balance.available_credits + balance.held_credits
    line = Table.grid(padding=(0, 2))
    line.add_row(
        Text(f"{seen.at:%H:%M:%S} UTC"),
        Text(balance.account_id),
        _bar(balance.available_credits, total),
        Text(f"{output.counted(balance.available_credits)} available, {balance.held_credits} held"),
    )
    return line


def _lanes(seen: Snapshot) -> RenderableType:
    if not seen.lanes:
        return Text("no video is under way", style="dim")
    grid = Table.grid(padding=(0, 2))
    for lane, counts in sorted(seen.lanes.items(), reverse=True):
        told = ", ".join(f"{count} {stage}" for stage, count in sorted(counts.items()))
        grid.add_row(Text(lane.lower(), style="bold"), Text(told))
    return grid


def _videos(seen: Snapshot) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("video", "lane", "model", "stage", "", "before it", "expected", "credits"):
        table.add_column(column)
    for video in seen.videos[:SHOWN_VIDEOS]:
        table.add_row(
            video.video_id,
            video.lane.lower(),
            video.spec.model,
            progress.stage_text(video),
            _bar(video.progress_percent, 100),
            str(video.queue_position) if video.stage == "QUEUED" else "",
            output.clock(video.expected_at),
            str(video.credits.reserved),
        )
    hidden = len(seen.videos) - SHOWN_VIDEOS
    if hidden > 0:
        table.add_row(f"and {hidden}{' or more' if seen.more else ''} others")
    return table


def _providers_table(found: tuple[attempts.ProviderAccount, ...]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in (
        "provider",
        "state",
        "jobs at once",
        "",
        "jobs in 24 h",
        "$ in 1 h",
        "$ in 24 h",
    ):
        table.add_column(column)
    for one in found:
        table.add_row(
            one.provider_account,
            Text("open", style="green") if one.open else Text(one.closed_reason, style="red"),
            _bar(one.jobs_in_flight, one.usable_jobs_in_flight),
            f"{one.jobs_in_flight} of {one.usable_jobs_in_flight}",
            _of(one.jobs_day, one.jobs_per_day),
            _dollars(one.cost_micros_hour, one.max_cost_micros_per_hour),
            _dollars(one.cost_micros_day, one.max_cost_micros_per_day),
        )
    return table


def _bar(part: int, whole: int) -> ProgressBar:
    return ProgressBar(total=max(whole, 1), completed=min(part, max(whole, 1)), width=BAR_WIDTH)


def _of(part: int, cap: int) -> str:
    return f"{part} of {cap}" if cap else str(part)


def _dollars(micros: int, cap: int) -> str:
    spent = f"{micros / 1e6:.2f}"
    return f"{spent} of {cap / 1e6:.2f}" if cap else spent
