"""What media work answers and how it refuses. Standard library only: anyone may import it."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

MAX_FIT_SIDE_PIXELS = 8192


class Reason(StrEnum):
    """Why media was refused. The name goes into the API's ErrorInfo, so it never changes."""

    NOT_AN_IMAGE = "NOT_AN_IMAGE"
    IMAGE_TOO_LARGE = "IMAGE_TOO_LARGE"
    IMAGE_TRUNCATED = "IMAGE_TRUNCATED"
    IMAGE_ANIMATED = "IMAGE_ANIMATED"
    IMAGE_FORMAT_NOT_ALLOWED = "IMAGE_FORMAT_NOT_ALLOWED"
    CROP_OUTSIDE_IMAGE = "CROP_OUTSIDE_IMAGE"
    NOT_A_VIDEO = "NOT_A_VIDEO"
    VIDEO_UNREADABLE = "VIDEO_UNREADABLE"
    MEDIA_TOO_EXPENSIVE = "MEDIA_TOO_EXPENSIVE"


class MediaRefused(Exception):
    """The bytes are at fault. The message says what to do; the same bytes are refused again."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class MediaWorkerFailed(Exception):
    """The worker is at fault (it crashed or broke its protocol); the call may succeed later."""


class MediaBusy(Exception):
    """Every worker is busy and the queue is full; try again after a pause."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    max_pixels: int = 50_000_000
    max_side_pixels: int = 16_384


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """Of what providers deliver; what callers send has smaller ones."""

    max_pixels: int = 7680 * 4320
    max_duration_seconds: int = 3600
    max_packets: int = 500_000


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Width and height are as seen: after the EXIF orientation."""

    media_type: str
    width: int
    height: int
    has_alpha: bool
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """Measured from the packets and decoded frames, not copied from the header's claims."""

    media_type: str
    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    duration_ms: int
    fps: float
    frame_count: int
    has_audio: bool
    audio_codec: str | None
    size_bytes: int
    rotation: int = 0
    """Degrees, counter-clockwise, by which players turn its frames: how phones film upright. Width and height are
    before it."""


@dataclass(frozen=True, slots=True)
class MadeVideo:
    """A newly made video; width and height are as seen."""

    media_type: str
    codec: str
    width: int
    height: int
    duration_ms: int
    fps: float
    has_audio: bool
    size_bytes: int
    sha256: str


class FitMode(StrEnum):
    COVER = "cover"  # fill the frame, cut what hangs over, centred
    CONTAIN = "contain"  # show everything, black bars
    CONTAIN_BLURRED = (
        "contain_blurred"  # show everything, before itself: enlarged, blurred and darker
    )


@dataclass(frozen=True, slots=True)
class Crop:
    """In pixels of the image as seen."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Mark:
    """What a synthetic video says about itself, in machine-readable form."""

    model: str
    video_id: str
    source_sha256: str
    created_at: datetime
    generator: str = "Framewire"


@dataclass(frozen=True, slots=True)
class Decoded:
    """How much of a video was decoded: all of it."""

    frames: int


@dataclass(frozen=True, slots=True)
class MarkedVideo:
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Tail:
    """What a mark adds behind a video; 0 bytes: it cannot stand behind this one."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A newly made image: its bytes and the facts about them."""

    body: bytes
    facts: ImageFacts


def check_fit(width: int, height: int) -> None:
    """Raises ValueError for arguments that no image can satisfy."""
    if not (0 < width <= MAX_FIT_SIDE_PIXELS and 0 < height <= MAX_FIT_SIDE_PIXELS):
        raise ValueError(f"width and height must be 1 to {MAX_FIT_SIDE_PIXELS}")


def partial_path(out: str | Path) -> Path:
    """Where an output grows, so that a killed worker never leaves half a file under its name."""
    return Path(f"{out}.partial")
