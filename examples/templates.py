"""A template is made once and filled for each video: a launch in each of several weathers, as one batch.

    export FRAMEWIRE_ADDRESS=127.0.0.1:7700 FRAMEWIRE_API_KEY=...
    python examples/templates.py fog rain "clear sky"

Run again, it makes a further version of the template; what was made before keeps the version that it was made from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from framewire import errors, sync, types
from framewire.templates import Variable

NAME = "launch"
PROMPT = "The camera rises along the rocket at {speed} m/s, in {weather}"
VARIABLES = (
    Variable("speed", "INTEGER", min=1, max=20, default_value=3),
    Variable("weather", choices=("clear sky", "fog", "rain"), description="outdoors"),
)


def make(weathers: Sequence[str], size: tuple[int, int]) -> None:
    width, height = size
    with sync.Client(os.environ["FRAMEWIRE_ADDRESS"], os.environ["FRAMEWIRE_API_KEY"]) as client:
        template = client.create_template(
            NAME, PROMPT, VARIABLES, model="sora-2", seconds=1, width=width, height=height
        )
        print(f"template: {template.name} version {template.version}")
        uses = [types.TemplateUse(NAME, {"weather": each}, template.version) for each in weathers]
        verdicts = client.create_videos([("", {"template": use}) for use in uses])
        for weather, verdict in zip(weathers, verdicts, strict=True):
            if verdict.video is None:
                print(f"{weather}: refused: {verdict.message} ({verdict.reason})")
        made = [verdict.video.video_id for verdict in verdicts if verdict.video is not None]
        for video in client.watch_videos(made) if made else ():
            if video.is_terminal and video.credits.settlement == "DONE":
                print(f"{video.state.lower()}: {video.spec.prompt}")
        found = list(client.list_videos(template=NAME, template_version=template.version))
        print(f"made from this version: {len(found)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weather", nargs="+")
    parser.add_argument("--size", default="1280x720")
    given = parser.parse_args()
    across, _, down = given.size.partition("x")
    try:
        make(given.weather, (int(across), int(down)))
    except (errors.FramewireError, OSError) as error:
        sys.exit(f"{error} ({getattr(error, 'reason', type(error).__name__)})")
