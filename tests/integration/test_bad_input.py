"""What bad input gets: docs/errors.md row by row, on the whole system. Each refusal leaves nothing half-done."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from framewire import errors
from tests import bad_input, pictures
from tests import system as systems
from tests.bad_input import CASES, TINY, Case, World
from tests.waiting import eventually

NAUGHTY = Path(__file__).parents[3] / "shared" / "data" / "naughty-strings.json"
LEFT: Mapping[str, Mapping[str, str]] = {
    "credits": {"held": "SELECT count(*) FROM holds WHERE account_id = ANY($1) AND state = 'HELD'"},
    "gateway": {
        "in limbo": """SELECT count(*) FROM videos WHERE account_id = ANY($1)
            AND (state = 'ADMITTING' OR release_due OR unpin_due)""",
    },
    "storage": {
        "pinned": "SELECT count(*) FROM pins WHERE account_id = ANY($1)",
        "uploading": "SELECT count(*) FROM assets WHERE account_id = ANY($1) AND state = 'UPLOADING'",
        "puts": "SELECT count(*) FROM puts JOIN assets USING (asset_id) WHERE account_id = ANY($1)",
        "inputs": """SELECT count(*) FROM assets
            WHERE account_id = ANY($1) AND kind IN ('INPUT_IMAGE', 'INPUT_VIDEO')""",
    },
    "generator": {"jobs": "SELECT count(*) FROM videos WHERE account_id = ANY($1)"},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(system: systems.System) -> AsyncIterator[World]:
    """One image and one finished video are there before; nothing more may be there after."""
    async with (
        await system.account(100) as rich,
        await system.account(0) as poor,
        grpc.aio.insecure_channel(system.stack.gateway_address) as channel,
    ):
        key = await rich.create_api_key()
        revoked = await rich.create_api_key()
        await system_revoke(channel, key.secret, revoked.key.key_id)
        image_id, video_id = str(uuid.uuid4()), str(uuid.uuid4())
        image = await rich.upload_image(pictures.plain((9, 9, 9)), request_id=image_id)
        done = await rich.generate("a good one", request_id=video_id, **TINY)
        yield World(
            system=system,
            channel=channel,
            key=key.secret,
            revoked_key=revoked.secret,
            rich=rich,
            poor=poor,
            image=image,
            image_request_id=image_id,
            done=done,
            done_request_id=video_id,
            balance=await rich.balance(),
        )


async def system_revoke(channel: grpc.aio.Channel, secret: str, key_id: str) -> None:
    from framewire.gateway.v1 import account_pb2, account_pb2_grpc

    await account_pb2_grpc.AccountServiceStub(channel).RevokeApiKey(
        account_pb2.RevokeApiKeyRequest(key_id=key_id),
        metadata=(("authorization", f"Bearer {secret}"),),
        timeout=10,
    )


@pytest_asyncio.fixture(loop_scope="session")
async def leaves_nothing(world: World) -> AsyncIterator[None]:
    """No hold, no pin, no row in limbo, no object left, no job: afterwards all is as it was before."""
    before = await standing(world)
    yield

    async def nothing() -> bool:
        after = await standing(world)
        assert after == before
        return True

    await eventually(nothing)
    assert (before["held"], before["in limbo"], before["pinned"]) == (0, 0, 0)
    assert (before["uploading"], before["puts"]) == (0, 0)


async def standing(world: World) -> dict[str, Any]:
    """What the two accounts have, and what is under way for them."""
    accounts = [world.rich.account_id, world.poor.account_id]
    found: dict[str, Any] = {}
    for service, counts in LEFT.items():
        async with world.system.database(service) as connection:
            for what, statement in counts.items():
                found[what] = await connection.fetchval(statement, accounts)
    return found | {"rich": await world.rich.balance(), "poor": await world.poor.balance()}


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
async def test_bad_input_is_refused_and_leaves_nothing(world: World, case: Case) -> None:
    row = next(row for row in bad_input.table() if row.what == case.what)
    error = await bad_input.refused(case.call(world))
    assert (error.code.name, error.reason) == (row.code, row.reason), error.message
    assert re.search(case.says, error.message), error.message
    assert bad_input.is_sentence(error.message), error.message
    if row.reason == "INVALID_FIELD":
        assert error.violations, "BadRequest names the field"


def test_each_row_has_its_case() -> None:
    here = {row.what for row in bad_input.table() if row.tested == bad_input.HERE}
    assert here == {case.what for case in CASES}


# Strings that break programs


@pytest.fixture(scope="module")
def naughty() -> list[str]:
    if not NAUGHTY.exists():
        pytest.skip(f"no {NAUGHTY}: the naughty strings are not tested")
    return json.loads(NAUGHTY.read_text())


async def answers(calls: list[Any]) -> list[Any]:
    """Results and refusals, a few dozen at a time."""
    slots = asyncio.Semaphore(32)

    async def one(call: Any) -> Any:
        async with slots:
            try:
                return await call
            except errors.FramewireError as error:
                return error

    return list(await asyncio.gather(*(one(call) for call in calls)))


@pytest.mark.usefixtures("leaves_nothing")
async def test_naughty_strings_as_prompts(world: World, naughty: list[str]) -> None:
    got = await answers([world.create({"prompt": text}, validate_only=True) for text in naughty])
    for text, answer in zip(naughty, got, strict=True):
        if isinstance(answer, errors.FramewireError):
            assert answer.reason == "INVALID_FIELD", (text, answer.message)
            assert not text.strip() or len(text) > 500 or "\0" in text, text
        else:
            assert answer.spec.prompt == text


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.slow
async def test_naughty_strings_as_labels_and_references(world: World, naughty: list[str]) -> None:
    """The account has no credits: the strings go through every service and every table, and no video is made."""

    def call(text: str) -> Any:
        return world.poor.create_video("x", labels={"a": text}, client_reference=text, **TINY)

    got = await answers([call(text) for text in naughty])
    for text, answer in zip(naughty, got, strict=True):
        wanted = "INVALID_FIELD" if len(text) > 63 or "\0" in text else "INSUFFICIENT_CREDITS"
        assert getattr(answer, "reason", None) == wanted, (text, answer)


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.slow
async def test_naughty_strings_as_models_ids_and_tokens(world: World, naughty: list[str]) -> None:
    def calls(text: str) -> list[Any]:
        return [
            world.create({"model": text}, validate_only=True),
            world.create({"input_image_id": text}, validate_only=True),
            bad_input.get(text)(world),
            world.create(quote_id=text, validate_only=True),
        ]

    got = await answers([call for text in naughty for call in calls(text)])
    wrong = [
        answer.message
        for answer in got
        if isinstance(answer, errors.FramewireError)
        and answer.code not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        and answer.reason != "QUOTE_NOT_VALID"
    ]
    assert wrong == []


# The command


def command(
    world: World, *arguments: str | bytes, **changed: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs the real command as a process of its own."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("FRAMEWIRE_")
    }
    environment |= {
        "FRAMEWIRE_ADDRESS": world.system.stack.gateway_address,
        "FRAMEWIRE_API_KEY": world.key,
        **changed,
    }
    return subprocess.run(
        [sys.executable, "-m", "framewire.cli", *arguments],
        env=environment, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


COMMANDS: list[tuple[str, tuple[str | bytes, ...], int, str]] = [
    ("INVALID_FIELD", ("generate", "-", "x" * 501), 1, "500"),
    ("NOT_AN_IMAGE", ("generate", "pyproject.toml", "x"), 1, "JPEG, PNG, WebP or AVIF"),
    ("MODEL_UNKNOWN", ("generate", "-", "x", "--model", "sora-9"), 1, "sora-2-pro"),
    ("SIZE_NOT_SUPPORTED", ("quote", "--size", "64x64"), 1, "1280x720"),
    ("VIDEO_NOT_FOUND", ("get", bad_input.NOBODY), 1, "framewire list"),
    ("PRICE_CHANGED", ("generate", "-", "x", "--max-credits", "0"), 1, "--max-credits"),
    ("LANE_NOT_ALLOWED", ("generate", "-", "x", "--lane", "vip"), 1, "STANDARD, BATCH"),
    ("INVALID_FIELD", ("generate", "-", b"\xff\xfe"), 1, "UTF-8"),
    ("INVALID_FIELD", ("quote", "--seconds", "99999999999"), 1, "too large"),
    ("", ("generate", "no-such.jpg", "x"), 2, "no image file"),
    ("", ("quote", "--size", "big"), 2, "1280x720"),
]


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.slow
@pytest.mark.parametrize(("reason", "arguments", "code", "says"), COMMANDS, ids=str)
async def test_the_command_says_it_in_a_line(
    world: World, reason: str, arguments: tuple[str | bytes, ...], code: int, says: str
) -> None:
    ended = await asyncio.to_thread(command, world, *arguments)
    check_told(ended, reason, code, says)


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.slow
@pytest.mark.parametrize("key", ["fw_" + "a" * 40, "schlüssel", "fw_a\nb"])
async def test_the_command_with_a_wrong_key(world: World, key: str) -> None:
    ended = await asyncio.to_thread(command, world, "balance", FRAMEWIRE_API_KEY=key)
    check_told(ended, "CREDENTIALS_INVALID", 1, "--api-key")


async def test_the_command_where_nobody_listens(world: World) -> None:
    ended = await asyncio.to_thread(command, world, "balance", FRAMEWIRE_ADDRESS="127.0.0.1:1")
    check_told(ended, "DEPENDENCY_UNAVAILABLE", 3, "cannot reach")


def check_told(
    ended: subprocess.CompletedProcess[bytes], reason: str, code: int, says: str
) -> None:
    told = ended.stderr.decode()
    first = told.splitlines()[0]
    assert (ended.returncode, ended.stdout) == (code, b""), told
    assert re.fullmatch(r"error: .+ \([A-Z_]+\)" if reason else r"error: .+", first), told
    assert not reason or first.endswith(f"({reason})"), told
    assert says in told
    assert "Traceback" not in told
    assert len(told.splitlines()) <= 2, "what is wrong, and what to do"
