"""Untrusted videos: measured, and a poster made. PyAV only; runs in the worker process.

Inspection reads every packet but decodes only key frames and the last group of pictures: a full
decode of a long 1080p video takes seconds and belongs to the scrub.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from services.storage.media import boxes, facts, sniff
from services.storage.media.facts import Reason

MAX_KEY_FRAMES = 32
MAX_LAST_GOP_FRAMES = 1200
CODECS = ("h264", "hevc", "av1", "vp8", "vp9")
DEFAULT_LIMITS = facts.VideoLimits()

_DEMUXERS = {"mp4": "mp4", "mov": "mov", "webm": "matroska", "matroska": "matroska"}
# Nothing but this one local file, and no decoder beyond what providers deliver.
_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "codec_whitelist": "h264,hevc,av1,libdav1d,vp8,vp9,libvpx,libvpx-vp9,aac,mp3,opus,vorbis",
}
_MISSING_TAIL_SECONDS = 1.0


@dataclass(slots=True)
class _Timeline:
    """What one pass over the packets adds up to, in units of the video stream's time base."""

    packets: int = 0
    frames: int = 0
    start: int | None = None
    end: int = 0
    end_seconds: float = 0.0
    key_frames: list[int] = field(default_factory=list)


def inspect(path: Path, limits: facts.VideoLimits = DEFAULT_LIMITS) -> facts.VideoFacts:
    """The measured facts of a video that decodes. Raises MediaRefused."""
    container_name = _checked_structure(path)
    with _refusing_broken_videos():
        with _open(path, container_name) as container:
            stream = _video_stream(container)
            _check_size(stream.width, stream.height, limits)
            _check_duration((container.duration or 0) / av.time_base, limits)
            timeline = _read_packets(container, stream, limits)
            _check_tail(container, timeline)
            frame = _decode_key_frames(container, stream, timeline.key_frames)
            _check_size(frame.width, frame.height, limits)
            audio = next((s for s in container.streams if isinstance(s, AudioStream)), None)
            audio_codec = audio.codec_context.name if audio is not None else None
            seconds = _seconds(stream, timeline)
            _check_duration(seconds, limits)
            codec = stream.codec_context.codec.canonical_name
        _decode_last_gop(path, container_name, timeline.key_frames[-1])
    return facts.VideoFacts(
        media_type=sniff.VIDEO_MEDIA_TYPES[container_name],
        container=container_name,
        codec=codec,
        pixel_format=frame.format.name,
        width=frame.width,
        height=frame.height,
        duration_ms=round(seconds * 1000),
        fps=round(timeline.frames / seconds, 3) if seconds else 0.0,
        frame_count=timeline.frames,
        has_audio=audio is not None,
        audio_codec=audio_codec,
        size_bytes=path.stat().st_size,
        rotation=frame.rotation,
    )


def decode(path: Path, limits: facts.VideoLimits = DEFAULT_LIMITS) -> facts.Decoded:
    """Decodes the whole video. Raises MediaRefused where a frame of it does not decode."""
    with _refusing_broken_videos():
        container_name = _checked_structure(path)
        with _open(path, container_name) as container:
            stream = _video_stream(container)
            _check_size(stream.width, stream.height, limits)
            frames = 0
            for frame in container.decode(stream):
                checked_frame(frame)
                frames += 1
        if not frames:
            raise unreadable("no frame of it decodes")
    return facts.Decoded(frames)


def poster(path: Path, limits: facts.VideoLimits = DEFAULT_LIMITS) -> facts.Rendered:
    """The first frame as a JPEG. Raises MediaRefused."""
    with opened(path, limits) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise unreadable("it has no frames")
        _check_size(frame.width, frame.height, limits)
        body = _jpeg(frame)
    return facts.Rendered(
        body,
        facts.ImageFacts(
            media_type="image/jpeg",
            width=frame.width,
            height=frame.height,
            has_alpha=False,
            size_bytes=len(body),
            sha256=hashlib.sha256(body).hexdigest(),
        ),
    )


