"""The provider accounts' quota: taken from the one bucket in Postgres that all replicas share, corrected by what the
providers say.
"""

from __future__ import annotations

import asyncio
import time

from prometheus_client import Counter

from services.generator import buckets, catalogue, pools
from services.generator.store import accounts

Use = buckets.Use
LONGEST_SLEEP_SECONDS = 5.0
BARE_REFUSAL_HOURS = 2 / 3600
REFUSALS = Counter(
    "framewire_provider_refusals",
    "Requests that a provider refused for its limits, by provider account and limit (requests, jobs, day).",
    ["provider_account", "limit"],
)


class Quota:
    """Takes requests from the accounts' buckets. One per process: who hears what a provider says, hears it for all."""

    def __init__(self, store: accounts.AccountStore, pools_: pools.Pools) -> None:
        self._store = store
        self._pools = pools_
        self._polls_after: dict[str, float] = {}

    async def take(
        self,
        account: catalogue.ProviderAccount,
        use: Use,
        within_seconds: float = float("inf"),
        *,
        last: bool = False,
    ) -> bool:
        """Waits for its turn and takes one request; false when that was not within the time.

        `last`: one of the last submits that there are. A request taken by a worker that dies is simply lost.
        """
        deadline = time.monotonic() + within_seconds
        await self.hear(account)
        while True:
            bucket, version, now = await self._store.bucket(account.name)
            answer = buckets.take(bucket, account.quota, use, now, last=last)
            written = answer.bucket is bucket or await self._store.write_bucket(
                account.name, answer.bucket, version
            )
            if not written:
                continue
            if answer.wait_seconds <= 0:
                return True
            if time.monotonic() + answer.wait_seconds > deadline:
                return False
            await asyncio.sleep(min(answer.wait_seconds, LONGEST_SLEEP_SECONDS))

    def poll_after_seconds(self, account: catalogue.ProviderAccount) -> float:
        """How long until the provider wants to be polled again, by what it has said; 0: whenever we like."""
        return max(0.0, self._polls_after.get(account.name, 0.0) - time.monotonic())

    async def hear(self, account: catalogue.ProviderAccount, *, refused: bool = False) -> None:
        """Takes over what the provider has said of its quota since.

        `refused`: it refused a request for coming too early.
        """
        heard = self._pools.providers[account.name].heard()
        if heard.poll_after_seconds is not None:
            self._polls_after[account.name] = time.monotonic() + heard.poll_after_seconds
        per_minute = account.requests_per_minute * account.hour_seconds / 3600
        share = None
        if heard.requests_limit is not None:
            share = min(1.0, heard.requests_limit / per_minute)
        wait = heard.wait_seconds
        if refused:
            REFUSALS.labels(account.name, "requests").inc()
            wait = BARE_REFUSAL_HOURS * account.hour_seconds if wait is None else wait
        said = buckets.Said(share, heard.requests_remaining, heard.reset_seconds, wait, refused)
        while said != buckets.Said():
            bucket, version, now = await self._store.bucket(account.name)
            corrected = buckets.hear(bucket, account.quota, said, now)
            if corrected is bucket or await self._store.write_bucket(
                account.name, corrected, version
            ):
                break
