"""The commands that make an account and end it."""

from __future__ import annotations

from typing import Annotated

import typer

from framewire import client, types
from framewire.cli import options, output, running

accounts = typer.Typer(no_args_is_help=True, help="An account as a whole (operators).")


@accounts.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who it is, for people.")],
    lane: Annotated[
        list[str], typer.Option(help="May be used; may be repeated.", show_default="as usual")
    ] = [],  # noqa: B006 (typer reads it)
    weight: Annotated[int, typer.Option(min=0, max=1000, help="Share inside a lane.")] = 0,
    request_id: Annotated[
        str, typer.Option(help="A UUID; given again, no second account is made.")
    ] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Make an account with its books; `keys create --account ID` makes it a key."""

    async def work(opened: client.Client) -> None:
        made = await opened.create_account(name, lanes=lane, weight=weight, request_id=request_id)
        if as_json:
            output.print_json(made)
        else:
            show(made)

    running.with_client(work, address, api_key, for_account=False)


@accounts.command()
def erase(
    account_id: Annotated[
        str, typer.Argument(metavar="ACCOUNT", help="The account's id.", show_default=False)
    ],
    why: Annotated[str, typer.Option(help="For the audit.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Erase an account for good, or show how far that is; its ledger entries stay. It goes on by itself."""
    if not yes:
        typer.confirm(
            f"Erase {account_id}, with its keys, videos and everything stored for it?", abort=True
        )

    async def work(opened: client.Client) -> None:
        found = await opened.operations.erase_account(account_id, why=why)
        if as_json:
            output.print_json(found)
            return
        output.print_facts(
            [
                ("account", account_id),
                ("asked for", output.clock(found.asked_at)),
                ("live videos", found.live_videos),
                ("videos to remove", found.videos_to_remove),
                ("assets to remove", found.assets_to_remove),
                ("done", output.clock(found.done_at) or "not yet"),
            ]
        )

    running.with_client(work, address, api_key, for_account=False)


def show(account: types.Account) -> None:
    """An account, for people."""
    output.print_facts(
        [
            ("account", account.account_id),
            ("name", account.display_name),
            ("lanes", " ".join(each.lower() for each in account.lanes)),
            ("weight", account.weight),
        ]
    )
