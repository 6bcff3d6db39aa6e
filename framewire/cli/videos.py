"""The commands about videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from framewire import client, errors, outcomes, types
from framewire.cli import inputs, many, options, output, progress, running, templates

Prompt = Annotated[
    str, typer.Argument(metavar="PROMPT", help="What is to be seen, up to 500 characters.")
]


def generate(
    image: inputs.First,
    prompt: inputs.PromptLast = "",
    images: inputs.Images = [],  # noqa: B006 (typer reads it)
    video: inputs.Video = None,
    fit: inputs.Fit = "",
    crop: inputs.Crop = "",
    renditions: inputs.Renditions = [],  # noqa: B006
    model: options.Model = "",
    seconds: options.Seconds = 0,
    size: options.Size = "",
    variants: options.Variants = 0,
    template: templates.Template = "",
    values: templates.Values = [],  # noqa: B006
    model_options: inputs.ModelOptions = [],  # noqa: B006
    lane: options.Lane = "",
    max_credits: Annotated[int | None, typer.Option(min=0, help="Refuse above this price.")] = None,
    out: options.Out = None,
    request_id: Annotated[
        str, typer.Option(help="A UUID; given again, the same request goes on and is paid once.")
    ] = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Make a video from an image, several images, a video or text, wait for it and download it."""
    fields = client.VideoFields(
        **options.spec_fields(model, seconds, size, variants),
        lane=lane,
        max_credits=max_credits,
    )
    fields |= {"options": inputs.model_options(model_options), "rendition_heights": renditions}
    given = inputs.given(images, video, fit, crop)
    text = inputs.prompt_and_first(image, prompt, given, bool(template))
    request_id = request_id or client.new_request_id()
    shown = progress.Shown(quiet=as_json)

    async def work(opened: client.Client) -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)  # before anything is paid for
        try:
            fields["template"] = await templates.used(opened, template, values)
            with shown:
                made = await inputs.generate(opened, text, given, shown, request_id, fields)
        except errors.FramewireError:
            _show_failed(shown.latest, as_json)
            raise
        await _save(opened, made, out, as_json)

    def interrupted() -> str:
        if shown.latest is not None:
            return f"The video goes on. Watch it: framewire watch {shown.latest.video_id}"
        return f"To go on, run the same command with --request-id {request_id}"

    running.with_client(work, address, api_key, account, interrupted=interrupted)


def get(
    video_id: options.VideoId,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Show a video as it is now."""

    async def work(opened: client.Client) -> None:
        _show(await opened.get_video(video_id), as_json)

    running.with_client(work, address, api_key, for_account=False)


def list_videos(
    state: Annotated[
        str, typer.Option(help="pending, processing, completed, failed or cancelled.")
    ] = "",
    model: options.Model = "",
    since: options.Since = "",
    until: options.Until = "",
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="May be repeated.")
    ] = None,
    reference: Annotated[str, typer.Option(help="Only with this client reference.")] = "",
    oldest_first: Annotated[bool, typer.Option("--oldest-first")] = False,
    template: Annotated[str, typer.Option(help="Only made from this template.")] = "",
    limit: options.Limit = 50,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """List the account's videos, newest first unless told."""
    start, end = options.period(since, until)
    labels = {name: value for name, _, value in (one.partition("=") for one in label or ())}

    async def work(opened: client.Client) -> None:
        found: list[types.Video] = []
        async for video in opened.list_videos(
            state=state,
            model=model,
            created_from=start,
            created_to=end,
            labels=labels,
            client_reference=reference,
            template=template,
            oldest_first=oldest_first,
        ):
            if as_json:
                output.print_json(video)
            found.append(video)
            if len(found) == limit:
                break
        if not as_json:
            columns = ("video", "state", "progress", "model", "credits", "created")
            output.print_table(columns, (_row(video) for video in found))

    running.with_client(work, address, api_key, account)


def watch(
    video_ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID...]", help="The videos. Default: all of the account.", show_default=False
        ),
    ] = None,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Follow videos until they are done and settled; exit code 1 when one made no output."""
    if video_ids and len(video_ids) == 1:
        _watch_one(video_ids[0], address, api_key, as_json)
    else:
        many.watch(video_ids or [], address, api_key, account, as_json)


def _watch_one(video_id: str, address: str, api_key: str, as_json: bool) -> None:
    shown = progress.Shown(quiet=as_json)

    async def work(opened: client.Client) -> None:
        with shown:
            async for video in opened.watch_video(video_id):
                shown(video)
                if as_json:
                    output.print_json(video)
        if shown.latest is not None:
            if not as_json:
                _show(shown.latest, as_json)
            outcomes.require_completed(shown.latest)

    running.with_client(
        work,
        address,
        api_key,
        for_account=False,
        interrupted=lambda: f"The video goes on. Watch it: framewire watch {video_id}",
    )


def download(
    video_id: options.VideoId,
    out: options.Out = None,
    height: Annotated[
        int,
        typer.Option(min=0, help="A smaller version instead, by its height.", show_default=False),
    ] = 0,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Download a finished video, verified."""

    async def work(opened: client.Client) -> None:
        video = await opened.get_video(video_id)
        if not video.outputs:
            await opened.get_download_url(video_id)  # the gateway says why there is none
        await _save(opened, video, out, as_json, height)

    running.with_client(work, address, api_key, for_account=False)


