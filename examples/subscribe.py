"""Prints a line for every video that is completed, as another service of the company would hear of it.

    FRAMEWIRE_NATS_URL=nats://127.0.0.1:4222 python examples/subscribe.py --durable my-service

With --durable the broker remembers what was taken: what is told while this is not running comes when it is again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from datetime import UTC, datetime

from framewire import errors, events
from framewire.events import types


async def listen(account_id: str, durable: str | None, since: datetime | None, count: int) -> None:
    nats_url = os.environ["FRAMEWIRE_NATS_URL"]
    feed = events.subscribe(nats_url, account_id, ["completed"], durable=durable, since=since)
    async with contextlib.aclosing(feed):
        async for event in feed:
            # Told at least once: whoever does something with it remembers event.event_id.
            assert isinstance(event.detail, types.Completed)
            for output in event.detail.outputs:
                size = f"{output.width}x{output.height}, {output.duration_ms / 1000:g} s"
                print(f"completed {event.video_id} {size} sha256 {output.sha256}", flush=True)
            count -= 1
            if count == 0:
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--account", default="*", help="only this account's")
    parser.add_argument("--durable", help="a name under which the broker remembers")
    parser.add_argument("--since", type=datetime.fromisoformat, help="what was told from then on")
    parser.add_argument("--count", type=int, default=0, help="end after so many; 0: never")
    given = parser.parse_args()
    since = given.since
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=UTC)
    try:
        asyncio.run(listen(given.account, given.durable, since, given.count))
    except errors.FramewireError as error:
        sys.exit(f"{error} ({error.reason})")
    except KeyboardInterrupt:
        sys.exit(130)
