"""AttemptService: answers for videos and their attempts."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import attempt_pb2, attempt_pb2_grpc
from kit import errors, pages
from services.generator import catalogue, events, pools, quota, standings, survey
from services.generator.store import Store, videos


class AttemptApi(attempt_pb2_grpc.AttemptServiceServicer):
    """The gRPC face. Every caller is a service of ours; operators come through the gateway."""

    def __init__(self, store: Store, pools_: pools.Pools) -> None:
        self._store = store
        self._pools = pools_
        self._lists = survey.Lists(store.survey, quota.Quota(store.accounts, pools_), pools_)

    async def GetVideoOutcome(self, request: Any, context: Any) -> attempt_pb2.VideoOutcome:
        """Where a video stands."""
        outcome = await self._store.videos.outcome(request.video_id)
        if outcome is None:
            raise errors.NotFound("ATTEMPT_NOT_FOUND", "the job of this video has not arrived")
        return _outcome(outcome)

    async def CancelAttempt(self, request: Any, context: Any) -> attempt_pb2.VideoOutcome:
        """Asks for the end of a video."""
        return _outcome(await self._store.videos.cancel(request.video_id, request.account_id))

    async def ListAttempts(self, request: Any, context: Any) -> attempt_pb2.ListAttemptsResponse:
        """Attempts, newest first."""
        size = request.page_size or pages.DEFAULT_SIZE
        state = attempt_pb2.AttemptState.Name(request.state).removeprefix("ATTEMPT_STATE_")
        found = await self._store.videos.list_attempts(
            request.video_id,
            "" if state == "UNSPECIFIED" else state,
            pages.decode(request.page_token),
            size + 1,
        )
        last = found[size - 1] if len(found) > size else None
        token = pages.encode(last["created_at"], str(last["attempt_id"])) if last else ""
        return attempt_pb2.ListAttemptsResponse(
            attempts=[_attempt(row) for row in found[:size]], next_page_token=token
        )

    async def ListProviderAccounts(
        self,
        request: Any,
        context: Any,
    ) -> attempt_pb2.ListProviderAccountsResponse:
        """State of the provider accounts."""
        accounts = self._pools.accounts
        found, now = await self._store.accounts.standings(accounts)
        return attempt_pb2.ListProviderAccountsResponse(
            provider_accounts=[
                _provider_account(item, accounts[item.provider_account], now) for item in found
            ]
        )

    async def PauseProviderAccount(self, request: Any, context: Any) -> attempt_pb2.ProviderAccount:
        """Stops or starts sending to an account."""
        known = request.provider_account in self._pools.accounts
        if not known or not await self._store.accounts.pause(
            request.provider_account, request.paused
        ):
            raise errors.NotFound("ACCOUNT_NOT_FOUND", "there is no provider account of that name")
        listed = await self.ListProviderAccounts(attempt_pb2.ListProviderAccountsRequest(), context)
        return next(
            item
            for item in listed.provider_accounts
            if item.provider_account == request.provider_account
        )

    async def SurveyVideos(self, request: Any, context: Any) -> attempt_pb2.SurveyVideosResponse:
        """Videos at a watermark."""
        size = request.page_size or pages.DEFAULT_SIZE
        before = pages.decode(request.page_token)
        if request.video_ids:
            found, as_of = await self._store.survey.by_ids(request.video_ids)
            size = len(found)
        elif request.HasField("created_since"):
            since = events.moment(request.created_since)
            found, as_of = await self._store.survey.since(since, before, size + 1)
        else:
            found, as_of = await self._store.survey.live(before, size + 1)
        last = found[size - 1] if len(found) > size else None
        return attempt_pb2.SurveyVideosResponse(
            videos=[
                attempt_pb2.SurveyedVideo(
                    outcome=_outcome(video.outcome),
                    attempts=[_attempt(row) for row in video.attempts],
                )
                for video in found[:size]
            ],
            as_of=events.timestamp(as_of),
            next_page_token=pages.encode(last.created_at, last.outcome.video_id) if last else "",
        )

    async def SurveyProviderJobs(
        self, request: Any, context: Any
    ) -> attempt_pb2.SurveyProviderJobsResponse:
        """A page of a provider's list."""
        if not self._pools.reachable(request.provider_account):
            raise errors.NotFound(
                "ACCOUNT_NOT_FOUND", "there is no provider account of that name with an address"
            )
        page = await self._lists.page(request.provider_account, request.page_token)
        return attempt_pb2.SurveyProviderJobsResponse(
            jobs=[
                attempt_pb2.SurveyedJob(
                    provider_job_id=job.provider_job_id,
                    created_at=events.timestamp(job.created_at),
                    status=job.status,
                    video_id=job.video_id,
                    superseded=job.superseded,
                    marked_video_id=job.marked_video_id,
                )
                for job in page.jobs
            ],
            as_of=events.timestamp(page.as_of),
            next_page_token=page.next_page_token,
            exclusive=page.exclusive,
        )

    async def ResolveAttempt(self, request: Any, context: Any) -> attempt_pb2.Attempt:
        """Not built yet."""
        raise errors.Unimplemented("NOT_IMPLEMENTED", "ResolveAttempt is not built yet")

    async def RetryAttempt(self, request: Any, context: Any) -> attempt_pb2.Attempt:
        """Not built yet."""
        raise errors.Unimplemented("NOT_IMPLEMENTED", "RetryAttempt is not built yet")


