"""The commands about models and events."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from framewire import client, events, types
from framewire.cli import connection, options, output, running


def models(
    address: options.Address = "", api_key: options.ApiKey = "", as_json: options.Json = False
) -> None:
    """List what can be made, what it costs and how long it takes; the default model comes first."""

    async def work(opened: client.Client) -> None:
        found = await opened.models()
        if as_json:
            output.print_json(found)
            return
        columns = ("model", "state", "sizes", "seconds", "from", "credits", "done in", "retires")
        output.print_table(columns, (_model_row(model) for model in found))

    running.with_client(work, address, api_key, for_account=False)


def feed(
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only this kind (queued, completed, settled, ...); may be repeated."),
    ] = None,
    since: Annotated[str, typer.Option(help="From then: 10m, 2h, 3d ago, or a date.")] = "",
    durable: Annotated[str, typer.Option(help="A name under which to go on next time.")] = "",
    limit: options.Limit = 0,
    nats_url: Annotated[
        str,
        typer.Option(
            envvar="FRAMEWIRE_NATS_URL",
            help="The bus. Default: that of the system running on this machine.",
            show_default=False,
        ),
    ] = "",
    account: Annotated[
        str,
        typer.Option(envvar="FRAMEWIRE_ACCOUNT", help="Only this account.", show_default="all"),
    ] = "*",
    as_json: options.Json = False,
) -> None:
    """Print events as they are told, until Ctrl-C."""
    start = options.moment(since) if since else None

    url = connection.nats_url(nats_url)

    async def work() -> None:
        await connection.require_listener(url)
        found = events.subscribe(url, account, kind or (), durable or None, start)
        count = 0
        async with contextlib.aclosing(found):
            async for event in found:
                if as_json:
                    output.print_json(event)
                else:
                    print(output.event_line(event), flush=True)
                count += 1
                if count == limit:
                    break

    running.run(work())


def _model_row(model: types.Model) -> tuple[object, ...]:
    found = {
        "text": model.text_to_video,
        "image": model.max_input_images == 1,
        f"{model.max_input_images} images": model.max_input_images > 1,
        f"video to {model.max_input_video_seconds:g} s": model.max_input_video_seconds > 0,
    }
    ways = [name for name, has in found.items() if has]
    return (
        model.model,
        model.state,
        " ".join(f"{size.width}x{size.height}" for size in model.sizes),
        " ".join(str(seconds) for seconds in model.seconds),
        ", ".join(ways),
        model.default_credits,
        ", ".join(
            f"{lane.lane.lower()} {lane.expected_seconds:.0f} s"
            for lane in model.lanes
            if lane.expected_seconds is not None
        ),
        output.clock(model.retires_at)[:10],
    )
