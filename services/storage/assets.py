"""What an asset is: its identity, its states, its limits, and where its bytes lie. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from kit import errors, ids
from services.storage.media import facts


class Kind(StrEnum):
    """What an asset is; the names of the contract."""

    INPUT_IMAGE = "INPUT_IMAGE"
    INPUT_VIDEO = "INPUT_VIDEO"
    OUTPUT_VIDEO = "OUTPUT_VIDEO"
    POSTER = "POSTER"
    RENDITION = "RENDITION"


class State(StrEnum):
    """Where an asset stands; only READY is visible."""

    UPLOADING = "UPLOADING"
    READY = "READY"
    DELETING = "DELETING"
    DELETED = "DELETED"
    QUARANTINED = "QUARANTINED"


class Bucket(StrEnum):
    """Which of the buckets; the settings say what they are called."""

    INPUT = "INPUT"
    OUTPUT = "OUTPUT"


BUCKETS: Mapping[Kind, Bucket] = {
    Kind.INPUT_IMAGE: Bucket.INPUT,
    Kind.INPUT_VIDEO: Bucket.INPUT,
    Kind.OUTPUT_VIDEO: Bucket.OUTPUT,
    Kind.POSTER: Bucket.OUTPUT,
    Kind.RENDITION: Bucket.OUTPUT,
}

EXTENSIONS: Mapping[str, str] = {
    "image/jpeg": "jpg",
    "image/png": "png",
    "image/webp": "webp",
    "image/avif": "avif",
    "video/mp4": "mp4",
    "video/quicktime": "mov",
    "video/webm": "webm",
}

INCOMING = "incoming/"
"""Where clients put bytes themselves, in the bucket of inputs."""

UNKNOWN_MEDIA_TYPE = "application/octet-stream"

# The reasons of the contract are fewer than those of the media package.
_REFUSALS: Mapping[facts.Reason, str] = {
    facts.Reason.NOT_AN_IMAGE: "NOT_AN_IMAGE",
    facts.Reason.IMAGE_TRUNCATED: "NOT_AN_IMAGE",
    facts.Reason.IMAGE_ANIMATED: "NOT_AN_IMAGE",
    facts.Reason.IMAGE_FORMAT_NOT_ALLOWED: "NOT_AN_IMAGE",
    facts.Reason.IMAGE_TOO_LARGE: "TOO_LARGE",
    facts.Reason.MEDIA_TOO_EXPENSIVE: "TOO_LARGE",
    facts.Reason.CROP_OUTSIDE_IMAGE: "INVALID_FIELD",
    facts.Reason.NOT_A_VIDEO: "NOT_A_VIDEO",
    facts.Reason.VIDEO_UNREADABLE: "NOT_A_VIDEO",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes an asset this one: the same four always have the same id."""

    account_id: str
    owner: str
    kind: Kind
    variant: int = 0

    @property
    def asset_id(self) -> str:
        return ids.derived_id(self.account_id, self.owner, self.kind, self.variant)

    @property
    def bucket(self) -> Bucket:
        return BUCKETS[self.kind]

    def poster(self) -> Identity:
        """Of the poster of this video."""
        return Identity(self.account_id, self.owner, Kind.POSTER, self.variant)


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured of the stored bytes."""

    sha256: str
    size_bytes: int
    source_sha256: str
    media_type: str
    width: int
    height: int
    duration_ms: int = 0
    fps: float = 0.0
    codec: str = ""
    has_audio: bool = False


@dataclass(frozen=True, slots=True)
class Asset:
    """One asset as the database has it. Facts are there once it is READY."""

    asset_id: str
    account_id: str
    kind: Kind
    state: State
    object_key: str | None
    facts: Facts | None
    poster_asset_id: str | None
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Area:
    """Part of an image, as fractions of its width and height."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Fit:
    """How an image or video is brought to a size."""

    width: int
    height: int
    mode: facts.FitMode = facts.FitMode.COVER
    area: Area | None = None


def object_key(account_id: str, asset_id: str, nonce: str, media_type: str) -> str:
    """Where one put's bytes of an asset lie. S3 servers tell the type by the extension."""
    return f"{account_id}/{asset_id}-{nonce}.{EXTENSIONS.get(media_type, 'bin')}"


def incoming_key(identity: Identity, nonce: str, media_type: str) -> str:
    """Where a client puts the bytes of an upload itself. Nothing is ever served from there."""
    extension = EXTENSIONS.get(media_type, "bin")
    return f"{INCOMING}{identity.account_id}/{identity.asset_id}-{nonce}.{extension}"


def file_name(asset_id: str, media_type: str) -> str:
    """What a download is called when nobody named it."""
    return f"{asset_id}.{EXTENSIONS.get(media_type, 'bin')}"


