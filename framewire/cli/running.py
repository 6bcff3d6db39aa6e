"""How every command runs: connected, and with one clear line and an exit code when it fails."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import typer

from framewire import client, errors
from framewire.cli import connection, output


def with_client(
    work: Callable[[client.Client], Awaitable[None]],
    address: str,
    api_key: str,
    account: str = "",
    *,
    for_account: bool = True,
    interrupted: Callable[[], str] = str,
) -> None:
    """Runs `work` with a client and ends the command. `interrupted` answers what to say after Ctrl-C."""
    target = connection.find(address, api_key, account)

    async def connected() -> None:
        async with connection.connected(target, for_account=for_account) as opened:
            await work(opened)

    run(connected(), target.address, interrupted)


def run(
    work: Coroutine[Any, Any, None], address: str = "", interrupted: Callable[[], str] = str
) -> None:
    """Runs to the end and ends the command with 0, or says what is wrong and ends it with another code."""
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        if told := interrupted():
            print(f"\n{told}", file=sys.stderr)
        code = output.EXIT_INTERRUPTED
    except typer.Exit:
        raise
    except errors.FramewireError as error:
        code = output.report(error, address)
    except BrokenPipeError:
        # Who read our output has seen enough; Python must not complain about it when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = output.EXIT_REFUSED
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        output.print_error(f"{error.strerror or error}{where}")
        code = output.EXIT_REFUSED
    except Exception as error:
        if os.environ.get("FRAMEWIRE_DEBUG"):
            raise
        hint = "A fault in the CLI; FRAMEWIRE_DEBUG=1 shows where."
        output.print_error(repr(error), "INTERNAL", hint)
        code = output.EXIT_REFUSED
    else:
        return
    raise typer.Exit(code)
