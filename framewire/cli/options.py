"""The options that commands share."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from framewire import client
from framewire.cli import output

Address = Annotated[
    str,
    typer.Option(
        envvar="FRAMEWIRE_ADDRESS",
        help="The gateway: host:port, or https://host for TLS. Default: the system running on this machine.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str,
    typer.Option(
        envvar="FRAMEWIRE_API_KEY",
        help="The API key; FRAMEWIRE_API_KEY_FILE may name a file with it.",
        show_default=False,
    ),
]
Account = Annotated[
    str,
    typer.Option(
        envvar="FRAMEWIRE_ACCOUNT",
        help="The account's id. Default: the key's own; on this machine a demo account.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON; for streams one line per item.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV with a line of names.")]
Since = Annotated[
    str, typer.Option(help="From then: 10m, 2h, 3d ago, a date, or a month: 2026-11.")
]
Until = Annotated[str, typer.Option(help="Until before then, in the same words; a month: its end.")]
Why = Annotated[str, typer.Option(help="For the audit.")]
VideoId = Annotated[str, typer.Argument(metavar="ID", help="The video's id.", show_default=False)]
Limit = Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")]
Model = Annotated[
    str,
    typer.Option(help="As `framewire models` lists it. Default: the first.", show_default=False),
]
Seconds = Annotated[
    int, typer.Option(min=0, help="Length. Default: the model's.", show_default=False)
]
Size = Annotated[
    str,
    typer.Option(metavar="WxH", help="In pixels. Default: the model's.", show_default=False),
]
Variants = Annotated[
    int, typer.Option(min=0, max=8, help="How many different videos.", show_default="1")
]
Lane = Annotated[str, typer.Option(help="vip, standard or batch.", show_default="standard")]
Out = Annotated[Path | None, typer.Option(help="Where to write the video.", show_default="ID.mp4")]


def spec_fields(model: str, seconds: int, size: str, variants: int) -> client.SpecFields:
    """What a video is to be; ends the command where the size is none."""
    width, height = 0, 0
    if size:
        found = re.fullmatch(r"(\d{1,5})[xX*](\d{1,5})", size.strip())
        if found is None:
            raise output.usage(f"{size!r} is no size; give for instance 1280x720")
        width, height = int(found[1]), int(found[2])
    return client.SpecFields(
        model=model, seconds=seconds, width=width, height=height, variants=variants
    )


def moment(text: str) -> datetime:
    """A time as people give it: 90s, 10m, 2h or 3d ago, or in ISO 8601."""
    if found := re.fullmatch(r"(\d{1,6})([smhd])", text.strip()):
        unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[found[2]]
        return datetime.now(UTC) - timedelta(**{unit: int(found[1])})
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        raise output.usage(
            f"{text!r} is no time; give for instance 10m, 2h, 3d or 2026-11-20T08:00"
        ) from None


def period(since: str, until: str) -> tuple[datetime | None, datetime | None]:
    """From when until before when. A month is UTC's, as usage counts it."""
    start, end = _month(since, 0), _month(until, 1)
    return (
        start or (moment(since) if since else None),
        end or (moment(until) if until else None),
    )


def usage_groups(by: list[str]) -> tuple[tuple[str, ...], str]:
    """What usage is grouped by, and the label whose values are the groups."""
    groups: list[str] = []
    label = ""
    for text in by:
        name, _, value = text.lower().partition(":")
        known = name in ("model", "lane", "key") and not value
        if not known and not (name == "label" and value and not label):
            raise output.usage(f"{text!r} is no group; give model, lane, key, or once label:NAME")
        groups.append(name)
        label = value or label
    return tuple(dict.fromkeys(groups)), label


def _month(text: str, later: int) -> datetime | None:
    found = re.fullmatch(r"(\d{4})-(\d{2})", text.strip())
    if found is None or not 1 <= int(found[2]) <= 12 or not 1 <= int(found[1]) <= 9998:
        return None
    months = int(found[1]) * 12 + int(found[2]) - 1 + later
    return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)