@contextmanager
def opened(path: Path, limits: facts.VideoLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video to be read, with what is wrong with it raised as MediaRefused."""
    container_name = _checked_structure(path)
    with _refusing_broken_videos(), _open(path, container_name) as container:
        stream = _video_stream(container)
        _check_size(stream.width, stream.height, limits)
        yield container, stream


def _checked_structure(path: Path) -> str:
    with path.open("rb") as file:
        name = sniff.video_container(file.read(sniff.HEAD_BYTES))
        if name in ("mp4", "mov"):
            boxes.top_level(file)
    return name


@contextmanager
def _refusing_broken_videos() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        raise unreadable("it is damaged or was cut short") from error


def unreadable(why: str) -> facts.MediaRefused:
    """It is broken; `why` goes on "The video cannot be read:"."""
    return facts.MediaRefused(
        Reason.VIDEO_UNREADABLE, f"The video cannot be read: {why}. Fetch the complete file again."
    )


def _open(path: Path, container_name: str) -> InputContainer:
    # The prefix keeps libav from reading a protocol into an unusual path.
    return av.open(
        f"file:{path}", "r", format=_DEMUXERS[container_name], options=dict(_OPEN_OPTIONS)
    )


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue  # cover art of an audio file
        if stream.codec_context is None or stream.codec_context.codec is None:
            break
        if stream.codec_context.codec.canonical_name not in CODECS:
            break
        # One thread: the worker's memory and CPU bounds are for the whole process.
        stream.codec_context.thread_count = 1
        return stream
    else:
        raise facts.MediaRefused(Reason.NOT_A_VIDEO, "This file has no video stream.")
    raise facts.MediaRefused(
        Reason.VIDEO_UNREADABLE,
        f"The video's codec is not accepted: use one of {', '.join(CODECS)}.",
    )


def _check_size(width: int, height: int, limits: facts.VideoLimits) -> None:
    if width * height > limits.max_pixels:
        raise _too_expensive(f"{width} x {height} pixels", f"{limits.max_pixels} pixels per frame")


def _check_duration(seconds: float, limits: facts.VideoLimits) -> None:
    if seconds > limits.max_duration_seconds:
        raise _too_expensive(f"{seconds:.0f} seconds", f"{limits.max_duration_seconds} seconds")


def _too_expensive(found: str, bound: str) -> facts.MediaRefused:
    return facts.MediaRefused(
        Reason.MEDIA_TOO_EXPENSIVE, f"The video is too large ({found}; at most {bound})."
    )


def _read_packets(
    container: InputContainer, stream: VideoStream, limits: facts.VideoLimits
) -> _Timeline:
    seen = _Timeline()
    for packet in container.demux():
        if packet.size == 0:
            continue
        seen.packets += 1
        if seen.packets > limits.max_packets:
            raise _too_expensive("too many packets", f"{limits.max_packets} packets")
        _add(seen, packet, is_video=packet.stream_index == stream.index)
    if not seen.frames or not seen.key_frames:
        raise unreadable("it has no frames")
    return seen


def _add(seen: _Timeline, packet: "Packet[Any]", *, is_video: bool) -> None:
    at = packet.pts if packet.pts is not None else packet.dts
    if at is None or packet.is_discard:
        return
    end = at + (packet.duration or 0)
    seen.end_seconds = max(seen.end_seconds, float(end * packet.time_base))
    if not is_video:
        return
    seen.frames += 1
    seen.start = at if seen.start is None else min(seen.start, at)
    seen.end = max(seen.end, end)
    if packet.is_keyframe:
        seen.key_frames.append(at)


def _check_tail(container: InputContainer, timeline: _Timeline) -> None:
    """A file cut short may still open, and promise more than it holds."""
    promised = (container.duration or 0) / av.time_base
    if promised - timeline.end_seconds > _MISSING_TAIL_SECONDS:
        raise unreadable(
            f"it promises {promised:.1f} s but holds {timeline.end_seconds:.1f} s of it"
        )


def _seconds(stream: VideoStream, timeline: _Timeline) -> float:
    length = timeline.end - (timeline.start or 0)
    return float(length * stream.time_base) if stream.time_base else 0.0


def _decode_key_frames(
    container: InputContainer, stream: VideoStream, key_frames: list[int]
) -> VideoFrame:
    """Decodes up to MAX_KEY_FRAMES of them, evenly spread; answers the first frame."""
    step = -(-len(key_frames) // MAX_KEY_FRAMES)
    wanted = set(key_frames[::step])
    first: VideoFrame | None = None
    container.seek(0)
    for packet in container.demux(stream):
        at = packet.pts if packet.pts is not None else packet.dts
        if packet.size and not (packet.is_keyframe and at in wanted):
            continue
        for frame in packet.decode():
            checked = checked_frame(frame)
            first = first or checked
    if first is None:
        raise unreadable("no frame of it decodes")
    return first


def _decode_last_gop(path: Path, container_name: str, last_key_frame: int) -> None:
    with _open(path, container_name) as container:
        stream = _video_stream(container)
        container.seek(last_key_frame, stream=stream)
        decoded = 0
        for frame in container.decode(stream):
            checked_frame(frame)
            decoded += 1
            if decoded == MAX_LAST_GOP_FRAMES:
                break
        if not decoded:
            raise unreadable("its last part does not decode")


def checked_frame(frame: object) -> VideoFrame:
    """A frame that is whole. Raises MediaRefused."""
    if not isinstance(frame, VideoFrame) or frame.is_corrupt:
        raise unreadable("it is damaged or was cut short")
    return frame


def _jpeg(frame: VideoFrame) -> bytes:
    picture = frame.reformat(format="yuvj420p", dst_color_range="JPEG", threads=1)
    picture.pts = 0
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height = picture.width, picture.height
    encoder.pix_fmt = "yuvj420p"
    encoder.time_base = Fraction(1)
    encoder.thread_count = 1
    encoder.options = {"qmin": "2", "qmax": "3"}
    return b"".join(bytes(packet) for packet in (*encoder.encode(picture), *encoder.encode(None)))
