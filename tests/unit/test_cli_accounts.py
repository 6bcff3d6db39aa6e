"""`framewire account` against a scripted gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import typer.testing

from framewire.cli import app
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import operator_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import ACCOUNT, Gateway


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateways.for_the_cli(monkeypatch) as running:
        answer = operator_pb2.EraseAccountResponse(live_videos=2, videos_to_remove=31)
        answer.asked_at.FromDatetime(datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC))
        running.on("EraseAccount", answer)
        made = operator_pb2.Account(account_id=ACCOUNT, display_name="press", lanes=[1, 3])
        running.on("CreateAccount", made)
        yield running


def run(*arguments: str, **more: Any) -> Any:
    return typer.testing.CliRunner().invoke(app.app, ("account", *arguments), **more)


def test_an_erasure_shows_how_far_it_is(gateway: Gateway) -> None:
    result = run("erase", ACCOUNT, "--why", "asked by letter", "--yes")
    assert result.exit_code == 0, result.output
    shown = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert shown == [
        *("account", "asked for", "live videos", "videos to remove", "assets to remove", "done")
    ]
    assert result.stdout.splitlines()[3].split()[-1] == "31", "videos, not credits"
    assert "not yet" in result.stdout
    (asked,) = gateway.requests("EraseAccount")
    assert (asked.account_id, asked.why) == (ACCOUNT, "asked by letter")
    shown = json.loads(run("erase", ACCOUNT, "--why", "x", "--yes", "--json").stdout)
    assert (shown["live_videos"], shown["done_at"]) == (2, None)


def test_nothing_is_erased_without_a_reason_and_a_yes(gateway: Gateway) -> None:
    assert run("erase", ACCOUNT, "--yes").exit_code == 2
    assert run("erase", ACCOUNT, "--why", "x", input="n\n").exit_code != 0
    assert gateway.requests("EraseAccount") == []
    assert run("erase", ACCOUNT, "--why", "x", input="y\n").exit_code == 0


def test_an_account_is_made_once_whatever_is_sent_again(gateway: Gateway) -> None:
    again = "0b2c3c1e-7a0b-4d0e-9c44-f3a9a1b0c2d7"
    result = run("create", "press", "--lane", "vip", "--weight", "3", "--request-id", again)
    assert result.exit_code == 0, result.output
    assert ACCOUNT in result.stdout
    assert json.loads(run("create", "press", "--json").stdout)["account_id"] == ACCOUNT
    first, second = gateway.requests("CreateAccount")
    assert (first.request_id, first.display_name, first.weight) == (again, "press", 3)
    assert list(first.lanes) == [vocabulary_pb2.LANE_VIP]
    assert second.request_id not in ("", again)
