"""The services behind, as the domain speaks of them. Every call has a timeout; errors are those of `kit.errors`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import event_pb2, reason_pb2, vocabulary_pb2
from framewire.generator.v1 import attempt_pb2, attempt_pb2_grpc
from framewire.storage.v1 import storage_pb2, storage_pb2_grpc
from kit import errors, telemetry
from services.gateway import catalogue, inputs, messages, videos
from services.gateway.store import rows

log = telemetry.logger(__name__)

TIMEOUT_SECONDS = 5.0
ESTIMATE_SECONDS = 1.0
"""What nobody needs is not waited for."""
FIT_SECONDS = 100.0
_LEDGER = "framewire.credits.v1.LedgerService"
_STORAGE = "framewire.storage.v1.StorageService"
_ATTEMPTS = "framewire.generator.v1.AttemptService"
RETRIED = {
    "credits": tuple(
        f"{_LEDGER}/{method}"
        for method in (
            "OpenAccount",
            "Grant",
            "Quote",
            "Reserve",
            "Release",
            "GetBalance",
            "ListEntries",
            "GetUsage",
            "Refund",
            "CheckBooks",
            "SetFrozen",
            "SetDailyCap",
            "ForgetLabels",
            "AddRulebook",
            "ListRulebooks",
            "SurveyHolds",
            "AssessHolds",
            "SettleHold",
            "GetRecovery",
            "RestoreHold",
            "EndRecovery",
        )
    ),
    "storage": tuple(
        f"{_STORAGE}/{method}"
        for method in (
            "Stat",
            "Pin",
            "Unpin",
            "SignUrl",
            "Delete",
            "CreateUpload",
            "CompleteUpload",
            "Import",
            "Fit",
            "List",
            "SurveyAssets",
            "EraseAccount",
            "SurveyPins",
        )
    ),
    "generator": tuple(
        f"{_ATTEMPTS}/{method}"
        for method in (
            "GetVideoOutcome",
            "CancelAttempt",
            "EstimateModels",
            "ErasePrompt",
            "SurveyVideos",
            "GetRecovery",
            "RecoverVideos",
            "EndRecovery",
        )
    ),
}
"""Methods that are idempotent by contract: tried again while UNAVAILABLE."""

_REFUSALS = (
    errors.InvalidArgument,
    errors.NotFound,
    errors.AlreadyExists,
    errors.FailedPrecondition,
    errors.PermissionDenied,
    errors.ResourceExhausted,
)
_NOT_THE_CALLERS = frozenset({"ROLE_NOT_ALLOWED", "HOLD_RELEASED", "RESERVE_TOO_LATE"})
_REASONS = frozenset(name.removeprefix("ERROR_REASON_") for name in reason_pb2.ErrorReason.keys())  # noqa: SIM118
_UPLOADS = (storage_pb2.ASSET_KIND_INPUT_IMAGE, storage_pb2.ASSET_KIND_INPUT_VIDEO)
_NO_HOLD = frozenset({"ACCOUNT_NOT_FOUND", "HOLD_NOT_FOUND"})


def is_refusal(error: errors.ServiceError) -> bool:
    """Whether a service behind decided against the request, as opposed to not having decided."""
    return isinstance(error, _REFUSALS) and error.reason in _REASONS


def for_caller(error: errors.ServiceError) -> errors.ServiceError:
    """What a caller of ours is told: a refusal as it is, everything else as "not now"."""
    if error.reason == "RECOVERY":
        return error
    if is_refusal(error) and error.reason not in _NOT_THE_CALLERS:
        return error
    return unavailable()


def unavailable() -> errors.Unavailable:
    """A service behind did not answer; nothing was done."""
    return errors.Unavailable(
        "DEPENDENCY_UNAVAILABLE",
        "a service behind did not answer in time; try again with the same request_id",
        retry_after_seconds=1,
    )


@dataclass(frozen=True, slots=True)
class Stubs:
    """The raw clients, for what is only passed on."""

    credits: ledger_pb2_grpc.LedgerServiceAsyncStub
    storage: storage_pb2_grpc.StorageServiceAsyncStub
    generator: attempt_pb2_grpc.AttemptServiceAsyncStub


class Peers:
    """What a video needs of credits, storage and generator."""

    def __init__(self, stubs: Stubs, models: catalogue.Catalogue) -> None:
        self.stubs = stubs
        self._models = models

    async def reserve(self, video: videos.Video) -> rows.Hold:
        """Prices the video and holds its credits, not later than its admission lasts. Idempotent by the video."""
        hold = await self.stubs.credits.Reserve(
            ledger_pb2.ReserveRequest(
                hold_id=video.video_id,
                account_id=video.account_id,
                item=self._item(messages.stored_spec(video), messages.lane_number(video.lane)),
                quote_id=video.quote_id,
                max_credits=video.max_credits,
                not_after=messages.timestamp(video.admit_until),
                labels=video.labels,
                key_id=video.key_id,
            ),
            timeout=TIMEOUT_SECONDS,
        )
        return rows.Hold(hold.reserved_credits, hold.price_version, hold.policy_version)

    async def release(self, video: videos.Video) -> None:
        """Gives the credits back, also those that a late Reserve would hold. Idempotent."""
        wanted = video.cancel_requested
        cause = (
            vocabulary_pb2.CAUSE_CANCELLED_BEFORE_SUBMIT
            if wanted
            else vocabulary_pb2.CAUSE_INTERNAL
        )
        request = ledger_pb2.ReleaseRequest(
            hold_id=video.video_id, account_id=video.account_id, cause=cause
        )
        try:
            await self.stubs.credits.Release(request, timeout=TIMEOUT_SECONDS)
        except errors.NotFound as error:
            if error.reason not in _NO_HOLD:
                raise

    async def price(
        self, spec: vocabulary_pb2.VideoSpec, lane: vocabulary_pb2.Lane.ValueType
    ) -> ledger_pb2.PriceQuote:
        """Today's price of a normalised spec."""
        return await self.stubs.credits.Quote(
            ledger_pb2.QuoteRequest(item=self._item(spec, lane)), timeout=TIMEOUT_SECONDS
        )

    def priced(self, video: videos.Video) -> ledger_pb2.Item:
        """What a video's hold is for."""
        return self._item(messages.stored_spec(video), messages.lane_number(video.lane))

    def _item(
        self, spec: vocabulary_pb2.VideoSpec, lane: vocabulary_pb2.Lane.ValueType
    ) -> ledger_pb2.Item:
        return item(spec, lane, self._models.models.get(spec.model))

    async def balance(self, account_id: str) -> ledger_pb2.Balance:
        """What an account has."""
        return await self.stubs.credits.GetBalance(
            ledger_pb2.GetBalanceRequest(account_id=account_id), timeout=TIMEOUT_SECONDS
        )

    async def pin(self, video: videos.Video) -> None:
        """Keeps what the video starts from while it lives. Idempotent. Raises NotFound or InvalidArgument where one
        cannot start it.
        """
        spec = messages.stored_spec(video)
        for each in messages.spec_inputs(spec):
            pinned = await self.stubs.storage.Pin(
                storage_pb2.PinRequest(
                    account_id=video.account_id, asset_id=each.asset_id, owner=video.video_id
                ),
                timeout=TIMEOUT_SECONDS,
            )
            self._check(each, spec.model, pinned.asset)

    async def unpin(self, video: videos.Video) -> None:
        """Lets go of everything that the video kept. Idempotent."""
        await self.stubs.storage.Unpin(
            storage_pb2.UnpinRequest(account_id=video.account_id, owner=video.video_id),
            timeout=TIMEOUT_SECONDS,
        )

    async def delete_asset(self, account_id: str, asset_id: str) -> None:
        """Removes an asset and all that was made from it; one that is gone is gone. FailedPrecondition: pinned."""
        try:
            await self.stubs.storage.Delete(
                storage_pb2.DeleteRequest(account_id=account_id, asset_id=asset_id),
                timeout=TIMEOUT_SECONDS,
            )
        except errors.NotFound:
            return

    async def delete_upload(self, account_id: str, asset_id: str) -> None:
        """Removes an asset if a caller sent it. An output, from which a video may start too, stays with its own."""
        try:
            asset = await self.stubs.storage.Stat(
                storage_pb2.StatRequest(account_id=account_id, asset_id=asset_id),
                timeout=TIMEOUT_SECONDS,
            )
        except errors.NotFound:
            return
        if asset.kind in _UPLOADS:
            await self.delete_asset(account_id, asset_id)

    async def erase_prompt(self, video: videos.Video) -> None:
        """Has the generator forget the words of a video that has ended. Idempotent."""
        await self.stubs.generator.ErasePrompt(
            attempt_pb2.ErasePromptRequest(video_id=video.video_id, account_id=video.account_id),
            timeout=TIMEOUT_SECONDS,
        )

    async def forget_labels(self, account_id: str) -> None:
        """Has the ledger take the labels off an account's holds. Idempotent."""
        request, more = ledger_pb2.ForgetLabelsRequest(account_id=account_id), True
        while more:
            answer = await self.stubs.credits.ForgetLabels(request, timeout=TIMEOUT_SECONDS)
            request.page_token = answer.next_page_token
            more = bool(request.page_token)

    async def erase_assets(self, account_id: str) -> int:
        """Has everything of an account removed from storage; how much a live video still needs. Idempotent."""
        answer = await self.stubs.storage.EraseAccount(
            storage_pb2.EraseAccountRequest(account_id=account_id), timeout=FIT_SECONDS
        )
        return answer.still_needed

    async def stat_inputs(self, account_id: str, model: str, given: Sequence[inputs.Input]) -> None:
        """Raises NotFound or InvalidArgument where one of the assets cannot start a video of the model."""
        for each in given:
            asset = await self.stubs.storage.Stat(
                storage_pb2.StatRequest(account_id=account_id, asset_id=each.asset_id),
                timeout=TIMEOUT_SECONDS,
            )
            self._check(each, model, asset)

    def _check(self, each: inputs.Input, model: str, asset: storage_pb2.Asset) -> None:
        known = self._models.models.get(model)
        if known is not None:  # else it was offered when the video was admitted
            kind = storage_pb2.AssetKind.Name(asset.kind).removeprefix("ASSET_KIND_")
            inputs.check_asset(each, known, inputs.Asset(kind, asset.duration_ms / 1000))

    async def fit(
        self, account_id: str, each: inputs.Input, size: tuple[int, int]
    ) -> storage_pb2.Asset:
        """An input as it will be sent. Idempotent: the one that is sent later is the same."""
        left, top, right, bottom = each.crop
        crop = storage_pb2.CropBounds(
            left_fraction=left, top_fraction=top, right_fraction=right, bottom_fraction=bottom
        )
        request = storage_pb2.FitRequest(
            account_id=account_id,
            asset_id=each.asset_id,
            width=size[0],
            height=size[1],
            mode=storage_pb2.FitMode.Value(f"FIT_MODE_{each.fit}"),
            crop=crop if each.crop != inputs.WHOLE else None,
        )
        return await self.stubs.storage.Fit(request, timeout=FIT_SECONDS)

    async def estimates(
        self, account_id: str, weight: int
    ) -> Mapping[str, attempt_pb2.ModelEstimate]:
        """When a video of the account would be done, by model; empty while generator does not say so in time."""
        request = attempt_pb2.EstimateModelsRequest(account_id=account_id, weight=weight)
        try:
            answer = await self.stubs.generator.EstimateModels(request, timeout=ESTIMATE_SECONDS)
        except errors.ServiceError as error:
            log.warning("no_estimates", error=repr(error))
            return {}
        return {each.model: each for each in answer.models}

    async def outcome(self, video: videos.Video) -> event_pb2.Event | None:
        """The newest event of a video, empty where there is none yet; None: the generator has never heard of it.

        Asks for its end as well, where its owner did: that is idempotent, and thus never lost.
        """
        try:
            if video.cancel_requested:
                outcome = await self.cancel(video)
            else:
                outcome = await self.stubs.generator.GetVideoOutcome(
                    attempt_pb2.GetVideoOutcomeRequest(video_id=video.video_id),
                    timeout=TIMEOUT_SECONDS,
                )
        except errors.NotFound:
            return None
        return outcome.last_event

    async def cancel(self, video: videos.Video) -> attempt_pb2.VideoOutcome:
        """Asks for the end of a video, also of one whose job has not arrived. Idempotent."""
        return await self.stubs.generator.CancelAttempt(
            attempt_pb2.CancelAttemptRequest(video_id=video.video_id, account_id=video.account_id),
            timeout=TIMEOUT_SECONDS,
        )


def item(
    spec: vocabulary_pb2.VideoSpec,
    lane: vocabulary_pb2.Lane.ValueType,
    model: catalogue.Model | None,
) -> ledger_pb2.Item:
    """What is priced. Of the options only those that a price depends on: the others may be anybody's words."""
    priced = {name for name, option in (model.options if model else {}).items() if option.is_priced}
    return ledger_pb2.Item(
        model=spec.model,
        width=spec.width,
        height=spec.height,
        seconds=spec.seconds,
        variants=spec.variants,
        lane=lane,
        options={
            name: messages.option_text(spec.options[name])
            for name in spec.options
            if name in priced
        },
    )
