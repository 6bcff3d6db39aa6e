"""Servers and providers of one's own, given by environment, instead of those that `services.local` starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.local import environment, errors, stack

SERVERS = {
    "FRAMEWIRE_POSTGRES_URL": "postgresql://u:p@10.0.0.1/postgres",
    "FRAMEWIRE_NATS_URL": "nats://10.0.0.1:4222",
    "FRAMEWIRE_S3_ENDPOINT": "http://10.0.0.1:9000",
    "FRAMEWIRE_S3_ACCESS_KEY": "a",
    "FRAMEWIRE_S3_SECRET_KEY": "s",
}


async def test_outer_servers_replace_the_embedded_ones(tmp_path: Path) -> None:
    outer = SERVERS | {
        "FRAMEWIRE_PROVIDER_BASE_URL": "http://10.0.0.2/v1",
        "FRAMEWIRE_PROVIDER_API_KEY": "p",
    }
    del outer["FRAMEWIRE_NATS_URL"]
    async with stack.Stack(tmp_path / "stack", services=(), environ=outer) as whole:
        assert whole.supervisor.names == ["nats"]
        variables = environment.environment(whole.addresses)
    assert variables["credits"]["CREDITS_DATABASE_URL"] == (
        "postgresql://u:p@10.0.0.1/framewire_credits"
    )
    assert variables["storage"]["STORAGE_ENDPOINT"] == "10.0.0.1:9000"
    assert variables["generator"]["GENERATOR_PROVIDER_BASE_URL"] == "http://10.0.0.2/v1"
    # No simulator runs then: the account at it is not opened, and what only it served is not offered.
    assert variables["generator"]["GENERATOR_AZURE_BASE_URL"] == ""
    assert variables["gateway"]["GATEWAY_MODELS"] == "sora-2,sora-2-pro"

    del outer["FRAMEWIRE_S3_SECRET_KEY"]
    with pytest.raises(errors.LocalError, match="FRAMEWIRE_S3_SECRET_KEY is missing"):
        await stack.Stack(tmp_path / "stack", services=(), environ=outer).start()


async def test_an_outer_azure_server_replaces_the_simulator(tmp_path: Path) -> None:
    outer = SERVERS | {
        "FRAMEWIRE_AZURE_BASE_URL": "http://10.0.0.3/openai/v1",
        "FRAMEWIRE_AZURE_API_KEY": "z",
    }
    assert "simulator" not in stack.Stack(tmp_path, environ=outer).services

    async def variables() -> dict[str, dict[str, str]]:
        async with stack.Stack(tmp_path, services=(), environ=outer) as whole:
            return environment.environment(whole.addresses)

    azure = await variables()
    assert azure["generator"]["GENERATOR_AZURE_BASE_URL"] == "http://10.0.0.3/openai/v1"
    assert azure["generator"]["GENERATOR_AZURE_API_KEY"] == "z"
    assert azure["generator"]["GENERATOR_PROVIDER_BASE_URL"] == ""
    assert azure["generator"]["GENERATOR_PROVIDER_API_KEY"] == ""
    assert azure["gateway"]["GATEWAY_MODELS"] == "sora-1"

    outer |= {
        "FRAMEWIRE_PROVIDER_BASE_URL": "http://10.0.0.2/v1",
        "FRAMEWIRE_PROVIDER_API_KEY": "p",
    }
    both = await variables()
    assert both["generator"]["GENERATOR_PROVIDER_BASE_URL"] == "http://10.0.0.2/v1"
    assert both["generator"]["GENERATOR_AZURE_BASE_URL"] == "http://10.0.0.3/openai/v1"
    assert both["gateway"]["GATEWAY_MODELS"] == "sora-2,sora-2-pro,sora-1"

    del outer["FRAMEWIRE_AZURE_API_KEY"]
    with pytest.raises(errors.LocalError, match="FRAMEWIRE_AZURE_API_KEY is missing"):
        await variables()
