"""Outputs carry Content Credentials (C2PA) where a certificate is configured; read here by their own library."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import c2pa
import pytest
import pytest_asyncio

from framewire.storage.v1 import storage_pb2 as pb
from kit import ids
from services.storage import signer
from services.storage.media import boxes, facts, marks, sandbox
from tests import credentials, pictures
from tests.storage_world import VIDEO, World, film, running

MARK = pb.Mark(model="sora-2", video_id="v-1")
UNTRUSTED = "signingCredential.untrusted"
"""The tests' authority is on nobody's list."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A storage that signs."""
    place = tmp_path_factory.mktemp("signing")
    held = credentials.credential(place)
    async with running(
        place,
        STORAGE_C2PA_CERTIFICATE_FILE=str(held.certificate),
        STORAGE_C2PA_KEY_FILE=str(held.key),
    ) as opened:
        yield opened


def read(body: bytes) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The whole report, the statement that counts, and what is wrong with it."""
    with c2pa.Reader("video/mp4", io.BytesIO(body)) as reader:
        report = json.loads(reader.json())
    wrong = [one["code"] for one in report.get("validation_status", ())]
    return report, report["manifests"][report["active_manifest"]], wrong


def assertion(statement: dict[str, Any], label: str) -> Any:
    return next(one["data"] for one in statement["assertions"] if one["label"] == label)


def actions(statement: dict[str, Any]) -> list[str]:
    return [one["action"] for one in assertion(statement, "c2pa.actions.v2")["actions"]]


async def test_an_output_says_signed_what_made_it(world: World, tmp_path: Path) -> None:
    body = film(tmp_path / "film.mp4", 120)
    output = await world.put(ids.new_id(), body, VIDEO, mark=MARK)
    kept = await world.get(output)
    assert hashlib.sha256(kept).hexdigest() == output.sha256
    report, statement, wrong = read(kept)
    assert wrong == [UNTRUSTED]
    assert len(report["manifests"]) == 1
    (made,) = assertion(statement, "c2pa.actions.v2")["actions"]
    assert made["action"] == "c2pa.created"
    assert made["digitalSourceType"] == marks.SOURCE_TYPE
    assert made["softwareAgent"] == {"name": "sora-2"}
    assert assertion(statement, "dev.framewire.video") == {
        "video_id": "v-1", "model": "sora-2", "source_sha256": hashlib.sha256(body).hexdigest()
    }  # fmt: skip
    assert statement["signature_info"]["common_name"] == "signer"
    # The mark is there, too, and the same pictures.
    (tmp_path / "kept").write_bytes(kept)
    mark = marks.read_mark(tmp_path / "kept")
    assert mark is not None
    assert (mark.video_id, mark.model) == ("v-1", "sora-2")
    seen = [
        [pictures.colour(one) for one in pictures.frames(tmp_path / name)]
        for name in ("film.mp4", "kept")
    ]
    assert seen[0] == seen[1]
    # Put again, it is the same asset, though another signature would have other bytes.
    assert await world.put(output.account_id, body, VIDEO, mark=MARK) == output


async def test_a_changed_byte_shows(world: World, tmp_path: Path) -> None:
    output = await world.put(ids.new_id(), film(tmp_path / "film.mp4"), VIDEO, mark=MARK)
    kept = bytearray(await world.get(output))
    media = next(box for box in boxes.top_level(io.BytesIO(kept)) if box.kind == b"mdat")
    kept[media.start + media.size // 2] ^= 1
    assert "assertion.bmffHash.mismatch" in read(bytes(kept))[2]


async def test_a_rendition_names_its_output_as_what_it_was_made_from(
    world: World, tmp_path: Path
) -> None:
    output = await world.put(ids.new_id(), film(tmp_path / "film.mp4"), VIDEO, mark=MARK)
    small = await world.rendition(output, 24)
    kept = await world.get(small)
    assert hashlib.sha256(kept).hexdigest() == small.sha256
    report, statement, wrong = read(kept)
    assert wrong == [UNTRUSTED]
    assert actions(statement) == ["c2pa.opened", "c2pa.transcoded"]
    (source,) = statement["ingredients"]
    assert source["active_manifest"] == read(await world.get(output))[0]["active_manifest"]
    assert len(report["manifests"]) == 2


async def test_a_providers_own_statement_is_kept(world: World, tmp_path: Path) -> None:
    film(tmp_path / "film.mp4")
    theirs = credentials.credential(tmp_path, "provider")
    body = await _signed_by(theirs, tmp_path)
    output = await world.put(ids.new_id(), body, VIDEO, mark=MARK)
    report, statement, wrong = read(await world.get(output))
    assert wrong == [UNTRUSTED]
    assert actions(statement) == ["c2pa.opened", "c2pa.edited.metadata"]
    (source,) = statement["ingredients"]
    provider = report["manifests"][source["active_manifest"]]
    assert provider["signature_info"]["common_name"] == "provider"
    told = source["validation_results"]["activeManifest"]
    assert "assertion.bmffHash.match" in [one["code"] for one in told["success"]]


async def _signed_by(held: credentials.Credential, place: Path) -> bytes:
    """A film as a provider sends it that signs its own."""
    settings = sandbox.Settings(size=1, signing=signer.credential(*held))
    mark = facts.Mark("theirs", "x", "0" * 64, datetime.now(UTC), "Provider")
    async with (
        sandbox.MediaWorkers(place) as workers,
        sandbox.MediaWorkers(place, settings) as holders,
    ):
        await workers.mark_video(place / "film.mp4", place / "marked", mark)
        await holders.sign_video(place / "marked", place / "theirs", place / "film.mp4", "")
    return (place / "theirs").read_bytes()


async def test_a_worker_that_holds_the_key_does_nothing_else(tmp_path: Path) -> None:
    held = signer.credential(*credentials.credential(tmp_path))
    film(tmp_path / "film.mp4")
    async with sandbox.MediaWorkers(tmp_path, sandbox.Settings(size=1, signing=held)) as holders:
        with pytest.raises(facts.MediaWorkerFailed):
            await holders.inspect_video(tmp_path / "film.mp4")
        # Nor does it sign what says nothing of itself: what calls it is told, and stores that.
        signing = signer.Signer(holders)
        path = tmp_path / "film.mp4"
        assert await signing.sign(path, path, signer.MARKED) is None
        assert path.exists()
    assert await asyncio.to_thread(lambda: list(tmp_path.glob("*-signed*"))) == []