def quote(
    prompt: Prompt = "a video",
    model: options.Model = "",
    seconds: options.Seconds = 0,
    size: options.Size = "",
    variants: options.Variants = 0,
    lane: options.Lane = "",
    template: templates.Template = "",
    values: templates.Values = [],  # noqa: B006
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Show the price of a video without making it; it does not depend on the prompt."""
    fields = options.spec_fields(model, seconds, size, variants)

    async def work(opened: client.Client) -> None:
        use = await templates.used(opened, template, values)
        text = "" if use else prompt
        found = await opened.quote_video(text, lane=lane, template=use, **fields)
        if as_json:
            output.print_json(found)
            return
        spec = found.spec
        variants_text = f", {spec.variants} variants" if spec.variants > 1 else ""
        size_text = f"{spec.width}x{spec.height}, {spec.seconds} s{variants_text}"
        output.print_facts(
            [
                ("price", output.counted(found.credits)),
                ("model", f"{spec.model}, {size_text}"),
                ("kept until", output.clock(found.expires_at)),
            ]
        )

    running.with_client(work, address, api_key, account)


def cancel(
    video_id: options.VideoId,
    address: options.Address = "",
    api_key: options.ApiKey = "",
    as_json: options.Json = False,
) -> None:
    """Ask for the end of a video; free of charge before it was sent to the provider."""

    async def work(opened: client.Client) -> None:
        _show(await opened.cancel_video(video_id), as_json)

    running.with_client(work, address, api_key, for_account=False)


async def _save(
    opened: client.Client, video: types.Video, out: Path | None, as_json: bool, height: int = 0
) -> None:
    place = out or Path(f"{video.video_id}.mp4")
    place.parent.mkdir(parents=True, exist_ok=True)
    paths = await opened.download_all(video, place, rendition_height=height)
    if as_json:
        output.print_json(video)
    else:
        output.print_facts([*output.video_facts(video), *(("file", path) for path in paths)])


def _show(video: types.Video, as_json: bool) -> None:
    if as_json:
        output.print_json(video)
    else:
        output.print_facts(output.video_facts(video))


def _show_failed(video: types.Video | None, as_json: bool) -> None:
    """A video that ended is printed even so: programs want its credits and its cause."""
    if video is not None and video.is_terminal and as_json:
        output.print_json(video)


def _row(video: types.Video) -> tuple[object, ...]:
    return (
        video.video_id,
        video.state,
        f"{video.progress_percent} %",
        video.spec.model,
        video.credits.captured if video.credits.settlement == "DONE" else video.credits.reserved,
        output.clock(video.created_at),
    )
