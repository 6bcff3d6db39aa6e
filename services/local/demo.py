"""`make demo`: starts the whole system, makes one MP4 through it, shows what was told and paid, stops everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from framewire import client, events, outcomes, types
from framewire import errors as public_errors
from framewire.cli import connection, output, progress
from services.local import environment, errors, stack

FIRST_CREDITS = 100
_VIDEO_SECONDS = {"simulator": 180.0, "provider": 1800.0}
_EVENT_SECONDS = 15.0
_console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Wish:
    """What to make, with what, and where to put it."""

    image: Path
    prompt: str
    model: str
    seconds: int
    out: Path
    data_dir: Path
    time_factor: float

    @property
    def simulated(self) -> bool:
        """No real provider is given."""
        return stack.simulated(os.environ)


class StepFailed(Exception):
    """A step of the demo did not work; the text says what and why."""


def demo(
    image: Annotated[Path, typer.Option(envvar="IMAGE")] = Path("examples/rocket.jpg"),
    prompt: Annotated[
        str, typer.Option(envvar="PROMPT")
    ] = "The camera rises slowly along the rocket while the exhaust cloud grows.",
    model: Annotated[str, typer.Option(envvar="MODEL", help="Default: the first.")] = "",
    seconds: Annotated[int, typer.Option(envvar="SECONDS", help="0: the model's default.")] = 0,
    out: Annotated[Path, typer.Option(envvar="OUT")] = Path("out/demo.mp4"),
    data_dir: Annotated[Path, typer.Option(envvar="FRAMEWIRE_DATA_DIR")] = Path(".framewire"),
    time_factor: Annotated[
        float, typer.Option(help="How many times faster than real the simulator is.")
    ] = 15.0,
) -> None:
    """Make one video on this machine, from start to stop."""
    wish = Wish(image, prompt, model, seconds, out, data_dir, time_factor)
    began = time.monotonic()
    try:
        asyncio.run(_until_stopped(wish))
    except StepFailed as failure:
        print(f"demo failed: {failure}", file=sys.stderr)
        if (data_dir / "log").exists():
            print(f"everything is stopped; logs are in {data_dir / 'log'}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\ninterrupted; everything is stopped", file=sys.stderr)
        raise typer.Exit(output.EXIT_INTERRUPTED) from None
    _console.print(f"everything is stopped; the demo took {time.monotonic() - began:.0f} s")


async def _until_stopped(wish: Wish) -> None:
    """SIGTERM and SIGHUP end it as Ctrl-C does: with everything stopped."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await run(wish)


async def run(wish: Wish) -> None:
    """The whole demo. Raises StepFailed, with nothing left running."""
    with _step("reading the image"):
        wish.image.read_bytes()
        wish.out.parent.mkdir(parents=True, exist_ok=True)
    async with (
        _system(wish) as whole,
        client.Client(whole.gateway_address, whole.operator_key) as caller,
    ):
        with _step("opening the account"):
            caller.account_id = await connection.local_account(caller, whole.operator_key)
            await _give_credits(caller, whole.operator_key, wish)
            before = await caller.balance()
        _console.print(f"balance before   {before.available_credits} credits")
        video = await _make(whole, caller, wish)
        with _step("downloading"):
            await caller.download_all(video, wish.out)
        with _step("reading the balance"):
            after = await caller.balance()
        _console.print(f"balance after    {after.available_credits} credits")
        _tell(video, wish, environment.served(whole.addresses)[video.spec.model])


@asynccontextmanager
async def _system(wish: Wish) -> AsyncIterator[stack.Stack]:
    began = time.monotonic()
    with _step("starting the system"):
        whole = stack.Stack(
            wish.data_dir,
            # A real provider lives in real time, and so do our timeouts for it.
            time_factor=wish.time_factor if wish.simulated else 1.0,
            report=lambda line: _console.print(line, style="red"),
        )
        with _console.status(f"starting the system in {whole.data_dir}"):
            await whole.start()
    try:
        parts = ", ".join(whole.where())
        _console.print(f"started          {parts} ({time.monotonic() - began:.1f} s)")
        yield whole
    finally:
        with _console.status("stopping"):
            await whole.stop()


