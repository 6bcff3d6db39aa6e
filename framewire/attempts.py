"""What operators do to attempts and provider accounts: `client.attempts.all()`, `.resolve(...)`, `.pause(...)`.

Every call is idempotent, and leaves an audit row with its `why`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from framewire import encode, transport
from framewire.decode import decode
from framewire.gateway.v1 import operator_pb2, operator_pb2_grpc
from framewire.generator.v1 import attempt_pb2

PAGE_SIZE = 100


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to have a video made."""

    video_id: str
    number: int
    account_id: str
    state: str
    provider_account: str
    provider_job_id: str
    cause: str
    message: str
    resolve_by: datetime | None
    created_at: datetime | None
    updated_at: datetime | None


@dataclass(frozen=True, slots=True)
class AttemptChange:
    """One change of an attempt's state."""

    state: str
    message: str
    at: datetime | None


@dataclass(frozen=True, slots=True)
class ProviderJob:
    """A job that a provider is known to have made."""

    provider_account: str
    provider_job_id: str
    adopted: bool
    seen_at: datetime | None


@dataclass(frozen=True, slots=True)
class AttemptOutput:
    """What became of one output of a render."""

    variant: int
    state: str
    message: str


@dataclass(frozen=True, slots=True)
class LateRender:
    """What is done about a render that may turn up after its attempt was given up."""

    state: str
    provider_job_id: str
    look_until: datetime | None
    message: str


@dataclass(frozen=True, slots=True)
class AttemptDetail:
    """Everything that is on record of an attempt. Costs are in millionths of a dollar; None: none that is known."""

    attempt: Attempt
    attempt_id: str
    submissions: int
    submitted_at: datetime | None
    cost_micros: int | None
    cost_known: bool
    lease_until: datetime | None
    next_step_at: datetime | None
    history: tuple[AttemptChange, ...]
    provider_jobs: tuple[ProviderJob, ...]
    outputs: tuple[AttemptOutput, ...]
    late_render: LateRender | None


@dataclass(frozen=True, slots=True)
class VideoOutcome:
    """Where a video stands at the generator."""

    video_id: str
    account_id: str
    state: str
    stage: str


@dataclass(frozen=True, slots=True)
class ProviderAccount:
    """One key at one provider. Costs are in millionths of its currency; a cap of 0 is none."""

    provider_account: str
    dialect: str
    open: bool
    closed_reason: str
    jobs_in_flight: int
    max_jobs_in_flight: int
    models: tuple[str, ...]
    pool: str
    weight: float
    usable_jobs_in_flight: int
    opens_at: datetime | None
    troubles: int
    cost_micros_hour: int
    cost_micros_day: int
    max_cost_micros_per_hour: int
    max_cost_micros_per_day: int
    jobs_day: int
    jobs_per_day: int
    has_list: bool


class Attempts:
    """The part of a client for who looks after attempts and providers."""

    def __init__(self, opened: transport.Transport) -> None:
        self._transport = opened
        self._stub: Any = operator_pb2_grpc.OperatorServiceStub(opened.channel)

    async def all(
        self,
        *,
        video_id: str = "",
        state: str = "",
        account_id: str = "",
        provider_account: str = "",
    ) -> AsyncIterator[Attempt]:
        """Attempts, newest first; what is left out is any. States: "UNRESOLVED", "RENDERING", ..."""
        asked = attempt_pb2.ListAttemptsRequest(
            video_id=video_id,
            state=encode.enum_value(attempt_pb2.AttemptState, "ATTEMPT_STATE_", state, "state"),
            account_id=account_id,
            provider_account=provider_account,
            page_size=PAGE_SIZE,
        )
        while True:
            request = operator_pb2.ListAttemptsRequest(request=asked)
            page = await self._transport.unary(self._stub.ListAttempts, request)
            for attempt in page.attempts:
                yield decode(Attempt, attempt)
            if not page.next_page_token:
                return
            asked.page_token = page.next_page_token

    async def one(self, video_id: str, number: int = 0) -> AttemptDetail:
        """Everything on record of an attempt of a video; 0: the newest."""
        asked = attempt_pb2.GetAttemptRequest(video_id=video_id, number=number)
        request = operator_pb2.GetAttemptRequest(request=asked)
        return decode(AttemptDetail, await self._transport.unary(self._stub.GetAttempt, request))

    async def resolve(
        self,
        video_id: str,
        resolution: str,
        *,
        provider_job_id: str = "",
        number: int = 0,
        why: str = "",
    ) -> Attempt:
        """Says what became of an undecided attempt: ADOPT (that job), NEVER_ACCEPTED or GIVE_UP."""
        asked = attempt_pb2.ResolveAttemptRequest(
            video_id=video_id,
            provider_job_id=provider_job_id,
            resolution=encode.enum_value(
                attempt_pb2.AttemptResolution, "ATTEMPT_RESOLUTION_", resolution, "resolution"
            ),
            number=number,
        )
        request = operator_pb2.ResolveAttemptRequest(request=asked, why=why)
        return decode(Attempt, await self._transport.unary(self._stub.ResolveAttempt, request))

    async def retry(
        self, video_id: str, *, number: int, accept_double_cost: bool = False, why: str = ""
    ) -> Attempt:
        """Gives attempt `number` up and sends its video again; answers the new attempt."""
        asked = attempt_pb2.RetryAttemptRequest(
            video_id=video_id, number=number, accept_double_cost=accept_double_cost
        )
        request = operator_pb2.RetryAttemptRequest(request=asked, why=why)
        return decode(Attempt, await self._transport.unary(self._stub.RetryAttempt, request))

    async def cancel(self, video_id: str, *, why: str = "") -> VideoOutcome:
        """Asks for the end of a video, whosever it is."""
        request = operator_pb2.CancelAttemptRequest(video_id=video_id, why=why)
        return decode(VideoOutcome, await self._transport.unary(self._stub.CancelAttempt, request))

    async def provider_accounts(self) -> tuple[ProviderAccount, ...]:
        """The provider accounts, by name."""
        request = operator_pb2.ListProviderAccountsRequest()
        page = await self._transport.unary(self._stub.ListProviderAccounts, request)
        return tuple(decode(ProviderAccount, item) for item in page.provider_accounts)

    async def pause(
        self, provider_account: str, *, paused: bool = True, why: str = ""
    ) -> ProviderAccount:
        """Stops, or starts, sending to a provider account."""
        asked = attempt_pb2.PauseProviderAccountRequest(
            provider_account=provider_account, paused=paused
        )
        request = operator_pb2.PauseProviderAccountRequest(request=asked, why=why)
        answer = await self._transport.unary(self._stub.PauseProviderAccount, request)
        return decode(ProviderAccount, answer)
