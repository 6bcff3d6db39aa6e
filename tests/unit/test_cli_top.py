"""`framewire top` against a scripted gateway."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.testing
from rich.console import Console

from framewire import attempts, client, errors, types
from framewire.cli import app
from framewire.cli import top as tops
from framewire.credits.v1 import ledger_pb2
from framewire.decode import decode
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import video_pb2
from framewire.generator.v1 import attempt_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import ACCOUNT, VIDEO, Gateway, Refusal, video


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateways.for_the_cli(monkeypatch) as running:
        monkeypatch.setenv("COLUMNS", "160")
        balance = ledger_pb2.Balance(account_id=ACCOUNT, available_credits=90, held_credits=10)
        running.on("GetBalance", balance)
        waiting, rendering = video(), video()
        waiting.stage, waiting.lane = vocabulary_pb2.VIDEO_STAGE_QUEUED, vocabulary_pb2.LANE_BATCH
        waiting.queue_position = 7
        rendering.stage = vocabulary_pb2.VIDEO_STAGE_RENDERING
        rendering.lane = vocabulary_pb2.LANE_VIP
        running.on(
            "ListVideos",
            video_pb2.ListVideosResponse(videos=[rendering]),
            video_pb2.ListVideosResponse(videos=[waiting]),
        )
        yield running


LEAVES_SCREEN = "\x1b[?1049l"
SHOWS_CURSOR = "\x1b[?25h"


def top(*arguments: str) -> Any:
    return typer.testing.CliRunner().invoke(app.app, ("top", *arguments))


def test_an_operator_sees_videos_lanes_credits_and_providers(gateway: Gateway) -> None:
    account = attempt_pb2.ProviderAccount(
        provider_account="main",
        open=True,
        jobs_in_flight=3,
        usable_jobs_in_flight=8,
        jobs_day=40,
        jobs_per_day=100,
        cost_micros_hour=1_500_000,
        max_cost_micros_per_hour=20_000_000,
    )
    shut = attempt_pb2.ProviderAccount(provider_account="other", closed_reason="paused")
    accounts = attempt_pb2.ListProviderAccountsResponse(provider_accounts=[account, shut])
    gateway.on("ListProviderAccounts", accounts)
    result = top()
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert VIDEO in shown
    for text in (
        *("90 credits available, 10 held", "1 queued", "1 rendering", " 7 ", "3 of 8"),
        *("40 of 100", "1.50 of 20.00", "paused"),
    ):
        assert text in shown, text
    states = [request.state for request in gateway.requests("ListVideos")]
    assert states == [vocabulary_pb2.VIDEO_STATE_PROCESSING, vocabulary_pb2.VIDEO_STATE_PENDING]


def test_a_member_sees_no_providers(gateway: Gateway) -> None:
    gateway.on(
        "ListProviderAccounts", Refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED")
    )
    result = top("--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["providers"] is None
    assert told["lanes"] == {"VIP": {"rendering": 1}, "BATCH": {"queued": 1}}


def seen(videos: int, ago_seconds: float = 0.0) -> tops.Snapshot:
    """So many videos, at three providers."""
    one, now = video(progress=37), datetime.now(UTC)
    one.expected_at.FromDatetime(now + timedelta(hours=3, minutes=10))
    balance = ledger_pb2.Balance(account_id=ACCOUNT, available_credits=4475, held_credits=175)
    provider = attempt_pb2.ProviderAccount(
        provider_account="main", open=True, jobs_in_flight=3, usable_jobs_in_flight=8
    )
    return tops.Snapshot(
        at=now - timedelta(seconds=ago_seconds),
        balance=decode(types.Balance, balance),
        videos=(decode(types.Video, one),) * videos,
        more=False,
        lanes={"STANDARD": {"rendering": videos}} if videos else {},
        providers=(decode(attempts.ProviderAccount, provider),) * 3,
    )


def drawn(picture: tops.Screen, width: int, height: int = 25) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(picture)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [240, 140, 112, 100, 80, 69, 57, 47, 40])
def test_it_is_as_wide_as_the_terminal_and_cuts_nothing(width: int) -> None:
    lines = drawn(tops.Screen(seen(3)), width)
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    assert (shown.count(VIDEO), shown.count("rendering"), shown.count("3 of 8")) == (3, 4, 3)
    assert "\u2026" not in shown, "a word was cut"
    assert ("37 %" in shown, "in 3 h" in shown, "standard " in lines[-5]) == (
        *(width >= 47, width >= 69, width >= 57),
    )


@pytest.mark.parametrize("height", [12, 24, 50])
def test_a_live_screen_is_as_high_as_the_terminal_and_keeps_the_providers(height: int) -> None:
    lines = drawn(tops.Screen(seen(100), every=600), 80, height)
    assert len(lines) == height
    rows = sum(VIDEO in line for line in lines)
    assert f"and {100 - rows} more" in "\n".join(lines)
    assert lines[-1].startswith("main")


def test_where_there_is_nothing_to_show_there_are_no_empty_columns() -> None:
    lines = drawn(tops.Screen(dataclasses.replace(seen(0), providers=None)), 80)
    assert [line.strip() for line in lines[1:]] == ["no video is under way"]


def test_an_old_picture_says_so() -> None:
    assert "no answer" not in "".join(drawn(tops.Screen(seen(1), every=600), 80))
    assert "no answer for " in "".join(drawn(tops.Screen(seen(1, 60), every=2), 80))


async def test_it_goes_on_when_the_gateway_was_away_and_ends_where_it_must(
    gateway: Gateway,
) -> None:
    refused = Refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED")
    gateway.on("ListProviderAccounts", refused)
    before = ledger_pb2.Balance(account_id=ACCOUNT, available_credits=90)
    after = ledger_pb2.Balance(account_id=ACCOUNT, available_credits=71)
    ended = Refusal(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    # Neither is tried again by the client itself.
    slow = Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    away = Refusal(grpc.StatusCode.UNAVAILABLE, "RECOVERY")
    gateway.on("GetBalance", before, slow, away, after, ended)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)
    async with client.Client(gateway.address, "fw_key") as opened:
        with pytest.raises(errors.FramewireError) as raised:
            await tops._follow(opened, console, 0.01)
    assert raised.value.reason == "CREDENTIALS_INVALID"
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.index("90 credits available") < shown.index("71 credits available")
    assert shown.rindex(LEAVES_SCREEN) > shown.rindex("71 credits available")


def test_ctrl_c_leaves_the_terminal_as_it_was(gateway: Gateway) -> None:
    refused = Refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED")
    gateway.on("ListProviderAccounts", refused)
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    # As a terminal's shell starts it: the terminal is its own, and it has not been told to ignore Ctrl-C.
    code = (
        "import os, signal, sys; os.login_tty(0); signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, '-m', 'framewire.cli', 'top'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        env={**os.environ, "TERM": "xterm-256color"},
        cwd=Path(__file__).parents[2],
    ) as process:
        shown = ""
        while "credits available" not in shown:
            shown += os.read(ours, 4096).decode()
        os.write(ours, b"\x03")
        assert process.wait(60) == 130
    assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    while more := _rest(ours):
        shown += more
    os.close(ours)
    assert "Traceback" not in shown
    assert shown.rindex(LEAVES_SCREEN) > shown.rindex("credits available")
    assert SHOWS_CURSOR in shown[shown.rindex("credits available") :]


def _rest(terminal: int) -> str:
    try:
        return os.read(terminal, 4096).decode()
    except OSError:  # Linux says so at the end
        return ""
