"""The commands about many videos, and about the ends of one: batch, retry, delete."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from framewire import client, types
from framewire.cli import options, output, running

MOST = 100
_FIELDS = frozenset(client.VideoFields.__annotations__) | frozenset(
    client.SpecFields.__annotations__
)


def batch(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="One JSON object a line: prompt, and as needed image_id, model, seconds, width, height, ...",
        ),
    ],
    request_id: Annotated[
        str, typer.Option(help="A UUID; given again, what was admitted is not made twice.")
    ] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Ask for up to 100 videos at once; exit code 1 when one of them was refused."""
    wanted = _read(file)
    request_id = request_id or client.new_request_id()

    async def work(opened: client.Client) -> None:
        verdicts = await opened.create_videos(wanted, request_id=request_id)
        if as_json:
            for verdict in verdicts:
                output.print_json(verdict)
        else:
            rows = (_row(number, verdict) for number, verdict in enumerate(verdicts, 1))
            output.print_table(("line", "video", "credits", "refused"), rows)
        if any(verdict.video is None for verdict in verdicts):
            raise typer.Exit(output.EXIT_REFUSED)

    def interrupted() -> str:
        return f"To go on, run the same command with --request-id {request_id}"

    running.with_client(work, address, api_key, account, interrupted=interrupted)


def watch(video_ids: list[str], address: str, api_key: str, account: str, as_json: bool) -> None:
    """A line for each change of these videos, or of all of the account."""

    async def work(opened: client.Client) -> None:
        failed = False
        async for video in opened.watch_videos(video_ids):
            failed |= video.state in ("FAILED", "CANCELLED")
            if as_json:
                output.print_json(video)
            else:
                print(_line(video), flush=True)
        if failed:
            raise typer.Exit(output.EXIT_REFUSED)

    running.with_client(work, address, api_key, account, for_account=not video_ids)


def _line(video: types.Video) -> str:
    where = video.state if video.is_terminal else f"{video.state}, {video.stage.lower()}"
    why = f"{video.failure.message} ({video.failure.cause})" if video.failure else ""
    credits_text = output.credits_text(video.credits)
    line = f"{video.video_id}  {where:24}  {video.progress_percent:3} %  {credits_text}  {why}"
    return line.rstrip()


def retry(
    video_id: options.VideoId,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Make a video that failed anew, as another video with a price of its own."""

    async def work(opened: client.Client) -> None:
        made = await opened.retry_video(video_id)
        if as_json:
            output.print_json(made)
        else:
            output.print_facts(
                [
                    ("video", made.video_id),
                    ("retry of", made.retry_of),
                    ("state", made.state),
                    ("credits", output.credits_text(made.credits)),
                ]
            )

    running.with_client(work, address, api_key, for_account=False)


def delete(
    video_id: options.VideoId,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Also one that lives: it is cancelled first.")
    ] = False,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Remove a video: its outputs, its prompt, and its image where no other video needs it."""

    async def work(opened: client.Client) -> None:
        gone = await opened.delete_video(video_id, cancel=cancel)
        if as_json:
            output.print_json(gone)
        else:
            when = output.clock(gone.deleted_at) or "when it has ended"
            output.print_facts([("video", gone.video_id), ("deleted", when)])

    running.with_client(work, address, api_key, for_account=False)


def _read(file: Path) -> list[tuple[str, client.VideoFields]]:
    wanted: list[tuple[str, client.VideoFields]] = []
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise output.usage(f"cannot read {file}: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            wanted.append(_item(f"{file}:{number}", line))
    if not 1 <= len(wanted) <= MOST:
        raise output.usage(f"{file} has {len(wanted)} videos; give 1 to {MOST}")
    return wanted


def _item(where: str, line: str) -> tuple[str, client.VideoFields]:
    try:
        item: Any = json.loads(line)
    except ValueError as error:
        raise output.usage(f"{where}: not JSON: {error}") from None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise output.usage(f'{where}: give an object with a "prompt"')
    prompt = item.pop("prompt")
    if unknown := sorted(set(item) - _FIELDS):
        raise output.usage(f"{where}: there is no {unknown[0]!r}; there are: {sorted(_FIELDS)}")
    if (seconds := item.get("reject_duplicates_within")) is not None:
        item["reject_duplicates_within"] = timedelta(seconds=seconds)
    return prompt, client.VideoFields(**item)


def _row(number: int, verdict: types.Verdict) -> tuple[object, ...]:
    if verdict.video is None:
        return number, "", "", f"{verdict.message} ({verdict.reason})"
    return number, verdict.video.video_id, verdict.video.credits.reserved, ""
