"""What operators see of attempts, queues and provider accounts, read from the database. Each replica shows the same."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from prometheus_client import Counter, Gauge

from kit import loops
from services.generator import attempts, buckets, catalogue, pools, standings, turns
from services.generator.store import Store

ATTEMPTS = Gauge("framewire_attempts", "Attempts that have not ended, by state.", ["state"])
OLDEST = Gauge(
    "framewire_attempts_oldest_seconds",
    "Longest time since an attempt of a state was sent, or made where it was not sent.",
    ["state"],
)
OVERDUE = Gauge(
    "framewire_steps_overdue",
    "Attempts whose next step was due 10 seconds ago and that nobody is at; those queued or rendering not counted.",
)
POLLS_OVERDUE = Gauge(
    "framewire_polls_overdue",
    "Provider accounts with renders that should have been polled a minute ago.",
)
WAITING = Gauge("framewire_queue_waiting", "Videos that wait for their turn.", ["pool", "lane"])
LONGEST_WAIT = Gauge(
    "framewire_queue_oldest_seconds", "Longest that one of them has waited.", ["pool", "lane"]
)
LATE = Gauge(
    "framewire_late_renders", "Given-up renders that are still looked for, by state.", ["state"]
)
EXPIRY_SHARE = Gauge(
    "framewire_content_expiry_share",
    "Of the time that a provider keeps a finished film: the most that is over of one not stored yet; at 1 it is lost.",
)
OPEN = Gauge(
    "framewire_provider_account_open", "1 when it can be sent to, else 0.", ["provider_account"]
)
SLOTS = Gauge(
    "framewire_provider_slots", "Jobs at once that it takes, as learnt.", ["provider_account"]
)
IN_FLIGHT = Gauge("framewire_provider_jobs", "Jobs that it has from us.", ["provider_account"])
SPENT = Gauge(
    "framewire_provider_capped_micros",
    "Cost of the jobs of the last hour or day, of accounts where it is capped.",
    ["provider_account", "window"],
)
CAP = Gauge(
    "framewire_provider_cap_micros",
    "What it may cost in an hour or day; 0: no cap.",
    ["provider_account", "window"],
)
ALLOWED = Gauge(
    "framewire_provider_requests_allowed_per_minute",
    "Requests that it takes in a minute, as configured and as learnt since.",
    ["provider_account"],
)
RETIRES_AT = Gauge(
    "framewire_provider_retires_timestamp_seconds",
    "When a model is gone from an account; only where that is known.",
    ["provider_account", "model"],
)
COMMITTED = Counter(
    "framewire_provider_committed_micros",
    "Price of the jobs that providers accepted, as far as this replica was told.",
    ["provider_account", "model"],
)


class Measures:
    """The loop that reads them."""

    def __init__(self, store: Store, pools_: pools.Pools) -> None:
        self._store = store
        self._pools = pools_

    async def run(self, stopping: asyncio.Event) -> None:
        """Reads until told to stop."""
        await loops.every("measures", loops.MEASURE_SECONDS, self.run_once, stopping)

    async def run_once(self) -> None:
        """Reads once."""
        found = await self._store.measures.read()
        by_state = {one.state: one for one in found.attempts}
        for state in attempts.State:
            one = by_state.get(state)
            if state not in attempts.TERMINAL:
                ATTEMPTS.labels(state).set(one.count if one else 0)
                OLDEST.labels(state).set(one.oldest_seconds if one else 0)
        OVERDUE.set(found.overdue)
        POLLS_OVERDUE.set(found.polls_overdue)
        waiting = {(one.pool, one.lane): one for one in found.queues}
        for pool in self._pools.names:
            for lane in turns.LANE_WEIGHTS:
                queue = waiting.get((pool, lane))
                WAITING.labels(pool, lane).set(queue.count if queue else 0)
                LONGEST_WAIT.labels(pool, lane).set(queue.oldest_seconds if queue else 0)
        late: dict[str, int] = defaultdict(int, found.late)
        for state in ("LOOKING", "FETCHING"):
            LATE.labels(state).set(late[state])
        EXPIRY_SHARE.set(found.expiry_share)
        await self._accounts()

    async def _accounts(self) -> None:
        accounts = self._pools.accounts
        standing, _ = await self._store.accounts.standings(accounts, uncapped=False)
        for item in standing:
            account = accounts[item.provider_account]
            bucket, _, now = await self._store.accounts.bucket(account.name)
            share = buckets.share_now(bucket, account.quota, now)
            _show(item, account, share * 60 / account.quota.requests.interval)


def _show(
    standing: standings.Standing, account: catalogue.ProviderAccount, requests_per_minute: float
) -> None:
    OPEN.labels(account.name).set(0 if standings.why_closed(standing, account) else 1)
    SLOTS.labels(account.name).set(standings.slots(standing, account))
    IN_FLIGHT.labels(account.name).set(standing.jobs_in_flight)
    ALLOWED.labels(account.name).set(requests_per_minute)
    CAP.labels(account.name, "hour").set(account.max_cost_micros_per_hour)
    CAP.labels(account.name, "day").set(account.max_cost_micros_per_day)
    if standings.capped(account):
        SPENT.labels(account.name, "hour").set(standing.cost_micros_hour)
        SPENT.labels(account.name, "day").set(standing.cost_micros_day)
    for name, model in account.models.items():
        if model.retires_at is not None:
            RETIRES_AT.labels(account.name, name).set(model.retires_at.timestamp())
