"""The command that compares the services with each other, and repairs what differs."""

from __future__ import annotations

from typing import Annotated

import typer

from framewire import client, reconciliation
from framewire.cli import options, output, running


def reconcile(
    apply: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Apply the repair of this finding first; may be repeated."),
    ] = None,
    since: Annotated[
        str, typer.Option(help="Compare videos from then on: 2h, 3d, or a date.", show_default="1d")
    ] = "",
    why: Annotated[str, typer.Option(help="Why it is repaired, for the audit.")] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Compare ledger, videos, attempts, providers' lists and stored objects (operators).

    Whatever is still open is compared whatever its age. A difference counts once two runs, 10 minutes apart, show it
    ("confirmed"); only then its repair can be applied. Exit code 1 when a confirmed difference stands.
    """
    start = options.moment(since) if since else None

    async def work(opened: client.Client) -> None:
        for finding_id in apply or ():
            applied = await opened.operations.repair(finding_id, why=why)
            if not as_json:
                print(f"applied {applied.repair} to {applied.kind} of {applied.video_id}")
        found = await opened.operations.reconcile(start)
        if as_json:
            output.print_json(found)
        else:
            _show(found)
        if found.done.confirmed:
            raise typer.Exit(output.EXIT_REFUSED)

    running.with_client(work, address, api_key, for_account=False)


def _show(found: reconciliation.Reconciliation) -> None:
    for finding in sorted(found.findings, key=lambda one: not one.confirmed):
        output.print_facts(
            [
                ("finding", finding.finding_id),
                ("kind", finding.kind),
                ("video", finding.video_id),
                ("account", finding.account_id),
                ("subject", finding.subject),
                *(
                    (said.side, f"{said.says}  (as of {output.clock(said.as_of)})")
                    for said in finding.statements
                ),
                ("first seen", output.clock(finding.first_seen_at)),
                ("confirmed", "yes" if finding.confirmed else "not yet: run again later"),
                ("repair", _repair(finding)),
                ("advice", finding.advice),
            ]
        )
        print()
    done = found.done
    for side in done.sides:
        state = f"not read: {side.error}" if side.error else f"as of {output.clock(side.as_of)}"
        print(f"{side.side}: {state}")
    print(
        f"compared {done.videos} videos, {done.objects} objects, {done.provider_jobs} jobs of providers "
        f"since {output.clock(done.since)}: {done.findings} differences, {done.confirmed} confirmed"
    )


def _repair(finding: reconciliation.Finding) -> str:
    if finding.repair == "NONE":
        return "none: an operator must look"
    if not finding.confirmed:
        return finding.repair
    return f"{finding.repair}: framewire reconcile --apply {finding.finding_id}"
