"""The command `framewire reconcile` against a scripted gateway: what it prints, what it applies, how it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import typer.testing

from framewire.cli import app
from framewire.gateway.v1 import operator_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import ACCOUNT, UNAVAILABLE, VIDEO, Gateway, Refusal

FINDING = "f" * 26
_runner = typer.testing.CliRunner()


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    for name in [name for name in os.environ if name.startswith("FRAMEWIRE_")]:
        monkeypatch.delenv(name)
    with gateways.running() as running:
        monkeypatch.setenv("FRAMEWIRE_ADDRESS", running.address)
        monkeypatch.setenv("FRAMEWIRE_API_KEY", "fw_key")
        yield running


def run(*arguments: str) -> Any:
    return _runner.invoke(app.app, ["reconcile", *arguments])


def finding(confirmed: bool = True, repair: str = "SETTLE_HOLD") -> operator_pb2.Finding:
    made = operator_pb2.Finding(
        finding_id=FINDING,
        kind=operator_pb2.FINDING_KIND_HOLD_OPEN_AFTER_END,
        video_id=VIDEO,
        account_id=ACCOUNT,
        repair=operator_pb2.RepairKind.Value(f"REPAIR_KIND_{repair}"),
        confirmed=confirmed,
    )
    said = made.statements.add(side="credits", says="HELD, reserved 10")
    said.as_of.FromJsonString("2026-11-20T10:00:00Z")
    return made


def passed(
    *findings: operator_pb2.Finding, error: str = ""
) -> list[operator_pb2.ReconcileResponse]:
    done = operator_pb2.ReconcilePass(
        videos=7,
        objects=8,
        provider_jobs=9,
        findings=len(findings),
        confirmed=sum(one.confirmed for one in findings),
        interval_seconds=600,
    )
    done.sides.add(side="provider main", error=error)
    found = [operator_pb2.ReconcileResponse(finding=one) for one in findings]
    return [*found, operator_pb2.ReconcileResponse(done=done)]


def test_agreement_is_told_and_ends_well(gateway: Gateway) -> None:
    gateway.on("Reconcile", passed())
    ran = run("--since", "2h")
    assert ran.exit_code == 0
    assert "compared 7 videos, 8 objects, 9 jobs of providers" in ran.output
    (request,) = gateway.requests("Reconcile")
    assert request.HasField("since")


def test_a_confirmed_difference_says_what_to_do_and_ends_with_1(gateway: Gateway) -> None:
    gateway.on("Reconcile", passed(finding(), error="it is away"))
    ran = run()
    assert ran.exit_code == 1
    for text in ("HOLD_OPEN_AFTER_END", VIDEO, "HELD, reserved 10", f"--apply {FINDING}"):
        assert text in ran.output
    assert "provider main: not read: it is away" in ran.output
    (request,) = gateway.requests("Reconcile")
    assert not request.HasField("since")


@pytest.mark.parametrize(
    ("found", "text", "code"),
    [
        (finding(confirmed=False), "not yet", 0),
        (finding(repair="NONE"), "none: an operator must look", 1),
    ],
)
def test_what_cannot_be_applied_says_so(
    gateway: Gateway, found: operator_pb2.Finding, text: str, code: int
) -> None:
    gateway.on("Reconcile", passed(found))
    ran = run()
    assert ran.exit_code == code
    assert text in ran.output
    assert "--apply" not in ran.output


def test_repairs_are_applied_one_by_one_and_looked_at_again(gateway: Gateway) -> None:
    gateway.on("Repair", finding())
    gateway.on("Reconcile", passed())
    ran = run("--apply", FINDING, "--apply", "g" * 26, "--why", "told to")
    assert ran.exit_code == 0
    assert [(one.finding_id, one.why) for one in gateway.requests("Repair")] == [
        (FINDING, "told to"),
        ("g" * 26, "told to"),
    ]
    assert f"applied SETTLE_HOLD to HOLD_OPEN_AFTER_END of {VIDEO}" in ran.output


def test_a_refused_repair_ends_it(gateway: Gateway) -> None:
    gateway.on("Repair", Refusal(grpc.StatusCode.FAILED_PRECONDITION, "FINDING_NOT_CONFIRMED"))
    ran = run("--apply", FINDING)
    assert ran.exit_code == 1
    assert "FINDING_NOT_CONFIRMED" in ran.stderr
    assert gateway.requests("Reconcile") == []


def test_json_is_the_whole_pass_and_a_broken_one_is_begun_anew(gateway: Gateway) -> None:
    gateway.on("Reconcile", [*passed(finding())[:1], UNAVAILABLE], passed(finding()))
    ran = run("--json")
    assert ran.exit_code == 1
    told = json.loads(ran.stdout)
    assert [one["finding_id"] for one in told["findings"]] == [FINDING]
    assert (told["done"]["videos"], told["done"]["interval_seconds"]) == (7, 600)
    assert len(gateway.requests("Reconcile")) == 2
