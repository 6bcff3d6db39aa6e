"""`framewire account erase` against a scripted gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import typer.testing

from framewire.cli import app
from framewire.gateway.v1 import operator_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import ACCOUNT, Gateway


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateways.for_the_cli(monkeypatch) as running:
        answer = operator_pb2.EraseAccountResponse(live_videos=2, videos_to_remove=31)
        answer.asked_at.FromDatetime(datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC))
        running.on("EraseAccount", answer)
        yield running


def run(*arguments: str, **more: Any) -> Any:
    return typer.testing.CliRunner().invoke(app.app, ("account", "erase", *arguments), **more)


def test_an_erasure_shows_how_far_it_is(gateway: Gateway) -> None:
    result = run(ACCOUNT, "--why", "asked by letter", "--yes")
    assert result.exit_code == 0, result.output
    assert "31" in result.stdout
    assert "not yet" in result.stdout
    (asked,) = gateway.requests("EraseAccount")
    assert (asked.account_id, asked.why) == (ACCOUNT, "asked by letter")
    shown = json.loads(run(ACCOUNT, "--why", "x", "--yes", "--json").stdout)
    assert (shown["live_videos"], shown["done_at"]) == (2, None)


def test_nothing_is_erased_without_a_reason_and_a_yes(gateway: Gateway) -> None:
    assert run(ACCOUNT, "--yes").exit_code == 2
    assert run(ACCOUNT, "--why", "x", input="n\n").exit_code != 0
    assert gateway.requests("EraseAccount") == []
    assert run(ACCOUNT, "--why", "x", input="y\n").exit_code == 0
