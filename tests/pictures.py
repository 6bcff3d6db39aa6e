"""Pictures and films for tests: what goes in, and what must come out."""

from __future__ import annotations

import io
from pathlib import Path

import av
from PIL import Image, ImageChops, ImageStat

ROCKET = Path(__file__).parent.parent / "examples" / "rocket.jpg"


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (320, 180)) -> bytes:
    """A JPEG of one colour: its owner can be told from any frame."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def frames(path: Path) -> list[Image.Image]:
    """Every frame of a video."""
    with av.open(str(path)) as film:
        return [frame.to_image() for frame in film.decode(video=0)]


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference per channel, 0 to 255."""
    delta = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return sum(ImageStat.Stat(delta).mean) / 3


def colour(image: Image.Image) -> tuple[int, ...]:
    """Mean colour."""
    return tuple(round(value) for value in ImageStat.Stat(image.convert("RGB")).mean)


def clip(
    path: Path,
    colours: tuple[tuple[int, int, int], ...],
    size: tuple[int, int] = (160, 90),
    seconds: float = 1.0,
) -> bytes:
    """An MP4 at 24 frames a second that shows the colours one after the other."""
    count = round(24 * seconds)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(count):
            shown = colours[index * len(colours) // count]
            frame = av.VideoFrame.from_image(Image.new("RGB", size, shown))
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def is_near(found: tuple[int, ...], wanted: tuple[int, ...], tolerance: int = 20) -> bool:
    """Whether two colours are the same to the eye."""
    return all(abs(one - other) <= tolerance for one, other in zip(found, wanted, strict=True))
