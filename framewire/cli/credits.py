"""The commands about credits: what an account has, was charged and used."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from framewire import client, types
from framewire.cli import options, output, running


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
    purchase: Annotated[str, typer.Option(help="The order or invoice that was paid.")] = "",
    why: options.Why = "",
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
            opened.account_id,
            credits,
            source=source,
            note=note,
            purchase=purchase,
            why=why,
            request_id=request_id,
        )
        if as_json:
            output.print_json(given)
        else:
            _show_balance(given.balance, as_json)

    running.with_client(work, address, api_key, account)


def entries(
    limit: options.Limit = 50,
    since: options.Since = "",
    until: options.Until = "",
    video: Annotated[str, typer.Option(help="Only of this video.")] = "",
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Only grant, reserve, capture, release, refund or expire; may be repeated."
        ),
    ] = None,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
) -> None:
    """Show the account's statement, newest first."""
    start, end = options.period(since, until)
    lines = output.lines(types.Entry, as_json=as_json, as_csv=as_csv)

    async def work(opened: client.Client) -> None:
        found: list[types.Entry] = []
        statement = opened.entries(since=start, until=end, video_id=video, kinds=kind or ())
        count = 0
        async with contextlib.aclosing(statement):
            async for entry in statement:
                lines(entry) if lines else found.append(entry)
                count += 1
                if count == limit:
                    break
        if lines:
            lines.end()
        else:
            columns = ("when", "kind", "available", "held", "video", "why")
            output.print_table(columns, (_entry_row(entry) for entry in found))

    running.with_client(work, address, api_key, account)


def usage(
    since: options.Since = "",
    until: options.Until = "",
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Group by model, lane, key or label:NAME; may be repeated.",
            show_default="model, lane",
        ),
    ] = None,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
) -> None:
    """Show what the account used, month by month (UTC); this month's unless told."""
    start, end = options.period(since, until)
    groups, label = options.usage_groups(by or ["model", "lane"])
    lines = output.lines(types.UsageLine, as_json=as_json, as_csv=as_csv)

    async def work(opened: client.Client) -> None:
        found = await opened.usage(since=start, until=end, group_by=groups, label=label)
        if lines:
            for line in found:
                lines(line)
            lines.end()
            return
        columns = (
            "month",
            *(label if name == "label" else name for name in groups),
            "videos",
            "credits",
            "refunded",
        )
        output.print_table(columns, (_usage_row(line, groups) for line in found))

    running.with_client(work, address, api_key, account)


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


def _entry_row(entry: types.Entry) -> tuple[object, ...]:
    return (
        output.clock(entry.created_at),
        entry.kind,
        f"{entry.available_change:+d}",
        f"{entry.held_change:+d}",
        entry.video_id,
        entry.note or ("" if entry.cause == "NONE" else entry.cause),
    )


_GROUP_FIELDS = {"model": "model", "lane": "lane", "key": "key_id", "label": "label_value"}


def _usage_row(line: types.UsageLine, groups: tuple[str, ...]) -> tuple[object, ...]:
    named = (getattr(line, _GROUP_FIELDS[group]) for group in groups)
    return (line.month, *named, line.videos, line.credits, line.refunded_credits)
