"""Writes rules/*.yaml as the PrometheusRule of deploy/k8s/components/monitoring: the same groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TARGET = HERE.parent / "k8s" / "components" / "monitoring" / "rules.yaml"


def groups() -> list[Any]:
    """All groups of rules, file by file."""
    files = sorted((HERE / "rules").glob("*.yaml"))
    return [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]


def rule_object() -> str:
    """The manifest."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "framewire", "labels": {"app.kubernetes.io/part-of": "framewire"}},
        "spec": {"groups": groups()},
    }
    text = yaml.safe_dump(manifest, sort_keys=False, width=118, allow_unicode=True)
    return "# Made by deploy/prometheus/to_k8s.py from deploy/prometheus/rules.\n" + text


if __name__ == "__main__":
    TARGET.write_text(rule_object())
