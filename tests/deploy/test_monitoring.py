"""Alerts, dashboards and the runbook agree with each other. That they name what is exposed is test_observed.py's."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests import monitoring, promql

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
CASES = [
    case
    for path in sorted((PROMETHEUS / "rules_test").glob("*.yaml"))
    for case in yaml.safe_load(path.read_text())["tests"]
]
HELD_BY_THE_DATABASE = {"J5", "Q3"}
"""Fences and keys: no metric could show them broken. docs/runbook.md says so."""
INVARIANTS = {
    *(f"L{n}" for n in range(1, 8)), *(f"J{n}" for n in range(1, 6)), *(f"P{n}" for n in range(1, 6)),
    "S1", "S2", "Q1", "Q2", "Q3", "V1", "V2",
}  # fmt: skip


def test_every_alert_has_a_runbook_entry_and_every_entry_an_alert() -> None:
    entries = set(re.findall(r"^### (\w+)$", monitoring.RUNBOOK, re.MULTILINE))
    assert entries == monitoring.ALERTS.keys()
    for name, alert in monitoring.ALERTS.items():
        assert alert["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert alert["annotations"]["summary"].endswith(".")
        assert alert["labels"]["severity"] in ("page", "ticket")


def test_every_invariant_has_an_alert() -> None:
    shown = [
        rule["labels"]["invariant"]
        for rule in monitoring.ALERTS.values()
        if "invariant" in rule["labels"]
    ]
    assert set(shown) == INVARIANTS - HELD_BY_THE_DATABASE
    assert [name for name, count in Counter(shown).items() if count > 1] == []
    promised = re.search(
        r"\| id \| invariant \|\n(.+?)\n\n",
        (ROOT / "docs" / "guarantees.md").read_text(),
        re.DOTALL,
    )
    assert promised
    ids = set(re.findall(r"\b[LJPSQV]\d\b", promised[1]))
    assert ids <= INVARIANTS, "a promise that nobody watches"
    assert ids.isdisjoint(HELD_BY_THE_DATABASE)


def test_links_of_the_runbook_lead_somewhere() -> None:
    here = monitoring.anchors(monitoring.RUNBOOK)
    for target in re.findall(r"\]\(([^)]+)\)", monitoring.RUNBOOK):
        file, _, anchor = target.partition("#")
        if file:
            assert (ROOT / "docs" / file).exists(), target
        else:
            assert anchor in here, target


def test_commands_of_the_runbook_are_those_of_the_cli() -> None:
    from typer.main import get_command

    from framewire.cli import app

    group = get_command(app.app)
    for words in re.findall(
        r"`framewire ([^`\n]+)`|^framewire ([^#\n]+)", monitoring.RUNBOOK, re.MULTILINE
    ):
        parts = (words[0] or words[1]).split()
        command = group
        while parts and hasattr(command, "commands"):
            name = parts.pop(0)
            assert name in command.commands, f"framewire has no {name}"
            command = command.commands[name]
        options = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {part for part in parts if part.startswith("--")} <= options, words


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    names = [case["name"] for case in CASES]
    assert sorted(names) == sorted(
        f"{alert}: {what}" for alert in monitoring.ALERTS for what in ("fires", "is quiet")
    )
    for case in CASES:
        (query,) = case["promql_expr_test"]
        alert, what = case["name"].split(": ")
        assert f'alertname="{alert}"' in query["expr"]
        assert query["exp_samples"][0]["value"] == (1 if what == "fires" else 0)
        fed = {re.split(r"[{]", one["series"])[0] for one in case["input_series"]}
        assert fed <= _read_by(alert), f"{case['name']} feeds what the alert does not read"


def _read_by(alert: str) -> set[str]:
    by_name = {rule["record"]: rule["expr"] for rule in monitoring.RULES if "record" in rule}
    found = promql.series(monitoring.ALERTS[alert]["expr"])
    return found | {name for one in found & by_name.keys() for name in promql.series(by_name[one])}


if PROMTOOL := shutil.which("promtool"):

    @pytest.mark.long  # all cases of all rules: minutes on a busy machine
    def test_promtool_agrees() -> None:
        """The real engine, where it is installed: syntax, and all cases."""
        for command, folder in (("check", "rules"), ("test", "rules_test")):
            files = sorted((PROMETHEUS / folder).glob("*.yaml"))
            done = subprocess.run(
                [PROMTOOL, command, "rules", *files], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_can_be_loaded_together() -> None:
    boards = monitoring.DASHBOARDS
    assert set(boards) == {"overview", "provider", "money", "bus", "storage", "service"}
    assert len({board["uid"] for board in boards.values()}) == len(boards)
    for name, board in boards.items():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids), name
        assert board["templating"]["list"][0]["type"] == "datasource"
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert place["x"] + place["w"] <= 24
            assert not cells & taken, f"{name}: {panel['title']} lies on another panel"
            taken |= cells
            if panel["type"] != "row":
                assert panel["datasource"]["uid"] == "${datasource}"
                assert panel["targets"], panel["title"]
                assert all(target["expr"] for target in panel["targets"])
            if panel.get("description", "").startswith("docs/"):
                assert panel["description"].split("#")[1] in monitoring.anchors(monitoring.RUNBOOK)


def test_compose_scrapes_every_service() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["dns_sd_configs"][0] for job in config["scrape_configs"]}
    assert jobs.keys() == {
        f"framewire-{name}" for name in ("gateway", "credits", "generator", "storage")
    }
    for name, found in jobs.items():
        assert found["names"] == [name.removeprefix("framewire-")]
        assert (found["type"], found["port"]) == ("A", 9090)
