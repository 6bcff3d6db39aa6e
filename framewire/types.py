"""What the SDK answers: frozen data. Enums are plain strings ("PROCESSING"), times are aware datetimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

TERMINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED")

OptionValue = str | float | bool


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the account, ready to start videos from."""

    image_id: str
    account_id: str
    media_type: str
    width: int
    height: int
    size_bytes: int
    created_at: datetime | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class InputVideo:
    """A video of the account, ready to start videos from."""

    input_video_id: str
    account_id: str
    media_type: str
    width: int
    height: int
    duration_ms: int
    fps: float
    codec: str
    size_bytes: int
    created_at: datetime | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class CropBounds:
    """Part of an image or video, as fractions of its width and height."""

    left_fraction: float = 0.0
    top_fraction: float = 0.0
    right_fraction: float = 1.0
    bottom_fraction: float = 1.0


@dataclass(frozen=True, slots=True)
class VideoInput:
    """What a video starts from: an image or a video, one of the two. Fits: "COVER", "CONTAIN", "CONTAIN_BLURRED"."""

    image_id: str = ""
    input_video_id: str = ""
    frame_index: int = 0
    fit: str = ""
    crop: CropBounds | None = None


@dataclass(frozen=True, slots=True)
class InputPreview:
    """An input exactly as it will be sent, and where it can be looked at for a short time."""

    asset_id: str
    media_type: str
    width: int
    height: int
    sha256: str
    size_bytes: int
    url: str
    url_expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Upload:
    """Where to PUT an image's or a video's bytes, with exactly these headers, and until when."""

    upload_id: str
    url: str
    headers: dict[str, str]
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """What a video was asked to be, with every default filled in."""

    prompt: str
    model: str
    input_image_id: str
    width: int
    height: int
    seconds: int
    variants: int
    options: Mapping[str, OptionValue]
    inputs: tuple[VideoInput, ...]
    rendition_heights: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VideoCredits:
    """Credits of a video; `captured` and `released` are final when `settlement` is DONE."""

    quoted: int
    reserved: int
    captured: int
    released: int
    settlement: str


@dataclass(frozen=True, slots=True)
class VideoFailure:
    """Why a video has no output; `retryable`: the same request can succeed as a new video."""

    cause: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Rendition:
    """A smaller version of an output, H.264 in MP4."""

    asset_id: str
    width: int
    height: int
    sha256: str
    size_bytes: int
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Output:
    """One stored video, with the facts that storage measured from its bytes."""

    asset_id: str
    variant: int
    sha256: str
    size_bytes: int
    media_type: str
    width: int
    height: int
    duration_ms: int
    fps: float
    codec: str
    has_audio: bool
    poster_asset_id: str
    expires_at: datetime | None
    renditions: tuple[Rendition, ...]


@dataclass(frozen=True, slots=True)
class TemplateUse:
    """A template to make a video from, "NAME" or "shared/NAME", with its variables; version 0 is the latest."""

    name: str
    variables: Mapping[str, OptionValue] = dataclasses.field(default_factory=dict)
    version: int = 0


@dataclass(frozen=True, slots=True)
class TemplateVersion:
    """The template that a video was made from."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Video:
    """A video as its caller sees it. COMPLETED, FAILED and CANCELLED never change."""

    video_id: str
    account_id: str
    state: str
    stage: str
    progress_percent: int
    queue_position: int
    expected_at: datetime | None
    revision: int
    spec: VideoSpec
    lane: str
    credits: VideoCredits
    outputs: tuple[Output, ...]
    late_outputs: tuple[Output, ...]
    failure: VideoFailure | None
    cancel_requested: bool
    similar_to: str
    retry_of: str
    labels: Mapping[str, str]
    client_reference: str
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime | None
    deleted_at: datetime | None
    start_by: datetime | None
    template: TemplateVersion | None

    @property
    def is_terminal(self) -> bool:
        """Its state will not change any more."""
        return self.state in TERMINAL_STATES

    @property
    def is_settled(self) -> bool:
        """Neither its state nor what it costs will change any more."""
        return self.is_terminal and self.credits.settlement == "DONE"


@dataclass(frozen=True, slots=True)
class Quote:
    """A price, kept to until it expires when `quote_id` is given to create_video."""

    quote_id: str
    credits: int
    expires_at: datetime | None
    spec: VideoSpec


@dataclass(frozen=True, slots=True)
class DownloadUrl:
    """Where to GET an output, for a short time, without other credentials."""

    url: str
    expires_at: datetime | None
    output: Output


@dataclass(frozen=True, slots=True)
class Size:
    """A size in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ModelOption:
    """A parameter of a model: "integer", "number", "string" or "boolean", with its bounds or choices."""

    name: str
    type: str
    min: float
    max: float
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelLane:
    """When a video that was asked for now would be done; None: nobody knows, since the model is not served."""

    lane: str
    queue_position: int
    expected_seconds: float | None


