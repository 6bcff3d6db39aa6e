"""Tells how far videos are, and when they may be done: core NATS, not stored, nobody depends on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import datetime, timedelta

from framewire import subjects
from framewire.events.v1 import event_pb2
from kit import bus, loops
from services.generator import attempts, catalogue, config, pools, standings, turns
from services.generator.store import Store, estimates, renders, rows

COUNT_SECONDS = 3.0
COUNT_SHARE = 50.0
"""A count may take so many times less than the time until the next one."""
NEXT_UP = 100
LONGEST_UNTOLD = 100


class Teller:
    """Sends progress."""

    def __init__(self, store: renders.RenderStore, bus_: bus.Bus) -> None:
        self._store = store
        self._bus = bus_

    async def stage(self, attempt: rows.Attempt | renders.Render, state: attempts.State) -> None:
        """The attempt has come to a stage that no event tells of."""
        await self.send(await self._store.stage(attempt, state))

    async def send(self, progress: event_pb2.Progress) -> None:
        """Sends what was written."""
        subject = subjects.progress_subject(progress.account_id)
        await self._bus.tell(subject, progress.SerializeToString())


class Estimator:
    """The loop over pools: counts their queues every few seconds and tells those that wait where they stand."""

    def __init__(
        self, settings: config.Settings, store: Store, pools_: pools.Pools, teller: Teller
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._teller = teller
        self._every = dict.fromkeys(pools_.names, COUNT_SECONDS)

    async def run(self, stopping: asyncio.Event) -> None:
        """Counts until told to stop."""
        await loops.every("estimator", self._settings.loop_seconds * 4, self.run_once, stopping)

    async def run_once(self) -> None:
        """Counts those pools that no replica has counted for a while; a long queue less often."""
        for pool in self._pools.names:
            if await self._store.estimates.claim(pool, timedelta(seconds=self._every[pool])):
                began = time.monotonic()
                await self._count(pool)
                took = time.monotonic() - began
                self._every[pool] = max(COUNT_SECONDS, COUNT_SHARE * took)

    async def _count(self, pool: str) -> None:
        counts, now = await self._store.estimates.count(pool)
        rates = await self._rates(pool)
        for model, rate in rates.items():
            await self._store.estimates.set_rate(pool, model, rate)
        if counts:
            await self._tell(pool, counts, rates, now)

    async def _rates(self, pool: str) -> dict[str, turns.Rate]:
        """What the pool's accounts do for each model, by their quota and the measured times of renders."""
        accounts = self._pools.of_pool(pool)
        found, now = await self._store.accounts.standings(accounts, uncapped=False)
        by_model: dict[str, list[turns.Rate]] = {}
        for item in found:
            account = accounts[item.provider_account]
            closed = standings.why_closed(item, account)
            for model in account.models:
                if standings.still_served(account, model, now):
                    rate = await self._rate(account, model, item)
                    shut = turns.Rate(0.0, rate.render_seconds, 0)
                    by_model.setdefault(model, []).append(shut if closed else rate)
        return {model: turns.together(rates) for model, rates in by_model.items()}

    async def _rate(
        self, account: catalogue.ProviderAccount, model: str, standing: standings.Standing
    ) -> turns.Rate:
        measured = await self._store.estimates.render_seconds(account.name, model)
        seconds = max(0.001, measured or account.models[model].render_seconds)
        quota = account.quota
        creates = 1 / quota.creates.interval if quota.creates else 0.0
        slots = standings.slots(standing, account)
        each = turns.turns_per_second(slots, seconds, 1 / quota.requests.interval, creates)
        return turns.Rate(each, seconds, max(0, slots - standing.jobs_in_flight))

    async def _tell(
        self, pool: str, counts: turns.Counts, rates: Mapping[str, turns.Rate], now: datetime
    ) -> None:
        queued = await self._store.estimates.queued(pool, NEXT_UP, LONGEST_UNTOLD)
        # Of a longer queue each is told in its turn, whether it moved or not: else those after it would never be.
        all_seen = len(queued) < LONGEST_UNTOLD
        changed: list[estimates.Estimate] = []
        for item in queued:
            place, seconds = turns.estimate(
                item.ahead, item.lane, item.account_id, counts, rates.get(item.model)
            )
            expected = None if seconds is None else now + timedelta(seconds=seconds)
            before = item.queue_position, item.expected_at
            if not all_seen or turns.worth_telling(*before, place, expected, now):
                changed.append(estimates.Estimate(item, place, expected))
        for told in await self._store.estimates.write(changed) if changed else ():
            await self._teller.send(told)
