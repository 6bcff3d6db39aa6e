"""Signs what was made (Content Credentials, C2PA) where a certificate is configured. No film is lost for want of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from prometheus_client import Counter, Gauge

from kit import telemetry
from services.storage.media import facts, sandbox

log = telemetry.logger(__name__)

MARKED = "c2pa.edited.metadata"
SMALLER = "c2pa.transcoded"
"""What was done to a video that has a statement already."""

UNSIGNED = Counter(
    "framewire_storage_unsigned", "Videos stored with their mark alone, since signing failed."
)
EXPIRES_AT = Gauge(
    "framewire_storage_signing_expires_timestamp_seconds",
    "When the certificate ends that videos are signed with.",
)
_USES = {
    "1.3.6.1.5.5.7.3.4": "e-mail protection",
    "1.3.6.1.5.5.7.3.36": "document signing",
    "1.3.6.1.4.1.62558.2.1": "C2PA claim signing",
}
"""What the certificates of C2PA's signers may be made out for."""
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


def configured(certificate_file: Path | None, key_file: Path | None) -> sandbox.Signing | None:
    """What workers sign with, if anything. Exits with what is wrong about it."""
    if certificate_file is None or key_file is None:
        return None
    try:
        return credential(certificate_file, key_file)
    except ValueError as error:
        raise SystemExit(f"settings are not usable:\n  {error}") from None


def credential(certificate_file: Path, key_file: Path) -> sandbox.Signing:
    """What workers sign with. Raises ValueError, saying what to do, unless it is good from now on."""
    try:
        chain = x509.load_pem_x509_certificates(certificate_file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{certificate_file} is no chain of certificates in PEM, the signer's first: {error}"
        ) from None
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{key_file} is no private key in PEM without a password: {error}"
        ) from None
    leaf = chain[0]
    if leaf.public_key() != key.public_key():
        raise ValueError(
            f"the key in {key_file} is not that of the first certificate in {certificate_file}"
        )
    if leaf.not_valid_after_utc <= datetime.now(UTC):
        raise ValueError(
            f"the certificate in {certificate_file} ended at {leaf.not_valid_after_utc}: renew it, "
            "or leave the setting out to store videos with their mark alone"
        )
    if not _uses(leaf) & _USES.keys():
        raise ValueError(
            f"the certificate in {certificate_file} must be for {' or '.join(_USES.values())}: "
            "ask its authority for such a one"
        )
    algorithm = _algorithm(key)
    if not algorithm:
        raise ValueError(
            f"the key in {key_file} is of a kind that C2PA does not know: use EC P-256, P-384 or P-521, Ed25519 or RSA"
        )
    EXPIRES_AT.set(leaf.not_valid_after_utc.timestamp())
    return sandbox.Signing(algorithm, str(certificate_file.resolve()), str(key_file.resolve()))


def _uses(certificate: x509.Certificate) -> set[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return set()
    return {use.dotted_string for use in found.value}


def _algorithm(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return _CURVES.get(key.curve.name, "")
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    return "ps256" if isinstance(key, rsa.RSAPrivateKey) else ""


class Signer:
    """Signs files in scratch."""

    def __init__(self, workers: sandbox.MediaWorkers) -> None:
        self._workers = workers

    async def sign(
        self, path: Path, original: Path, change: str
    ) -> tuple[Path, facts.MarkedVideo] | None:
        """The signed file beside `path`, which is removed; None: it stays, to be stored as it is. Raises MediaBusy."""
        out = path.with_name(f"{path.name}-signed")
        try:
            signed = await self._workers.sign_video(path, out, original, change)
        except (facts.MediaRefused, facts.MediaWorkerFailed) as error:
            UNSIGNED.inc()
            log.error("video_not_signed", path=path.parent.name, error=str(error))
            return None
        path.unlink()
        return out, signed
