"""What all benches share: rounds, percentiles, the table, the results file and docs/benchmarks.md."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of a table. `ratio` is value ÷ against_value; `goal` says what it should be, `holds` whether it is."""

    metric: str
    value: float
    unit: str
    against: str
    against_value: float | None
    ratio: float | None
    goal: str
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Load:
    """What callers did in a while: calls a second, and how long a call took."""

    rate: float
    seconds: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """Milliseconds that this share of the calls took at most."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def load(call: Callable[[], Awaitable[object]], callers: int, seconds: float) -> Load:
    """So many callers, each calling again as soon as it is answered. A call that fails ends the bench."""
    times: list[float] = []
    started = time.perf_counter()
    end = started + seconds

    async def caller() -> None:
        before = time.perf_counter()
        while before < end:
            await call()
            after = time.perf_counter()
            times.append(after - before)
            before = after

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return Load(len(times) / (time.perf_counter() - started), tuple(times))


def against(
    metric: str,
    values: Sequence[float],
    unit: str,
    name: str,
    others: Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Measured:
    """The medians of both sides' rounds, and their ratio against a goal (or none)."""
    value, other = statistics.median(values), statistics.median(others)
    ratio = value / other
    goal, holds = "reported", None
    if at_least is not None:
        goal, holds = f">= {at_least}", ratio >= at_least
    elif at_most is not None:
        goal, holds = f"<= {at_most}", ratio <= at_most
    return Measured(
        metric, round(value, 3), unit, name, round(other, 3), round(ratio, 3), goal, holds
    )


def alone(metric: str, value: float, unit: str, *, at_most: float | None = None) -> Measured:
    """A figure with a goal of its own (or none)."""
    goal = f"<= {at_most:g} {unit}" if at_most is not None else "reported"
    holds = value <= at_most if at_most is not None else None
    return Measured(metric, round(value, 3), unit, "", None, None, goal, holds)


def publish(name: str, command: str, measured: Sequence[Measured], notes: str) -> None:
    """Prints the table, writes bench/results/NAME.json, and renews docs/benchmarks.md from all results there are."""
    console = Console()
    table = Table(title=f"{name}: {command}")
    for column in ("metric", "value", "unit", "against", "its value", "ratio", "goal", "holds"):
        table.add_column(column)
    for one in measured:
        table.add_row(*_cells(one))
    console.print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = {
        "name": name,
        "command": command,
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "notes": notes,
        "results": [asdict(one) for one in measured],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page())


def page() -> str:
    """docs/benchmarks.md, from all results."""
    text = (
        "# Benchmarks\n\n"
        "Written by the benches themselves from `bench/results/*.json`; do not edit. Each figure is taken "
        "against something else\nin the same run on the same machine, rounds of both sides interleaved, medians "
        "shown. What falls short is marked **no**.\n"
    )
    for file in sorted(RESULTS.glob("*.json")):
        results = json.loads(file.read_text())
        machine = results["machine"]
        text += (
            f"\n## {results['name']}\n\n`{results['command']}`, {results['taken_at']}, commit "
            f"`{results['commit']}`, {machine['cpus']} CPUs ({machine['cpu']}), "
            f"{machine['memory_gb']} GB, Python {machine['python']}. Load average of the machine, of "
            f"whatever ran on it, when it ended: {machine['load']}.\n\n"
            "| metric | value | unit | against | its value | ratio | goal | holds |\n"
            "|---|---|---|---|---|---|---|---|\n"
        )
        for row in results["results"]:
            text += "| " + " | ".join(_cells(Measured(**row))) + " |\n"
        text += f"\n{results['notes']}\n"
    return text


def _cells(one: Measured) -> list[str]:
    holds = {None: "", True: "yes", False: "**no**"}[one.holds]
    number = "{:,.0f}" if abs(one.value) >= 100 else "{:.2f}"
    return [
        *(one.metric, number.format(one.value), one.unit, one.against),
        "" if one.against_value is None else number.format(one.against_value),
        "" if one.ratio is None else f"{one.ratio:.2f}",
        *(one.goal, holds),
    ]


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    told = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def _machine() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }
