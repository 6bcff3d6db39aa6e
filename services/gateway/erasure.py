"""Accounts are erased: step by step, again and again until nothing is left, whoever dies in between."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from kit import errors, loops, telemetry
from kit.failpoints import failpoint
from services.gateway import auth, peers, store
from services.gateway.store import erasures

log = telemetry.logger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """What is left, and of assets how much."""

    left: erasures.Left
    assets: int


class Erasure:
    """The loop over accounts that are being erased, and its first step.

    Each step is idempotent. What videos still have to give back, cancel and remove is the sweeper's, as for any
    deleted video; here they are only asked to end, deleted, and waited for.
    """

    def __init__(
        self, kept: store.Store, peers_: peers.Peers, retry_seconds: float, settle_seconds: float
    ) -> None:
        self._store = kept
        self._peers = peers_
        self._retry_seconds = retry_seconds
        self._settle_seconds = settle_seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Erases until told to stop."""
        await loops.every("erasure", self._retry_seconds, self.run_once, stopping)

    async def run_once(self) -> bool:
        """A step of each that is due."""
        for account_id in await self._store.erasures.take_due(self._retry_seconds):
            try:
                await self._step(account_id)
            except errors.ServiceError as error:  # done again when it is next due
                log.warning("erasure_put_off", account_id=account_id, error=repr(error))
        return False

    async def erase(self, account_id: str, why: str, principal: str) -> Progress:
        """Begins, or goes on; how far it is. Raises NotFound/ACCOUNT_NOT_FOUND."""
        if not await self._store.erasures.begin(account_id, why, principal):
            raise auth.account_not_found()
        await failpoint("gateway.erase.after_begin")
        return await self._step(account_id)

    async def _step(self, account_id: str) -> Progress:
        kept = self._store.erasures
        for video_id in await kept.admitting(account_id):
            await self._store.admissions.cancel(video_id)
        await kept.cancel_live(account_id)
        for video_id in await kept.ended(account_id):
            await self._store.removals.delete(video_id)
        await kept.scrub(account_id)
        left = await kept.left(account_id, self._settle_seconds)
        if left.live or left.to_remove:
            return Progress(left, 0)
        await self._peers.forget_labels(account_id)
        assets = await self._peers.erase_assets(account_id)
        await failpoint("gateway.erase.after_assets")
        if left.settled and not assets and left.done_at is None:
            await kept.done(account_id)
            log.info("account_erased", account_id=account_id)
            left = await kept.left(account_id, self._settle_seconds)
        return Progress(left, assets)
