"""What each dialect is sent of images and videos, and what it says where it takes no such thing."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from email import message_from_bytes
from pathlib import Path

import pytest

from services.generator import attempts
from services.generator.providers import contract
from tests import pictures, provider_worlds, simulated
from tests.provider_worlds import BY_NAME, FIRST, WORLDS, World

LAST = contract.Input(pictures.plain((30, 30, 200)), frame_index=23)


@pytest.fixture(scope="module")
async def simulator(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[simulated.Simulator]:
    async with provider_worlds.simulator(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def clip(tmp_path: Path) -> contract.Input:
    body = pictures.clip(tmp_path / "clip.mp4", ((200, 30, 30), (30, 30, 200)), (320, 180))
    return contract.Input(body, is_video=True)


def parts(body: contract.Body) -> list[tuple[str, str, str, bytes]]:
    """Name, file name, type and content of each part."""
    head = f"Content-Type: {body.content_type}\r\n\r\n".encode()
    found = message_from_bytes(head + body.data).get_payload()
    assert isinstance(found, list)
    return [
        (
            str(part.get_param("name", header="content-disposition")),
            str(part.get_filename() or ""),
            part.get_content_type(),
            part.get_payload(decode=True),
        )
        for part in found
    ]


async def test_the_jobs_dialect_names_each_file_and_its_frame() -> None:
    async with BY_NAME["azure_jobs"].open("http://x/v1") as client:
        body = client.provider.build(client.world.spec(), (*FIRST, LAST), "attempt-7")
    sent = parts(body)
    (items,) = [json.loads(content) for name, _, _, content in sent if name == "inpaint_items"]
    whole = {"left_fraction": 0, "top_fraction": 0, "right_fraction": 1, "bottom_fraction": 1}
    assert [(item["frame_index"], item["type"], item["crop_bounds"]) for item in items] == [
        (0, "image", whole),
        (23, "image", whole),
    ]
    files = [part for part in sent if part[0] == "files"]
    assert [item["file_name"] for item in items] == [name for _, name, _, _ in files]
    assert [content for *_, content in files] == [FIRST[0].content, LAST.content]
    assert {kind for _, _, kind, _ in files} == {"image/jpeg"}


async def test_any_file_of_an_attempt_is_its_marker() -> None:
    wanted = attempts.marker("attempt-7")
    for number, extension in ((0, "jpg"), (1, "jpg"), (0, "mp4")):
        assert attempts.marker_of(attempts.file_name("attempt-7", number, extension)) == wanted
    for strange in ("", "cat.jpg", "framewire-.jpg", "framewire-a.png"):
        assert attempts.marker_of(strange) == strange
        assert attempts.marked_attempt(strange) == ""


@pytest.mark.parametrize("name", ["azure_jobs", "vllm_omni"])
async def test_a_job_from_a_video(
    simulator: simulated.Simulator, clip: contract.Input, name: str, tmp_path: Path
) -> None:
    """The film shows the clip: its first half is red, its second blue."""
    async with BY_NAME[name].open(simulator.url) as client:
        attempt_id = uuid.uuid4().hex
        spec = client.world.spec("at night", inputs=[{"input_video_id": "a" * 26}])
        outcome = await client.provider.create(
            client.provider.build(spec, (clip,), attempt_id), None
        )
        assert isinstance(outcome, contract.Accepted), outcome
        (entry,) = await simulator.log(kind="accepted", id=outcome.provider_job_id)
        assert [(item["type"], item["frame_index"]) for item in entry["inputs"]] == [("video", 0)]
        if name == "azure_jobs":
            shown = await client.listed(outcome.provider_job_id)
            assert shown.marker == client.provider.shown_marker(spec, attempt_id) != ""
        job = await client.ended(outcome.provider_job_id)
        film = tmp_path / "film.mp4"
        film.write_bytes(await client.there(job.outputs[0]))
    colours = [pictures.colour(image) for image in pictures.frames(film)]
    assert pictures.is_near(colours[2], (200, 30, 30))
    assert pictures.is_near(colours[-3], (30, 30, 200))


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
async def test_what_a_server_does_not_take_is_not_sent(world: World, clip: contract.Input) -> None:
    takes_video = world.name in ("azure_jobs", "vllm_omni")
    async with world.open("http://x/v1") as client:
        build, spec = client.provider.build, client.world.spec()
        if takes_video:
            assert clip.content in build(spec, (clip,), "a").data
        else:
            with pytest.raises(contract.CannotSend, match="this server starts from one image"):
                build(spec, (clip,), "a")
        if world.name != "azure_jobs":
            for several in ((LAST,), (*FIRST, LAST), (clip, LAST)):
                with pytest.raises(contract.CannotSend, match="as the first frame"):
                    build(spec, several, "a")
