"""The command that makes good what a restored database forgot."""

from __future__ import annotations

from typing import Annotated

import typer

from framewire import client, recovery
from framewire.cli import options, output, running


def recover(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Make good what a restored database forgot, then open its service again (operators).

    Nothing is sent to a provider again before it proved that it does not have it. Broken off, it can be run again.
    Exit code 1 when something could not be made good: it is listed as NOT_HELD or NOT_READMITTED.
    """

    async def work(opened: client.Client) -> None:
        found = await opened.operations.recover(dry_run=dry_run, why=why)
        if as_json:
            output.print_json(found)
        else:
            _show(found, dry_run)
        if any(one.action.startswith("NOT_") for one in found.videos):
            raise typer.Exit(output.EXIT_REFUSED)

    running.with_client(work, address, api_key, for_account=False)


def _show(found: recovery.Recovery, dry_run: bool) -> None:
    output.print_table(
        ("video", "done", "what"), ((one.video_id, one.action, one.detail) for one in found.videos)
    )
    closed = [one for one in found.done.services if not one.standing.open]
    for one in closed:
        print(f"{one.service} was closed: {one.standing.reason}")
    if not closed:
        print("nothing to recover from: every service is open")
    elif dry_run:
        print(f"{found.done.videos} videos looked at; nothing was changed")
    else:
        print(f"{found.done.videos} videos looked at; every service is open")
