"""Which series a PromQL query reads, as far as our own queries go."""

from __future__ import annotations

import re

WORDS = {
    "abs", "absent", "and", "avg", "bool", "by", "clamp_min", "count", "group_left", "histogram_quantile",
    "ignoring", "increase", "label_values", "max", "min", "offset", "on", "or", "rate", "sum", "time",
    "unless", "vector", "without",
}  # fmt: skip
TARGET_LABELS = {"job", "instance", "pod"}
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left)\s*\(([^)]*)\)")
_NAME = re.compile(r"(?<![\w.:])[a-zA-Z_:][a-zA-Z0-9_:]*")


def series(query: str) -> set[str]:
    """Names of the series."""
    text = re.sub(r"\{[^}]*\}", "", re.sub(r'"[^"]*"', '""', query))
    text = re.sub(r"\[[^\]]*\]", "", _GROUPING.sub("", text))
    return set(_NAME.findall(text)) - WORDS


def matched(query: str) -> dict[str, set[str]]:
    """By name, the labels that are matched where it is read; those of the target left out."""
    bare = re.sub(r'"[^"]*"', '""', query)
    found: dict[str, set[str]] = {}
    for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", bare):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) - TARGET_LABELS
        found.setdefault(name, set()).update(labels)
    return found