def fitted(account_id: str, asset_id: str, fit: Fit) -> Identity:
    """The asset that this fit of that image or video is."""
    area = fit.area
    part = f"{area.left!r},{area.top!r},{area.right!r},{area.bottom!r}" if area else "whole"
    digest = ids.derived_id(fit.width, fit.height, fit.mode, part)
    return Identity(account_id, f"fit:{asset_id}:{digest}", Kind.RENDITION)


def rendition(account_id: str, asset_id: str, height: int) -> Identity:
    """The asset that this smaller version of that output is."""
    return Identity(account_id, f"rendition:{asset_id}:{height}", Kind.RENDITION)


def uploaded_kind(media_type: str) -> Kind:
    """What is to come of an upload that is announced as this."""
    return Kind.INPUT_VIDEO if media_type.startswith("video/") else Kind.INPUT_IMAGE


def is_video(asset: Asset) -> bool:
    """Whether its bytes move."""
    return asset.facts is not None and asset.facts.media_type.startswith("video/")


def check_even(**sides: int) -> None:
    """Raises InvalidArgument for a side that no H.264 video of ours has."""
    for name, pixels in sides.items():
        if pixels % 2:
            sentence = "of a video must be even"
            raise errors.InvalidArgument(
                "INVALID_FIELD", f"{name}: {sentence}", violations=[(name, sentence)]
            )


def check_area(area: Area) -> None:
    """Raises InvalidArgument for an area that holds nothing."""
    if area.left < area.right and area.top < area.bottom:
        return
    sentence = "left_fraction must be below right_fraction and top_fraction below bottom_fraction"
    raise errors.InvalidArgument(
        "INVALID_FIELD", f"crop: {sentence}", violations=[("crop", sentence)]
    )


def crop(area: Area, width: int, height: int) -> facts.Crop:
    """The area in pixels of an image of that size; at least one pixel."""
    left = min(math.floor(area.left * width), width - 1)
    top = min(math.floor(area.top * height), height - 1)
    right = min(max(math.ceil(area.right * width), left + 1), width)
    bottom = min(max(math.ceil(area.bottom * height), top + 1), height)
    return facts.Crop(left, top, right - left, bottom - top)


def check_range(offset: int, length: int, size_bytes: int) -> int:
    """How many bytes a range gives, from what was asked (0: to the end). Raises InvalidArgument behind the end."""
    if offset >= size_bytes:
        sentence = f"the asset has {size_bytes} bytes; offset must be below that"
        raise errors.InvalidArgument(
            "INVALID_FIELD", f"offset: {sentence}", violations=[("offset", sentence)]
        )
    rest = size_bytes - offset
    return min(length, rest) if length else rest


def check_limit(size_bytes: int, limit_bytes: int) -> None:
    """Raises InvalidArgument/TOO_LARGE."""
    if size_bytes > limit_bytes:
        raise errors.InvalidArgument(
            "TOO_LARGE",
            f"at most {limit_bytes} bytes are accepted; send a smaller file",
            limit_bytes=limit_bytes,
        )


def check_arrived(size_bytes: int, sha256: str, arrived_bytes: int, arrived_sha256: str) -> None:
    """Compares what was said (0 and empty: nothing was) with what came. Raises InvalidArgument/CHECKSUM_MISMATCH."""
    if size_bytes and arrived_bytes != size_bytes:
        raise errors.InvalidArgument(
            "CHECKSUM_MISMATCH",
            f"{size_bytes} bytes were announced and {arrived_bytes} came; send the whole file again",
        )
    if sha256 and arrived_sha256 != sha256:
        raise errors.InvalidArgument(
            "CHECKSUM_MISMATCH",
            "the bytes that came do not have the sha256 that was announced; send the file again",
        )


def not_found() -> errors.NotFound:
    """There is no such asset, it is another account's, or it is not READY."""
    return errors.NotFound("ASSET_NOT_FOUND", "there is no such asset in this account; upload it")


def pinned() -> errors.FailedPrecondition:
    """It cannot be deleted now."""
    return errors.FailedPrecondition(
        "CONFLICT", "the asset is needed by a video that is still being made; delete it afterwards"
    )


def kept_aside(sha256: str, why: str) -> errors.InvalidArgument:
    """These bytes came before, and are no video this time either."""
    return errors.InvalidArgument(
        "NOT_A_VIDEO", f"these bytes came before, and are kept aside: {why}", sha256=sha256
    )


def refusal(refused: facts.MediaRefused) -> errors.InvalidArgument:
    """What a caller is told of media that was refused."""
    return errors.InvalidArgument(_REFUSALS[refused.reason], str(refused), detail=refused.reason)
