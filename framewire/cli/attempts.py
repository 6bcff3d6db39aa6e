"""The commands of operators about attempts and provider accounts."""

from __future__ import annotations

from typing import Annotated

import typer

from framewire import attempts as sdk
from framewire import client
from framewire.cli import options, output, running

attempts = typer.Typer(
    no_args_is_help=True, help="Look into attempts and decide what nobody else can (operators)."
)
providers = typer.Typer(
    no_args_is_help=True, help="Provider accounts: see, pause, resume (operators)."
)

Number = Annotated[
    int, typer.Option(min=0, help="Which attempt, from 1. Default: the newest.", show_default=False)
]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="As `framewire providers list` shows it.")
]


@attempts.command("list")
def list_attempts(
    video: Annotated[str, typer.Option(help="Only of this video.", show_default=False)] = "",
    state: Annotated[
        str, typer.Option(help="Only in this state, for instance unresolved.", show_default=False)
    ] = "",
    provider: Annotated[
        str, typer.Option(help="Only at this provider account.", show_default=False)
    ] = "",
    account: Annotated[str, typer.Option(help="Only of this account.", show_default=False)] = "",
    limit: options.Limit = 50,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """List attempts, newest first."""

    async def work(opened: client.Client) -> None:
        found: list[sdk.Attempt] = []
        listed = opened.attempts.all(
            video_id=video, state=state, account_id=account, provider_account=provider
        )
        async for attempt in listed:
            if as_json:
                output.print_json(attempt)
            found.append(attempt)
            if len(found) == limit:
                break
        if not as_json:
            columns = ("video", "try", "state", "provider", "job", "changed", "why")
            output.print_table(columns, (_row(attempt) for attempt in found))

    running.with_client(work, address, api_key, for_account=False)


@attempts.command()
def show(
    video_id: options.VideoId,
    number: Number = 0,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Show everything on record of an attempt: history, provider jobs, outputs, cost."""

    async def work(opened: client.Client) -> None:
        found = await opened.attempts.one(video_id, number)
        if as_json:
            output.print_json(found)
        else:
            output.print_facts(_facts(found))

    running.with_client(work, address, api_key, for_account=False)


@attempts.command()
def resolve(
    video_id: options.VideoId,
    job: Annotated[
        str, typer.Option(help="It is this job of the provider's.", show_default=False)
    ] = "",
    never_accepted: Annotated[
        bool, typer.Option("--never-accepted", help="The provider never had it: send it again.")
    ] = False,
    give_up: Annotated[
        bool, typer.Option("--give-up", help="Nobody can tell: it fails, nothing is charged.")
    ] = False,
    number: Number = 0,
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Say what became of an attempt that is unknown or unresolved."""
    if [bool(job), never_accepted, give_up].count(True) != 1:
        raise output.usage("say one of --job ID, --never-accepted and --give-up")
    resolution = "ADOPT" if job else "NEVER_ACCEPTED" if never_accepted else "GIVE_UP"

    async def work(opened: client.Client) -> None:
        done = await opened.attempts.resolve(
            video_id, resolution, provider_job_id=job, number=number, why=why
        )
        _show(done, as_json)

    running.with_client(work, address, api_key, for_account=False)


@attempts.command()
def retry(
    video_id: options.VideoId,
    number: Annotated[
        int, typer.Option(min=1, help="Which attempt is to be followed by another one.")
    ],
    accept_double_cost: Annotated[
        bool, typer.Option("--accept-double-cost", help="The provider may be paid twice.")
    ] = False,
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Give an undecided attempt up and send its video again, on the same hold."""

    async def work(opened: client.Client) -> None:
        done = await opened.attempts.retry(
            video_id, number=number, accept_double_cost=accept_double_cost, why=why
        )
        _show(done, as_json)

    running.with_client(work, address, api_key, for_account=False)


@attempts.command()
def cancel(
    video_id: options.VideoId,
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Ask for the end of a video, whosever it is."""

    async def work(opened: client.Client) -> None:
        done = await opened.attempts.cancel(video_id, why=why)
        if as_json:
            output.print_json(done)
        else:
            output.print_facts(
                [("video", done.video_id), ("state", done.state), ("stage", done.stage.lower())]
            )

    running.with_client(work, address, api_key, for_account=False)


@providers.command("list")
def list_providers(
    address: options.Address = "", api_key: options.ApiKey = "", as_json: options.Json = False
) -> None:
    """List the provider accounts with what they are doing."""

    async def work(opened: client.Client) -> None:
        found = await opened.attempts.provider_accounts()
        if as_json:
            output.print_json(found)
        else:
            _show_providers(found)

    running.with_client(work, address, api_key, for_account=False)


@providers.command()
def pause(
    name: Name,
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Send nothing to a provider account until told otherwise."""
    _set_paused(name, True, why, address, api_key, as_json)


@providers.command()
def resume(
    name: Name,
    why: options.Why = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Send to a provider account again."""
    _set_paused(name, False, why, address, api_key, as_json)


def _set_paused(
    name: str, paused: bool, why: str, address: str, api_key: str, as_json: bool
) -> None:
    async def work(opened: client.Client) -> None:
        done = await opened.attempts.pause(name, paused=paused, why=why)
        if as_json:
            output.print_json(done)
        else:
            _show_providers((done,))

    running.with_client(work, address, api_key, for_account=False)


def _show_providers(found: tuple[sdk.ProviderAccount, ...]) -> None:
    columns = ("name", "dialect", "open", "in flight", "models")
    rows = (
        (
            one.provider_account,
            one.dialect,
            "yes" if one.open else f"no: {one.closed_reason}",
            f"{one.jobs_in_flight} of {one.max_jobs_in_flight}",
            " ".join(one.models),
        )
        for one in found
    )
    output.print_table(columns, rows)


def _show(attempt: sdk.Attempt, as_json: bool) -> None:
    if as_json:
        output.print_json(attempt)
    else:
        output.print_facts(_attempt_facts(attempt))


def _row(attempt: sdk.Attempt) -> tuple[object, ...]:
    return (
        attempt.video_id,
        attempt.number,
        attempt.state,
        attempt.provider_account,
        attempt.provider_job_id,
        output.clock(attempt.updated_at),
        attempt.message or ("" if attempt.cause == "NONE" else attempt.cause),
    )


def _attempt_facts(attempt: sdk.Attempt) -> list[tuple[str, object]]:
    return [
        ("video", attempt.video_id),
        ("attempt", attempt.number),
        ("account", attempt.account_id),
        ("state", attempt.state),
        ("cause", "" if attempt.cause == "NONE" else attempt.cause),
        ("message", attempt.message),
        ("provider", attempt.provider_account),
        ("provider job", attempt.provider_job_id),
        ("given up at", output.clock(attempt.resolve_by)),
    ]


def _facts(found: sdk.AttemptDetail) -> list[tuple[str, object]]:
    cost = "" if found.cost_micros is None else f"${found.cost_micros / 1e6:.6g}"
    facts = _attempt_facts(found.attempt)
    facts += [
        ("attempt id", found.attempt_id),
        ("sent", f"{found.submissions} times, last {output.clock(found.submitted_at) or 'never'}"),
        ("cost", cost if found.cost_known else f"{cost} if it was charged: not known"),
        ("held until", output.clock(found.lease_until)),
        ("next step", "" if found.attempt.cause else output.clock(found.next_step_at)),
    ]
    for change in found.history:
        facts.append(("history", f"{output.clock(change.at)}  {change.state}  {change.message}"))
    for job in found.provider_jobs:
        how = "adopted" if job.adopted else "answered"
        facts.append(
            (
                "job",
                f"{job.provider_account} {job.provider_job_id}, {how} {output.clock(job.seen_at)}",
            )
        )
    for made in found.outputs:
        facts.append(("output", f"{made.variant}: {made.state}  {made.message}"))
    if late := found.late_render:
        until = f"until {output.clock(late.look_until)}"
        facts.append(
            ("late render", f"{late.state} {late.provider_job_id} {until}  {late.message}")
        )
    return facts
