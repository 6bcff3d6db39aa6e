"""Videos made here, whole and broken, through the pure media functions."""

import hashlib
import io
import random
from datetime import UTC, datetime
from pathlib import Path

import av
import pytest
from PIL import Image

from services.storage.media import boxes, facts, images, marks, videos
from services.storage.media.facts import Reason

MARK = facts.Mark(
    model='kling "v3" <pro> & co',
    video_id="vid_01",
    source_sha256="ab" * 32,
    created_at=datetime(2026, 7, 1, 12, 0, 0, 123456, tzinfo=UTC),
)


def still(image_format: str) -> bytes:
    body = io.BytesIO()
    Image.new("RGB", (64, 48), (220, 20, 20)).save(body, image_format)
    return body.getvalue()


def quiet() -> av.AudioFrame:
    silence = av.AudioFrame(format="fltp", layout="stereo", samples=1024)
    silence.sample_rate = 44100
    for plane in silence.planes:
        plane.update(bytes(plane.buffer_size))
    return silence


def make_video(
    path: Path,
    *,
    frames: int = 48,
    codec: str = "libx264",
    audio: bool = False,
    size: tuple[int, int] = (160, 96),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=24, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.gop_size = 12
        sound = container.add_stream("aac", rate=44100) if audio else None
        for index in range(frames):
            image = Image.effect_noise(size, 60).convert("RGB")
            image.paste((220, 20, 20), (0, 0, 60, 60))
            if index:
                image.paste((20, 220, 20), (0, 0, 60, 60))
            frame = av.VideoFrame.from_image(image)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            silence = quiet()
            for index in range(frames * 44100 // 24 // 1024):
                silence.pts = index * 1024
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return path


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("media") / "video.mp4", audio=True)


def refused_video(path: Path) -> Reason:
    with pytest.raises(facts.MediaRefused) as refused:
        videos.inspect(path)
    return refused.value.reason


def decoded_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_is_measured(mp4: Path) -> None:
    assert videos.inspect(mp4) == facts.VideoFacts(
        media_type="video/mp4",
        container="mp4",
        codec="h264",
        pixel_format="yuv420p",
        width=160,
        height=96,
        duration_ms=2000,
        fps=24.0,
        frame_count=48,
        has_audio=True,
        audio_codec="aac",
        size_bytes=mp4.stat().st_size,
    )


@pytest.mark.parametrize(
    ("name", "codec", "options", "container_options"),
    [
        ("a.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
        ("b.mp4", "libx264", {"bf": "0"}, {"movflags": "faststart"}),
        ("c.mp4", "libx264", {}, {"movflags": "frag_keyframe+empty_moov"}),
        ("d.mp4", "libsvtav1", {"preset": "12"}, {}),
        ("e.mov", "libx264", {}, {}),
    ],
)
def test_other_files_are_measured(
    tmp_path: Path,
    name: str,
    codec: str,
    options: dict[str, str],
    container_options: dict[str, str],
) -> None:
    path = make_video(
        tmp_path / name, codec=codec, options=options, container_options=container_options
    )
    found = videos.inspect(path)
    assert (found.width, found.height, found.frame_count) == (160, 96, 48)
    assert (found.has_audio, found.fps) == (False, pytest.approx(24, abs=0.1))
    assert found.duration_ms == pytest.approx(2000, abs=45)


def test_the_poster_is_the_first_frame(mp4: Path) -> None:
    poster = videos.poster(mp4)
    image = Image.open(io.BytesIO(poster.body))
    assert (image.format, image.size) == ("JPEG", (160, 96))
    pixel = image.getpixel((20, 20))
    assert isinstance(pixel, tuple)
    assert all(abs(a - b) <= 25 for a, b in zip(pixel, (220, 20, 20), strict=True))
    assert poster.facts == images.inspect(poster.body)
    assert videos.poster(mp4).body == poster.body


@pytest.mark.parametrize("keep", [0.05, 0.4, 0.8, 0.99])
@pytest.mark.parametrize("name", ["video.mp4", "fast.mp4", "frag.mp4", "video.webm"])
def test_cut_videos_are_refused(tmp_path: Path, mp4: Path, name: str, keep: float) -> None:
    whole = {
        "video.mp4": lambda: mp4,
        "fast.mp4": lambda: make_video(
            tmp_path / "f.mp4", container_options={"movflags": "faststart"}
        ),
        "frag.mp4": lambda: make_video(
            tmp_path / "g.mp4", container_options={"movflags": "frag_keyframe+empty_moov"}
        ),
        "video.webm": lambda: make_video(
            tmp_path / "w.webm",
            frames=96,
            codec="libvpx-vp9",
            options={"deadline": "realtime", "cpu-used": "8"},
        ),
    }[name]().read_bytes()
    if name == "video.webm" and keep > 0.5:
        return  # the tolerance for a missing tail is one second
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: int(len(whole) * keep)])
    assert refused_video(cut) is Reason.VIDEO_UNREADABLE


def test_overwritten_video_data_is_refused(tmp_path: Path, mp4: Path) -> None:
    data = bytearray(mp4.read_bytes())
    with mp4.open("rb") as file:
        media = next(box for box in boxes.top_level(file) if box.kind == b"mdat")
    start = media.start + media.header_bytes
    data[start : media.start + media.size] = bytes(media.size - media.header_bytes)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    assert refused_video(broken) is Reason.VIDEO_UNREADABLE
    with pytest.raises(facts.MediaRefused):
        videos.poster(broken)


