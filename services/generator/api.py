"""AttemptService: answers for videos and their attempts."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from google.protobuf import timestamp_pb2

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import attempt_pb2, attempt_pb2_grpc, job_pb2
from kit import errors, incarnation, loops, pages
from services.generator import (
    catalogue,
    events,
    operate,
    pools,
    quota,
    recover,
    standings,
    survey,
    turns,
)
from services.generator.store import Store, operators, recovery, videos

ORDINARY_WEIGHT = 100


class AttemptApi(attempt_pb2_grpc.AttemptServiceServicer):
    """The gRPC face. Every caller is a service of ours; operators come through the gateway."""

    def __init__(
        self,
        store: Store,
        pools_: pools.Pools,
        quota_: quota.Quota,
        dispatch: loops.Wake,
        life: incarnation.Incarnation,
    ) -> None:
        self._store = store
        self._pools = pools_
        self._lists = survey.Lists(store.survey, quota_, pools_)
        self._dispatch = dispatch
        self._operators = operate.Operators(store, pools_, quota_)
        self._life = life
        self._recovery = recover.Recovery(store, pools_, quota_, life)

    async def GetVideoOutcome(self, request: Any, context: Any) -> attempt_pb2.VideoOutcome:
        """Where a video stands."""
        outcome = await self._store.videos.outcome(request.video_id)
        if outcome is None:
            raise errors.NotFound("ATTEMPT_NOT_FOUND", "the job of this video has not arrived")
        return _outcome(outcome)

    async def CancelAttempt(self, request: Any, context: Any) -> attempt_pb2.VideoOutcome:
        """Asks for the end of a video."""
        self._life.require()
        return _outcome(await self._store.videos.cancel(request.video_id, request.account_id))

    async def ErasePrompt(self, request: Any, context: Any) -> attempt_pb2.ErasePromptResponse:
        """Forgets the words of a video that has ended."""
        if not await self._store.videos.erase_prompt(request.video_id, request.account_id):
            raise errors.FailedPrecondition("CONFLICT", "the video lives; its prompt is needed")
        return attempt_pb2.ErasePromptResponse()

    async def ListAttempts(self, request: Any, context: Any) -> attempt_pb2.ListAttemptsResponse:
        """Attempts, newest first."""
        size = request.page_size or pages.DEFAULT_SIZE
        state = attempt_pb2.AttemptState.Name(request.state).removeprefix("ATTEMPT_STATE_")
        only = operators.Filter(
            request.video_id,
            "" if state == "UNSPECIFIED" else state,
            request.account_id,
            request.provider_account,
        )
        found = await self._store.operators.list_attempts(
            only,
            pages.decode(request.page_token),
            size + 1,
        )
        last = found[size - 1] if len(found) > size else None
        token = pages.encode(last["created_at"], str(last["attempt_id"])) if last else ""
        return attempt_pb2.ListAttemptsResponse(
            attempts=[_attempt(row) for row in found[:size]], next_page_token=token
        )

    async def EstimateModels(
        self, request: attempt_pb2.EstimateModelsRequest, context: Any
    ) -> attempt_pb2.EstimateModelsResponse:
        """Where a video that came now would stand, by model and lane."""
        counts, rates = await self._store.estimates.counted()
        weight = request.weight or ORDINARY_WEIGHT
        answer = attempt_pb2.EstimateModelsResponse()
        for model, pool in sorted(self._pools.pool_of_model.items()):
            rate = rates.get((pool, model))
            made = answer.models.add(model=model, render_seconds=rate.render_seconds if rate else 0)
            for lane in turns.LANE_WEIGHTS:
                place, seconds = turns.of_next(
                    lane, request.account_id, weight, counts.get(pool, {}), rate
                )
                made.lanes.add(
                    lane=vocabulary_pb2.Lane.Value(f"LANE_{lane}"),
                    queue_position=place,
                    expected_seconds=seconds,
                )
        return answer

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
                _provider_account(
                    item,
                    accounts[item.provider_account],
                    now,
                    self._pools.has_list(item.provider_account),
                )
                for item in found
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
                    job=job_pb2.Job.FromString(video.job)
                    if request.with_jobs and video.job
                    else None,
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

    async def GetAttempt(self, request: Any, context: Any) -> attempt_pb2.AttemptDetail:
        """Everything on record of an attempt."""
        return _detail(await self._operators.detail(request.video_id, request.number))

    async def ResolveAttempt(self, request: Any, context: Any) -> attempt_pb2.Attempt:
        """What became of an undecided attempt."""
        self._life.require()
        resolution = request.resolution
        adopts = resolution == attempt_pb2.ATTEMPT_RESOLUTION_ADOPT
        if resolution and adopts != bool(request.provider_job_id):
            sentence = "belongs to ADOPT, and only there"
            raise errors.InvalidArgument(
                "INVALID_FIELD",
                f"provider_job_id: {sentence}",
                violations=[("provider_job_id", sentence)],
            )
        if resolution == attempt_pb2.ATTEMPT_RESOLUTION_NEVER_ACCEPTED:
            done = await self._operators.never_accepted(request.video_id, request.number)
        elif request.provider_job_id:
            done = await self._operators.adopt(
                request.video_id, request.number, request.provider_job_id
            )
        else:
            done = await self._operators.give_up(request.video_id, request.number)
        return _attempt(await self._store.operators.listed(done))

    async def RetryAttempt(self, request: Any, context: Any) -> attempt_pb2.Attempt:
        """Sends the video of an undecided attempt again."""
        self._life.require()
        done = await self._operators.retry(
            request.video_id, request.number, request.accept_double_cost
        )
        self._dispatch.ring()
        return _attempt(await self._store.operators.listed(done))

    async def GetRecovery(self, request: Any, context: Any) -> vocabulary_pb2.RecoveryStanding:
        """Whether it may send."""
        return _standing(await self._life.standing())

    async def RecoverVideos(self, request: Any, context: Any) -> attempt_pb2.RecoverVideosResponse:
        """Makes good what was forgotten of these."""
        known = [_known(video) for video in request.videos]
        done = await self._recovery.videos(known, dry_run=request.dry_run)
        return attempt_pb2.RecoverVideosResponse(videos=[_recovered(one) for one in done])

    async def EndRecovery(self, request: Any, context: Any) -> attempt_pb2.EndRecoveryResponse:
        """Makes good the rest, and opens."""
        done = await self._recovery.end(dry_run=request.dry_run)
        self._dispatch.ring()
        return attempt_pb2.EndRecoveryResponse(videos=[_recovered(one) for one in done])


def _standing(found: incarnation.Standing) -> vocabulary_pb2.RecoveryStanding:
    return vocabulary_pb2.RecoveryStanding(
        open=found.open,
        incarnation_id=found.incarnation_id,
        reason=found.reason,
        since=_moment(found.since),
        restored_to=_moment(found.restored_to),
    )


def _known(video: attempt_pb2.KnownVideo) -> recovery.Known:
    state = vocabulary_pb2.VideoState.Name(video.state).removeprefix("VIDEO_STATE_")
    return recovery.Known(video.job, state, video.last_event, events.moment(video.created_at))


def _recovered(done: recovery.Done) -> vocabulary_pb2.RecoveredVideo:
    video_id, action, detail = done
    return vocabulary_pb2.RecoveredVideo(
        video_id=video_id,
        action=vocabulary_pb2.RecoveryAction.Value(f"RECOVERY_ACTION_{action}"),
        detail=detail,
    )


def _outcome(outcome: videos.Outcome) -> attempt_pb2.VideoOutcome:
    return attempt_pb2.VideoOutcome(
        video_id=outcome.video_id,
        account_id=outcome.account_id,
        state=vocabulary_pb2.VideoState.Value(f"VIDEO_STATE_{outcome.state}"),
        stage=events.stage(outcome.stage),
        last_event=outcome.last_event,
    )


def _provider_account(
    standing: standings.Standing, account: catalogue.ProviderAccount, now: datetime, has_list: bool
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
        has_list=has_list,
    )


def _attempt(row: Any) -> attempt_pb2.Attempt:
    return attempt_pb2.Attempt(
        video_id=row["video_id"],
        number=row["number"],
        account_id=row["account_id"],
        state=_state(row["state"]),
        provider_account=row["provider_account"] or "",
        provider_job_id=row["provider_job_id"] or "",
        cause=events.cause(row["cause"]) if row["cause"] else vocabulary_pb2.CAUSE_UNSPECIFIED,
        message=row["message"],
        resolve_by=_moment(row["resolve_by"]),
        created_at=events.timestamp(row["created_at"]),
        updated_at=events.timestamp(row["updated_at"]),
    )


def _detail(found: operators.Detail) -> attempt_pb2.AttemptDetail:
    row, late = found.row, found.late
    return attempt_pb2.AttemptDetail(
        attempt=_attempt(row),
        attempt_id=row["attempt_id"],
        submissions=row["submissions"],
        submitted_at=_moment(row["submitted_at"]),
        cost_micros=row["cost_micros"],
        cost_known=row["cost_known"],
        lease_until=_moment(row["lease_until"]),
        next_step_at=_moment(row["next_step_at"]),
        history=[
            attempt_pb2.AttemptChange(
                state=_state(change["state_after"]),
                message=change["message"],
                at=_moment(change["at"]),
            )
            for change in found.history
        ],
        provider_jobs=[
            attempt_pb2.ProviderJob(
                provider_account=job["provider_account"],
                provider_job_id=job["provider_job_id"],
                adopted=job["adopted"],
                seen_at=_moment(job["seen_at"]),
            )
            for job in found.provider_jobs
        ],
        outputs=[
            attempt_pb2.AttemptOutput(
                variant=output.variant, state=output.state, message=output.message
            )
            for output in found.outputs
        ],
        late_render=attempt_pb2.LateRender(
            state=late["state"],
            provider_job_id=late["provider_job_id"] or "",
            look_until=_moment(late["look_until"]),
            message=late["message"],
        )
        if late
        else None,
    )


def _state(name: str) -> attempt_pb2.AttemptState.ValueType:
    return attempt_pb2.AttemptState.Value(f"ATTEMPT_STATE_{name}")


def _moment(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    return events.timestamp(moment) if moment else None
