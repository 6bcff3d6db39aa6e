"""What `make test-compose` looks at from outside the calls: metrics of every replica, NATS's consumers, Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import urllib.request
from collections.abc import Mapping
from typing import Any, Protocol

from framewire import subjects
from services.credits import settlement
from services.gateway import deliverer, projector
from tests import monitoring
from tests.waiting import eventually

JSZ = "'http://127.0.0.1:8222/jsz?consumers=1'"
PYTHON = f'python3 -c "import urllib.request as r; print(r.urlopen({JSZ}).read().decode())"'
READ = (
    "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
)
CONSUMERS = {
    subjects.EVENTS_STREAM: {projector.DURABLE, deliverer.DURABLE, settlement.DURABLE},
    subjects.JOBS_STREAM: {"generator"},
}
PROMETHEUS = "prom/prometheus:v3.5.0"
SCRAPED_WITHIN_SECONDS = 120.0


class Project(Protocol):
    """The compose project under test."""

    env: dict[str, str]
    prometheus: str
    """host:port that it is published at."""

    def __call__(self, *arguments: str, quiet: bool = False) -> str: ...
    def containers(self, service: str) -> list[dict[str, Any]]: ...


async def bus_is_used(compose: Project, services: tuple[str, ...]) -> None:
    """Each durable consumer is there, which its user must be allowed to make; and nothing waits to be told."""
    told = json.loads(compose("exec", "-T", "nats", "sh", "-c", f"wget -q -O - {JSZ} || {PYTHON}"))
    found = {
        stream["name"]: {one["name"] for one in stream.get("consumer_detail") or ()}
        for account in told["account_details"]
        for stream in account["stream_detail"]
    }
    for stream, names in CONSUMERS.items():
        assert names <= found[stream], f"{stream} has the consumers {found[stream]}, not {names}"

    def waiting() -> dict[str, float]:
        return {
            service: max(
                float(count)
                for replica in compose.containers(service)
                for count in re.findall(
                    r"^framewire_outbox_waiting (\S+)$", _metrics(replica["Id"]), re.MULTILINE
                )
            )
            for service in services
        }

    async def all_told() -> bool:
        return not any((await asyncio.to_thread(waiting)).values())

    await eventually(
        all_told, within_seconds=60, every_seconds=2, what="an empty outbox everywhere"
    )


def _metrics(container: str) -> str:
    command = ["docker", "exec", container, "python", "-c", READ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def prometheus_scrapes(compose: Project, replicas: Mapping[str, int]) -> bool:
    """The profile's Prometheus finds every replica and has the rules; False: its image is not to be had here."""
    image = compose.env.get("PROMETHEUS_IMAGE", PROMETHEUS)
    if not await asyncio.to_thread(_is_here, image):
        return False
    compose("--profile", "monitoring", "up", "-d", "--no-build", "--no-deps", "prometheus")
    wanted = {f"framewire-{name}": count for name, count in replicas.items()}

    async def scraped() -> bool:
        found: dict[str, int] = {}
        targets = (await _asked(compose, "targets"))["activeTargets"]
        for target in targets:
            job = target["labels"]["job"]
            found[job] = found.get(job, 0) + (target["health"] == "up")
        return found == wanted

    await eventually(
        scraped, within_seconds=SCRAPED_WITHIN_SECONDS, every_seconds=3, what="targets"
    )
    rules = [
        rule for group in (await _asked(compose, "rules"))["groups"] for rule in group["rules"]
    ]
    loaded = {rule["name"] for rule in rules if rule["type"] == "alerting"}
    assert loaded == monitoring.ALERTS.keys(), "other alerts are loaded"
    broken = [rule["name"] for rule in rules if rule["health"] == "err"]
    assert not broken, f"these rules fail: {broken}"
    return True


def _is_here(image: str) -> bool:
    command = ["docker", "image", "inspect", image]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


async def _asked(compose: Project, what: str) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        url = f"http://{compose.prometheus}/api/v1/{what}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    return await asyncio.to_thread(read)
