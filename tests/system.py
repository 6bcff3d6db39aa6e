"""A whole Framewire for tests: every server and service real, each a process of its own, on loopback."""

from __future__ import annotations

import asyncio
import json
import urllib.request
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import psutil

from framewire import client
from framewire.credits.v1 import ledger_pb2
from framewire.gateway.v1 import operator_pb2, operator_pb2_grpc
from services.local import stack
from tests import containers
from tests.waiting import eventually

TIME_FACTOR = 50.0
"""Provider time runs so much faster; leases and our own timeouts are real, and short by these settings:"""
SETTINGS: dict[str, dict[str, str]] = {
    "gateway": {
        "GATEWAY_ADMIT_SECONDS": "3",
        "GATEWAY_SWEEP_SECONDS": "0.3",
        "GATEWAY_SWEEP_GRACE_SECONDS": "1",
        "GATEWAY_SWEEP_UNACCEPTED_SECONDS": "1",
        "GATEWAY_SWEEP_OVERDUE_SECONDS": "5",
        "GATEWAY_SWEEP_RETRY_SECONDS": "0.5",
        "GATEWAY_ERASE_SETTLE_SECONDS": "0.5",
    },
    "credits": {"CREDITS_FLOOR_SECONDS": "1", "CREDITS_HOLD_OVERDUE_SECONDS": "5"},
    "generator": {
        "GENERATOR_POST_TIMEOUT_SECONDS": "2",
        "GENERATOR_SUBMIT_LEASE_MARGIN_SECONDS": "1",
        "GENERATOR_PREPARE_LEASE_SECONDS": "3",
        "GENERATOR_FETCH_LEASE_SECONDS": "3",
        "GENERATOR_PASS_LEASE_SECONDS": "2",
        "GENERATOR_LOOP_SECONDS": "0.1",
    },
    "storage": {},
    "simulator": {},
}


class System:
    """The running system and what tests do with it."""

    def __init__(self, running: stack.Stack, outer: containers.Outer, failpoints: Path) -> None:
        self.stack = running
        self.bus = outer.server(running, "nats")
        self.postgres = outer.server(running, "postgres")
        self.supervisor = running.supervisor
        self._failpoints = failpoints
        self.operator: client.Client

    async def account(self, credits: int = 1000) -> client.Client:
        """A new account with credits, and a client that holds a key of it. Close it with `aclose` or `async with`."""
        account = await self.operator.create_account(
            f"test {uuid.uuid4().hex[:8]}", requests_per_minute=MANY, videos_per_hour=MANY
        )
        if credits:
            await self.operator.grant(account.account_id, credits)
        key = await self.operator.create_api_key(account_id=account.account_id, display_name="test")
        address = self.stack.gateway_address
        return client.Client(address, key.secret, account_id=account.account_id)

    async def check_books(self) -> ledger_pb2.CheckBooksResponse:
        """The ledger's own proof."""
        async with grpc.aio.insecure_channel(self.stack.gateway_address) as channel:
            stub = operator_pb2_grpc.OperatorServiceStub(channel)
            metadata = (("authorization", f"Bearer {self.stack.operator_key}"),)
            return await stub.CheckBooks(
                operator_pb2.CheckBooksRequest(), metadata=metadata, timeout=20
            )

    def arm(self, point: str, action: str = "kill") -> None:
        """The next time that a service comes by this failpoint, it does the action."""
        self._failpoints.write_text(f"{self.armed()}{point}={action}\n")

    def armed(self) -> str:
        """What has not struck yet."""
        return self._failpoints.read_text() if self._failpoints.exists() else ""

    def disarm(self) -> str:
        """Takes back what did not strike; answers it."""
        left = self.armed()
        self._failpoints.write_text("")
        return left

    def is_stopped(self, name: str) -> bool:
        """Whether a service has met a failpoint that stops it, and was not woken up since."""
        pid = self.supervisor.get(name).pid
        assert pid is not None
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED

    async def revive(self, name: str) -> None:
        """Waits for a service to die of its failpoint and starts it again."""
        await self.supervisor.wait_exit(name)
        await self.supervisor.start(name)

    async def simulated(
        self, path: str, body: Mapping[str, Any] | None = None, method: str | None = None
    ) -> Any:
        """An answer of the simulator's own pages; with a body it is a POST unless told."""
        base = self.stack.addresses.provider_base_url.removesuffix("/v1")

        def ask() -> Any:
            data = json.dumps(body).encode() if body is not None else None
            request = urllib.request.Request(f"{base}{path}", data=data, method=method)
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)

        return await asyncio.to_thread(ask)

    async def paid_jobs(self, prompt: str) -> list[Any]:
        """What the simulator accepted, and would bill, for a prompt: the oracle."""
        entries = await self.simulated("/_sim/log?kind=accepted")
        found = entries["entries"] if isinstance(entries, dict) else entries
        return [entry for entry in found if prompt in entry.get("prompt", "")]

    @asynccontextmanager
    async def database(self, service: str) -> AsyncIterator[asyncpg.Connection]:
        """A connection to a service's own database."""
        connection = await asyncpg.connect(self.stack.addresses.database_url(service))
        try:
            yield connection
        finally:
            await connection.close()

    async def quiet(self, within_seconds: float = 60.0) -> None:
        """Waits until nothing is under way any more: no live video, no held credit, nothing untold."""

        async def nothing() -> bool:
            async with self.database("gateway") as gateway:
                live = await gateway.fetchval(
                    "SELECT count(*) FROM videos WHERE state IN ('ADMITTING', 'PENDING', 'PROCESSING')"
                )
            async with self.database("credits") as credits_:
                held = await credits_.fetchval("SELECT count(*) FROM holds WHERE state = 'HELD'")
                untold = await credits_.fetchval(
                    "SELECT count(*) FROM outbox WHERE published_at IS NULL"
                )
            async with self.database("generator") as generator:
                untold += await generator.fetchval(
                    "SELECT count(*) FROM outbox WHERE published_at IS NULL"
                )
            assert (live, held, untold) == (0, 0, 0), f"live {live}, held {held}, untold {untold}"
            return True

        await eventually(nothing, within_seconds=within_seconds, every_seconds=0.2)


MANY = 1_000_000


@asynccontextmanager
async def running(
    data_dir: Path, overrides: Mapping[str, Mapping[str, str]] | None = None
) -> AsyncIterator[System]:
    """A system of its own in a directory of its own."""
    failpoints = data_dir / "failpoints"
    settings = {
        name: {**values, "FRAMEWIRE_FAILPOINTS": str(failpoints), **(overrides or {}).get(name, {})}
        for name, values in SETTINGS.items()
    }
    async with containers.outer_servers() as outer:
        whole = stack.Stack(
            data_dir, time_factor=TIME_FACTOR, overrides=settings, environ=outer.environ
        )
        try:
            await whole.start()
            system = System(whole, outer, failpoints)
            async with client.Client(whole.gateway_address, whole.operator_key) as operator:
                system.operator = operator
                yield system
        finally:
            await whole.destroy()
