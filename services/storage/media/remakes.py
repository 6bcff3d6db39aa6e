"""Videos made from videos: cleaned, brought to a size, made smaller. PyAV and Pillow only; runs in the worker process.

Everything is written without the source's metadata, and the same video shows the same pictures each time. It is not
always the same bytes: of the same frames libx264, with one thread, made other last bytes of the first picture in some
of thousands of runs; what was shown did not differ. With memory that is filled as it is handed out (MALLOC_PERTURB_)
four thousand runs did not: it seems to read what nobody wrote. Nothing relies on the bytes: what was made is kept.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream
from PIL import Image

from services.storage.media import facts, images, marks, videos
from services.storage.media.facts import Reason

KEPT_CODECS = {"mp4": ("h264", "hevc", "av1", "vp9"), "webm": ("vp8", "vp9", "av1")}
"""What a cleaned clip is kept in: the first container that takes its codec."""
SOUND_CODECS = ("aac", "mp3", "opus")
MAX_FPS = 120.0
_MEDIA_TYPES = {"mp4": "video/mp4", "webm": "video/webm"}
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
_BT709 = 1
_LIMITED_RANGE = 1
# Inputs go on through a model: as good as the source. Renditions are looked at on small screens.
_FITTED = {"preset": "veryfast", "crf": "16"}
_SMALLER = {"preset": "veryfast", "crf": "23"}


def clean(
    path: Path, out: Path, limits: facts.VideoLimits = videos.DEFAULT_LIMITS
) -> facts.MadeVideo:
    """A caller's video as a fresh file: its pictures as they are, no metadata, no sound. Raises MediaRefused.

    `out` grows under another name until it is whole, as in all of these.
    """
    measured = videos.inspect(path, limits)
    if measured.container == "matroska":
        raise facts.MediaRefused(
            Reason.NOT_A_VIDEO, "Matroska files are not accepted. Send an MP4, MOV or WebM file."
        )
    kept_in = next((name for name, codecs in KEPT_CODECS.items() if measured.codec in codecs), "")
    if not kept_in or measured.fps > MAX_FPS:
        raise facts.MediaRefused(
            Reason.VIDEO_UNREADABLE, f"A video of {measured.fps:g} frames a second is not accepted."
        )
    with _writing(out, kept_in) as written, videos.opened(path, limits) as (container, stream):
        _copy(container, stream, written)
    turned = measured.rotation % 180 != 0
    return facts.MadeVideo(
        media_type=_MEDIA_TYPES[kept_in],
        codec=measured.codec,
        width=measured.height if turned else measured.width,
        height=measured.width if turned else measured.height,
        duration_ms=measured.duration_ms,
        fps=measured.fps,
        has_audio=False,
        size_bytes=out.stat().st_size,
        sha256=_sha256(out),
    )


def fit(
    path: Path,
    out: Path,
    width: int,
    height: int,
    mode: facts.FitMode = facts.FitMode.COVER,
    crop: facts.Crop | None = None,
    limits: facts.VideoLimits = videos.DEFAULT_LIMITS,
) -> facts.MadeVideo:
    """The video, or a part of its picture, at exactly width x height, upright, H.264, silent. Raises MediaRefused.

    One that is just that already is copied: nothing is lost by encoding it again.
    """
    facts.check_fit(width, height)
    _check_even(width, height)
    measured = videos.inspect(path, limits)
    with _writing(out, "mp4") as written, videos.opened(path, limits) as (container, stream):
        if crop is None and _is_already(measured, width, height):
            _copy(container, stream, written)
        else:
            encoder = _Encoder(written, stream, width, height, _FITTED)
            for frame in container.decode(stream):
                picture = _upright(videos.checked_frame(frame))
                encoder.add(images.placed(picture, width, height, mode, crop), frame)
            encoder.end()
    return _made(out)


def rendition(
    path: Path, out: Path, height: int, limits: facts.VideoLimits = videos.DEFAULT_LIMITS
) -> facts.MadeVideo:
    """A smaller version of a marked video, H.264 in MP4, with its sound and its mark. Raises MediaRefused."""
    _check_even(height)
    marked = facts.partial_path(out)
    bare = out.with_name(f"{out.name}.bare")
    try:
        with _writing(bare, "mp4") as written, videos.opened(path, limits) as (container, stream):
            width = max(2, 2 * round(stream.width * height / stream.height / 2))
            _scale(container, stream, written, width, height)
        mark = marks.read_mark(path)
        if mark is None:
            bare.replace(marked)
        else:
            marks.mark(bare, marked, mark)
        marked.replace(out)
    finally:
        bare.unlink(missing_ok=True)
    return _made(out)


@dataclass(slots=True)
class _Clock:
    """Times of the frames that are written: the source's, from 0, and always growing."""

    first: int | None = None
    last: int = -1

    def at(self, pts: int | None) -> int:
        pts = self.last + 1 if pts is None else pts
        self.first = pts if self.first is None else self.first
        self.last = max(pts - self.first, self.last + 1)
        return self.last


