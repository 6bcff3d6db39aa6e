"""Certificates to sign films with, of an authority that the tests make."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

EMAIL_PROTECTION = x509.ExtendedKeyUsageOID.EMAIL_PROTECTION


class Credential(NamedTuple):
    """Where a chain and its key lie."""

    certificate: Path
    key: Path


def credential(
    place: Path,
    name: str = "signer",
    *,
    key: Any = None,
    days: float = 30,
    usage: x509.ObjectIdentifier = EMAIL_PROTECTION,
) -> Credential:
    """A certificate of that use, which ends in so many days, with its authority's behind it."""
    root, key = (
        ec.generate_private_key(ec.SECP256R1()),
        key or ec.generate_private_key(ec.SECP256R1()),
    )
    end = datetime.now(UTC) + timedelta(days=days)
    authority = (
        _certificate("authority", "authority", root.public_key(), end, authority=True)
        .sign(root, hashes.SHA256())
    )  # fmt: skip
    leaf = (
        _certificate(name, "authority", key.public_key(), end, authority=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False
        )
        .sign(root, hashes.SHA256())
    )
    made = Credential(place / f"{name}.pem", place / f"{name}.key")
    pem = serialization.Encoding.PEM
    made.certificate.write_bytes(leaf.public_bytes(pem) + authority.public_bytes(pem))
    made.key.write_bytes(
        key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    return made


def _certificate(
    name: str, issuer: str, key: Any, end: datetime, *, authority: bool
) -> x509.CertificateBuilder:
    names = [
        x509.Name(
            [
                x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, f"{each} of the tests"),
                x509.NameAttribute(x509.NameOID.COMMON_NAME, each),
            ]
        )
        for each in (name, issuer)
    ]
    return (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - timedelta(days=60))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                key_cert_sign=authority,
                crl_sign=authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
