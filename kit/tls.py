"""TLS between services and towards callers, by files that are mounted: the same for every service, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import grpc
from cryptography import x509
from prometheus_client import Gauge

from kit import telemetry

ENDS_AT = Gauge(
    "framewire_certificate_expires_timestamp_seconds",
    "When the certificate ends that the server or the channels of this process show, as they read it.",
    ["side"],
)

log = telemetry.logger(__name__)


class Files(Protocol):
    """The part of a service's settings that says where certificates are."""

    @property
    def tls_certificate_file(self) -> Path | None: ...
    @property
    def tls_key_file(self) -> Path | None: ...
    @property
    def tls_client_ca_file(self) -> Path | None: ...
    @property
    def tls_ca_file(self) -> Path | None: ...


def check(files: Files) -> None:
    """Raises ValueError where only half of what belongs together is named."""
    if (files.tls_certificate_file is None) != (files.tls_key_file is None):
        raise ValueError("tls_certificate_file and tls_key_file belong together")
    if files.tls_client_ca_file is not None and files.tls_certificate_file is None:
        raise ValueError("tls_client_ca_file needs tls_certificate_file")


def server(files: Files) -> grpc.ServerCredentials | None:
    """What a server shows; None: it speaks plain text.

    The files are read again when they have changed, for connections from then on. With `tls_client_ca_file` only who
    shows a certificate of that authority is let in.
    """
    certificate, key = files.tls_certificate_file, files.tls_key_file
    if certificate is None or key is None:
        return None
    authority = files.tls_client_ca_file
    named = [path for path in (certificate, key, authority) if path is not None]
    seen = _times(named)

    def read() -> grpc.ServerCertificateConfiguration:
        pair = (key.read_bytes(), _shown("server", certificate))
        roots = authority.read_bytes() if authority is not None else None
        return grpc.ssl_server_certificate_configuration([pair], roots)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            now = _times(named)
            if now == seen:
                return None
            fresh = read()
        except OSError as error:  # half-way through an exchange: what we have is good
            log.warning("certificates_not_read", error=repr(error))
            return None
        seen = now
        log.info("certificates_read_again")
        return fresh

    return grpc.dynamic_ssl_server_credentials(
        read(),
        changed,  # pyright: ignore[reportArgumentType] - None: as it was
        authority is not None,
    )


def client(files: Files) -> grpc.ChannelCredentials | None:
    """What a channel to another service shows and trusts; None: it speaks plain text. Read at the start."""
    if files.tls_ca_file is None:
        return None
    roots = files.tls_ca_file.read_bytes()
    if files.tls_certificate_file is None or files.tls_key_file is None:
        return grpc.ssl_channel_credentials(roots)
    return grpc.ssl_channel_credentials(
        roots, files.tls_key_file.read_bytes(), _shown("channel", files.tls_certificate_file)
    )


def _shown(side: str, certificate: Path) -> bytes:
    """The chain, with its first one's end in a gauge."""
    chain = certificate.read_bytes()
    leaf = x509.load_pem_x509_certificate(chain)
    ENDS_AT.labels(side).set(leaf.not_valid_after_utc.timestamp())
    return chain


def _times(paths: list[Path]) -> list[tuple[int, int]]:
    return [(path.stat().st_mtime_ns, path.stat().st_ino) for path in paths]
