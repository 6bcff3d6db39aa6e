"""The provider's side of a reconciliation: its own list, page by page, and whose each job is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from kit import errors, telemetry
from services.generator import attempts, pools, quota
from services.generator.providers import contract
from services.generator.store import survey

log = telemetry.logger(__name__)


@dataclass(frozen=True, slots=True)
class ListedJob:
    """A job as the provider lists it, and whose it is."""

    provider_job_id: str
    created_at: datetime
    status: str
    video_id: str
    superseded: bool
    marked_video_id: str


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a provider's list."""

    jobs: Sequence[ListedJob]
    as_of: datetime
    next_page_token: str
    exclusive: bool


class Lists:
    """The lists of the provider accounts."""

    def __init__(self, store: survey.SurveyStore, quota_: quota.Quota, pools_: pools.Pools) -> None:
        self._store = store
        self._quota = quota_
        self._pools = pools_

    async def page(self, name: str, cursor: str) -> Page:
        """One page, newest first; the cursor is the provider's. Raises Unavailable when it does not answer."""
        account = self._pools.accounts[name]
        await self._quota.take(account, quota.Use.POLL)
        as_of = await self._store.clock()
        try:
            jobs, after = await self._pools.providers[name].list_page(cursor or None)
        except contract.ProviderTrouble as trouble:
            log.warning("list_failed", provider_account=name, error=str(trouble))
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE",
                f"provider account {name} does not give its list now",
                retry_after_seconds=trouble.retry_after_seconds or account.poll_interval_seconds,
            ) from trouble
        # After the list: what was recorded while it was read is known then.
        owners = await self._store.owners(name, [job.provider_job_id for job in jobs])
        marked = {job.provider_job_id: attempts.marked_attempt(job.marker) for job in jobs}
        videos = await self._store.videos_of([attempt for attempt in marked.values() if attempt])
        return Page(
            [
                _listed(
                    job,
                    owners.get(job.provider_job_id),
                    videos.get(marked[job.provider_job_id], ""),
                )
                for job in jobs
            ],
            as_of,
            after or "",
            account.evidence is not attempts.Evidence.BLIND,
        )


def _listed(job: contract.Job, owner: survey.Owner | None, marked_video_id: str) -> ListedJob:
    return ListedJob(
        job.provider_job_id,
        job.created_at,
        job.status,
        owner.video_id if owner else "",
        owner.superseded if owner else False,
        marked_video_id,
    )
