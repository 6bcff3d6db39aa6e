"""What videos start from: which images and videos a model takes, and where. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kit import errors
from services.gateway import catalogue

WHOLE = (0.0, 0.0, 1.0, 1.0)
LENGTH_TOLERANCE_SECONDS = 0.05
"""A clip of five seconds may last a frame longer."""


# An image is always an upload: it may be deleted with the video. A video may be another video's output too.
IMAGE_KINDS = frozenset({"INPUT_IMAGE"})
VIDEO_KINDS = frozenset({"INPUT_VIDEO", "OUTPUT_VIDEO"})


@dataclass(frozen=True, slots=True)
class Asset:
    """What storage says of an asset, as far as it matters here."""

    kind: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Input:
    """One image or video; where in the video it goes, and how it is brought to its size."""

    asset_id: str
    is_video: bool = False
    frame_index: int = 0
    fit: str = "COVER"
    crop: tuple[float, float, float, float] = WHOLE
    """Left, top, right, bottom, as fractions."""

    @property
    def is_first_frame(self) -> bool:
        """Whether it is what an input_image_id alone says."""
        return self == Input(self.asset_id)


def check(
    given: Sequence[Input], model: catalogue.Model, frames: int | None = None
) -> tuple[Input, ...]:
    """The inputs by frame, if the model takes them. `frames`: how many the video has; None: not known, so any.

    Raises InvalidArgument: INVALID_FIELD, or INPUT_NOT_SUPPORTED with what the model takes.
    """
    if not given and not model.text_to_video:
        raise _not_supported(model, "makes no videos from text alone")
    images = [each for each in given if not each.is_video]
    clips = [each for each in given if each.is_video]
    if images and clips:
        raise _not_supported(model, "starts from images or from a video, not from both")
    if len(images) > model.max_input_images:
        raise _not_supported(model, f"does not start from {_counted(len(images), 'image')}")
    if clips and not model.max_input_video_seconds:
        raise _not_supported(model, "does not start from a video")
    if len(clips) > 1:
        raise _not_supported(model, "starts from one video at most")
    for number, each in enumerate(given):
        _check_crop(each, number)
        _check_frame(each, number, model, frames)
    if len({each.frame_index for each in given}) < len(given):
        raise _invalid("spec.inputs", "two are for one frame")
    return tuple(sorted(given, key=lambda each: each.frame_index))


def described(model: catalogue.Model) -> str:
    """For people: what the model starts from."""
    takes: list[str] = ["text alone"] if model.text_to_video else []
    if model.max_input_images:
        where = "at any frame" if model.input_images_at_any_frame else "as the first frame"
        takes.append(f"{_counted(model.max_input_images, 'image')} {where}")
    if model.max_input_video_seconds:
        takes.append(f"a video of at most {model.max_input_video_seconds:g} s")
    return ", ".join(takes)


def check_asset(asked: Input, model: catalogue.Model, asset: Asset) -> None:
    """Raises InvalidArgument where the asset is not what the input says, or longer than the model takes."""
    kinds = VIDEO_KINDS if asked.is_video else IMAGE_KINDS
    seconds = asset.seconds
    if asset.kind not in kinds:
        if asked.is_video:
            raise errors.InvalidArgument(
                "NOT_A_VIDEO", "input_video_id names an asset that is not a video"
            )
        raise errors.InvalidArgument(
            "NOT_AN_IMAGE", "the image of the spec is an asset that is not an image"
        )
    if asked.is_video and seconds > model.max_input_video_seconds + LENGTH_TOLERANCE_SECONDS:
        raise _not_supported(model, f"does not start from a video of {seconds:.2f} s")


def short(given: Sequence[Input]) -> tuple[str, tuple[Input, ...]]:
    """As a spec says it, in one way only: a first frame as input_image_id, everything else as inputs."""
    if len(given) == 1 and given[0].is_first_frame:
        return given[0].asset_id, ()
    return "", tuple(given)


def asked(input_image_id: str, given: Sequence[Input]) -> tuple[Input, ...]:
    """What a caller's spec says, whichever way. Raises InvalidArgument where it says both."""
    if not input_image_id:
        return tuple(replace(each, fit=each.fit or "COVER") for each in given)
    if given:
        raise _invalid("spec.input_image_id", "is short for one of spec.inputs; set one of the two")
    return (Input(input_image_id),)


def _check_crop(each: Input, number: int) -> None:
    left, top, right, bottom = each.crop
    if not (left < right and top < bottom):
        raise _invalid(
            f"spec.inputs[{number}].crop",
            "left_fraction must be below right_fraction and top_fraction below bottom_fraction",
        )


def _check_frame(each: Input, number: int, model: catalogue.Model, frames: int | None) -> None:
    if not each.frame_index:
        return
    anywhere = model.input_images_at_any_frame or each.is_video
    if not anywhere or not model.frames_per_second:
        raise _not_supported(model, f"takes no input at frame {each.frame_index}")
    if frames is not None and each.frame_index >= frames:
        raise _invalid(
            f"spec.inputs[{number}].frame_index",
            f"the video has {frames} frames, numbered from 0",
        )


def _not_supported(model: catalogue.Model, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "INPUT_NOT_SUPPORTED", f"{model.name} {why}; it starts from: {described(model)}"
    )


def _invalid(field: str, rule: str) -> errors.InvalidArgument:
    return errors.InvalidArgument("INVALID_FIELD", f"{field}: {rule}", violations=[(field, rule)])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"