@dataclass(frozen=True, slots=True)
class Model:
    """What can be asked of a model; of sizes and seconds the default comes first."""

    model: str
    display_name: str
    state: str
    sizes: tuple[Size, ...]
    seconds: tuple[int, ...]
    max_variants: int
    text_to_video: bool
    image_to_video: bool
    options: tuple[ModelOption, ...]
    default_credits: int
    retires_at: datetime | None
    max_input_images: int
    input_images_at_any_frame: bool
    max_input_video_seconds: float
    frames_per_second: int
    lanes: tuple[ModelLane, ...]
    render_seconds: float


@dataclass(frozen=True, slots=True)
class Balance:
    """What an account has."""

    account_id: str
    available_credits: int
    held_credits: int
    next_expiry_at: datetime | None
    next_expiry_credits: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a statement."""

    transfer_id: str
    kind: str
    available_change: int
    held_change: int
    video_id: str
    cause: str
    created_at: datetime | None
    note: str
    operator: str
    purchase: str
    price_version: str
    policy_version: str
    trace_id: str


@dataclass(frozen=True, slots=True)
class UsageLine:
    """What was used in one month (UTC) by one group; what it was not grouped by is empty."""

    month: str
    model: str
    lane: str
    key_id: str
    label_value: str
    videos: int
    credits: int
    refunded_credits: int


@dataclass(frozen=True, slots=True)
class AccountRules:
    """What operators set for an account; caps are credits a day (UTC)."""

    account_id: str
    frozen: bool
    daily_cap_credits: int | None
    key_daily_cap_credits: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Rulebook:
    """A version of the price book or refund policy. Its content never changes."""

    kind: str
    version: str
    content_hash: str
    loaded_at: datetime | None
    loaded_by: str
    in_force: bool
    effective_from: datetime | None
    activated_by: str


@dataclass(frozen=True, slots=True)
class Asset:
    """A stored object, as far as operators look at one."""

    asset_id: str
    account_id: str
    kind: str
    state: str
    sha256: str
    size_bytes: int
    created_at: datetime | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Quarantined:
    """What is kept aside because it is not what it claims to be; its bytes are not to be trusted."""

    asset: Asset
    url: str
    url_expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Erasure:
    """How far the erasure of an account is."""

    asked_at: datetime | None
    live_videos: int
    videos_to_remove: int
    assets_to_remove: int
    done_at: datetime | None
    """None: not yet. It goes on by itself."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Whether the books balance, and one sentence for each row that disagrees."""

    balanced: bool
    findings: tuple[str, ...]
    transfers: int
    accounts: int
    open_holds: int
    recomputed_holds: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits that were given, and the balance afterwards."""

    lot_id: str
    balance: Balance


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an account, or a key's own; None: not set, or not to be changed."""

    requests_per_minute: int | None = None
    videos_per_hour: int | None = None
    max_in_flight: int | None = None
    upload_bytes_per_day: int | None = None
    moderation_refusals_per_hour: int | None = None
    moderation_refusals_per_day: int | None = None

    def given(self) -> dict[str, int]:
        """Those that are set."""
        return {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }


@dataclass(frozen=True, slots=True)
class Account:
    """Who pays."""

    account_id: str
    display_name: str
    lanes: tuple[str, ...]
    weight: int
    max_in_flight: int
    requests_per_minute: int
    videos_per_hour: int
    created_at: datetime | None
    limits: Limits


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key, without its secret."""

    key_id: str
    prefix: str
    account_id: str
    role: str
    display_name: str
    created_at: datetime | None
    revoked_at: datetime | None
    expires_at: datetime | None
    last_used_at: datetime | None
    limits: Limits


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """An API key that was just made. The secret is shown here, once."""

    key: ApiKey
    secret: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one item of a batch: the video, or why there is none. `code` is gRPC's number; 0 with a video."""

    video: Video | None
    code: int
    reason: str
    message: str
    metadata: Mapping[str, str]
