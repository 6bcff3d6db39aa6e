"""The commands about who may call and how much: keys, members, limits, admission."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from framewire import access, client, types
from framewire.cli import accounts, options, output, running

keys = typer.Typer(no_args_is_help=True, help="API keys.")
members = typer.Typer(no_args_is_help=True, help="Who comes with an issuer's tokens (operators).")
admission = typer.Typer(no_args_is_help=True, help="Stop or start taking videos (operators).")

KeyId = Annotated[str, typer.Argument(metavar="KEY", help="The key's id.", show_default=False)]
Amount = Annotated[int | None, typer.Option(min=0, show_default="as it is")]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    role: Annotated[str, typer.Option(help="member, service or operator.")] = "member",
    days: Annotated[int, typer.Option(min=0, help="It ends after so many; 0: never.")] = 0,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Make a key. It is shown once, here."""
    until = datetime.now(UTC) + timedelta(days=days) if days else None

    async def work(opened: client.Client) -> None:
        made = await opened.create_api_key(role=role.upper(), display_name=name, expires_at=until)
        _show_new(made, as_json)

    running.with_client(work, address, api_key, account, for_account=role.lower() == "member")


@keys.command("list")
def list_keys(
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """List keys, the newest first."""

    async def work(opened: client.Client) -> None:
        found = await opened.access.keys()
        if as_json:
            output.print_json(found)
            return
        rows = (
            (
                key.key_id,
                f"{key.prefix}...",
                key.role.lower(),
                key.display_name,
                output.clock(key.last_used_at),
                output.clock(key.expires_at),
                output.clock(key.revoked_at),
            )
            for key in found
        )
        columns = ("key", "begins", "role", "name", "last used", "expires", "revoked")
        output.print_table(columns, rows)

    running.with_client(work, address, api_key, account)


@keys.command("rotate")
def rotate_key(
    key_id: KeyId,
    grace_hours: Annotated[int, typer.Option(min=0, help="How long the old one works on.")] = 0,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Make a key like another one, which ends. The new one is shown once, here."""

    async def work(opened: client.Client) -> None:
        made = await opened.access.rotate_key(key_id, grace=timedelta(hours=grace_hours))
        _show_new(made, as_json)

    running.with_client(work, address, api_key, for_account=False)


@keys.command("revoke")
def revoke_key(
    key_id: KeyId,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """End a key: everywhere within five seconds."""

    async def work(opened: client.Client) -> None:
        ended = await opened.access.revoke_key(key_id)
        if as_json:
            output.print_json(ended)
        else:
            output.print_facts([("key", ended.key_id), ("revoked", output.clock(ended.revoked_at))])

    running.with_client(work, address, api_key, for_account=False)


@members.command("add")
def add_member(
    issuer: Annotated[str, typer.Argument(metavar="ISSUER", help="As the gateway is configured.")],
    subject: Annotated[str, typer.Option(help="The `sub` of the tokens.")] = "",
    email: Annotated[str, typer.Option(help="Or the e-mail address, verified by the issuer.")] = "",
    role: Annotated[str, typer.Option(help="member, service or operator.")] = "member",
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Let somebody call with an issuer's tokens, as a member of the account or in a role without one."""

    async def work(opened: client.Client) -> None:
        added = await opened.access.add_member(
            issuer, subject=subject, email=email, role=role.upper(), why=why
        )
        _show_members([added], as_json)

    running.with_client(work, address, api_key, account, for_account=role.lower() == "member")


@members.command("remove")
def remove_member(
    principal: Annotated[str, typer.Argument(metavar="PRINCIPAL", help="As `list` shows it.")],
    account: Annotated[str, typer.Option(help="Out of this account; left out: of all.")] = "",
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Take somebody out of an account, or out of all and the role."""

    async def work(opened: client.Client) -> None:
        removed = await opened.access.remove_member(principal, account, why=why)
        if as_json:
            output.print_json({"removed": removed})
        else:
            output.print_facts([("removed", removed)])

    running.with_client(work, address, api_key, for_account=False)


@members.command("list")
def list_members(
    account: Annotated[str, typer.Option(help="Of this account; left out: who has none.")] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """List members of an account, or the services and operators."""

    async def work(opened: client.Client) -> None:
        _show_members(await opened.access.members(account), as_json)

    running.with_client(work, address, api_key, for_account=False)


def limits(
    requests_per_minute: Amount = None,
    videos_per_hour: Amount = None,
    max_in_flight: Amount = None,
    upload_bytes_per_day: Amount = None,
    moderation_refusals_per_hour: Amount = None,
    moderation_refusals_per_day: Amount = None,
    key: Annotated[str, typer.Option(help="Of this API key; 0 then means: none of its own.")] = "",
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show the limits of an account or a key, and change those that are given."""
    asked = types.Limits(
        requests_per_minute,
        videos_per_hour,
        max_in_flight,
        upload_bytes_per_day,
        moderation_refusals_per_hour,
        moderation_refusals_per_day,
    )

    async def work(opened: client.Client) -> None:
        found = await opened.access.set_limits(asked, key_id=key, why=why)
        if as_json:
            output.print_json(found)
            return
        output.print_facts(
            [(name.replace("_", " "), value) for name, value in found.given().items()]
        )

    running.with_client(work, address, api_key, account)


def set_account(
    lane: Annotated[list[str] | None, typer.Option(help="May be used; may be repeated.")] = None,
    weight: Annotated[int, typer.Option(min=0, max=1000, help="Share inside a lane.")] = 0,
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show an account's lanes and weight, and change what is given."""

    async def work(opened: client.Client) -> None:
        found = await opened.access.set_account(lanes=lane or (), weight=weight, why=why)
        if as_json:
            output.print_json(found)
        else:
            accounts.show(found)

    running.with_client(work, address, api_key, account)


@admission.command()
def pause(
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Take no more videos, from anybody; what was taken goes on."""
    _set_admission(True, why, address, api_key, as_json)


@admission.command()
def resume(
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Take videos again."""
    _set_admission(False, why, address, api_key, as_json)


def _set_admission(paused: bool, why: str, address: str, api_key: str, as_json: bool) -> None:
    async def work(opened: client.Client) -> None:
        now = await opened.operations.set_admission(paused, why=why)
        if as_json:
            output.print_json({"paused": now})
        else:
            output.print_facts([("admission", "paused" if now else "open")])

    running.with_client(work, address, api_key, for_account=False)


def _show_new(made: types.NewApiKey, as_json: bool) -> None:
    if as_json:
        output.print_json(made)
        return
    output.print_facts(
        [
            ("key", made.key.key_id),
            ("secret", made.secret),
            ("account", made.key.account_id or "any"),
            ("role", made.key.role.lower()),
            ("expires", output.clock(made.key.expires_at) or "never"),
        ]
    )


def _show_members(found: list[access.Member] | tuple[access.Member, ...], as_json: bool) -> None:
    if as_json:
        output.print_json(found)
        return
    rows = (
        (
            each.principal_id,
            each.role.lower(),
            each.issuer,
            each.subject or "(not seen yet)",
            each.email,
            output.clock(each.added_at),
        )
        for each in found
    )
    columns = ("principal", "role", "issuer", "subject", "e-mail", "since")
    output.print_table(columns, rows)
