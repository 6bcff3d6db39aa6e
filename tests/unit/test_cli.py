"""The command `framewire` against a scripted gateway: what it prints, where it connects to, how it ends."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.testing

from framewire.cli import app, connection
from framewire.credits.v1 import ledger_pb2
from framewire.gateway.v1 import account_pb2, operator_pb2, upload_pb2, video_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import ACCOUNT, HANG, UNAVAILABLE, VIDEO, Gateway, Refusal, told, video

CODE = grpc.StatusCode
OPERATOR_KEY = "fw_operator"
_runner = typer.testing.CliRunner()


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("FRAMEWIRE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateways.running() as running:
        monkeypatch.setenv("FRAMEWIRE_ADDRESS", running.address)
        monkeypatch.setenv("FRAMEWIRE_API_KEY", "fw_key")
        yield running


def run(*arguments: str) -> Any:
    return _runner.invoke(app.app, arguments)


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def local_stack(gateway: Gateway, data_dir: Path) -> None:
    """What services.local leaves behind."""
    data_dir.mkdir()
    (data_dir / "operator.key").write_text(f"{OPERATOR_KEY}\n")
    content = {
        "gateway": gateway.address,
        "operator_key_file": str(data_dir / "operator.key"),
        "programs": {"nats": {"address": "nats://127.0.0.1:1"}},
    }
    (data_dir / "stack.json").write_text(json.dumps(content))


BALANCE = ledger_pb2.Balance(account_id=ACCOUNT, available_credits=90, held_credits=1)


# Where it connects to


def test_the_local_system_is_found_and_its_account_made_once(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FRAMEWIRE_ADDRESS")
    monkeypatch.delenv("FRAMEWIRE_API_KEY")
    local_stack(gateway, tmp_path / ".framewire")
    gateway.on("CreateAccount", operator_pb2.Account(account_id=ACCOUNT))
    gateway.on("GetBalance", BALANCE)
    gateway.on("GetVideo", video())
    for _ in range(2):
        result = run("balance")
        assert result.exit_code == 0, result.output
    assert "available  90 credits" in result.stdout
    assert gateway.metadata["authorization"] == f"Bearer {OPERATOR_KEY}"
    first, second = gateway.requests("CreateAccount")
    assert first == second
    assert first.display_name == "local"
    assert {one.account_id for one in gateway.requests("GetBalance")} == {ACCOUNT}
    assert run("balance", "--account", "b" * 26).exit_code == 0
    assert run("get", VIDEO).exit_code == 0
    assert len(gateway.requests("CreateAccount")) == 2, (
        "not where an account is named or not needed"
    )


def test_the_local_operator_key_goes_nowhere_else(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FRAMEWIRE_API_KEY")
    local_stack(gateway, tmp_path / ".framewire")
    result = run("balance")
    assert result.exit_code == 2
    assert "FRAMEWIRE_API_KEY_FILE" in result.stderr
    (tmp_path / "key").write_text("fw_mine\n")
    monkeypatch.setenv("FRAMEWIRE_API_KEY_FILE", str(tmp_path / "key"))
    gateway.on("GetBalance", BALANCE)
    assert run("balance").exit_code == 0
    assert gateway.metadata["authorization"] == "Bearer fw_mine"


def test_the_version_is_that_of_the_package() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"framewire {metadata.version('framewire')}\n")


def test_nothing_to_connect_to_is_a_usage_error() -> None:
    for command in (["balance"], ["events"]):
        result = run(*command)
        assert result.exit_code == 2
        assert "framewire local up" in result.stderr


@pytest.mark.parametrize("command", [["balance"], ["events", "--nats-url", "nats://127.0.0.1:1"]])
def test_nobody_listening_is_exit_code_3_at_once(
    monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("FRAMEWIRE_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("FRAMEWIRE_API_KEY", "k")
    result = run(*command)
    assert result.exit_code == 3
    first = result.stderr.splitlines()[0]
    assert first == "error: cannot reach 127.0.0.1:1: Connection refused (DEPENDENCY_UNAVAILABLE)"


# Errors


@pytest.mark.parametrize(
    ("refusal", "exit_code", "line", "hint"),
    [
        (
            Refusal(
                CODE.FAILED_PRECONDITION,
                "INSUFFICIENT_CREDITS",
                "not enough credits",
                {"needed": "10", "available": "3"},
            ),
            1,
            "error: not enough credits (INSUFFICIENT_CREDITS)",
            "needs 10 credits, 3 are available",
        ),
        (
            Refusal(CODE.RESOURCE_EXHAUSTED, "RATE_LIMITED", "slow\ndown", retry_after_seconds=60),
            1,
            "error: slow down (RATE_LIMITED)",
            "Try again in 60 s.",
        ),
        (
            Refusal(CODE.INTERNAL, "INTERNAL", "internal error", {"error_id": "e1"}),
            1,
            "error: internal error (INTERNAL)",
            "error id e1",
        ),
        (
            Refusal(CODE.UNAVAILABLE, "ADMISSION_PAUSED", "paused"),
            1,
            "error: paused (ADMISSION_PAUSED)",
            "Try again later",
        ),
        (UNAVAILABLE, 3, "error: no (DEPENDENCY_UNAVAILABLE)", "framewire local status"),
    ],
    ids=lambda one: getattr(one, "reason", None),
)
def test_a_refusal_is_one_line_and_what_to_do(
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Refusal,
    exit_code: int,
    line: str,
    hint: str,
) -> None:
    gateway.on("CreateVideo", refusal)
    gateway.keep_time(monkeypatch, "CreateVideo", connection.RETRY_SECONDS)
    result = run("generate", "-", "a sea")
    assert result.exit_code == exit_code
    assert result.stdout == ""
    said = result.stderr.splitlines()
    assert said[0] == line
    assert hint in said[1]
    assert len(said) == 2


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "none.jpg", "a"],
        ["generate", "-", "a", "--size", "wide"],
        ["generate", "-"],
        ["events", "--since", "soon"],
        ["grant", "0"],
        ["grant", "5"],
        ["nonsense"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(gateway: Gateway, command: list[str]) -> None:
    result = run(*command)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert not gateway.calls


def test_an_unexpected_fault_is_one_line_too(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(connection, "require_listener", broken)
    result = run("balance")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (
        1,
        "error: RuntimeError('odd') (INTERNAL)",
    )


# What it prints


def test_json_is_one_document_with_the_keys_of_the_dataclass(gateway: Gateway) -> None:
    gateway.on("GetVideo", video(3, "FAILED", settled=True))
    (found,) = lines(run("get", VIDEO, "--json").stdout)
    assert found["video_id"] == VIDEO
    assert (found["state"], found["credits"]["settlement"]) == ("FAILED", "DONE")
    assert found["created_at"] == "2026-11-20T10:00:00+00:00"
    assert found["finished_at"] is None
    gateway.on("ListModels", account_pb2.ListModelsResponse(models=[account_pb2.Model(model="m")]))
    assert lines(run("models", "--json").stdout)[0][0]["model"] == "m"
    gateway.on("QuoteVideo", video_pb2.QuoteVideoResponse(credits=7))
    assert lines(run("quote", "--json").stdout)[0]["credits"] == 7
    gateway.on("GetBalance", BALANCE)
    assert lines(run("balance", "--json").stdout)[0]["available_credits"] == 90
    gateway.on("CancelVideo", video())
    assert lines(run("cancel", VIDEO, "--json").stdout)[0]["video_id"] == VIDEO
    gateway.on("Grant", ledger_pb2.GrantResponse(lot_id="l", balance=BALANCE))
    granted = lines(run("grant", "5", "--account", ACCOUNT, "--json").stdout)[0]
    assert granted["balance"]["available_credits"] == 90


def test_json_of_lists_is_a_line_per_item_up_to_the_limit(gateway: Gateway) -> None:
    page = video_pb2.ListVideosResponse(videos=[video(1), video(2)], next_page_token="more")
    gateway.on("ListVideos", page)
    found = lines(run("list", "--limit", "3", "--json").stdout)
    assert [one["revision"] for one in found] == [1, 2, 1]
    gateway.on("ListEntries", ledger_pb2.ListEntriesResponse(entries=[ledger_pb2.Entry(kind=1)]))
    assert [one["kind"] for one in lines(run("entries", "--json").stdout)] == ["GRANT"]


def test_watch_prints_each_state_and_tells_failure_by_its_exit_code(gateway: Gateway) -> None:
    gateway.on("WatchVideo", told(video(1), video(2, "FAILED"), video(3, "FAILED", settled=True)))
    result = run("watch", VIDEO, "--json")
    assert [one["revision"] for one in lines(result.stdout)] == [1, 2, 3]
    assert result.exit_code == 1
    assert "error: the prompt [bold] was refused (INPUT_REFUSED)" in result.stderr
    assert f"0 credits charged for {VIDEO}" in result.stderr
    gateway.on("WatchVideo", told(video(3, "COMPLETED", settled=True)))
    result = run("watch", VIDEO)
    assert result.exit_code == 0
    assert "8 credits charged" in result.stdout


def test_people_get_every_fact_uncut(gateway: Gateway) -> None:
    gateway.on("GetVideo", video(3, "FAILED", settled=True))
    assert "failure  the prompt [bold] was refused (INPUT_REFUSED)" in run("get", VIDEO).stdout
    gateway.on("ListVideos", video_pb2.ListVideosResponse(videos=[video()]))
    assert VIDEO in run("list").stdout


def test_generate_sends_what_was_asked_and_shows_each_stage(
    gateway: Gateway, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    gateway.on("UploadImage", upload_pb2.Image(image_id="i" * 26))
    gateway.on("CreateVideo", video(1))
    gateway.on("WatchVideo", told(video(2, progress=40), video(3, "COMPLETED", settled=True)))
    result = run(
        *("generate", "a.jpg", "a sea", "--size", "640x360", "--seconds", "4", "--lane", "vip"),
        *("--max-credits", "9", "--model", "m", "--out", "new/place/o.mp4"),
    )
    assert result.exit_code == 0, result.output
    (sent,) = gateway.requests("CreateVideo")
    assert (sent.spec.width, sent.spec.height, sent.spec.seconds) == (640, 360, 4)
    assert (sent.spec.model, sent.max_credits) == ("m", 9)
    assert sent.spec.input_image_id == "i" * 26
    assert f"{VIDEO} rendering 0 %, 8 credits held" in result.stderr
    assert f"{VIDEO} completed 100 %, 8 credits charged" in result.stderr
    assert (tmp_path / "new/place").is_dir()


def test_generate_prints_a_failed_video_as_json_too(gateway: Gateway) -> None:
    gateway.on("CreateVideo", video(1))
    gateway.on("WatchVideo", told(video(2, "FAILED", settled=True)))
    result = run("generate", "-", "a sea", "--json")
    assert result.exit_code == 1
    assert lines(result.stdout)[0]["failure"]["cause"] == "INPUT_REFUSED"
    assert "INPUT_REFUSED" in result.stderr


def test_ctrl_c_leaves_the_video_alone_and_says_how_to_go_on(gateway: Gateway) -> None:
    gateway.on("CreateVideo", video(1))
    gateway.on("WatchVideo", told(video(2), HANG))
    # A shell that starts us in the background leaves SIGINT ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from framewire.cli import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "generate", "-", "a sea"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert process.stderr is not None
        assert VIDEO in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(10) == 130
    assert f"framewire watch {VIDEO}" in rest
    assert "Traceback" not in rest
    assert "CancelVideo" not in gateway.calls


# The local system


def test_local_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: became.append(arguments))
    run("local", "up", "--time-factor", "5", "--help")
    run("local", "status")
    assert [arguments[1:] for arguments in became] == [
        ["-m", "services.local", "up", "--time-factor", "5", "--help"],
        ["-m", "services.local", "status"],
    ]


def test_local_says_when_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda _: None)
    result = run("local", "up")
    assert result.exit_code == 1
    assert "pip install 'framewire[local]'" in result.stderr


# The ledger


def test_a_statement_as_csv_is_a_table_that_no_spreadsheet_takes_for_formulas(
    gateway: Gateway,
) -> None:
    entry = ledger_pb2.Entry(
        transfer_id="t-1", kind=1, available_change=-5, note='=cmd|"x"', operator="op"
    )
    entry.created_at.FromJsonString("2026-11-20T10:00:00Z")
    gateway.on("ListEntries", ledger_pb2.ListEntriesResponse(entries=[entry]))
    result = run("entries", "--csv", "--kind", "grant", "--video", VIDEO, "--since", "2026-11")
    names, row = csv.reader(io.StringIO(result.stdout))
    found = dict(zip(names, row, strict=True))
    assert (found["transfer_id"], found["kind"], found["available_change"]) == (
        "t-1",
        "GRANT",
        "-5",
    )
    assert (found["note"], found["created_at"]) == ('\'=cmd|"x"', "2026-11-20T10:00:00+00:00")
    (asked,) = gateway.requests("ListEntries")
    assert (list(asked.kinds), asked.video_id) == ([1], VIDEO)
    assert getattr(asked, "from").ToJsonString() == "2026-11-01T00:00:00Z"
    gateway.on("ListEntries", ledger_pb2.ListEntriesResponse())
    assert run("entries", "--csv").stdout.strip() == ",".join(names)
    gateway.on("ListEntries", Refusal(CODE.NOT_FOUND, "ACCOUNT_NOT_FOUND", "no such account"))
    result = run("entries", "--csv")
    assert (result.exit_code, result.stdout) == (1, "")


def test_usage_in_every_form(gateway: Gateway) -> None:
    line = account_pb2.UsageLine(
        month="2026-11", model="sora-2", label_value="red", videos=3, credits=30, refunded_credits=4
    )
    gateway.on("GetUsage", account_pb2.GetUsageResponse(lines=[line]))
    by = ("--by", "model", "--by", "label:team")
    shown = run("usage", *by, "--until", "2026-12").stdout.split("\n")
    assert shown[0].split() == ["month", "model", "team", "videos", "credits", "refunded"]
    assert shown[1].split() == ["2026-11", "sora-2", "red", "3", "30", "4"]
    (asked,) = gateway.requests("GetUsage")
    assert (list(asked.group_by), asked.label) == ([1, 4], "team")
    assert asked.to.ToJsonString() == "2027-01-01T00:00:00Z"
    (found,) = lines(run("usage", "--json").stdout)
    assert (found["month"], found["credits"], found["lane"]) == ("2026-11", 30, "")
    names, row = csv.reader(io.StringIO(run("usage", "--csv").stdout))
    assert dict(zip(names, row, strict=True))["refunded_credits"] == "4"
    for wrong in (("--by", "colour"), ("--by", "label"), ("--json", "--csv"), ("--since", "13")):
        result = run("usage", *wrong)
        assert (result.exit_code, result.stdout) == (2, ""), wrong


def test_operators_keep_the_ledgers_rules(gateway: Gateway, tmp_path: Path) -> None:
    rules = ledger_pb2.AccountRules(account_id=ACCOUNT, frozen=True, key_daily_cap_credits={"k": 7})
    gateway.on("SetFrozen", rules)
    assert "frozen" in run("operator", "freeze", "--account", ACCOUNT, "--why", "abuse").stdout
    run("operator", "unfreeze", "--account", ACCOUNT)
    first, second = gateway.requests("SetFrozen")
    assert (first.request.frozen, first.why, second.request.frozen) == (True, "abuse", False)
    gateway.on("SetDailyCap", rules)
    found = lines(run("operator", "cap", "0", "--account", ACCOUNT, "--json").stdout)[0]
    assert (found["daily_cap_credits"], found["key_daily_cap_credits"]) == (None, {"k": 7})
    assert "7 credits a day" in run("operator", "cap", "none", "--account", ACCOUNT).stdout
    first, second = gateway.requests("SetDailyCap")
    assert (first.request.HasField("credits"), second.request.HasField("credits")) == (True, False)
    prices = tmp_path / "prices.yaml"
    prices.write_text("version: x")
    book = ledger_pb2.Rulebook(version="x", content_hash="a" * 64)
    gateway.on("AddRulebook", book)
    assert "a" * 64 in run("operator", "add-rulebook", "prices", str(prices)).stdout
    assert gateway.requests("AddRulebook")[0].request.yaml == "version: x"
    gateway.on("ListRulebooks", ledger_pb2.ListRulebooksResponse(rulebooks=[book]))
    assert "a" * 64 in run("operator", "rulebooks", "refunds").stdout
    gateway.on("ActivateRulebook", book)
    activate = ("operator", "activate-rulebook", "refunds", "x", "a" * 64)
    run(*activate, "--at", "2030-01-01T00:00:00+00:00")
    sent = gateway.requests("ActivateRulebook")[0].request
    assert (sent.kind, sent.effective_from.ToJsonString()) == (2, "2030-01-01T00:00:00Z")
    gateway.on("Refund", ledger_pb2.RefundResponse(lot_id="l", balance=BALANCE))
    assert "90 credits" in run("operator", "refund", VIDEO, "5", "--from-loss").stdout
    assert gateway.requests("Refund")[0].refund.taken_from == ledger_pb2.REFUND_FROM_LOSS
    gateway.on("CheckBooks", ledger_pb2.CheckBooksResponse(findings=["hold h: wrong"]))
    result = run("operator", "check-books")
    assert (result.exit_code, "hold h: wrong" in result.stdout) == (1, True)
    for wrong in (
        ("operator", "cap", "many", "--account", ACCOUNT),
        ("operator", "cap", "5"),
        ("operator", "rulebooks", "taxes"),
    ):
        assert run(*wrong).exit_code == 2, wrong
    assert run("operator", "add-rulebook", "prices", "no-such.yaml").exit_code == 1
