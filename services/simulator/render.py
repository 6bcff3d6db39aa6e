"""Makes real films without any model: encodes the frames of a scene."""

import fractions
import io
import pathlib
import struct
import threading
from collections.abc import Callable, Mapping

import av
import av.video.frame
import av.video.stream
from av.container import OutputContainer
from PIL import Image

from services.simulator import scenes

NOTICE = "simulated, no model"
# Replaced by the real id, padded to this length, when a film is written: identical requests share
# one render, and still no two films have the same bytes.
ID_PLACEHOLDER = "video_" + "0" * 48

_BOX_HEADER_BYTES = 8
_BT709 = 1
_LIMITED_RANGE = 1
_QUALITY = {"preset": "superfast", "crf": "22", "threads": "1"}
_LOW_QUALITY = {**_QUALITY, "crf": "38"}


class StoppedError(Exception):
    """The render was given up, since the simulator stops."""


def render(scene: scenes.Scene, path: pathlib.Path, stopping: Callable[[], bool]) -> None:
    """Writes the film to `path` whole or not at all. Takes CPU: never call it on the event loop.

    Raises StoppedError soon after `stopping` is true.
    """
    partial = path.with_suffix(".partial")
    with _open_to_write(partial, f"{NOTICE}; job {ID_PLACEHOLDER}") as container:
        stream = _add_stream(
            container, scene.width, scene.height, scene.frames_per_second, _QUALITY
        )
        for number, planes in enumerate(scenes.frames(scene)):
            if stopping():
                raise StoppedError
            frame = _frame(planes, scene)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    partial.replace(path)


def write_film(
    rendered: pathlib.Path, path: pathlib.Path, film_id: str, least_bytes: int = 0
) -> None:
    """Writes a film of its own: the shared render with the id in its comment, padded to `least_bytes`."""
    padded = film_id.ljust(len(ID_PLACEHOLDER))
    assert len(padded) == len(ID_PLACEHOLDER)
    # Two requests may write the same film at once, each its own partial file.
    partial = path.with_suffix(f".{threading.get_ident()}.partial")
    content = rendered.read_bytes().replace(ID_PLACEHOLDER.encode(), padded.encode(), 1)
    padding_bytes = least_bytes - len(content)
    with partial.open("wb") as file:
        file.write(content)
        if padding_bytes >= _BOX_HEADER_BYTES:
            # A `free` box, which players skip; what is not written takes no room on the disk.
            file.write(struct.pack(">I4s", padding_bytes, b"free"))
            file.truncate(least_bytes)
    partial.replace(path)


def write_low_quality(film: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the same film in fewer bytes. Takes CPU."""
    partial = path.with_suffix(f".{threading.get_ident()}.partial")
    with av.open(film) as source:
        given = source.streams.video[0]
        rate = round(given.average_rate or 24)
        with _open_to_write(partial, source.metadata["comment"]) as container:
            stream = _add_stream(container, given.width, given.height, rate, _LOW_QUALITY)
            for number, frame in enumerate(source.decode(given)):
                frame.pts, frame.time_base = number, fractions.Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    partial.replace(path)


def thumbnail(film: pathlib.Path, image_format: str) -> bytes:
    """The film's first frame as `WEBP` or `JPEG`."""
    with av.open(film) as container:
        image: Image.Image = next(container.decode(video=0)).to_image()
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=80)
    return buffer.getvalue()


def _open_to_write(path: pathlib.Path, comment: str) -> OutputContainer:
    container = av.open(
        path, "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
    )
    container.metadata["comment"] = comment
    container.metadata["title"] = "Framewire simulator"
    return container


def _add_stream(
    container: OutputContainer, width: int, height: int, rate: int, options: Mapping[str, str]
) -> av.video.stream.VideoStream:
    stream = container.add_stream("libx264", rate=rate, options=dict(options))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = _LIMITED_RANGE
    return stream


def _frame(planes: scenes.Planes, scene: scenes.Scene) -> av.video.frame.VideoFrame:
    frame = av.VideoFrame(scene.width, scene.height, "yuv420p")
    for plane, image in zip(frame.planes, planes, strict=True):
        # The library aligns rows: each may be longer than the picture is wide.
        rows = Image.new("L", (plane.line_size, image.height))
        rows.paste(image)
        plane.update(rows.tobytes())
    return frame
