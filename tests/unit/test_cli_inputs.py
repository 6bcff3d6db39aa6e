"""What commands say of images and videos, against a scripted gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from framewire.cli import app
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import upload_pb2, video_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import VIDEO, Gateway

_runner = CliRunner()


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gateway]:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b@2.jpg", "c.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    with gateways.running() as running:
        monkeypatch.setenv("FRAMEWIRE_ADDRESS", running.address)
        monkeypatch.setenv("FRAMEWIRE_API_KEY", "fw_key")
        running.on("UploadImage", upload_pb2.Image(image_id="i" * 26))
        running.on("UploadVideo", upload_pb2.InputVideo(input_video_id="c" * 26))
        done = video_pb2.Video(video_id=VIDEO, state=vocabulary_pb2.VIDEO_STATE_COMPLETED)
        done.credits.settlement = vocabulary_pb2.SETTLEMENT_DONE
        done.revision = 2
        running.on("CreateVideo", done)
        running.on("WatchVideo", [video_pb2.WatchVideoResponse(video=done)])
        yield running


def spec(gateway: Gateway, *arguments: str) -> vocabulary_pb2.VideoSpec:
    result = _runner.invoke(app.app, ["generate", *arguments])
    assert result.exit_code == 0, result.output
    (sent,) = gateway.requests("CreateVideo")
    return sent.spec


def test_a_first_frame_and_a_prompt(gateway: Gateway) -> None:
    sent = spec(gateway, "a.jpg", "a sea")
    assert (sent.prompt, sent.input_image_id, len(sent.inputs)) == ("a sea", "i" * 26, 0)


def test_images_at_frames_with_a_fit_and_a_crop(gateway: Gateway) -> None:
    sent = spec(
        gateway,
        *("--image", "a.jpg", "--image", "a.jpg@23", "--fit", "contain_blurred"),
        *("--crop", "0,0,0.5,1", "--option", "seed=7", "--option", "mood=calm", "a sea"),
        *("--rendition", "360", "--rendition", "90"),
    )
    assert [each.frame_index for each in sent.inputs] == [0, 23]
    for each in sent.inputs:
        assert each.fit == vocabulary_pb2.FIT_MODE_CONTAIN_BLURRED
        assert (each.image_id, each.crop.right_fraction) == ("i" * 26, 0.5)
    assert (sent.prompt, sent.input_image_id) == ("a sea", "")
    assert (sent.options["seed"].number_value, sent.options["mood"].string_value) == (7, "calm")
    assert list(sent.rendition_heights) == [360, 90]


def test_a_video(gateway: Gateway) -> None:
    sent = spec(gateway, "--video", "c.mp4", "at night")
    (used,) = sent.inputs
    assert (used.input_video_id, used.frame_index, sent.prompt) == ("c" * 26, 0, "at night")
    assert used.WhichOneof("asset") == "input_video_id"


def test_a_name_with_an_at_is_a_name_where_there_is_such_a_file(gateway: Gateway) -> None:
    assert spec(gateway, "--image", "b@2.jpg", "a sea").input_image_id == "i" * 26


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a sea"], "give IMAGE and PROMPT"),
        (["a.jpg", "a sea", "--video", "c.mp4"], "first image as IMAGE"),
        (["a sea", "--image", "a.jpg", "--image", "a.jpg"], "two images are for frame 0"),
        (["a sea", "--image", "none.jpg@3"], "no image file none.jpg"),
        (["a sea", "--image", "a.jpg", "--crop", "0,0,1"], "is no part"),
        (["a.jpg", "a sea", "--option", "seed"], "is no option"),
        (["a sea", "--video", "none.mp4"], "none.mp4"),
    ],
)
def test_what_makes_no_sense_is_usage(gateway: Gateway, arguments: list[str], says: str) -> None:
    result = _runner.invoke(app.app, ["generate", *arguments])
    assert result.exit_code == 2, result.output
    assert says in result.output.replace("\n", " ")
    assert not gateway.calls


def test_preview_needs_something(gateway: Gateway) -> None:
    assert _runner.invoke(app.app, ["preview"]).exit_code == 2
    assert not gateway.calls


def test_preview_asks_for_the_size_and_writes_what_it_gets(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[Any, ...]] = []

    async def fetch(*asked: Any) -> None:
        written.append(asked)

    monkeypatch.setattr("framewire.downloads.fetch", fetch)
    one = video_pb2.InputPreview(media_type="image/jpeg", url="http://s3/1", sha256="0" * 64)
    two = video_pb2.InputPreview(media_type="video/mp4", url="http://s3/2", size_bytes=9)
    gateway.on("PreviewInputs", video_pb2.PreviewInputsResponse(previews=[one, two]))
    result = _runner.invoke(
        app.app,
        [
            "preview",
            "--image",
            "a.jpg",
            "--size",
            "640x360",
            "--model",
            "m",
            "--json",
            "--out",
            "x",
        ],
    )
    assert result.exit_code == 0, result.output
    (sent,) = gateway.requests("PreviewInputs")
    assert (sent.model, sent.width, sent.height, len(sent.inputs)) == ("m", 640, 360, 1)
    assert [(url, str(place), size) for url, place, size, _ in written] == [
        ("http://s3/1", "x.jpg", 0),
        ("http://s3/2", "x-1.mp4", 9),
    ]
    assert [json.loads(line)["url"] for line in result.stdout.splitlines()] == [one.url, two.url]
