"""The sides of a reconciliation: what each service, and each provider, says; read page by page, with its watermark."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.generator.v1 import attempt_pb2
from framewire.storage.v1 import storage_pb2
from kit import errors
from services.gateway import messages, peers, provider_lists, reconciliation, store, videos

BATCH = 200
PAGE_SIZE = 500
MAX_VIDEOS = 200_000
MAX_PROVIDER_PAGES = 200
TIMEOUT_SECONDS = 20.0
LIST_TIMEOUT_SECONDS = 60.0  # it waits for the provider account's quota
_ID = re.compile(r"[a-z0-9]{26}")
_ENDS = (
    event_pb2.EVENT_KIND_COMPLETED,
    event_pb2.EVENT_KIND_FAILED,
    event_pb2.EVENT_KIND_CANCELLED,
)


class Sides:
    """Reads all sides. Raises `kit.errors` where a service does not answer."""

    def __init__(self, store_: store.Store, stubs: peers.Stubs) -> None:
        self._findings = store_.findings
        self._stubs = stubs

    async def video_ids(self, since: datetime) -> list[str]:
        """Every video that any side has had since then or has open now, and those of which something was found.

        Raises InvalidArgument where they are too many for one pass.
        """
        found = set(await self._findings.videos_with_findings())
        async for page in self._ids(since):
            found.update(one for one in page if _ID.fullmatch(one))
            if len(found) > MAX_VIDEOS:
                sentence = f"there are more than {MAX_VIDEOS} videos since then; name a later time"
                raise errors.InvalidArgument(
                    "INVALID_FIELD", f"since: {sentence}", violations=[("since", sentence)]
                )
        return sorted(found)

    async def _ids(self, since: datetime) -> AsyncIterator[list[str]]:
        place: tuple[datetime, str] | None = None
        while page := await self._findings.videos_since(since, place, PAGE_SIZE):
            place = page[-1]
            yield [video_id for _, video_id in page]
        after = ""
        while live := await self._findings.live_videos(after, PAGE_SIZE):
            after = live[-1]
            yield live
        credits_, generator, storage = (
            self._stubs.credits,
            self._stubs.generator,
            self._stubs.storage,
        )
        stamp = messages.timestamp(since)
        for holds in (
            ledger_pb2.SurveyHoldsRequest(created_since=stamp),
            ledger_pb2.SurveyHoldsRequest(),
        ):
            async for answer in _pages(credits_.SurveyHolds, holds):
                yield [one.hold.hold_id for one in answer.holds]
        for asked in (
            attempt_pb2.SurveyVideosRequest(created_since=stamp),
            attempt_pb2.SurveyVideosRequest(),
        ):
            async for answer in _pages(generator.SurveyVideos, asked):
                yield [one.outcome.video_id for one in answer.videos]
        async for answer in _pages(storage.SurveyPins, storage_pb2.SurveyPinsRequest()):
            yield [pin.owner for pin in answer.pins]

    async def subjects(self, video_ids: Sequence[str]) -> list[reconciliation.Subject]:
        """What all sides say of these videos, at most BATCH of them."""
        assert len(video_ids) <= BATCH
        pins = await self._stubs.storage.SurveyPins(
            storage_pb2.SurveyPinsRequest(owners=video_ids), timeout=TIMEOUT_SECONDS
        )
        rows, gateway_as_of = await self._findings.videos(video_ids)
        held = await self._stubs.credits.SurveyHolds(
            ledger_pb2.SurveyHoldsRequest(hold_ids=video_ids), timeout=TIMEOUT_SECONDS
        )
        made = await self._stubs.generator.SurveyVideos(
            attempt_pb2.SurveyVideosRequest(video_ids=video_ids), timeout=TIMEOUT_SECONDS
        )
        expected = await self._expected(made.videos, held.holds)
        outcomes = {one.outcome.video_id: _outcome(one) for one in made.videos}
        stored = await self._stored(
            [output.asset_id for outcome in outcomes.values() for output in outcome.outputs],
            pins.as_of.ToDatetime(tzinfo=UTC),
        )
        marks = reconciliation.Watermarks(
            gateway_as_of,
            held.as_of.ToDatetime(tzinfo=UTC),
            made.as_of.ToDatetime(tzinfo=UTC),
            pins.as_of.ToDatetime(tzinfo=UTC),
        )
        known = {row.video_id: _video(row) for row in rows}
        holds = {one.hold.hold_id: _hold(one) for one in held.holds}
        return [
            reconciliation.Subject(
                video_id,
                marks,
                known.get(video_id),
                _with_expected(holds.get(video_id), expected.get(video_id)),
                outcomes.get(video_id),
                {
                    output.asset_id: stored[output.asset_id]
                    for output in (outcomes[video_id].outputs if video_id in outcomes else ())
                    if output.asset_id in stored
                },
                tuple(
                    reconciliation.Pin(pin.asset_id, pin.account_id)
                    for pin in pins.pins
                    if pin.owner == video_id
                ),
            )
            for video_id in video_ids
        ]

    async def _expected(
        self,
        made: Sequence[attempt_pb2.SurveyedVideo],
        held: Sequence[ledger_pb2.SurveyedHold],
    ) -> dict[str, int]:
        """What the policy on each settled hold takes for its end."""
        settled = {
            one.hold.hold_id
            for one in held
            if one.hold.state in (ledger_pb2.HOLD_STATE_CAPTURED, ledger_pb2.HOLD_STATE_RELEASED)
        }
        ends = [
            one.outcome.last_event
            for one in made
            if one.outcome.last_event.kind in _ENDS and one.outcome.video_id in settled
        ]
        if not ends:
            return {}
        answer = await self._stubs.credits.AssessHolds(
            ledger_pb2.AssessHoldsRequest(ends=ends), timeout=TIMEOUT_SECONDS
        )
        return {one.hold_id: one.captured_credits for one in answer.assessments}

    async def _stored(
        self, asset_ids: Sequence[str], as_of: datetime
    ) -> dict[str, reconciliation.Stored]:
        found: dict[str, reconciliation.Stored] = {}
        for start in range(0, len(asset_ids), BATCH):
            answer = await self._stubs.storage.SurveyAssets(
                storage_pb2.SurveyAssetsRequest(asset_ids=asset_ids[start : start + BATCH]),
                timeout=TIMEOUT_SECONDS,
            )
            found |= {one.asset.asset_id: _stored(one, as_of) for one in answer.assets}
        return found

    async def provider_accounts(self) -> list[str]:
        """The provider accounts that have a list to compare with."""
        answer = await self._stubs.generator.ListProviderAccounts(
            attempt_pb2.ListProviderAccountsRequest(), timeout=TIMEOUT_SECONDS
        )
        return [one.provider_account for one in answer.provider_accounts if one.has_list]

    async def provider_list(self, name: str, back_to: datetime) -> provider_lists.ProviderList:
        """A provider's list, read back to before a moment, or as far as it goes."""
        request = attempt_pb2.SurveyProviderJobsRequest(provider_account=name)
        jobs: list[provider_lists.ListedJob] = []
        as_of: datetime | None = None
        for _ in range(MAX_PROVIDER_PAGES):
            page = await self._stubs.generator.SurveyProviderJobs(
                request, timeout=LIST_TIMEOUT_SECONDS
            )
            as_of = as_of or page.as_of.ToDatetime(tzinfo=UTC)
            jobs += [_listed(job) for job in page.jobs]
            if not page.next_page_token or (jobs and jobs[-1].created_at < back_to):
                return provider_lists.ProviderList(name, as_of, jobs, back_to, page.exclusive)
            request.page_token = page.next_page_token
        raise errors.Unavailable(
            "DEPENDENCY_UNAVAILABLE",
            f"the list of {name} has more than {MAX_PROVIDER_PAGES} pages since then",
        )


