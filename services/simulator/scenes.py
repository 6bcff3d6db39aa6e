"""What each frame of a film shows: a camera move over a picture, a drawn scene, a given clip.

All work is on planes of yuv420p: an image is converted once, and Pillow crops and scales three
small planes per frame instead of one RGB image, which is what keeps six seconds of 720p under
three seconds of one core.
"""

import colorsys
import dataclasses
import hashlib
import pathlib
import random
import textwrap
from collections.abc import Iterator, Sequence

import av
from PIL import Image, ImageDraw, ImageFont

Planes = Sequence[Image.Image]  # Y, U and V
Crop = tuple[float, float, float, float]  # left, top, right, bottom, as fractions

MOVES = 6  # how many camera moves there are

_ZOOM = 0.16  # how much of the width is gone at the end of the move
_FOCI = ((0.5, 0.35), (0.2, 0.3), (0.8, 0.3), (0.5, 0.8), (0.15, 0.7), (0.85, 0.7))
assert len(_FOCI) == MOVES


@dataclasses.dataclass(frozen=True, slots=True)
class Shot:
    """A given image or clip, from one frame of the film on."""

    path: pathlib.Path  # named by its content's SHA-256
    is_clip: bool = False
    frame_index: int = 0
    crop: Crop = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Everything the bytes of a film depend on, its id left out."""

    width: int
    height: int
    seconds: int
    frames_per_second: int
    shots: tuple[Shot, ...]  # up to two images or one clip, by frame
    text: str  # drawn on the frames before the first shot
    move: int  # which way the camera goes

    @property
    def frame_count(self) -> int:
        """Of the whole film."""
        return self.seconds * self.frames_per_second

    @property
    def key(self) -> str:
        """A file name: equal scenes have equal keys."""
        shots = tuple(
            (shot.path.name, shot.is_clip, shot.frame_index, shot.crop) for shot in self.shots
        )
        size = (self.width, self.height, self.seconds, self.frames_per_second)
        parts = (*size, shots, self.text, self.move)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


@dataclasses.dataclass(frozen=True, slots=True)
class _Still:
    """A picture that the camera moves over from `starts_at` on, with text that stays in place."""

    starts_at: int
    planes: Planes
    text_masks: Planes | None = None


def move_of(prompt: str, variant: int) -> int:
    """The camera move of a prompt's variant, always the same one."""
    return (hashlib.sha256(prompt.encode()).digest()[0] + variant) % MOVES


def frames(scene: Scene) -> Iterator[Planes]:
    """Every frame, in order. An image is at its frame as it is; a drawn scene fills what is before."""
    clip = next((shot for shot in scene.shots if shot.is_clip), None)
    stills = []
    if not scene.shots or scene.shots[0].frame_index > 0:
        stills.append(_drawn(scene))
    if clip is None:
        for shot in scene.shots:
            with Image.open(shot.path) as image:
                stills.append(_Still(shot.frame_index, _fitted(image.convert("RGB"), shot, scene)))
        yield from _over(stills, 0, scene.frame_count, scene.move)
        return
    number = min(clip.frame_index, scene.frame_count)
    if stills:
        yield from _over(stills, 0, number, scene.move)
    last: Planes | None = None
    for last in _clip(clip, scene, scene.frame_count - number):
        yield last
        number += 1
    if last is not None:
        yield from _over([_Still(number, last)], number, scene.frame_count, scene.move)


def clip_format(head: bytes) -> str | None:
    """The container format of a clip by its first bytes; None if it is none that is taken.

    Only these two are opened: FFmpeg's guess might be one that reads other files.
    """
    if head[4:8] == b"ftyp":
        return "mp4"
    return "matroska" if head[:4] == b"\x1aE\xdf\xa3" else None


