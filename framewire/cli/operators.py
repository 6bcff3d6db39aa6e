"""The commands of operators about the ledger. Each leaves a row in the audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from framewire import client, types
from framewire.cli import options, output, running

Kind = Annotated[str, typer.Argument(metavar="KIND", help="prices or refunds.")]
_KINDS = {"prices": "PRICE_BOOK", "refunds": "REFUND_POLICY"}


def refund(
    video_id: options.VideoId,
    credits: Annotated[int, typer.Argument(metavar="CREDITS", min=1)],
    from_loss: Annotated[
        bool, typer.Option(help="What was charged stays earned; the platform bears the refund.")
    ] = False,
    note: Annotated[str, typer.Option(help="For the account's statement.")] = "",
    why: options.Why = "",
    request_id: Annotated[
        str, typer.Option(help="A UUID; given again, nothing is given twice.")
    ] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Give back credits that a video was charged."""

    async def work(opened: client.Client) -> None:
        given = await opened.operations.refund(
            video_id, credits, from_loss=from_loss, note=note, why=why, request_id=request_id
        )
        if as_json:
            output.print_json(given)
        else:
            balance = given.balance
            output.print_facts(
                [
                    ("account", balance.account_id),
                    ("available", output.counted(balance.available_credits)),
                ]
            )

    running.with_client(work, address, api_key, for_account=False)


def freeze(
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Stop an account from making new videos; those under way go on."""
    _set_frozen(True, why, address, api_key, account, as_json)


def unfreeze(
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Let a frozen account go on."""
    _set_frozen(False, why, address, api_key, account, as_json)


def cap(
    credits: Annotated[
        str, typer.Argument(metavar="CREDITS", help="Most credits a day (UTC), or none: no cap.")
    ],
    key: Annotated[str, typer.Option(help="Only this API key, by its id.")] = "",
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Cap what an account, or one of its API keys, may use in a day."""
    most = None if credits.lower() == "none" else _number(credits)

    async def work(opened: client.Client) -> None:
        account_id = _named(opened)
        found = await opened.operations.set_daily_cap(account_id, most, key_id=key, why=why)
        _show_rules(found, as_json)

    running.with_client(work, address, api_key, account)


def rulebooks(
    kind: Kind,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """List the versions of the price book or the refund policy, newest first."""
    name = _kind(kind)

    async def work(opened: client.Client) -> None:
        found = await opened.operations.rulebooks(name)
        if as_json:
            for one in found:
                output.print_json(one)
            return
        columns = ("version", "in force", "from", "by", "added", "hash")
        output.print_table(columns, (_rulebook_row(one) for one in found))

    running.with_client(work, address, api_key, for_account=False)


def add_rulebook(
    kind: Kind,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML document.")],
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Add a version of the price book or the refund policy; it is checked whole, and not put in force."""
    name = _kind(kind)

    async def work(opened: client.Client) -> None:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise output.usage(f"{file} is not a text in UTF-8") from None
        _show_rulebook(await opened.operations.add_rulebook(name, text, why=why), as_json)

    running.with_client(work, address, api_key, for_account=False)


def activate_rulebook(
    kind: Kind,
    version: Annotated[str, typer.Argument(metavar="VERSION")],
    content_hash: Annotated[
        str, typer.Argument(metavar="HASH", help="As `framewire operator rulebooks` lists it.")
    ],
    at: Annotated[str, typer.Option(help="From then, in ISO 8601.", show_default="now")] = "",
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Put a version in force for new quotes and holds; those that are there keep theirs."""
    name, start = _kind(kind), options.moment(at) if at else None

    async def work(opened: client.Client) -> None:
        found = await opened.operations.activate_rulebook(
            name, version, content_hash, effective_from=start, why=why
        )
        _show_rulebook(found, as_json)

    running.with_client(work, address, api_key, for_account=False)


def check_books(
    address: options.Address = "", api_key: options.ApiKey = "", as_json: options.Json = False
) -> None:
    """Prove the books of the whole ledger; exit code 1 when a row disagrees."""

    async def work(opened: client.Client) -> None:
        proof = await opened.operations.check_books()
        if as_json:
            output.print_json(proof)
        else:
            for finding in proof.findings:
                print(finding)
            output.print_facts(
                [
                    ("books", "balance" if proof.balanced else "DISAGREE"),
                    ("transfers", proof.transfers),
                    ("accounts", proof.accounts),
                    ("open holds", proof.open_holds),
                    ("recomputed", proof.recomputed_holds),
                ]
            )
        if not proof.balanced:
            raise typer.Exit(output.EXIT_REFUSED)

    running.with_client(work, address, api_key, for_account=False)


def quarantined(
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="Whose.")],
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """List what is kept aside of an account because it is no video, with a URL of its bytes. Do not trust them."""

    async def work(opened: client.Client) -> None:
        found = await opened.operations.quarantined(account, why=why)
        if as_json:
            for each in found:
                output.print_json(each)
            return
        rows = [
            (
                each.asset.asset_id,
                each.asset.size_bytes,
                output.clock(each.asset.created_at),
                output.clock(each.asset.expires_at),
                each.url,
            )
            for each in found
        ]
        output.print_table(("asset", "bytes", "since", "until", "url"), rows)

    running.with_client(work, address, api_key, for_account=False)


def _set_frozen(
    frozen: bool, why: str, address: str, api_key: str, account: str, as_json: bool
) -> None:
    async def work(opened: client.Client) -> None:
        _show_rules(await opened.operations.set_frozen(_named(opened), frozen, why=why), as_json)

    running.with_client(work, address, api_key, account)


def _named(opened: client.Client) -> str:
    if not opened.account_id:
        raise output.usage("say whose: --account ID or FRAMEWIRE_ACCOUNT")
    return opened.account_id


def _kind(kind: str) -> str:
    if kind not in _KINDS:
        raise output.usage(f"there is no {kind!r}; give prices or refunds")
    return _KINDS[kind]


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise output.usage(f"{text!r} is no number of credits; give for instance 500, or none")
    return int(text)


def _show_rules(found: types.AccountRules, as_json: bool) -> None:
    if as_json:
        output.print_json(found)
        return
    cap = found.daily_cap_credits
    keys = found.key_daily_cap_credits
    output.print_facts(
        [
            ("account", found.account_id),
            ("frozen", "yes" if found.frozen else "no"),
            ("a day", "no cap" if cap is None else output.counted(cap)),
            *((f"key {key}", f"{output.counted(keys[key])} a day") for key in sorted(keys)),
        ]
    )


def _show_rulebook(found: types.Rulebook, as_json: bool) -> None:
    if as_json:
        output.print_json(found)
        return
    output.print_facts(
        [
            ("version", found.version),
            ("hash", found.content_hash),
            ("in force", "yes" if found.in_force else "no"),
            ("from", output.clock(found.effective_from)),
        ]
    )


def _rulebook_row(one: types.Rulebook) -> tuple[object, ...]:
    return (
        one.version,
        "yes" if one.in_force else "",
        output.clock(one.effective_from),
        one.activated_by,
        f"{output.clock(one.loaded_at)} by {one.loaded_by}",
        one.content_hash,
    )
