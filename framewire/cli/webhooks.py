"""The commands about webhooks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from framewire import client, webhooks
from framewire.cli import options, output, running

sent = typer.Typer(no_args_is_help=True, help="Events by POST, to addresses of yours.")

EndpointId = Annotated[
    str, typer.Argument(metavar="ENDPOINT", help="The endpoint's id.", show_default=False)
]
Kinds = Annotated[
    list[str],
    typer.Option("--kind", help="Only this kind; may be repeated.", show_default="all kinds"),
]


@sent.command("create")
def create(
    url: Annotated[str, typer.Argument(help="https://...", show_default=False)],
    kinds: Kinds = [],  # noqa: B006 (typer reads it)
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Make an endpoint. Its secret is shown once, here."""

    async def work(opened: client.Client) -> None:
        _show_new(await opened.webhooks.create(url, kinds, description=description), as_json)

    running.with_client(work, address, api_key, account)


@sent.command("list")
def list_endpoints(
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """List the account's endpoints."""

    async def work(opened: client.Client) -> None:
        found = await opened.webhooks.endpoints()
        if as_json:
            for each in found:
                output.print_json(each)
            return
        rows = (
            (
                each.endpoint_id,
                each.url,
                " ".join(each.kinds).lower() or "all",
                "yes" if each.enabled else f"no ({each.disabled_why.lower()})",
                output.clock(each.failing_since),
                each.description,
            )
            for each in found
        )
        output.print_table(
            ("endpoint", "url", "kinds", "enabled", "failing since", "description"), rows
        )

    running.with_client(work, address, api_key, account)


@sent.command("show")
def show(
    endpoint_id: EndpointId,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Show an endpoint; its secret is not shown again."""

    async def work(opened: client.Client) -> None:
        _show(await opened.webhooks.get(endpoint_id), as_json)

    running.with_client(work, address, api_key, for_account=False)


@sent.command("update")
def update(
    endpoint_id: EndpointId,
    url: Annotated[str | None, typer.Option(help="https://...", show_default="as it is")] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Only this kind; may be repeated.", show_default="as it is"),
    ] = None,
    description: Annotated[
        str | None, typer.Option(help="What it is for.", show_default="as it is")
    ] = None,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Change an endpoint's address, kinds or description; what is left out stays."""
    # No --kind at all comes as None or as an empty list: both leave the kinds alone.
    given = kinds or None

    async def work(opened: client.Client) -> None:
        changed = await opened.webhooks.update(
            endpoint_id, url=url, kinds=given, description=description
        )
        _show(changed, as_json)

    running.with_client(work, address, api_key, for_account=False)


@sent.command("enable")
def enable(
    endpoint_id: EndpointId,
    off: Annotated[bool, typer.Option("--off", help="Disable it instead.")] = False,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Deliver to an endpoint again, from now on; `replay` delivers what it missed."""

    async def work(opened: client.Client) -> None:
        _show(await opened.webhooks.update(endpoint_id, enabled=not off), as_json)

    running.with_client(work, address, api_key, for_account=False)


@sent.command("rotate")
def rotate(
    endpoint_id: EndpointId,
    grace_hours: Annotated[
        int, typer.Option(min=0, max=168, help="How long the secret before signs too.")
    ] = 24,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Give an endpoint a new secret. It is shown once, here."""

    async def work(opened: client.Client) -> None:
        made = await opened.webhooks.rotate(endpoint_id, grace=timedelta(hours=grace_hours))
        _show_new(made, as_json)

    running.with_client(work, address, api_key, for_account=False)


@sent.command("delete")
def delete(
    endpoint_id: EndpointId,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Remove an endpoint, and what waits for it."""

    async def work(opened: client.Client) -> None:
        await opened.webhooks.delete(endpoint_id)
        if as_json:
            output.print_json({"endpoint_id": endpoint_id})
        else:
            output.print_facts([("removed", endpoint_id)])

    running.with_client(work, address, api_key, for_account=False)


@sent.command("deliveries")
def deliveries(
    endpoint_id: EndpointId,
    state: Annotated[str, typer.Option(help="pending, delivered or failed only.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 50,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """List deliveries to an endpoint, the newest first."""

    async def work(opened: client.Client) -> None:
        found: list[webhooks.Delivery] = []
        async for each in opened.webhooks.deliveries(endpoint_id, state):
            found.append(each)
            if len(found) == limit:
                break
        if as_json:
            for each in found:
                output.print_json(each)
            return
        columns = ("delivery", "event", "kind", "state", "tries", "last try", "next try")
        output.print_table(columns, (_row(each) for each in found))

    running.with_client(work, address, api_key, for_account=False)


@sent.command("redeliver")
def redeliver(
    delivery_id: Annotated[
        str, typer.Argument(metavar="DELIVERY", help="The delivery's id.", show_default=False)
    ],
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Deliver once more, whatever became of it."""

    async def work(opened: client.Client) -> None:
        _show_delivery(await opened.webhooks.redeliver(delivery_id), as_json)

    running.with_client(work, address, api_key, for_account=False)


@sent.command("replay")
def replay(
    endpoint_id: EndpointId,
    since: Annotated[
        datetime,
        typer.Argument(help="From when, UTC: 2026-11-27T12:00:00", show_default=False),
    ],
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Deliver again what was told since a time."""

    async def work(opened: client.Client) -> None:
        place: datetime | None = since.replace(tzinfo=UTC)
        events = 0
        while place is not None:
            done = await opened.webhooks.replay(endpoint_id, place)
            events, place = events + done.events, done.next_from
        if as_json:
            output.print_json({"events": events})
        else:
            print(f"{events} events are delivered again")

    running.with_client(work, address, api_key, for_account=False)


@sent.command("test")
def send_test(
    endpoint_id: EndpointId,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Deliver an event of kind TEST; `deliveries` shows what became of it."""

    async def work(opened: client.Client) -> None:
        _show_delivery(await opened.webhooks.test(endpoint_id), as_json)

    running.with_client(work, address, api_key, for_account=False)


def _show_new(made: webhooks.NewSecret, as_json: bool) -> None:
    if as_json:
        output.print_json(made)
    else:
        output.print_facts([*_endpoint(made.endpoint), ("secret", made.secret)])


def _show(endpoint: webhooks.Endpoint, as_json: bool) -> None:
    if as_json:
        output.print_json(endpoint)
    else:
        output.print_facts(_endpoint(endpoint))


def _endpoint(endpoint: webhooks.Endpoint) -> list[tuple[str, object]]:
    return [
        ("endpoint", endpoint.endpoint_id),
        ("url", endpoint.url),
        ("kinds", " ".join(endpoint.kinds).lower() or "all"),
        ("enabled", "yes" if endpoint.enabled else f"no ({endpoint.disabled_why.lower()})"),
        ("description", endpoint.description),
        ("old secret signs until", output.clock(endpoint.old_secret_until)),
    ]


def _last(delivery: webhooks.Delivery) -> str:
    if not delivery.tries:
        return ""
    last = delivery.tries[-1]
    return f"{last.error or last.status} ({last.duration_ms} ms)"


def _row(delivery: webhooks.Delivery) -> tuple[object, ...]:
    return (
        delivery.delivery_id,
        delivery.event_id,
        delivery.kind.lower(),
        delivery.state.lower(),
        delivery.attempts,
        _last(delivery),
        output.clock(delivery.next_attempt_at),
    )


def _show_delivery(delivery: webhooks.Delivery, as_json: bool) -> None:
    if as_json:
        output.print_json(delivery)
        return
    output.print_facts(
        [
            ("delivery", delivery.delivery_id),
            ("event", delivery.event_id),
            ("kind", delivery.kind.lower()),
            ("state", delivery.state.lower()),
            ("last try", _last(delivery)),
        ]
    )