async def _pages(send: Callable[..., Awaitable[Any]], request: Any) -> AsyncIterator[Any]:
    request.page_size = PAGE_SIZE
    while True:
        page = await send(request, timeout=TIMEOUT_SECONDS)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _video(row: videos.Video) -> reconciliation.Video:
    return reconciliation.Video(
        row.account_id,
        row.state,
        row.accepted_at is not None,
        row.settlement,
        row.captured_credits,
        row.released_credits,
        row.failure_cause or "",
        tuple(output.asset_id for output in messages.outputs(row)),
        row.deleted_at is not None,
    )


def _hold(one: ledger_pb2.SurveyedHold) -> reconciliation.Hold:
    hold = one.hold
    return reconciliation.Hold(
        hold.account_id,
        ledger_pb2.HoldState.Name(hold.state).removeprefix("HOLD_STATE_"),
        hold.reserved_credits,
        hold.captured_credits,
        hold.released_credits,
        one.refunded_credits,
        one.by_operator,
    )


def _with_expected(
    hold: reconciliation.Hold | None, expected: int | None
) -> reconciliation.Hold | None:
    return replace(hold, expected=expected) if hold is not None else None


def _outcome(one: attempt_pb2.SurveyedVideo) -> reconciliation.Outcome:
    outcome = one.outcome
    state = vocabulary_pb2.VideoState.Name(outcome.state).removeprefix("VIDEO_STATE_")
    return reconciliation.Outcome(
        outcome.account_id,
        state,
        _cause(one) if state in ("FAILED", "CANCELLED") else "",
        tuple(_outputs(outcome.last_event.completed.outputs)),
        tuple(_attempt(attempt) for attempt in one.attempts),
    )