def _over(stills: Sequence[_Still], begin: int, end: int, move: int) -> Iterator[Planes]:
    """Camera moves over the stills, each blending into the next one on its way."""
    for number in range(begin, end):
        at = max(index for index, still in enumerate(stills) if still.starts_at <= number)
        current = stills[at]
        following = stills[at + 1] if at + 1 < len(stills) else None
        until = end if following is None else min(end, following.starts_at)
        way = (number - current.starts_at) / max(1, until - current.starts_at - 1)
        moved = _move(current.planes, way, _FOCI[move])
        if current.text_masks is not None:
            for plane, value, mask in zip(moved, (235, 128, 128), current.text_masks, strict=True):
                plane.paste(value, mask=mask)
        if following is not None:
            share = (number - current.starts_at) / (following.starts_at - current.starts_at)
            moved = [
                Image.blend(plane, target, share)
                for plane, target in zip(moved, following.planes, strict=True)
            ]
        yield moved


def _move(base: Planes, at: float, focus: tuple[float, float]) -> Planes:
    """The camera at `at` of its way, 0 showing the whole image as it is."""
    share = _ZOOM * at * at * (3 - 2 * at)
    moved = []
    for plane in base:
        width, height = plane.size
        left, top = width * share * focus[0], height * share * focus[1]
        box = (left, top, left + width * (1 - share), top + height * (1 - share))
        moved.append(
            plane.resize(plane.size, Image.Resampling.BILINEAR, box=box) if share else plane.copy()
        )
    return moved


def _clip(shot: Shot, scene: Scene, limit: int) -> Iterator[Planes]:
    """The clip's frames at the film's rate: at each instant the latest one."""
    shown, started, last = 0, None, None
    with shot.path.open("rb") as file:
        container_format = clip_format(file.read(16))
    with av.open(str(shot.path), format=container_format) as container:
        for frame in container.decode(video=0):
            started = frame.time if started is None else started
            time = (frame.time or 0.0) - (started or 0.0)
            while last is not None and shown / scene.frames_per_second < time - 1e-6:
                if shown == limit:
                    return
                yield last
                shown += 1
            last = _fitted(frame.to_image(), shot, scene)
    if last is not None and shown < limit:
        yield last


def _fitted(image: Image.Image, shot: Shot, scene: Scene) -> Planes:
    """The cropped part of the image, stretched to the film's size."""
    left, top, right, bottom = shot.crop
    box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    size = (scene.width, scene.height)
    if box != (0, 0, *size) or image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    return _planes(image)


def _planes(image: Image.Image) -> Planes:
    frame = av.VideoFrame.from_image(image).reformat(format="yuv420p", dst_colorspace="ITU709")
    return [
        Image.frombytes(
            "L", (plane.width, plane.height), bytes(plane), "raw", "L", plane.line_size, 1
        )
        for plane in frame.planes
    ]


def _drawn(scene: Scene) -> _Still:
    generator = random.Random(f"{scene.text}:{scene.move}")
    mask = _text_mask(scene)
    small = mask.resize((scene.width // 2, scene.height // 2))
    base = _planes(_gradient(scene.width, scene.height, generator))
    return _Still(0, base, (mask, small, small))


def _gradient(width: int, height: int, generator: random.Random) -> Image.Image:
    """A soft scene of a few colours: tiny random pixels, scaled up smoothly."""
    hue = generator.random()
    small = Image.new("RGB", (5, 4))
    for x in range(small.width):
        for y in range(small.height):
            red, green, blue = colorsys.hsv_to_rgb(
                (hue + generator.uniform(-0.12, 0.12)) % 1.0,
                generator.uniform(0.45, 0.85),
                generator.uniform(0.15, 0.65),
            )
            small.putpixel((x, y), (int(red * 255), int(green * 255), int(blue * 255)))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _text_mask(scene: Scene) -> Image.Image:
    """The prompt, wrapped and centred; where the mask is white, the text is."""
    mask = Image.new("L", (scene.width, scene.height))
    if not scene.text:
        return mask
    size = max(8, min(scene.width, scene.height) // 14)
    font = _font(size)
    columns = max(8, int(scene.width * 0.84 / (size * 0.55)))
    rows = max(1, int(scene.height * 0.8 / (size * 1.3)))
    text = "\n".join(textwrap.wrap(scene.text[:2000], columns)[:rows])
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, align="center")
    at = ((scene.width - (right - left)) / 2 - left, (scene.height - (bottom - top)) / 2 - top)
    draw.multiline_text(at, text, font=font, fill=235, align="center")
    return mask


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans where the system has it, for its wide range; else Pillow's own, Latin only."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
