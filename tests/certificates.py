"""Certificates of authorities that tests make, and who is let in with them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kit import auth, errors, rpc, tls

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


async def answers(address: str, files: Files) -> bool:
    """Whether a server lets in who has these files, and is trusted by them."""
    async with rpc.channel(address, TOKENS, credentials=tls.client(files)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except (errors.Unavailable, errors.DeadlineExceeded):
            return False
        return True
