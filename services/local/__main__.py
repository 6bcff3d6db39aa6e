"""`python -m services.local up|status`: the whole system in the foreground, and a look at it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Coroutine
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from services.local import errors, stack

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Framewire on one machine.")
_console = Console()
_MARKS = {"up": "[green]up[/]", "starting": "[yellow]starting[/]", "died": "[red]died[/]"}

DataDir = Annotated[
    Path, typer.Option(envvar="FRAMEWIRE_DATA_DIR", help="Where everything is kept.")
]


@app.command()
def up(
    data_dir: DataDir = Path(".framewire"),
    time_factor: Annotated[
        float, typer.Option(help="How many times faster than real the provider is simulated.")
    ] = 1.0,
    gateway_port: Annotated[
        int | None,
        typer.Option(help="Exactly this port. Default: the one used before, 7700, or a free one."),
    ] = None,
) -> None:
    """Start everything; Ctrl-C stops everything."""
    _or_one_line(_up(data_dir, time_factor, gateway_port))


@app.command()
def status(data_dir: DataDir = Path(".framewire")) -> None:
    """Probe each part of a running system; exit code 0 when all answer."""
    _or_one_line(_status(data_dir))


async def _up(data_dir: Path, time_factor: float, gateway_port: int | None) -> int:
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, told_to_stop.set)
    whole = stack.Stack(
        data_dir,
        time_factor=time_factor,
        gateway_port=gateway_port,
        report=lambda line: _console.print(line, style="red", markup=False, soft_wrap=True),
    )
    with _console.status(f"starting in {whole.data_dir}"):
        if not await _started(whole, told_to_stop):
            _console.print("stopped before everything was up")
            return 1
    try:
        await _show_until(whole, told_to_stop)
    finally:
        with _console.status("stopping"):
            await whole.stop()
    _console.print("stopped")
    return 0


async def _started(whole: stack.Stack, told_to_stop: asyncio.Event) -> bool:
    """False when told to stop meanwhile; then nothing runs."""
    async with asyncio.TaskGroup() as group:
        start = group.create_task(_caught(whole))
        stopping = group.create_task(told_to_stop.wait())
        await asyncio.wait((start, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            return False
        stopping.cancel()
    if (failure := start.result()) is not None:
        raise failure
    return True


async def _caught(whole: stack.Stack) -> errors.LocalError | None:
    """The error as a value: out of a task group it would come wrapped."""
    try:
        await whole.start()
    except errors.LocalError as error:
        return error
    return None


async def _show_until(whole: stack.Stack, told_to_stop: asyncio.Event) -> None:
    _console.print(
        f"gateway {whole.gateway_address}, operator key in {whole.operator_key_path}, "
        f"logs in {whole.data_dir / 'log'}; Ctrl-C stops all",
        soft_wrap=True,
    )
    if not _console.is_terminal:  # a log: the table once, then only what changes for the worse
        _console.print(_table(whole))
    with (
        Live(console=_console, auto_refresh=False)
        if _console.is_terminal
        else nullcontext() as live
    ):
        while not told_to_stop.is_set():
            whole.supervisor.check()
            if live is not None:
                live.update(_table(whole), refresh=True)
            with suppress(TimeoutError):
                await asyncio.wait_for(told_to_stop.wait(), 0.5)


def _table(whole: stack.Stack) -> Table:
    states = {one.name: one for one in whole.supervisor.status()}
    table = Table("part", "state", "address", "pid")
    for name, address in whole.where().items():
        one = states.get(name)
        state = _MARKS.get(one.state, one.state) if one else "outer"
        table.add_row(name, state, address, str(one.pid) if one else "-")
    return table


async def _status(data_dir: Path) -> int:
    try:
        content = json.loads((data_dir / "stack.json").read_text())
    except FileNotFoundError:
        raise errors.LocalError(
            f"nothing runs in {data_dir}: no stack.json there; "
            "start it with `python -m services.local up`"
        ) from None
    except (OSError, ValueError) as error:
        raise errors.LocalError(f"cannot read {data_dir / 'stack.json'}: {error}") from error
    table = Table("part", "state", "address", "pid")
    healthy = True
    for name, part in content["programs"].items():
        address = content["postgres_url"] if name == "postgres" else part["address"]
        try:
            answers = await stack.probe(name, address)
        except errors.LocalError:
            answers = False
        healthy &= answers
        mark = "[green]up[/]" if answers else "[red]down[/]"
        table.add_row(name, mark, part["address"], str(part["pid"] or "-"))
    _console.print(table)
    _console.print(f"operator key in {content['operator_key_file']}", soft_wrap=True)
    return 0 if healthy else 1


def _or_one_line(work: Coroutine[object, object, int]) -> None:
    try:
        code = asyncio.run(work)
    except (errors.LocalError, PermissionError) as error:
        print(f"framewire: {error}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
