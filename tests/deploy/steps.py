"""What the runs of whole deployments say and demand, step by step."""

from __future__ import annotations

import time

_STARTED = time.monotonic()


class Failed(Exception):
    """What was promised does not hold."""


def require(holds: object, message: str) -> None:
    if not holds:
        raise Failed(message)


def say(text: str) -> None:
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {text}", flush=True)
