"""A prompt becomes a square video of 1 s at 1080x1080 by sora-1, the model on Azure.

    export FRAMEWIRE_ADDRESS=127.0.0.1:7700 FRAMEWIRE_API_KEY=...
    python examples/sora1_square.py "A calm sea at dawn" sea.mp4

The caller sees no difference between providers: which one serves a model is the generator's configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from framewire import errors
from framewire.client import Client

MODEL = "sora-1"


async def make(prompt: str, out: Path) -> None:
    async with Client(os.environ["FRAMEWIRE_ADDRESS"], os.environ["FRAMEWIRE_API_KEY"]) as client:
        served = [model.model for model in await client.models()]
        if MODEL not in served:
            sys.exit(f"{MODEL} is not served here; there are: {', '.join(served)}")
        quote = await client.quote_video(prompt, model=MODEL, seconds=1, width=1080, height=1080)
        print(f"price: {quote.credits} credits")
        # The quote's price holds: should the book change meanwhile, the call is refused instead of dearer.
        video = await client.generate(
            prompt,
            out=out,
            on_progress=lambda video: print(video.state.lower(), flush=True),
            quote_id=quote.quote_id,
            model=MODEL,
            seconds=1,
            width=1080,
            height=1080,
        )
        made = video.outputs[0]
        print(f"saved: {out} ({made.width}x{made.height}, {made.duration_ms / 1000:g} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    try:
        asyncio.run(make(given.prompt, given.out))
    except (errors.FramewireError, OSError) as error:
        sys.exit(f"{error} ({getattr(error, 'reason', type(error).__name__)})")
