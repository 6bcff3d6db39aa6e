"""What videos start from, as commands say it; `framewire preview`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from framewire import client, downloads, outcomes, types, uploads
from framewire.cli import options, output, running

First = Annotated[
    str,
    typer.Argument(
        metavar="[IMAGE]",
        help="The first frame: an image file, a public https:// URL, or - for text-to-video. "
        "Left out with --image or --video.",
    ),
]
PromptLast = Annotated[
    str,
    typer.Argument(
        metavar="PROMPT", help="What is to be seen, up to 500 characters.", show_default=False
    ),
]
Images = Annotated[
    list[str],
    typer.Option(
        "--image",
        metavar="IMAGE[@FRAME]",
        help="An image file or https:// URL, and the frame that it is for (0 unless given). May be repeated.",
        show_default=False,
    ),
]
Video = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A video to start from: MP4, MOV or WebM.", exists=True),
]
Fit = Annotated[
    str,
    typer.Option(help="How it is brought to the size: cover, contain or contain_blurred."),
]
Crop = Annotated[
    str,
    typer.Option(
        metavar="L,T,R,B", help="The part to take, as fractions: 0,0,0.5,1 is the left half."
    ),
]
Renditions = Annotated[
    list[int],
    typer.Option(
        "--rendition",
        metavar="HEIGHT",
        min=64,
        help="A smaller version that is wanted too. May be repeated.",
        show_default=False,
    ),
]
ModelOptions = Annotated[
    list[str],
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="A parameter of the model, as `framewire models --json` lists them. May be repeated.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Given:
    """What a command was given to start from."""

    images: dict[int, uploads.Source]
    video: Path | None
    fit: str
    crop: types.CropBounds | None

    def __bool__(self) -> bool:
        return bool(self.images) or self.video is not None


def given(images: list[str], video: Path | None, fit: str, crop: str) -> Given:
    """Ends the command where a word makes no sense."""
    found: dict[int, uploads.Source] = {}
    for text in images:
        name, frame = _frame(text)
        if frame in found:
            raise output.usage(f"two images are for frame {frame}; say which with IMAGE@FRAME")
        found[frame] = source(name)
    return Given(found, video, fit, _bounds(crop) if crop else None)


def prompt_and_first(image: str, prompt: str, wanted: Given, templated: bool = False) -> str:
    """The prompt, and what stands before it among the images; alone it needs --image or --video.

    With a template there is no prompt, and what stands alone is the image.
    """
    if templated and prompt:
        raise output.usage("the template makes the prompt: give IMAGE alone, or -")
    if not prompt and not templated:
        if not wanted:
            raise output.usage("give IMAGE and PROMPT; - as the image makes a video from text")
        return image
    if image != "-":
        if wanted:
            raise output.usage("give the first image as IMAGE, or all of them as --image")
        wanted.images[0] = source(image)
    return prompt


async def generate(
    opened: client.Client,
    prompt: str,
    wanted: Given,
    shown: client.OnProgress,
    request_id: str,
    fields: client.VideoFields,
) -> types.Video:
    """Makes the video and waits for it."""
    return await opened.generate(
        prompt,
        wanted.images or None,
        video=wanted.video,
        fit=wanted.fit,
        crop=wanted.crop,
        on_progress=shown,
        request_id=request_id,
        **fields,
    )


def source(name: str) -> uploads.Source:
    """An image by its file's name or address; ends the command where there is none."""
    if name.startswith("https://"):
        return name
    if not Path(name).is_file():
        raise output.usage(f"there is no image file {name}; - makes a video from text")
    return Path(name)


def model_options(texts: list[str]) -> dict[str, types.OptionValue]:
    """NAME=VALUE: a number, true or false, or else a text."""
    found: dict[str, types.OptionValue] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise output.usage(f"{text!r} is no option; give for instance seed=7")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        found[name] = parsed if isinstance(parsed, bool | int | float) else value
    return found


def preview(
    images: Images = [],  # noqa: B006 (typer reads it)
    video: Video = None,
    fit: Fit = "",
    crop: Crop = "",
    model: options.Model = "",
    size: options.Size = "",
    out: Annotated[
        Path, typer.Option(help="Where to write it; the extension follows from what it is.")
    ] = Path("preview"),
    address: options.Address = "",
    api_key: options.ApiKey = "",
    account: options.Account = "",
    as_json: options.Json = False,
) -> None:
    """Write exactly the pictures that a model would be sent, without making a video."""
    wanted = given(images, video, fit, crop)
    if not wanted:
        raise output.usage("give --image or --video")
    fields = options.spec_fields(model, 0, size, 0)

    async def work(opened: client.Client) -> None:
        inputs = await opened.upload_inputs(
            wanted.images or None, wanted.video, fit=wanted.fit, crop=wanted.crop
        )
        shown = await opened.preview_inputs(
            inputs,
            model=model,
            width=fields.get("width", 0),
            height=fields.get("height", 0),
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        for number, each in enumerate(shown):
            extension = ".mp4" if each.media_type.startswith("video/") else ".jpg"
            place = outcomes.variant_path(out.with_suffix(extension), number)
            await downloads.fetch(each.url, place, each.size_bytes, each.sha256)
            if as_json:
                output.print_json(each)
            else:
                output.print_facts(
                    [
                        ("file", place),
                        ("size", f"{each.width}x{each.height}, {each.size_bytes} bytes"),
                    ]
                )

    running.with_client(work, address, api_key, account)


def _frame(text: str) -> tuple[str, int]:
    """A file may have an @ in its name: what is a file as it stands is one."""
    found = re.fullmatch(r"(.+)@(\d{1,6})", text)
    if found is None or Path(text).is_file():
        return text, 0
    return found[1], int(found[2])


def _bounds(text: str) -> types.CropBounds:
    try:
        sides = [float(part) for part in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) != 4:
        raise output.usage(f"{text!r} is no part; give left,top,right,bottom: 0,0,0.5,1")
    return types.CropBounds(*sides)
