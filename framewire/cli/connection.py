"""Where the CLI connects to: what it is told, else the system that runs on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from framewire import client, transport
from framewire.cli import output

RETRY_SECONDS = 20.0
_PROBE_SECONDS = 3.0
_NAMESPACE = uuid.UUID("5f1d3c1e-7a0b-5d0e-9c44-f3a9a1b0c2d7")
_LANES = ("VIP", "STANDARD", "BATCH")


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway and who calls it. `is_local`: with the operator key of the system on this machine."""

    address: str
    api_key: str
    account_id: str
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class LocalStack:
    """What `services.local` wrote down about the system that it runs."""

    gateway: str
    operator_key_file: Path
    nats_url: str


def find(address: str, api_key: str, account_id: str) -> Target:
    """The gateway, the key and the account. The local operator key goes to the local gateway alone."""
    api_key = api_key or _key_from_file()
    if address and api_key:
        return Target(address, api_key, account_id)
    if address:
        raise output.usage(
            f"no API key for {address}: give --api-key, FRAMEWIRE_API_KEY or FRAMEWIRE_API_KEY_FILE"
        )
    stack = local_stack()
    if api_key:
        return Target(stack.gateway, api_key, account_id)
    try:
        key = stack.operator_key_file.read_text().strip()
    except OSError as error:
        raise output.usage(f"cannot read the local operator key: {error}") from error
    return Target(stack.gateway, key, account_id, is_local=True)


def nats_url(given: str) -> str:
    """The bus to read events from."""
    return given or local_stack().nats_url


def local_stack() -> LocalStack:
    """The system that runs on this machine; ends the command when there is none."""
    data_dir = Path(os.environ.get("FRAMEWIRE_DATA_DIR") or ".framewire")
    try:
        content = json.loads((data_dir / "stack.json").read_text())
        return LocalStack(
            gateway=content["gateway"],
            operator_key_file=Path(content["operator_key_file"]),
            nats_url=content["programs"]["nats"]["address"],
        )
    except FileNotFoundError:
        raise output.usage(
            f"nothing runs here (no {data_dir}/stack.json): start it with `framewire local up`, "
            "or say where it is: --address and --api-key, for events --nats-url"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise output.usage(f"cannot read {data_dir}/stack.json: {error!r}") from error


@asynccontextmanager
async def connected(target: Target, *, for_account: bool = True) -> AsyncIterator[client.Client]:
    """A client; on the local system, where no account was named, for its one demo account."""
    opened = client.Client(
        target.address,
        target.api_key,
        account_id=target.account_id,
        retry_seconds=RETRY_SECONDS,
    )
    async with opened:
        await require_listener(target.address)
        if for_account and target.is_local and not target.account_id:
            opened.account_id = await local_account(opened, target.api_key)
        yield opened


async def require_listener(address: str) -> None:
    """Fails at once, and plainly, where nothing listens on our own machine: there, waiting does not help."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    host, port = parts.hostname or "", parts.port
    if port is None or not transport.is_loopback(host):
        return
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        why = os.strerror(error.errno) if error.errno else "no answer"
        raise transport.failure(
            grpc.StatusCode.UNAVAILABLE,
            "DEPENDENCY_UNAVAILABLE",
            f"cannot reach {host}:{port}: {why}",
        ) from None
    writer.close()


async def local_account(operator: client.Client, operator_key: str) -> str:
    """The one account of a local system, made on first use. Idempotent: its request_id follows from the key."""
    account = await operator.create_account(
        "local", lanes=_LANES, request_id=fixed_request_id(operator_key, "account")
    )
    return account.account_id


def fixed_request_id(operator_key: str, purpose: str) -> str:
    """The same id whenever a local system does the same thing."""
    return str(uuid.uuid5(_NAMESPACE, f"{purpose}:{operator_key}"))


def _key_from_file() -> str:
    if not (place := os.environ.get("FRAMEWIRE_API_KEY_FILE", "")):
        return ""
    try:
        return Path(place).read_text().strip()
    except OSError as error:
        raise output.usage(f"FRAMEWIRE_API_KEY_FILE: {error}") from error
