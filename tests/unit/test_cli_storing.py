"""`framewire storage` against a scripted gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import typer.testing

from framewire.cli import app
from framewire.gateway.v1 import account_pb2
from framewire.storage.v1 import storage_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import ACCOUNT, Gateway

ASSET = "s" * 26


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateways.for_the_cli(monkeypatch) as running:
        yield running


def run(*arguments: str) -> Any:
    return typer.testing.CliRunner().invoke(app.app, ("storage", *arguments))


def test_usage_by_kind(gateway: Gateway) -> None:
    kinds = [
        storage_pb2.KindUsage(
            kind=storage_pb2.ASSET_KIND_OUTPUT_VIDEO, count=3, size_bytes=4_500_000
        )
    ]
    gateway.on("GetStorageUsage", storage_pb2.GetUsageResponse(kinds=kinds))
    result = run("usage")
    assert result.exit_code == 0, result.output
    assert "output_video" in result.stdout
    assert "4.5" in result.stdout


def test_an_output_is_kept_longer(gateway: Gateway) -> None:
    answer = account_pb2.ExtendRetentionResponse()
    answer.expires_at.FromDatetime(datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC))
    gateway.on("ExtendRetention", answer)
    result = run("keep", ASSET, "30d", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["expires_at"].startswith("2027-01-02T03:04:05")
    (asked,) = gateway.requests("ExtendRetention")
    assert (asked.asset_id, asked.keep_seconds) == (ASSET, 30 * 86_400)
    assert run("keep", ASSET, "soon").exit_code == 2


def test_an_operator_sets_an_accounts_times(gateway: Gateway) -> None:
    kinds = [
        storage_pb2.KindRetention(kind=storage_pb2.ASSET_KIND_OUTPUT_VIDEO, keep_seconds=86_400),
        storage_pb2.KindRetention(kind=storage_pb2.ASSET_KIND_INPUT_IMAGE),
    ]
    gateway.on("SetRetention", storage_pb2.Retention(account_id=ACCOUNT, kinds=kinds))
    result = run(
        *("retention", "output_video=1d", "input_image=ever"),
        *("--account", ACCOUNT, "--why", "they asked"),
    )
    assert result.exit_code == 0, result.output
    assert "for ever" in result.stdout
    (asked,) = gateway.requests("SetRetention")
    assert asked.why == "they asked"
    assert list(asked.retention.kinds) == kinds
    assert run("retention", "postcard=1d", "--account", ACCOUNT).exit_code == 1
