"""Named crash points: `failpoint("service.point")`.

A no-op unless the environment names a file in FRAMEWIRE_FAILPOINTS. Each line of that file is `name=action`, with the
actions `kill` (SIGKILL to ourselves), `stop` (SIGSTOP), `error` (an exception) and `sleep:SECONDS`. A line is used up
when it strikes, so a process that is started again does not die of the same one. The crash tests write the file;
production never sets the variable.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

_armed_file = os.environ.get("FRAMEWIRE_FAILPOINTS", "")


class FailpointError(Exception):
    """Raised by a failpoint that was armed with `error`."""


def _take(name: str) -> str | None:
    path = Path(_armed_file)
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        point, _, action = line.partition("=")
        if point == name:
            lines.remove(line)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text("".join(f"{left}\n" for left in lines))
            temporary.replace(path)
            with path.with_suffix(".struck").open("a") as struck:
                struck.write(f"{line}\n")
            return action
    return None


async def failpoint(name: str) -> None:
    """Does what a test armed for this point; costs one comparison otherwise."""
    if not _armed_file:
        return
    action = _take(name)
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "error":
        raise FailpointError(name)
    elif action.startswith("sleep:"):
        await asyncio.sleep(float(action.removeprefix("sleep:")))
    else:
        raise ValueError(f"failpoint {name}: no action {action!r}")
