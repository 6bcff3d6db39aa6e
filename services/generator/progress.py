"""Tells how far videos are: core NATS, not stored, nobody depends on it."""

from __future__ import annotations

from framewire import subjects
from framewire.events.v1 import event_pb2
from kit import bus
from services.generator import attempts
from services.generator.store import renders, rows


class Teller:
    """Sends progress."""

    def __init__(self, store: renders.RenderStore, bus_: bus.Bus) -> None:
        self._store = store
        self._bus = bus_

    async def stage(self, attempt: rows.Attempt, state: attempts.State) -> None:
        """The attempt has come to a stage that no event tells of."""
        await self.send(await self._store.stage(attempt, state))

    async def send(self, progress: event_pb2.Progress) -> None:
        """Sends what was written."""
        subject = subjects.progress_subject(progress.account_id)
        await self._bus.tell(subject, progress.SerializeToString())
