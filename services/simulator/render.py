"""Makes real films without any model: a camera move over the reference image, or a drawn scene.

The first frame of an image job is the image itself. All work is on planes of yuv420p: the image
is converted once, and Pillow crops and scales three small planes per frame instead of one RGB
image, which is what keeps six seconds of 720p under three seconds of one core.
"""

import colorsys
import dataclasses
import hashlib
import io
import pathlib
import random
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence

import av
import av.video.frame
from PIL import Image, ImageDraw, ImageFont

NOTICE = "simulated, no model"
# Replaced by the real id, of the same length, when a job's film is written: identical requests
# share one render, and still no two jobs have the same bytes.
ID_PLACEHOLDER = "video_" + "0" * 48

_ZOOM = 0.16  # how much of the width is gone at the end of the move
_FOCI = ((0.5, 0.35), (0.2, 0.3), (0.8, 0.3), (0.5, 0.8), (0.15, 0.7), (0.85, 0.7))
_BT709 = 1
_LIMITED_RANGE = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Everything the bytes of a film depend on, its job's id left out."""

    width: int
    height: int
    seconds: int
    frames_per_second: int
    reference: pathlib.Path | None  # named by its content's SHA-256
    text: str  # drawn when there is no reference
    focus: int  # which way the camera goes

    @property
    def key(self) -> str:
        """A file name: equal scenes have equal keys."""
        reference = self.reference.name if self.reference else ""
        parts = (
            self.width,
            self.height,
            self.seconds,
            self.frames_per_second,
            reference,
            self.text,
            self.focus,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


def focus_of(prompt: str) -> int:
    """The camera move that goes with a prompt, always the same one."""
    return hashlib.sha256(prompt.encode()).digest()[0] % len(_FOCI)


class StoppedError(Exception):
    """The render was given up, since the simulator stops."""


def render(scene: Scene, path: pathlib.Path, stopping: Callable[[], bool]) -> None:
    """Writes the film to `path` whole or not at all. Takes CPU: never call it on the event loop.

    Raises StoppedError soon after `stopping` is true.
    """
    partial = path.with_suffix(".partial")
    with av.open(
        partial, "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
    ) as container:
        container.metadata["comment"] = f"{NOTICE}; job {ID_PLACEHOLDER}"
        container.metadata["title"] = "Framewire simulator"
        stream = container.add_stream(
            "libx264",
            rate=scene.frames_per_second,
            options={"preset": "superfast", "crf": "22", "threads": "1"},
        )
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        for number, planes in enumerate(_frames(scene)):
            if stopping():
                raise StoppedError
            frame = _frame(planes, scene)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    partial.replace(path)


def write_film(rendered: pathlib.Path, path: pathlib.Path, job_id: str) -> None:
    """Writes one job's own film: the shared render with the job's id in its comment."""
    assert len(job_id) == len(ID_PLACEHOLDER)
    # Two requests may write the same film at once, each its own partial file.
    partial = path.with_suffix(f".{threading.get_ident()}.partial")
    partial.write_bytes(rendered.read_bytes().replace(ID_PLACEHOLDER.encode(), job_id.encode(), 1))
    partial.replace(path)


def thumbnail(film: pathlib.Path) -> bytes:
    """The film's first frame as WebP."""
    with av.open(film) as container:
        image = next(container.decode(video=0)).to_image()
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _frames(scene: Scene) -> Iterator[Sequence[Image.Image]]:
    """Y, U and V of each frame."""
    count = scene.seconds * scene.frames_per_second
    if scene.reference is not None:
        with Image.open(scene.reference) as image:
            base, overlay = _planes(image.convert("RGB")), None
    else:
        generator = random.Random(f"{scene.text}:{scene.focus}")
        base = _planes(_gradient(scene.width, scene.height, generator))
        mask = _text_mask(scene)
        overlay = (mask, mask.resize((scene.width // 2, scene.height // 2)))
    for number in range(count):
        moved = _move(base, number / max(1, count - 1), _FOCI[scene.focus])
        if overlay is not None:
            for plane, value, mask in zip(
                moved, (235, 128, 128), (overlay[0], overlay[1], overlay[1]), strict=True
            ):
                plane.paste(value, mask=mask)
        yield moved


def _move(
    base: Sequence[Image.Image], at: float, focus: tuple[float, float]
) -> Sequence[Image.Image]:
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


def _planes(image: Image.Image) -> Sequence[Image.Image]:
    frame = av.VideoFrame.from_image(image).reformat(format="yuv420p", dst_colorspace="ITU709")
    return [
        Image.frombytes(
            "L", (plane.width, plane.height), bytes(plane), "raw", "L", plane.line_size, 1
        )
        for plane in frame.planes
    ]


def _frame(planes: Sequence[Image.Image], scene: Scene) -> av.video.frame.VideoFrame:
    frame = av.VideoFrame(scene.width, scene.height, "yuv420p")
    for plane, image in zip(frame.planes, planes, strict=True):
        # The library aligns rows: each may be longer than the picture is wide.
        rows = Image.new("L", (plane.line_size, image.height))
        rows.paste(image)
        plane.update(rows.tobytes())
    return frame


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
