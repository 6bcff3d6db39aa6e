"""What the pretended service would bill, read from its log. Pure: entries in, lines of an account out."""

from collections.abc import Iterable
from typing import Any, cast

from services.simulator import jobs, oplog

KINDS = ("accepted", "deleted")
_NAMES = ("id", "key_name", "model", "prompt", "dialect")


def account(entries: Iterable[oplog.Entry]) -> list[dict[str, object]]:
    """One line for each accepted job, the oldest first, deleted ones too; of one that runs, what it will cost.

    What failed costs nothing, but for what runway's moderation stopped; what is deleted while it runs stays paid,
    unless the server stops it then.
    """
    lines: dict[str, dict[str, Any]] = {}
    for untyped in entries:
        entry = cast("dict[str, Any]", untyped)
        if entry["kind"] == "accepted":
            line = {name: entry.get(name, jobs.OPENAI_VIDEOS) for name in _NAMES}
            failed = entry["error"] is not None
            lines[entry["id"]] = {**line, "billed_micros": entry["billed_micros"], "failed": failed}
        elif entry["kind"] == "deleted" and entry["id"] in lines:
            lines[entry["id"]]["billed_micros"] -= entry.get("unbilled_micros", 0)
    return list(lines.values())
