"""The commands about models, credits and events."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from framewire import client, events, types
from framewire.cli import connection, options, output, running


def models(
    address: options.Address = "", api_key: options.ApiKey = "", as_json: options.Json = False
) -> None:
    """List what can be made and what it costs; the default model comes first."""

    async def work(opened: client.Client) -> None:
        found = await opened.models()
        if as_json:
            output.print_json(found)
            return
        columns = ("model", "state", "sizes", "seconds", "from", "credits", "retires")
        output.print_table(columns, (_model_row(model) for model in found))

    running.with_client(work, address, api_key, for_account=False)


def balance(
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show the account's credits."""

    async def work(opened: client.Client) -> None:
        _show_balance(await opened.balance(), as_json)

    running.with_client(work, address, api_key, account)


def grant(
    credits: Annotated[int, typer.Argument(metavar="CREDITS", min=1)],
    source: Annotated[
        str, typer.Option(help="purchase, promotion, subscription or correction.")
    ] = "promotion",
    note: Annotated[str, typer.Option(help="For the account's statement.")] = "",
    why: Annotated[str, typer.Option(help="For the audit.")] = "",
    request_id: Annotated[
        str, typer.Option(help="A UUID; given again, nothing is given twice.")
    ] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Give credits to an account (operators)."""

    async def work(opened: client.Client) -> None:
        if not opened.account_id:
            raise output.usage("say who gets them: --account ID or FRAMEWIRE_ACCOUNT")
        given = await opened.grant(
            opened.account_id, credits, source=source, note=note, why=why, request_id=request_id
        )
        if as_json:
            output.print_json(given)
        else:
            _show_balance(given.balance, as_json)

    running.with_client(work, address, api_key, account)


def entries(
    limit: options.Limit = 50,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show the account's statement, newest first."""

    async def work(opened: client.Client) -> None:
        found: list[types.Entry] = []
        async for entry in opened.entries():
            if as_json:
                output.print_json(entry)
            found.append(entry)
            if len(found) == limit:
                break
        if not as_json:
            columns = ("when", "kind", "available", "held", "video", "why")
            output.print_table(columns, (_entry_row(entry) for entry in found))

    running.with_client(work, address, api_key, account)


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


def _show_balance(found: types.Balance, as_json: bool) -> None:
    if as_json:
        output.print_json(found)
        return
    expiry = f"{output.counted(found.next_expiry_credits)} at {output.clock(found.next_expiry_at)}"
    output.print_facts(
        [
            ("account", found.account_id),
            ("available", output.counted(found.available_credits)),
            ("held", output.counted(found.held_credits)),
            ("next to expire", expiry if found.next_expiry_at else ""),
        ]
    )


def _model_row(model: types.Model) -> tuple[object, ...]:
    ways = [
        name
        for name, has in (("image", model.image_to_video), ("text", model.text_to_video))
        if has
    ]
    return (
        model.model,
        model.state,
        " ".join(f"{size.width}x{size.height}" for size in model.sizes),
        " ".join(str(seconds) for seconds in model.seconds),
        ", ".join(ways),
        model.default_credits,
        output.clock(model.retires_at)[:10],
    )


def _entry_row(entry: types.Entry) -> tuple[object, ...]:
    return (
        output.clock(entry.created_at),
        entry.kind,
        f"{entry.available_change:+d}",
        f"{entry.held_change:+d}",
        entry.video_id,
        entry.note or ("" if entry.cause == "NONE" else entry.cause),
    )
