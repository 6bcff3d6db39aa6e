"""`framewire top` against a scripted gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import typer.testing

from framewire.cli import app
from framewire.credits.v1 import ledger_pb2
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
