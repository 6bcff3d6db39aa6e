"""The generator's and the providers' side of a reconciliation, on a real Postgres and a scripted list."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from framewire.generator.v1 import attempt_pb2
from kit import errors, loops
from services.generator import api, attempts, catalogue, events, pools, quota
from services.generator.providers import contract
from services.generator.store import videos
from tests import lives
from tests.generator_world import World, server, world

__all__ = ["server", "world"]

CATALOGUE = Path(catalogue.__file__).parent / "providers.yaml"
NOW = datetime.now(UTC)


class ScriptedList:
    """A provider of which only the list is asked; None: it does not answer."""

    has_list = True

    def __init__(self, *pages: tuple[contract.Job, ...] | None) -> None:
        self._pages = pages

    def heard(self) -> contract.Limits:
        return contract.Limits()

    async def list_page(self, after: str | None) -> tuple[tuple[contract.Job, ...], str | None]:
        place = int(after or 0)
        page = self._pages[place]
        if page is None:
            raise contract.ProviderTrouble("not now")
        return page, str(place + 1) if place + 1 < len(self._pages) else None


def job(job_id: str, marker: str = "") -> contract.Job:
    running = contract.Status.RUNNING
    return contract.Job(job_id, running, 0, NOW, None, None, marker=marker)


def served(world: World, *pages: tuple[contract.Job, ...] | None, shared: bool = False) -> Any:
    """The API, with a provider that shows these pages."""
    document = yaml.safe_load(CATALOGUE.read_text())
    document["provider_accounts"][0]["shared"] = shared
    accounts = catalogue.parse(document, 1.0)
    providers = cast("dict[str, contract.Provider]", dict.fromkeys(accounts, ScriptedList(*pages)))
    opened = pools.Pools(accounts, providers, frozenset({"azure", "runway"}))
    quota_ = quota.Quota(world.store.accounts, opened)
    return api.AttemptApi(world.store, opened, quota_, loops.Wake(), lives.open_life(world.pool))


async def surveyed(served_: api.AttemptApi, **fields: Any) -> list[attempt_pb2.SurveyedVideo]:
    """Every page."""
    request = attempt_pb2.SurveyVideosRequest(page_size=1, **fields)
    found: list[attempt_pb2.SurveyedVideo] = []
    while True:
        page = await served_.SurveyVideos(request, None)
        assert abs((events.moment(page.as_of) - datetime.now(UTC)).total_seconds()) < 10
        found += page.videos
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def test_a_survey_tells_videos_with_their_attempts(world: World) -> None:
    old, live, ended = await world.rendering(), await world.unknown(), await world.rendering()
    tombstone = "t" * 26
    await world.store.videos.cancel(tombstone, "a" * 26)
    verdict = videos.Verdict("PROVIDER_ERROR", "it broke", retryable=True)
    assert await world.store.videos.fail(ended, verdict, another_try=False)
    await world.pool.execute(
        "UPDATE videos SET created_at = created_at - interval '2 days' WHERE video_id = $1",
        old.video_id,
    )
    served_ = served(world)
    since = events.timestamp(NOW - timedelta(hours=24))
    alive = {one.outcome.video_id for one in await surveyed(served_)}
    recent = {one.outcome.video_id for one in await surveyed(served_, created_since=since)}
    assert alive == {old.video_id, live.video_id}
    assert recent == {live.video_id, ended.video_id, tombstone}
    wanted = [ended.video_id, tombstone, "u" * 26]
    known = {one.outcome.video_id: one for one in await surveyed(served_, video_ids=wanted)}
    assert known.keys() == {ended.video_id, tombstone}
    assert known[ended.video_id].outcome.last_event.failed.message == verdict.message
    (attempt,) = known[ended.video_id].attempts
    assert attempt.state == attempt_pb2.ATTEMPT_STATE_FAILED
    assert attempt.provider_job_id == ended.provider_job_id
    assert list(known[tombstone].attempts) == []


async def test_a_providers_list_says_whose_each_job_is(world: World) -> None:
    await world.store.accounts.ensure(["main"])
    known, twice, undecided = (
        await world.rendering(),
        await world.rendering(),
        await world.unknown(),
    )
    await world.store.submissions.add_job(twice.attempt_id, "main", "second", twice.fence)
    named = job("named", attempts.marker(undecided.attempt_id))
    first = (job(str(known.provider_job_id)), job("second"), job("nobody"))
    served_ = served(world, first, (named, job("other", attempts.marker("gone"))))
    request = attempt_pb2.SurveyProviderJobsRequest(provider_account="main")
    page = await served_.SurveyProviderJobs(request, None)
    request.page_token = page.next_page_token
    last = await served_.SurveyProviderJobs(request, None)
    assert page.exclusive
    assert not last.next_page_token
    assert {
        one.provider_job_id: (one.video_id, one.superseded, one.marked_video_id)
        for one in (*page.jobs, *last.jobs)
    } == {
        known.provider_job_id: (known.video_id, False, ""),
        "second": (twice.video_id, True, ""),
        "nobody": ("", False, ""),
        "named": ("", False, undecided.video_id),
        "other": ("", False, ""),
    }
    assert not (await served(world, first, shared=True).SurveyProviderJobs(
        attempt_pb2.SurveyProviderJobsRequest(provider_account="main"), None
    )).exclusive  # fmt: skip


async def test_a_list_that_cannot_be_had_is_refused(world: World) -> None:
    await world.store.accounts.ensure(["main"])
    served_ = served(world, None)
    with pytest.raises(errors.Unavailable):
        await served_.SurveyProviderJobs(
            attempt_pb2.SurveyProviderJobsRequest(provider_account="main"), None
        )
    for name in ("azure", "nobody"):  # one without an address, one that there is not
        request = attempt_pb2.SurveyProviderJobsRequest(provider_account=name)
        with pytest.raises(errors.NotFound):
            await served_.SurveyProviderJobs(request, None)