async def _give_credits(caller: client.Client, operator_key: str, wish: Wish) -> None:
    """The first time, and again when they do not suffice any more: it is a demo."""
    account_id, note = caller.account_id, "demo"
    first = connection.fixed_request_id(operator_key, f"first credits:{account_id}")
    await caller.grant(account_id, FIRST_CREDITS, note=note, request_id=first)
    price = (await caller.quote_video(wish.prompt, model=wish.model, seconds=wish.seconds)).credits
    available = (await caller.balance()).available_credits
    _console.print(f"price            {price} credits")
    if available < price:
        more = max(FIRST_CREDITS, price - available)
        await caller.grant(account_id, more, note=note)
        _console.print(f"granted          {more} credits, for {available} were not enough")


async def _make(whole: stack.Stack, caller: client.Client, wish: Wish) -> types.Video:
    """The video, settled, with every event printed as it came."""
    shown = progress.Shown(_console)
    settled = asyncio.Event()
    since = datetime.now(UTC)
    async with asyncio.TaskGroup() as group:
        helpers = [
            group.create_task(_print_events(whole, caller.account_id, since, shown, settled)),
            group.create_task(whole.supervisor.watch()),
        ]
        try:
            made = await _generated(caller, wish, shown, settled)
        finally:
            for helper in helpers:
                helper.cancel()
    if isinstance(made, StepFailed):  # out of the task group it would have come wrapped
        raise made
    return made


async def _generated(
    caller: client.Client, wish: Wish, shown: progress.Shown, settled: asyncio.Event
) -> types.Video | StepFailed:
    seconds = _VIDEO_SECONDS["simulator" if wish.simulated else "provider"]
    try:
        with _step("making the video"), shown:
            async with asyncio.timeout(seconds):
                video = await caller.generate(
                    wish.prompt,
                    wish.image,
                    model=wish.model,
                    seconds=wish.seconds,
                    on_progress=shown,
                )
        with _step("waiting for the event `settled`"):
            async with asyncio.timeout(_EVENT_SECONDS):
                await settled.wait()
    except StepFailed as failure:
        return failure
    return video


async def _print_events(
    whole: stack.Stack,
    account_id: str,
    since: datetime,
    shown: progress.Shown,
    settled: asyncio.Event,
) -> None:
    feed = events.subscribe(whole.addresses.nats_url, account_id, since=since)
    try:
        async with contextlib.aclosing(feed):
            async for event in feed:
                _console.print(f"event            {output.event_line(event)}")
                mine = shown.latest is not None and event.video_id == shown.latest.video_id
                if event.kind == "settled" and mine:
                    settled.set()
    except public_errors.FramewireError as error:
        _console.print(f"the event feed failed: {error.message}", style="red")


def _tell(video: types.Video, wish: Wish, provider: str) -> None:
    for one in video.outputs:
        path = outcomes.variant_path(wish.out, one.variant)
        _console.print(f"video            {path.resolve()}")
        _console.print(f"                 {output.output_text(one)}")
        _console.print(f"                 sha256 {one.sha256}, as downloaded")
    if wish.simulated:
        _console.print(
            "Made by a simulator that runs no model and only moves the picture. For real videos set "
            "FRAMEWIRE_PROVIDER_BASE_URL and FRAMEWIRE_PROVIDER_API_KEY."
        )
    else:
        _console.print(f"Made by the provider at {provider}.")


@contextmanager
def _step(name: str) -> Iterator[None]:
    """What goes wrong inside is told with the name of the step."""
    try:
        yield
    except public_errors.FramewireError as error:
        raise StepFailed(f"{name}: {error.message} ({error.reason})") from error
    except TimeoutError as error:
        raise StepFailed(f"{name}: not done in time") from error
    except (errors.LocalError, OSError) as error:
        raise StepFailed(f"{name}: {error}") from error


if __name__ == "__main__":
    typer.run(demo)
