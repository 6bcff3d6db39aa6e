"""Mutual TLS by files: who may call whom, and certificates that are exchanged while the server runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from prometheus_client import REGISTRY

from kit import tls
from tests.certificates import HOST, Authority, Files, answers
from tests.waiting import eventually


@dataclass(frozen=True)
class World:
    """A server that lets in who shows a certificate of our authority."""

    authority: Authority
    stranger: Authority
    address: str
    mine: Files


@pytest_asyncio.fixture(loop_scope="session")
async def world(tmp_path: Path) -> AsyncIterator[World]:
    authority, stranger = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    served = replace(authority.pair("server"), tls_client_ca_file=authority.file)
    credentials = tls.server(served)
    assert credentials is not None
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    port = server.add_secure_port(f"{HOST}:0", credentials)
    await server.start()
    mine = replace(authority.pair("client"), tls_ca_file=authority.file)
    yield World(authority, stranger, f"{HOST}:{port}", mine)
    await server.stop(0)


async def test_only_services_of_our_authority_are_let_in_and_called(world: World) -> None:
    assert await answers(world.address, world.mine)
    assert not await answers(world.address, Files()), "plain text"
    without = Files(tls_ca_file=world.authority.file)
    assert not await answers(world.address, without), "no certificate"
    other = replace(world.stranger.pair("stranger"), tls_ca_file=world.authority.file)
    assert not await answers(world.address, other), "another authority's certificate"
    misled = replace(world.mine, tls_ca_file=world.stranger.file)
    assert not await answers(world.address, misled), "a server that we do not trust"


async def test_certificates_are_exchanged_while_it_runs(world: World) -> None:
    assert await answers(world.address, world.mine)
    before = ends_at("server")
    world.stranger.pair("server", hours=2)
    moved_on = replace(world.mine, tls_ca_file=world.stranger.file)
    await eventually(lambda: answers(world.address, moved_on))
    assert not await answers(world.address, world.mine)
    # Operators see when each ends: the new one an hour later.
    assert ends_at("server") >= before + 3500
    assert before - 60 < ends_at("channel") < before + 60


def ends_at(side: str) -> float:
    name = "framewire_certificate_expires_timestamp_seconds"
    return REGISTRY.get_sample_value(name, {"side": side}) or 0.0


@pytest.mark.parametrize(
    "half",
    [
        Files(tls_certificate_file=Path("a")),
        Files(tls_key_file=Path("a")),
        Files(tls_client_ca_file=Path("a")),
    ],
)
def test_half_of_a_pair_is_refused(half: Files) -> None:
    with pytest.raises(ValueError, match="tls_certificate_file"):
        tls.check(half)
