"""The credits service as processes of its own, on a real Postgres and NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kit import auth
from services.local import environment, nats, places, postgres, probes, process

ROOT = Path(__file__).parents[1]
SECRET = "s" * 32
TOKENS = auth.ServiceTokens("gateway", SECRET)


@dataclass
class Ledger:
    """The servers, and a migrated database."""

    folder: Path
    postgres: postgres.Postgres
    nats: nats.Nats

    @property
    def url(self) -> str:
        return self.postgres.database_url("framewire_credits")

    def replica(self, name: str) -> Replica:
        """A process of the service, to be started."""
        address = f"{places.HOST}:{places.choose_port(self.folder, name)}"
        settings = {
            "DATABASE_URL": self.url,
            "NATS_URL": self.nats.url,
            "LISTEN": address,
            "SERVICE_TOKEN_SECRET": SECRET,
            "DRAIN_SECONDS": "2",
        }
        variables = {f"CREDITS_{key}": value for key, value in settings.items()}
        return Replica(name, environment.command("credits"), address, variables, self.folder)


class Replica(process.Service):
    """One process that serves gRPC at `address`."""

    def __init__(
        self,
        name: str,
        command: list[str],
        address: str,
        variables: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.address = address
        env = environment.inherited() | {"PYTHONPATH": str(ROOT)} | dict(variables)
        super().__init__(
            process.Child(name, command, env, lambda: probes.grpc_serving(address)), folder
        )


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Ledger]:
    """Postgres and NATS, and the ledger's database as `migrate` makes it. Replicas are the caller's to start."""
    ledger = Ledger(folder, postgres.Postgres(folder), nats.Nats(folder))
    try:
        await asyncio.gather(ledger.postgres.start(), ledger.nats.start())
        await ledger.postgres.create_database("framewire_credits")
        child = ledger.replica("migrate").child
        migrate = process.Child("migrate", [*child.argv, "migrate"], child.env)
        await process.run_to_end(migrate, folder)
        yield ledger
    finally:
        await ledger.nats.kill()
        await ledger.postgres.destroy()
