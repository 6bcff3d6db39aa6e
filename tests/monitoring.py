"""The rules and dashboards of deploy/, read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RULES_FILES = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yaml"))
RULES: list[dict[str, Any]] = [
    rule
    for file in RULES_FILES
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text())
    for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
}
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()


def anchors(text: str) -> set[str]:
    """What links may point at, as they are made of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}


def queries() -> list[tuple[str, str]]:
    """Where it stands, and the query."""
    found = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in RULES]
    for name, board in DASHBOARDS.items():
        for panel in board["panels"]:
            where = f"{name}: {panel['title']}"
            found += [(where, target["expr"]) for target in panel.get("targets", ())]
        variables = [one for one in board["templating"]["list"] if one["type"] == "query"]
        found += [
            (f"{name}: ${one['name']}", one["query"].split(",")[0] + ")") for one in variables
        ]
    return found
