"""The set-up step of the bus: refuses a NATS that acknowledges what is not on disk, and makes the streams. Idempotent.

From the environment: FRAMEWIRE_NATS_URL_FILE (a file with the URL of a user that may make streams) and
FRAMEWIRE_NATS_MONITOR_URL (`http://host:8222`).
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from kit import bus

TIMEOUT_SECONDS = 10.0


def require_synced(monitor_url: str) -> None:
    """Ends the step unless NATS syncs what it acknowledges: by default it loses up to two minutes in a power cut."""
    try:
        synced = bus.ask_server(monitor_url).sync_always
    except (OSError, ValueError) as error:
        sys.exit(f"cannot ask {monitor_url}/varz: {error}")
    if not synced:
        sys.exit(f"NATS at {monitor_url} does not run with `jetstream {{ sync_interval: always }}`")


async def make_streams(nats_url: str) -> None:
    """Ends the step when that does not work in time, which a wrong password also looks like."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS), bus.connect(nats_url, "set-up") as connected:
            await connected.opened.wait()
            await connected.ensure_streams()
    except bus.BusError as error:
        sys.exit(f"cannot make the streams: {error!r}")


def main() -> None:
    require_synced(os.environ["FRAMEWIRE_NATS_MONITOR_URL"].rstrip("/"))
    url = Path(os.environ["FRAMEWIRE_NATS_URL_FILE"]).read_text().strip()
    asyncio.run(make_streams(url))
    print("the bus is set up: sync_interval is always, the streams are there")


if __name__ == "__main__":
    main()
