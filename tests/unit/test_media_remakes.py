"""Videos made from videos: cleaned, fitted, made smaller. What they show is looked at frame by frame."""

import dataclasses
import hashlib
import struct
from datetime import UTC, datetime
from pathlib import Path

import av
import pytest
from PIL import Image

from services.storage.media import facts, marks, remakes, videos
from services.storage.media.facts import Crop, FitMode, Reason
from tests import pictures

RED, BLUE, BLACK = (220, 20, 20), (20, 20, 220), (0, 0, 0)
MARK = facts.Mark("sora-2", "vid_01", "ab" * 32, datetime(2026, 7, 1, tzinfo=UTC))
SECRET = "40.7128-074.0060 secret place"


def half(size: tuple[int, int]) -> Image.Image:
    """Red left half, blue right half."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def film(
    path: Path,
    size: tuple[int, int] = (160, 96),
    codec: str = "libx264",
    frames: int = 24,
    sound: bool = True,
) -> Path:
    """One second at 24 frames a second, with sound and with notes that nobody is to read."""
    with av.open(str(path), "w") as container:
        container.metadata.update({"title": SECRET, "comment": SECRET})
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.metadata["handler_name"] = SECRET
        webm = path.suffix == ".webm"
        audio = container.add_stream("libopus" if webm else "aac", rate=48000) if sound else None
        for index in range(frames):
            frame = av.VideoFrame.from_image(half(size))
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            _silence(container, audio)
    return path


def _silence(container: av.container.OutputContainer, audio: av.AudioStream) -> None:
    for index in range(50):
        silence = av.AudioFrame(format="fltp", layout="stereo", samples=960)
        silence.sample_rate, silence.pts = 48000, index * 960
        for plane in silence.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(audio.encode(silence))
    container.mux(audio.encode(None))


def turned(path: Path, out: Path) -> Path:
    """As a phone films upright: players are to turn it clockwise by a quarter."""
    body = path.read_bytes()
    straight = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    quarter = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    at = body.index(straight, body.index(b"tkhd"))
    out.write_bytes(body[:at] + quarter + body[at + len(quarter) :])
    return out


def at(image: Image.Image, x: float, y: float) -> tuple[int, ...]:
    pixel = image.getpixel((int(x * image.width), int(y * image.height)))
    assert isinstance(pixel, tuple)
    return pixel


def near(found: tuple[int, ...], wanted: tuple[int, ...], tolerance: int = 25) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "codec", "media_type"),
    [
        ("a.mp4", "libx264", "video/mp4"),
        ("a.mov", "libx264", "video/mp4"),
        ("a.webm", "libvpx-vp9", "video/mp4"),
        ("a.webm", "libvpx", "video/webm"),
    ],
)
def test_a_cleaned_clip_has_its_pictures_and_nothing_else(
    tmp_path: Path, name: str, codec: str, media_type: str
) -> None:
    source, out = film(tmp_path / name, codec=codec), tmp_path / "clean"
    assert SECRET.encode() in source.read_bytes()
    made = remakes.clean(source, out)
    body = out.read_bytes()
    assert SECRET.encode() not in body
    assert (made.media_type, made.width, made.height) == (media_type, 160, 96)
    assert (made.sha256, made.size_bytes) == (hashlib.sha256(body).hexdigest(), len(body))
    assert not videos.inspect(out).has_audio
    assert videos.inspect(source).has_audio
    assert abs(made.duration_ms - 1000) <= 60
    before, after = pictures.frames(source), pictures.frames(out)
    assert [image.tobytes() for image in after] == [image.tobytes() for image in before]
    assert remakes.clean(source, tmp_path / "again") == made
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "clean", "again"])


def test_clips_beyond_the_limits_and_matroska_are_refused(tmp_path: Path) -> None:
    source = film(tmp_path / "a.mp4")
    matroska = film(tmp_path / "a.mkv")
    for path, limits, reason in (
        (source, facts.VideoLimits(max_pixels=160 * 96 - 1), Reason.MEDIA_TOO_EXPENSIVE),
        (source, facts.VideoLimits(max_duration_seconds=0), Reason.MEDIA_TOO_EXPENSIVE),
        (matroska, facts.VideoLimits(), Reason.NOT_A_VIDEO),
    ):
        with pytest.raises(facts.MediaRefused) as refused:
            remakes.clean(path, tmp_path / "clean", limits)
        assert refused.value.reason is reason
        assert not (tmp_path / "clean").exists()


def test_a_clip_cut_short_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = film(tmp_path / "a.mp4")
    body = source.read_bytes()
    for part in (0.3, 0.7, 0.95):
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(body[: int(part * len(body))])
        for make in (remakes.clean, lambda a, b: remakes.fit(a, b, 64, 64)):
            with pytest.raises(facts.MediaRefused):
                make(cut, tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "cut.mp4"}


def test_how_a_phone_turned_it_is_kept_and_then_applied(tmp_path: Path) -> None:
    upright = turned(film(tmp_path / "a.mp4"), tmp_path / "upright.mp4")
    made = remakes.clean(upright, tmp_path / "clean")
    assert (made.width, made.height) == (96, 160)
    fitted = remakes.fit(tmp_path / "clean", tmp_path / "fitted", 96, 160)
    assert (fitted.width, fitted.height) == (96, 160)
    first = pictures.frames(tmp_path / "fitted")[0]
    # Turned clockwise, what was left is on top.
    assert near(at(first, 0.5, 0.1), RED)
    assert near(at(first, 0.5, 0.9), BLUE)


def test_a_clip_of_the_size_already_is_not_encoded_again(tmp_path: Path) -> None:
    source = film(tmp_path / "a.mp4", sound=False)
    made = remakes.fit(source, tmp_path / "same", 160, 96)
    assert (made.width, made.height, made.has_audio) == (160, 96, False)
    same = [image.tobytes() for image in pictures.frames(tmp_path / "same")]
    assert same == [image.tobytes() for image in pictures.frames(source)]
    remakes.fit(source, tmp_path / "other", 160, 96, crop=Crop(0, 0, 80, 96))
    assert near(at(pictures.frames(tmp_path / "other")[5], 0.9, 0.5), RED)


def alike(again: facts.MadeVideo, path: Path, made: facts.MadeVideo, before: Path) -> None:
    """The same facts and the same pictures. The bytes may differ by a few: see remakes.py."""
    same = {"size_bytes": made.size_bytes, "sha256": made.sha256}
    assert dataclasses.replace(again, **same) == made
    assert abs(again.size_bytes - made.size_bytes) <= 16
    one, two = pictures.frames(before), pictures.frames(path)
    assert len(one) == len(two)
    assert max(pictures.difference(a, b) for a, b in zip(one, two, strict=True)) < 0.1


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
@pytest.mark.parametrize(
    ("mode", "size", "crop", "side", "middle"),
    [
        (FitMode.COVER, (96, 96), None, RED, RED),
        (FitMode.CONTAIN, (240, 96), None, BLACK, RED),
        (FitMode.CONTAIN_BLURRED, (240, 96), None, (132, 12, 12), RED),
        (FitMode.COVER, (96, 96), Crop(80, 0, 80, 96), BLUE, BLUE),
        (FitMode.CONTAIN_BLURRED, (240, 96), Crop(80, 0, 80, 96), (12, 12, 132), BLUE),
    ],
)
def test_every_frame_is_fitted(
    tmp_path: Path,
    codec: str,
    mode: FitMode,
    size: tuple[int, int],
    crop: Crop | None,
    side: tuple[int, int, int],
    middle: tuple[int, int, int],
) -> None:
    source = film(tmp_path / ("a.webm" if "vpx" in codec else "a.mp4"), codec=codec)
    made = remakes.fit(source, tmp_path / "fitted", *size, mode, crop)
    assert (made.media_type, made.codec, made.has_audio) == ("video/mp4", "h264", False)
    assert ((made.width, made.height), abs(made.duration_ms - 1000) <= 60) == (size, True)
    shown = pictures.frames(tmp_path / "fitted")
    assert len(shown) == 24
    for image in (shown[0], shown[-1]):
        assert near(at(image, 0.04, 0.5), side), at(image, 0.04, 0.5)
        assert near(at(image, 0.42, 0.5), middle), at(image, 0.42, 0.5)
    again = remakes.fit(source, tmp_path / "again", *size, mode, crop)
    alike(again, tmp_path / "again", made, tmp_path / "fitted")


def test_a_rendition_is_smaller_sounds_and_is_marked(tmp_path: Path) -> None:
    marked = tmp_path / "marked.mp4"
    marks.mark(film(tmp_path / "a.mp4", (320, 180), frames=48), marked, MARK)
    made = remakes.rendition(marked, out := tmp_path / "small", 90)
    assert (made.width, made.height, made.codec, made.has_audio) == (160, 90, "h264", True)
    assert abs(made.duration_ms - videos.inspect(marked).duration_ms) <= 60
    assert made.size_bytes == out.stat().st_size < marked.stat().st_size
    assert made.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert marks.read_mark(out) == MARK
    assert SECRET.encode() not in out.read_bytes()
    shown, source = pictures.frames(out), pictures.frames(marked)
    assert len(shown) == len(source) == 48
    assert pictures.difference(shown[-1], source[-1].resize((160, 90))) < 6
    again = remakes.rendition(marked, tmp_path / "again", 90)
    alike(again, tmp_path / "again", made, out)
    left = {"a.mp4", "marked.mp4", "small", "again"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_odd_sides_are_programmer_errors(tmp_path: Path) -> None:
    source = film(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="even"):
        remakes.fit(source, tmp_path / "out", 33, 32)
    with pytest.raises(ValueError, match="even"):
        remakes.rendition(source, tmp_path / "out", 33)
