"""The commands about what is stored."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated

import typer

from framewire import client
from framewire.cli import options, output, running

stored = typer.Typer(
    no_args_is_help=True, help="What is stored: how much, and how long it is kept."
)
_DURATION = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@stored.command()
def usage(
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show what the account has stored, by kind."""

    async def work(opened: client.Client) -> None:
        found = await opened.assets.usage()
        if as_json:
            output.print_json(found)
            return
        rows = ((one.kind.lower(), one.count, f"{one.size_bytes / 1e6:,.1f}") for one in found)
        output.print_table(("kind", "assets", "MB"), rows)

    running.with_client(work, address, api_key, account)


@stored.command()
def keep(
    asset_id: Annotated[str, typer.Argument(metavar="ASSET", help="An image or an output.")],
    duration: Annotated[str, typer.Argument(metavar="TIME", help="From now: 12h, 30d.")],
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Keep an image or an output at least so long; it is never shortened."""
    wanted = _duration(duration)

    async def work(opened: client.Client) -> None:
        until = await opened.assets.keep(asset_id, wanted)
        if as_json:
            output.print_json({"asset_id": asset_id, "expires_at": until})
        else:
            output.print_facts(
                [("asset", asset_id), ("kept until", output.clock(until) or "for ever")]
            )

    running.with_client(work, address, api_key, account)


@stored.command()
def retention(
    kinds: Annotated[
        list[str],
        typer.Argument(metavar="KIND=TIME...", help="output_video=30d poster=30d input_image=ever"),
    ],
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Set how long an account's assets are kept from now on (operators); kinds left out: as everybody's."""
    wanted: dict[str, timedelta | None] = {}
    for text in kinds:
        name, _, time = text.partition("=")
        wanted[name] = None if time == "ever" else _duration(time)

    async def work(opened: client.Client) -> None:
        kept = await opened.operations.set_retention(opened.account_id, wanted, why=why)
        if as_json:
            seconds = {name: time and int(time.total_seconds()) for name, time in kept.items()}
            output.print_json(seconds)
        else:
            output.print_facts([(name.lower(), time or "for ever") for name, time in kept.items()])

    running.with_client(work, address, api_key, account)


def _duration(text: str) -> timedelta:
    found = _DURATION.fullmatch(text.strip())
    if found is None or int(found[1]) == 0:
        raise output.usage(f"{text!r} is no time; give for instance 12h or 30d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