def _cause(one: attempt_pb2.SurveyedVideo) -> str:
    """Why it ended: by its terminal event, or by its last attempt where a later event has followed that."""
    event = one.outcome.last_event
    cause = event.cancelled.cause if event.HasField("cancelled") else event.failed.cause
    if not cause and one.attempts:
        cause = one.attempts[-1].cause
    return vocabulary_pb2.Cause.Name(cause).removeprefix("CAUSE_")


def _outputs(told: Sequence[event_pb2.Output]) -> list[reconciliation.Output]:
    found = [
        reconciliation.Output(output.asset_id, output.size_bytes, output.sha256) for output in told
    ]
    posters = [output.poster_asset_id for output in told if output.poster_asset_id]
    smaller = [each for output in told for each in output.renditions]
    return [
        *found,
        *(reconciliation.Output(asset_id) for asset_id in posters),
        *(reconciliation.Output(each.asset_id, each.size_bytes) for each in smaller),
    ]


def _attempt(attempt: attempt_pb2.Attempt) -> reconciliation.Attempt:
    return reconciliation.Attempt(
        attempt.number,
        attempt_pb2.AttemptState.Name(attempt.state).removeprefix("ATTEMPT_STATE_"),
        attempt.provider_account,
        attempt.provider_job_id,
        attempt.created_at.ToDatetime(tzinfo=UTC),
    )


def _stored(one: storage_pb2.SurveyedAsset, as_of: datetime) -> reconciliation.Stored:
    asset = one.asset
    expired = asset.HasField("expires_at") and asset.expires_at.ToDatetime(tzinfo=UTC) <= as_of
    return reconciliation.Stored(
        asset.account_id,
        storage_pb2.AssetState.Name(asset.state).removeprefix("ASSET_STATE_"),
        asset.size_bytes,
        asset.sha256,
        expired,
        one.object_size_bytes if one.object_found else None,
    )


def _listed(job: attempt_pb2.SurveyedJob) -> provider_lists.ListedJob:
    return provider_lists.ListedJob(
        job.provider_job_id,
        job.created_at.ToDatetime(tzinfo=UTC),
        job.status,
        job.video_id,
        job.superseded,
        job.marked_video_id,
    )
