"""The event feed: `async for event in events.subscribe(nats_url): ...`.

At least once, in order per video, stable ids, replay by time. docs/events.md has the promise; `framewire.events.v1` has
the contract.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from datetime import datetime

from framewire.events.types import Event

__all__ = ["Event", "subscribe"]


def subscribe(
    nats_url: str,
    account_id: str = "*",
    kinds: Iterable[str] = (),
    durable: str | None = None,
    since: datetime | None = None,
) -> AsyncGenerator[Event, None]:
    """Events of one account (or of all), of these kinds (or all): "queued", "completed", "settled", ...

    Without `durable`: what is told from `since` (default: from now) on. With it, the broker remembers under this name
    what was taken: an event is acknowledged when the next one is asked for, so what was being handled in a crash comes
    again. `since` then counts on the first use of the name alone (default: all that is kept, 30 days). Readers of one
    name share its events, one at a time.

    An event of a video whose `seq` was passed already is left out. Reconnects by itself; raises FramewireError when
    the broker cannot be reached at the start, refuses the credentials in the URL, or has no such stream.
    """
    from framewire.events import feed  # only those who subscribe pay for the import of nats

    return feed.Feed(nats_url, account_id, tuple(kinds), durable, since).events()
