"""Settings: one frozen class per service, read from the environment and from mounted secret files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

SECRETS_DIR_VARIABLE = "FRAMEWIRE_SECRETS_DIR"


class ServiceSettings(BaseSettings):
    """What every service is told. Subclasses set `env_prefix` and add their own."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    listen: str = "127.0.0.1:0"
    """host:port of the gRPC server."""
    health_listen: str = ""
    """host:port where gRPC health alone is served, in plain text, for probes; empty: only at `listen`."""
    metrics_listen: str = "127.0.0.1:0"
    """host:port of Prometheus' /metrics."""
    database_url: SecretStr
    """postgresql://user:password@host:port/database, this service's own."""
    database_pool_size: int = 10
    """Most connections of the pool."""
    incarnation_seconds: float = 10
    """How often a database is compared with what is kept of it outside, where its service does that."""
    nats_url: str = "nats://127.0.0.1:4222"
    """Where the bus is."""
    service_token_secret: SecretStr
    """Signs the tokens between services; the same for all of them, at least 32 characters."""
    tls_certificate_file: Path | None = None
    """What the server at `listen` and channels show, PEM; none: plain text. The server reads it again on change."""
    tls_key_file: Path | None = None
    """Its key."""
    tls_client_ca_file: Path | None = None
    """Only callers with a certificate of this authority are let in; none: anybody. For all but the gateway."""
    tls_ca_file: Path | None = None
    """The authority of the other services' certificates; none: they are called in plain text. Read at the start."""
    reflection: bool = True
    """Whether gRPC reflection is served; off in production."""
    drain_seconds: float = 20
    """How long running calls and steps may take to end after SIGTERM."""
    log_level: str = "info"
    """debug, info, warning or error."""
    otlp_endpoint: str = ""
    """Where traces go, OTLP over gRPC: `http://host:port`, or `https://`; empty: nowhere."""
    sentry_dsn: SecretStr = SecretStr("")
    """Where errors go, a DSN of Sentry or of what speaks its protocol; empty: nowhere but to the log."""


S = TypeVar("S", bound=ServiceSettings)


def load(cls: type[S]) -> S:
    """Reads the settings or ends the process with one line per mistake."""
    try:
        return cls(_secrets_dir=os.environ.get(SECRETS_DIR_VARIABLE) or None)  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        prefix = cls.model_config.get("env_prefix", "")
        lines = [
            f"  {prefix}{'.'.join(str(part) for part in item['loc'])}".upper() + f": {item['msg']}"
            for item in error.errors()
        ]
        raise SystemExit("settings are not usable:\n" + "\n".join(lines)) from None
