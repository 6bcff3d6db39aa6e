"""Writes rules.yaml as the PrometheusRule of deploy/k8s/components/monitoring: the same groups."""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parent
TARGET = HERE.parent / "k8s" / "components" / "monitoring" / "rules.yaml"


def rule_object() -> str:
    """The manifest."""
    groups = yaml.safe_load((HERE / "rules.yaml").read_text())["groups"]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "framewire", "labels": {"app.kubernetes.io/part-of": "framewire"}},
        "spec": {"groups": groups},
    }
    text = yaml.safe_dump(manifest, sort_keys=False, width=118, allow_unicode=True)
    return "# Made by deploy/prometheus/to_k8s.py from deploy/prometheus/rules.yaml.\n" + text


if __name__ == "__main__":
    TARGET.write_text(rule_object())