@pytest.mark.parametrize("where", ["a key frame", "the end"])
def test_damaged_pictures_are_found(tmp_path: Path, where: str) -> None:
    path = make_video(tmp_path / "x.mp4")
    assert videos.inspect(path).frame_count == 48
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        spots = [(packet.pos, packet.size, packet.is_keyframe) for packet in packets]
    keys = [index for index, spot in enumerate(spots) if spot[2]]
    at = keys[1] if where == "a key frame" else keys[-1] + 1
    assert 0 < at < len(spots)
    data = bytearray(path.read_bytes())
    # One damaged picture of noise may by chance decode without complaint; a run of them does not.
    damaged = spots[at : at + 1] if where == "a key frame" else spots[at:]
    for start, size, _ in damaged:
        assert start is not None
        data[start + size // 4 : start + size] = random.Random(1).randbytes(size - size // 4)
    path.write_bytes(data)
    assert refused_video(path) is Reason.VIDEO_UNREADABLE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage" * 1000,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        still("AVIF"),
        still("JPEG"),
    ],
)
def test_what_is_not_a_video_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    assert refused_video(path) is Reason.NOT_A_VIDEO


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        container.mux(sound.encode(quiet()))
        container.mux(sound.encode(None))
    assert refused_video(path) is Reason.NOT_A_VIDEO


def test_codecs_nobody_sends_are_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "x.mp4", codec="mpeg4", frames=3)
    assert refused_video(path) is Reason.VIDEO_UNREADABLE


def test_absurd_videos_are_refused(mp4: Path) -> None:
    for limits in (
        facts.VideoLimits(max_pixels=1000),
        facts.VideoLimits(max_duration_seconds=1),
        facts.VideoLimits(max_packets=20),
    ):
        with pytest.raises(facts.MediaRefused) as refused:
            videos.inspect(mp4, limits)
        assert refused.value.reason is Reason.MEDIA_TOO_EXPENSIVE


# --- marks


@pytest.mark.parametrize(
    "container_options", [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}]
)
def test_a_marked_video_says_so_and_is_otherwise_the_same(
    tmp_path: Path, container_options: dict[str, str]
) -> None:
    source = make_video(tmp_path / "in.mp4", container_options=container_options)
    target, again = tmp_path / "out.mp4", tmp_path / "again.mp4"
    made = marks.mark(source, target, MARK)
    body = target.read_bytes()
    assert made == facts.MarkedVideo(len(body), hashlib.sha256(body).hexdigest())
    assert marks.mark(source, again, MARK) == made
    assert marks.read_mark(source) is None
    assert marks.read_mark(target) == MARK
    before, after = videos.inspect(source), videos.inspect(target)
    assert (after.frame_count, after.duration_ms) == (before.frame_count, before.duration_ms)
    assert decoded_frames(target) == 48
    assert videos.poster(source).body == videos.poster(target).body


def test_other_software_finds_the_mark(tmp_path: Path, mp4: Path) -> None:
    target = tmp_path / "out.mp4"
    marks.mark(mp4, target, MARK)
    assert target.read_bytes().startswith(mp4.read_bytes())
    with av.open(str(target), options={"export_xmp": "1"}) as container:
        packet = container.metadata["xmp"]
    assert marks.SOURCE_TYPE in packet
    assert 'framewire:VideoId="vid_01"' in packet


def test_the_index_at_the_end_of_a_fragmented_file_stays_there(tmp_path: Path) -> None:
    source = make_video(
        tmp_path / "in.mp4", container_options={"movflags": "frag_keyframe+empty_moov"}
    )
    marks.mark(source, tmp_path / "out.mp4", MARK)
    with (tmp_path / "out.mp4").open("rb") as file:
        assert [box.kind for box in boxes.top_level(file)][-2:] == [b"uuid", b"mfra"]


def test_an_open_ended_last_box_does_not_swallow_the_mark(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mp4", container_options={"movflags": "faststart"})
    with source.open("rb") as file:
        last = boxes.top_level(file)[-1]
    data = bytearray(source.read_bytes())
    data[last.start : last.start + 4] = bytes(4)
    source.write_bytes(data)
    marks.mark(source, tmp_path / "out.mp4", MARK)
    assert marks.read_mark(tmp_path / "out.mp4") == MARK
    assert decoded_frames(tmp_path / "out.mp4") == 48


def test_the_last_mark_counts(tmp_path: Path, mp4: Path) -> None:
    first = facts.Mark("old", "vid_00", "00" * 32, MARK.created_at)
    marks.mark(mp4, tmp_path / "one.mp4", first)
    marks.mark(tmp_path / "one.mp4", tmp_path / "two.mp4", MARK)
    assert marks.read_mark(tmp_path / "two.mp4") == MARK


def test_what_cannot_be_marked_is_refused_and_leaves_no_file(tmp_path: Path, mp4: Path) -> None:
    whole = mp4.read_bytes()
    cases = {
        b"nonsense": Reason.NOT_A_VIDEO,
        b"\x1a\x45\xdf\xa3webm": Reason.VIDEO_UNREADABLE,
        whole[:-100]: Reason.VIDEO_UNREADABLE,
        whole + b"abc": Reason.VIDEO_UNREADABLE,
    }
    for data, reason in cases.items():
        (tmp_path / "in").write_bytes(data)
        with pytest.raises(facts.MediaRefused) as refused:
            marks.mark(tmp_path / "in", tmp_path / "out", MARK)
        assert refused.value.reason is reason
        assert not (tmp_path / "out").exists()
