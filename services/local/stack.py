"""The servers and the services composed: one object that is the whole system."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from services.local import environment as environments
from services.local import errors, nats, places, postgres, probes, process, s3, supervisor

PREFERRED_GATEWAY_PORT = 7700
_SERVERS = ("postgres", "nats", "s3")


class Stack:
    """Everything on one machine, kept in `data_dir`. `async with`; one at a time for a directory.

    `overrides` adds environment variables to a service; `services` runs fewer than all. `environ`
    (default: ours) may replace the embedded servers and the simulator: FRAMEWIRE_POSTGRES_URL,
    _NATS_URL, _S3_ENDPOINT with _S3_ACCESS_KEY and _S3_SECRET_KEY, _PROVIDER_BASE_URL with
    _PROVIDER_API_KEY, _AZURE_BASE_URL with _AZURE_API_KEY. With one provider of one's own, nothing
    is simulated, and only what that one serves is offered.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        time_factor: float = 1.0,
        services: Sequence[str] = environments.SERVICES,
        gateway_port: int | None = None,
        overrides: Mapping[str, Mapping[str, str]] | None = None,
        environ: Mapping[str, str] | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        if unknown := set(services) - set(environments.SERVICES):
            raise errors.LocalError(f"no service is called {', '.join(sorted(unknown))}")
        if not time_factor > 0:
            raise errors.LocalError(f"the time factor must be above 0, not {time_factor:g}")
        self.data_dir = places.prepare(data_dir)
        self.time_factor = time_factor
        self.environ = dict(os.environ if environ is None else environ)
        self.supervisor = supervisor.Supervisor(self.data_dir, report=report)
        self.postgres = postgres.Postgres(self.data_dir)
        self.nats = nats.Nats(self.data_dir)
        self.s3 = s3.S3(self.data_dir)
        self._gateway_port = gateway_port
        self._overrides = dict(overrides or {})
        self._addresses: environments.Addresses | None = None
        self._held = contextlib.ExitStack()
        self.services = tuple(
            name
            for name in environments.SERVICES
            if name in services and (name != "simulator" or simulated(self.environ))
        )

    @property
    def addresses(self) -> environments.Addresses:
        if self._addresses is None:
            raise errors.LocalError("the stack was not started")
        return self._addresses

    @property
    def gateway_address(self) -> str:
        """host:port of the gateway's gRPC."""
        return self.addresses.listen["gateway"]

    @property
    def operator_key(self) -> str:
        """The API key with operator rights, made on the first start."""
        return places.secret(self.operator_key_path, lambda: f"fw_{secrets.token_hex(24)}")

    @property
    def operator_key_path(self) -> Path:
        return self.data_dir / "operator.key"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Raises LocalError, leaving nothing running."""
        self._held.enter_context(places.held(self.data_dir))
        self._held.callback((self.data_dir / "stack.json").unlink, missing_ok=True)
        try:
            ports = self._service_ports()  # first: a busy port is said before anything starts
            await self._start_servers()
            self._addresses = self._find_addresses(ports)
            await self._start_services()
            self._write_stack_file()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """All, in reverse order of their start. Idempotent."""
        try:
            await self.supervisor.stop_all()
        finally:
            self._held.close()

    async def destroy(self) -> None:
        """Stops all and deletes the Postgres data, which may lie outside `data_dir`. For tests."""
        await self.stop()
        await self.postgres.destroy()

    def _outer(self, name: str) -> str:
        return self.environ.get(f"FRAMEWIRE_{name}", "").strip()

    def _service_ports(self) -> dict[str, int]:
        ports: dict[str, int] = {}
        for name in environments.SERVICES:
            if name == "gateway" and self._gateway_port is not None:
                ports[name] = places.require_port(self._gateway_port, "--gateway-port")
            else:
                preferred = PREFERRED_GATEWAY_PORT if name == "gateway" else None
                ports[name] = places.choose_port(self.data_dir, name, preferred)
        for name in environments.MIGRATED:
            ports[f"{name}-metrics"] = places.choose_port(self.data_dir, f"{name}-metrics")
        return ports

    async def _start_servers(self) -> None:
        replaced = {"postgres": "POSTGRES_URL", "nats": "NATS_URL", "s3": "S3_ENDPOINT"}
        for server in (self.postgres, self.nats, self.s3):
            if not self._outer(replaced[server.name]):
                self.supervisor.add(server)
        await self.supervisor.start_all()

    def _find_addresses(self, ports: Mapping[str, int]) -> environments.Addresses:
        listen = {name: f"{places.HOST}:{ports[name]}" for name in environments.MIGRATED}
        metrics = {
            name: f"{places.HOST}:{ports[f'{name}-metrics']}" for name in environments.MIGRATED
        }
        endpoint = self._outer("S3_ENDPOINT").removeprefix("http://") or self.s3.endpoint
        embedded_s3 = not self._outer("S3_ENDPOINT")
        simulator_url = f"http://{places.HOST}:{ports['simulator']}"
        provider_base_url, provider_api_key = self._provider("PROVIDER", f"{simulator_url}/v1")
        azure_base_url, azure_api_key = self._provider("AZURE", f"{simulator_url}/openai/v1")
        runway_base_url, runway_api_key = self._provider("RUNWAY", f"{simulator_url}/v1")
        return environments.Addresses(
            data_dir=self.data_dir,
            time_factor=self.time_factor,
            postgres_url=self._outer("POSTGRES_URL") or self.postgres.url,
            nats_url=self._outer("NATS_URL") or self.nats.url,
            nats_monitor_url="" if self._outer("NATS_URL") else self.nats.monitor_url,
            s3_endpoint=endpoint,
            s3_public_endpoint=self._outer("S3_PUBLIC_ENDPOINT") or endpoint,
            s3_access_key=self.s3.access_key if embedded_s3 else self._required("S3_ACCESS_KEY"),
            s3_secret_key=self.s3.secret_key if embedded_s3 else self._required("S3_SECRET_KEY"),
            s3_region=self._outer("S3_REGION") or s3.REGION,
            provider_base_url=provider_base_url,
            provider_api_key=provider_api_key,
            azure_base_url=azure_base_url,
            azure_api_key=azure_api_key,
            runway_base_url=runway_base_url,
            runway_api_key=runway_api_key,
            simulator_port=ports["simulator"],
            listen=listen,
            metrics_listen=metrics,
            service_token_secret=places.secret(
                self.data_dir / "secrets" / "service-token", lambda: secrets.token_hex(32)
            ),
            operator_key=self.operator_key,
        )

    def _provider(self, dialect: str, simulator_url: str) -> tuple[str, str]:
        """Base URL and key of who speaks a dialect; both empty: nobody, for the one provider given speaks the other."""
        if base_url := self._outer(f"{dialect}_BASE_URL"):
            return base_url, self._required(f"{dialect}_API_KEY")
        if simulated(self.environ):
            return simulator_url, places.secret(self.data_dir / "secrets" / "simulator")
        return "", ""

    def _required(self, name: str) -> str:
        if value := self._outer(name):
            return value
        raise errors.LocalError(f"FRAMEWIRE_{name} is missing; the outer server needs it")

    async def _start_services(self) -> None:
        variables = environments.environment(self.addresses)
        base = environments.inherited()
        full = {
            name: {**base, **variables[name], **self._overrides.get(name, {})}
            for name in self.services
        }
        migrated = [name for name in self.services if name in environments.MIGRATED]
        await process.together(*(self._migrate(name, full[name]) for name in migrated))
        for name in self.services:
            self.supervisor.add(process.Service(self._child(name, full[name]), self.data_dir))
        await self.supervisor.start_all()

    async def _migrate(self, name: str, env: Mapping[str, str]) -> None:
        await postgres.create_database(self.addresses.postgres_url, f"framewire_{name}")
        command = environments.command(name, "migrate")
        child = process.Child(f"{name}-migrate", command, env, cwd=self.data_dir)
        await process.run_to_end(child, self.data_dir)

    def _child(self, name: str, env: Mapping[str, str]) -> process.Child:
        async def ready() -> bool:
            return await probe(name, self.where()[name])

        return process.Child(
            name,
            environments.command(name),
            env,
            ready_probe=ready,
            ready_seconds=60.0,
            stop_seconds=20.0,
            cwd=self.data_dir,
        )

    def where(self) -> dict[str, str]:
        """What to show and to probe: the address of each part that runs or is used. No secrets."""
        shown = {
            "postgres": postgres.without_password(self.addresses.postgres_url),
            "nats": self.addresses.nats_url,
            "s3": self.addresses.s3_endpoint,
        }
        for name in self.services:
            if name == "simulator":
                shown[name] = self.addresses.provider_base_url
            else:
                shown[name] = self.addresses.listen[name]
        return shown

    def _write_stack_file(self) -> None:
        """For `status` and for scripts. Private, for the Postgres address holds the password."""
        pids = {one.name: one.pid for one in self.supervisor.status()}
        content = {
            "pid": os.getpid(),
            "data_dir": str(self.data_dir),
            "gateway": self.gateway_address,
            "operator_key_file": str(self.operator_key_path),
            "time_factor": self.time_factor,
            "metrics": dict(self.addresses.metrics_listen),
            "postgres_url": self.addresses.postgres_url,
            "programs": {
                name: {"address": address, "pid": pids.get(name), "outer": name not in pids}
                for name, address in self.where().items()
            },
        }
        places.write_private(self.data_dir / "stack.json", json.dumps(content, indent=2) + "\n")


def simulated(environ: Mapping[str, str]) -> bool:
    """Whether the simulator makes the videos: no provider of one's own is given."""
    names = [f"FRAMEWIRE_{name}_BASE_URL" for name in ("PROVIDER", "AZURE", "RUNWAY")]
    return not any(environ.get(name, "").strip() for name in names)


async def probe(name: str, address: str) -> bool:
    """Whether a part of the stack answers at its address (Postgres: with the password in it)."""
    match name:
        case "postgres":
            return await probes.postgres_answers(address)
        case "nats":
            return await probes.nats_answers(address)
        case "s3":
            return await probes.http_answers(address)
        case "simulator":
            server = urlsplit(address)
            return await probes.http_status(server.hostname or "", server.port or 80) == 200
        case _:
            return await probes.grpc_serving(address)
