"""Recovery of a restored generator: nothing is sent again before a provider proved that it does not have it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from framewire.generator.v1 import job_pb2
from kit import errors, incarnation, telemetry
from kit.failpoints import failpoint
from services.generator import attempts, catalogue, pools, quota, standings
from services.generator.providers import contract
from services.generator.store import Store, recovery, rows

log = telemetry.logger(__name__)

MAX_PAGES = 200
_FIRST_ASKED = (attempts.Evidence.SEARCHABLE, attempts.Evidence.KEYED, attempts.Evidence.BLIND)


class Recovery:
    """What operators start by `framewire recover`."""

    def __init__(
        self,
        store: Store,
        pools_: pools.Pools,
        quota_: quota.Quota,
        incarnation_: incarnation.Incarnation,
    ) -> None:
        self._store = store.recovery
        self._pools = pools_
        self._quota = quota_
        self._incarnation = incarnation_

    async def videos(
        self, known: Sequence[recovery.Known], *, dry_run: bool
    ) -> list[recovery.Done]:
        """Makes good what was forgotten of these. Raises FailedPrecondition/NOT_IN_RECOVERY."""
        window = await self._window()
        done: list[recovery.Done] = []
        for video in known:
            pool = self._pools.pool_of(video.job.spec.model) or ""
            suspicion = self._suspect(video.job, pool, None)
            done.append(await self._store.take(video, window, suspicion, pool, dry_run=dry_run))
            await failpoint("generator.recover.after_video")
        return done

    async def end(self, *, dry_run: bool) -> list[recovery.Done]:
        """Doubts the rest, puts paid jobs of ended videos on record, and opens."""
        window = await self._store.window()
        if window is None:
            return []
        done = await self._store.doubt_rest(window, self._suspect, dry_run=dry_run)
        ended = await self._store.ended_without_job(window)
        for name in self._pools.accounts:
            if ended and self._pools.has_list(name):
                done += await self._book(self._pools.accounts[name], window, ended, dry_run=dry_run)
        if not dry_run:
            await failpoint("generator.recover.before_open")
            await self._incarnation.end_recovery()
        return done

    async def _window(self) -> recovery.Window:
        window = await self._store.window()
        if window is None:
            raise errors.FailedPrecondition(
                "NOT_IN_RECOVERY", "the generator's database is the one that went on"
            )
        return window

    def _suspect(self, job: job_pb2.Job, pool: str, first: str | None) -> recovery.Suspicion | None:
        """The accounts that may have it: the one it was given to first, then those that can tell."""
        able = {
            name: account
            for name, account in self._pools.of_pool(pool).items()
            if job.spec.model in account.models
        }
        if not able:
            return None
        names = sorted(
            able, key=lambda name: (name != first, _FIRST_ASKED.index(able[name].evidence), name)
        )
        account = able[names[0]]
        return recovery.Suspicion(
            tuple(names),
            self._pools.providers[names[0]].shown(job.spec),
            standings.price(account, job.spec),
            timedelta(seconds=account.resolve_seconds),
            timedelta(seconds=account.max_render_seconds),
        )

    async def _book(
        self,
        account: catalogue.ProviderAccount,
        window: recovery.Window,
        ended: Sequence[rows.Attempt],
        *,
        dry_run: bool,
    ) -> list[recovery.Done]:
        """Jobs in its list that only an ended video can have been paid for."""
        provider = self._pools.providers[account.name]
        jobs = await self._list(account, window)
        free = await self._store.unowned(account.name, [job.provider_job_id for job in jobs])
        done: list[recovery.Done] = []
        for attempt in ended:
            if attempt.job.spec.model not in account.models:
                continue
            marker = provider.shown_marker(attempt.job.spec, attempt.attempt_id)
            shown = provider.shown(attempt.job.spec)
            ours = [
                job
                for job in jobs
                if job.provider_job_id in free
                and (job.marker == marker if marker else job.fingerprint == shown)
            ]
            alone = bool(marker) or await self._store.lookalikes(shown, window) == 1
            if not alone:
                continue
            for job in ours if marker else ours[:1] if len(ours) == 1 else ():
                if dry_run or await self._store.book(attempt, account.name, job.provider_job_id):
                    detail = f"{account.name} {job.provider_job_id}"
                    done.append((attempt.video_id, "ADOPTED", detail))
        return done

    async def _list(
        self, account: catalogue.ProviderAccount, window: recovery.Window
    ) -> list[contract.Job]:
        since = window.since - timedelta(seconds=account.clock_skew_seconds)
        jobs: list[contract.Job] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            await self._quota.take(account, quota.Use.POLL)
            try:
                page, cursor = await self._pools.providers[account.name].list_page(cursor)
            except contract.ProviderTrouble as trouble:
                raise errors.Unavailable(
                    "DEPENDENCY_UNAVAILABLE",
                    f"provider account {account.name} does not give its list now",
                    retry_after_seconds=trouble.retry_after_seconds
                    or account.poll_interval_seconds,
                ) from trouble
            jobs += page
            if cursor is None or (page and page[-1].created_at < since):
                break
        return jobs