class _Encoder:
    """H.264 of given frames, at the source's times."""

    def __init__(
        self,
        written: OutputContainer,
        source: VideoStream,
        width: int,
        height: int,
        options: dict[str, str],
    ) -> None:
        rate = source.average_rate or source.guessed_rate or 24
        self._stream = written.add_stream("libx264", rate=rate, options=dict(options))
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.thread_count = 1
        if source.time_base is not None:
            codec.time_base = source.time_base
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        self._time_base = source.time_base
        self._written = written
        self._clock = _Clock()

    def add(self, picture: Image.Image | VideoFrame, source: VideoFrame) -> None:
        """One frame, shown when the source's is."""
        given = picture if isinstance(picture, VideoFrame) else VideoFrame.from_image(picture)
        frame = given.reformat(
            self._stream.width,
            self._stream.height,
            "yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.AREA,
            threads=1,  # more of them do not make the same bytes each time
        )
        frame.pts, frame.time_base = self._clock.at(source.pts), self._time_base
        frame.pict_type = 0  # the encoder chooses, not the source
        self._written.mux(self._stream.encode(frame))

    def end(self) -> None:
        """Writes what it still holds."""
        self._written.mux(self._stream.encode(None))


def _scale(
    container: InputContainer,
    stream: VideoStream,
    written: OutputContainer,
    width: int,
    height: int,
) -> None:
    encoder = _Encoder(written, stream, width, height, _SMALLER)
    sounds = [each for each in container.streams.audio if each.codec_context.name in SOUND_CODECS][
        :1
    ]
    copies = {each.index: written.add_stream_from_template(each) for each in sounds}
    for packet in container.demux([stream, *sounds]):
        if packet.stream_index in copies:
            if packet.dts is not None:
                packet.stream = copies[packet.stream_index]
                written.mux(packet)
            continue
        for frame in packet.decode():
            whole = videos.checked_frame(frame)
            encoder.add(whole, whole)
    encoder.end()


def _copy(container: InputContainer, stream: VideoStream, written: OutputContainer) -> None:
    """The pictures' packets as they are; how players turn them goes along."""
    copied = written.add_stream_from_template(stream)
    for packet in container.demux(stream):
        if _has_bytes(packet):
            packet.stream = copied
            written.mux(packet)


def _has_bytes(packet: "Packet[VideoStream]") -> bool:
    return packet.dts is not None and packet.size > 0


def _is_already(measured: facts.VideoFacts, width: int, height: int) -> bool:
    return (
        (measured.container, measured.codec, measured.rotation) == ("mp4", "h264", 0)
        and measured.pixel_format in ("yuv420p", "yuvj420p")
        and (measured.width, measured.height) == (width, height)
    )


def _upright(frame: VideoFrame) -> Image.Image:
    turn = _TURNS.get(frame.rotation % 360)
    picture = frame.to_image(threads=1)
    return picture if turn is None else picture.transpose(turn)


def _check_even(*sides: int) -> None:
    if any(side % 2 for side in sides):
        raise ValueError("sides of a video are even")


@contextmanager
def _writing(out: Path, container_format: str) -> Iterator[OutputContainer]:
    """A file that appears when it is whole."""
    partial = facts.partial_path(out)
    options = {"fflags": "+bitexact"}
    if container_format == "mp4":
        options["movflags"] = "+faststart"
    try:
        with av.open(f"file:{partial}", "w", format=container_format, options=options) as written:
            yield written
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _made(out: Path) -> facts.MadeVideo:
    measured = videos.inspect(out)
    return facts.MadeVideo(
        media_type=measured.media_type,
        codec=measured.codec,
        width=measured.width,
        height=measured.height,
        duration_ms=measured.duration_ms,
        fps=measured.fps,
        has_audio=measured.has_audio,
        size_bytes=measured.size_bytes,
        sha256=_sha256(out),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
