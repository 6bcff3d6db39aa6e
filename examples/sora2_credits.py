"""An image and a prompt become a video of 6 s at 1280x720 by sora-2, for 10 credits.

export FRAMEWIRE_ADDRESS=127.0.0.1:7700 FRAMEWIRE_API_KEY=...
python examples/sora2_credits.py examples/rocket.jpg "The camera rises along the rocket" rocket.mp4
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from framewire import errors, types
from framewire.client import Client

MAX_PROMPT_CHARACTERS = 500  # this example's own rule


async def make(image: Path, prompt: str, out: Path, *, seconds: int, size: tuple[int, int]) -> None:
    width, height = size
    async with Client(os.environ["FRAMEWIRE_ADDRESS"], os.environ["FRAMEWIRE_API_KEY"]) as client:
        print(f"balance before: {(await client.balance()).available_credits} credits")
        # One call: uploads the image, holds the credits, waits, downloads. It never pays twice, however often it
        # has to be repeated on the way.
        video = await client.generate(
            prompt,
            image,
            out=out,
            on_progress=show,
            model="sora-2",
            seconds=seconds,
            width=width,
            height=height,
        )
        print(f"taken: {video.credits.captured} credits")
        print(f"balance after: {(await client.balance()).available_credits} credits")
        print(f"saved: {out} ({out.stat().st_size} bytes)")


def show(video: types.Video) -> None:
    print(f"{video.state.lower()} {video.stage.lower()} {video.progress_percent} %", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt", help=f"at most {MAX_PROMPT_CHARACTERS} characters")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--size", default="1280x720")
    given = parser.parse_args()
    if len(given.prompt) > MAX_PROMPT_CHARACTERS:
        parser.error(
            f"the prompt has {len(given.prompt)} characters, more than {MAX_PROMPT_CHARACTERS}"
        )
    return given


if __name__ == "__main__":
    asked = arguments()
    width, _, height = asked.size.partition("x")
    try:
        asyncio.run(
            make(
                asked.image,
                asked.prompt,
                asked.out,
                seconds=asked.seconds,
                size=(int(width), int(height)),
            )
        )
    except (errors.FramewireError, OSError) as error:
        sys.exit(f"{error} ({getattr(error, 'reason', type(error).__name__)})")
