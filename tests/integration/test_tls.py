"""Mutual TLS by files: who may call whom, and certificates that are exchanged while the server runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from prometheus_client import REGISTRY

from kit import auth, errors, rpc, tls
from tests.waiting import eventually

TOKENS = auth.ServiceTokens("tester", "s" * 32)
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Files:
    """Settings of a service, as far as TLS goes."""

    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    tls_ca_file: Path | None = None


class Authority:
    """Signs certificates for this machine."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = (
            folder,
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        )
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(_pem(self._signed(self._name, self._key, authority=True)))

    def pair(self, name: str, hours: int = 1) -> Files:
        """A certificate with its key, in files of that name; written again, they are exchanged."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        _exchange(certificate, _pem(self._signed(subject, key, authority=False, hours=hours)))
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        _exchange(key_file, private)
        return Files(certificate, key_file)

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        authority: bool,
        hours: int = 1,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))])
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=hours))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _exchange(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(f"{path.suffix}.new")
    fresh.write_bytes(content)
    fresh.replace(path)


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


async def answers(address: str, files: Files) -> bool:
    async with rpc.channel(address, TOKENS, credentials=tls.client(files)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except (errors.Unavailable, errors.DeadlineExceeded):
            return False
        return True


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
