"""What `kubectl kustomize` makes of deploy/k8s, as far as our files go: resources, components, merges, namespace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
CLUSTER_WIDE = {"Namespace"}
_KEYS = {
    **dict.fromkeys(("containers", "initContainers", "env", "volumes"), "name"),
    "volumeMounts": "mountPath",
}
"""Lists whose elements are merged, and by what."""


def render(directory: Path, upon: list[Object] | None = None) -> list[Object]:
    """All objects of an overlay, base or component; a component adds to those it is laid upon, and changes them."""
    told = yaml.safe_load((directory / "kustomization.yaml").read_text())
    unknown = told.keys() - {
        "apiVersion",
        "kind",
        "namespace",
        "resources",
        "components",
        "patches",
    }
    assert not unknown, f"{directory.name}: this renderer does not know {unknown}"
    objects: list[Object] = [] if upon is None else upon
    for name in told.get("resources", ()):
        place = directory / name
        if place.is_dir():
            objects += render(place)
        else:
            # Anchors make shared parts: each object gets its own.
            objects += [copy.deepcopy(one) for one in yaml.safe_load_all(place.read_text()) if one]
    for name in told.get("components", ()):
        render(directory / name, objects)
    for patch in told.get("patches", ()):
        for change in yaml.safe_load_all((directory / patch["path"]).read_text()):
            (target,) = [one for one in objects if key(one)[:2] == key(change)[:2]]
            _merge(target, change)
    if namespace := told.get("namespace"):
        for one in objects:
            if one["kind"] not in CLUSTER_WIDE:
                one["metadata"]["namespace"] = namespace
    return objects


def key(one: Object) -> tuple[str, str, str]:
    """Kind, name and namespace."""
    return one["kind"], one["metadata"]["name"], one["metadata"].get("namespace", "")


def _merge(into: Object, change: Object) -> None:
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        elif isinstance(value, list):
            by = _KEYS[name]
            before = {one[by]: one for one in into.get(name, ())}
            # Those of the change come first, as kubectl has it.
            changed = [before.pop(one[by], one) for one in value]
            for kept, one in zip(changed, value, strict=True):
                _merge(kept, one)
            into[name] = [*changed, *before.values()]
        else:
            into[name] = value