def _outcome(outcome: videos.Outcome) -> attempt_pb2.VideoOutcome:
    return attempt_pb2.VideoOutcome(
        video_id=outcome.video_id,
        account_id=outcome.account_id,
        state=vocabulary_pb2.VideoState.Value(f"VIDEO_STATE_{outcome.state}"),
        stage=events.stage(outcome.stage),
        last_event=outcome.last_event,
    )


def _provider_account(
    standing: standings.Standing, account: catalogue.ProviderAccount, now: datetime
) -> attempt_pb2.ProviderAccount:
    closed_reason = standings.why_closed(standing, account)
    waits = standing.opens_in_seconds > 0
    return attempt_pb2.ProviderAccount(
        provider_account=account.name,
        dialect=account.dialect,
        open=not closed_reason,
        closed_reason=closed_reason,
        jobs_in_flight=standing.jobs_in_flight,
        max_jobs_in_flight=account.max_jobs_in_flight,
        models=sorted(account.models),
        pool=account.pool,
        weight=account.weight,
        usable_jobs_in_flight=standings.slots(standing, account),
        opens_at=events.timestamp(now + timedelta(seconds=standing.opens_in_seconds))
        if waits
        else None,
        troubles=standing.troubles,
        cost_micros_hour=standing.cost_micros_hour,
        cost_micros_day=standing.cost_micros_day,
        max_cost_micros_per_hour=account.max_cost_micros_per_hour,
        max_cost_micros_per_day=account.max_cost_micros_per_day,
        jobs_day=standing.jobs_day,
        jobs_per_day=account.jobs_per_day,
    )


def _attempt(row: Any) -> attempt_pb2.Attempt:
    return attempt_pb2.Attempt(
        video_id=row["video_id"],
        number=row["number"],
        account_id=row["account_id"],
        state=attempt_pb2.AttemptState.Value(f"ATTEMPT_STATE_{row['state']}"),
        provider_account=row["provider_account"] or "",
        provider_job_id=row["provider_job_id"] or "",
        cause=events.cause(row["cause"]) if row["cause"] else vocabulary_pb2.CAUSE_UNSPECIFIED,
        message=row["message"],
        resolve_by=events.timestamp(row["resolve_by"]) if row["resolve_by"] else None,
        created_at=events.timestamp(row["created_at"]),
        updated_at=events.timestamp(row["updated_at"]),
    )
