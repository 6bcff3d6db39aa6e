"""Which settings each service gets: the one place that knows how the parts find each other here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.local import places, postgres

SERVICES = ("simulator", "storage", "credits", "generator", "gateway")
# Those with a database, streams or buckets of their own.
MIGRATED = ("storage", "credits", "generator", "gateway")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where everything is, and the secrets shared between the parts."""

    data_dir: Path
    time_factor: float
    postgres_url: str
    nats_url: str
    nats_monitor_url: str  # empty: not known
    s3_endpoint: str
    s3_public_endpoint: str
    s3_access_key: str
    s3_secret_key: str
    s3_region: str
    provider_base_url: str  # empty: no provider account of the openai_videos dialect
    provider_api_key: str
    azure_base_url: str  # empty: none of the azure_jobs dialect
    azure_api_key: str
    runway_base_url: str  # the same of the runway dialect
    runway_api_key: str
    simulator_port: int | None
    listen: Mapping[str, str]  # service to host:port of its gRPC
    metrics_listen: Mapping[str, str]
    service_token_secret: str
    operator_key: str

    def database_url(self, service: str) -> str:
        return postgres.with_database(self.postgres_url, f"framewire_{service}")


def served(addresses: Addresses) -> dict[str, str]:
    """Model to base URL of the provider that makes it. What nobody serves here is not offered."""
    makers = {
        "sora-2": addresses.provider_base_url,
        "sora-2-pro": addresses.provider_base_url,
        "sora-1": addresses.azure_base_url,
        "runway-gen4-turbo": addresses.runway_base_url,
    }
    return {model: base_url for model, base_url in makers.items() if base_url}


def environment(addresses: Addresses) -> dict[str, dict[str, str]]:
    """The variables of each service, without those inherited from us."""
    shared = {name: _shared(name, addresses) for name in MIGRATED}
    shared["storage"] |= {
        "STORAGE_ENDPOINT": addresses.s3_endpoint,
        "STORAGE_PUBLIC_ENDPOINT": addresses.s3_public_endpoint,
        "STORAGE_ACCESS_KEY": addresses.s3_access_key,
        "STORAGE_SECRET_KEY": addresses.s3_secret_key,
        "STORAGE_REGION": addresses.s3_region,
        "STORAGE_INPUT_BUCKET": "framewire-inputs",
        "STORAGE_OUTPUT_BUCKET": "framewire-outputs",
        "STORAGE_SCRATCH_DIR": str(addresses.data_dir / "scratch"),
    }
    shared["credits"] |= {"CREDITS_GENERATOR_ADDRESS": addresses.listen["generator"]}
    shared["generator"] |= {
        "GENERATOR_STORAGE_ADDRESS": addresses.listen["storage"],
        "GENERATOR_NATS_MONITOR_URL": addresses.nats_monitor_url,
        "GENERATOR_TIME_FACTOR": str(addresses.time_factor),
        "GENERATOR_SPOOL_DIR": str(addresses.data_dir / "spool"),
        "GENERATOR_PROVIDER_BASE_URL": addresses.provider_base_url,
        "GENERATOR_PROVIDER_API_KEY": addresses.provider_api_key,
        "GENERATOR_AZURE_BASE_URL": addresses.azure_base_url,
        "GENERATOR_AZURE_API_KEY": addresses.azure_api_key,
        "GENERATOR_RUNWAY_BASE_URL": addresses.runway_base_url,
        "GENERATOR_RUNWAY_API_KEY": addresses.runway_api_key,
    }
    shared["gateway"] |= {
        "GATEWAY_CREDITS_ADDRESS": addresses.listen["credits"],
        "GATEWAY_STORAGE_ADDRESS": addresses.listen["storage"],
        "GATEWAY_GENERATOR_ADDRESS": addresses.listen["generator"],
        "GATEWAY_BOOTSTRAP_KEY": addresses.operator_key,
        "GATEWAY_MODELS": ",".join(served(addresses)),
    }
    if addresses.simulator_port is not None:
        shared["simulator"] = {
            "SIMULATOR_HOST": places.HOST,
            "SIMULATOR_PORT": str(addresses.simulator_port),
            "SIMULATOR_DATA_DIR": str(addresses.data_dir / "simulator"),
            "SIMULATOR_TIME_FACTOR": str(addresses.time_factor),
            "SIMULATOR_API_KEYS": addresses.provider_api_key,
        }
    return shared


def _shared(service: str, addresses: Addresses) -> dict[str, str]:
    values = {
        "DATABASE_URL": addresses.database_url(service),
        "NATS_URL": addresses.nats_url,
        "LISTEN": addresses.listen[service],
        "METRICS_LISTEN": addresses.metrics_listen[service],
        "SERVICE_TOKEN_SECRET": addresses.service_token_secret,
    }
    return {f"{service.upper()}_{name}": value for name, value in values.items()}


def inherited() -> dict[str, str]:
    """What services take from our own environment: all except what would lead them astray."""
    taken = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    path = [str(_ROOT), *filter(None, taken.get("PYTHONPATH", "").split(os.pathsep))]
    taken["PYTHONPATH"] = os.pathsep.join(path)
    taken["PYTHONUNBUFFERED"] = "1"  # the last words of a killed service reach its log
    # grpc and httpx would send loopback calls to a company proxy.
    outside = taken.get("no_proxy") or taken.get("NO_PROXY") or ""
    taken["no_proxy"] = taken["NO_PROXY"] = ",".join(filter(None, [outside, "127.0.0.1,localhost"]))
    return taken


def command(service: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"services.{service}", *arguments]
