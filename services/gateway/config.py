"""Settings of the gateway (GATEWAY_...)."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from kit import config
from services.gateway import oidc


class Settings(config.ServiceSettings):
    """What the gateway is told."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", frozen=True, extra="ignore")

    credits_address: str
    """host:port of the ledger."""
    storage_address: str
    """host:port of the storage service."""
    generator_address: str
    """host:port of the generator."""
    bootstrap_key: SecretStr = SecretStr("")
    """An operator's API key that exists from the start ("fw_" and 32 or more letters and digits); empty: none."""
    oidc_issuers: tuple[oidc.Issuer, ...] = ()
    """Whose tokens are taken beside API keys: JSON, [{"issuer", "audience": [...], "jwks_url", ...}, ...]."""
    page_token_secret: SecretStr = SecretStr("")
    """Signs page tokens; empty: derived from the service token secret."""
    models_file: Path = Path(__file__).parent / "models.yaml"
    """The models that can be asked for."""
    models: str = ""
    """Names of those that are offered here, comma between them; empty: all of the file."""
    admit_seconds: float = Field(default=10, gt=0)
    """How long an admission may take before another may take it over or undo it."""
    publish_seconds: float = Field(default=0.25, gt=0)
    """How long CreateVideo waits for the bus; the sweeper rings again."""
    default_max_in_flight: int = Field(default=200, ge=1)
    """Videos in flight of an account that names no limit."""
    default_requests_per_minute: int = Field(default=600, ge=1)
    """Requests per minute of an account that names no limit."""
    default_videos_per_hour: int = Field(default=2000, ge=1)
    """Videos per hour of an account that names no limit."""
    sweep_seconds: float = Field(default=1, gt=0)
    """Pause between two passes of the sweeper."""
    sweep_grace_seconds: float = Field(default=10, ge=0)
    """How long an overdue admission waits for a call with its request_id before it is undone."""
    sweep_unaccepted_seconds: float = Field(default=5, gt=0)
    """How old a video gets that the generator has not been heard of before the generator is asked."""
    sweep_overdue_seconds: float = Field(default=60, gt=0)
    """How long a live video may be silent before the generator is asked."""
    sweep_retry_seconds: float = Field(default=5, gt=0)
    """Pause before something that failed is tried again."""
    erase_settle_seconds: float = Field(default=600, ge=0)
    """No erasure of an account is through sooner: calls that were under way, uploads too, have ended then."""
    reconcile_interval_seconds: float = Field(default=600, ge=0)
    """How far apart two reconciliations must show a difference before it counts."""
    reconcile_seconds: float = Field(default=1800, ge=0)
    """How often the replicas together reconcile by themselves; longer than the interval above. 0: only when asked."""
    watch_floor_seconds: float = Field(default=10, gt=0)
    """How often watched videos are read without having been nudged."""
    webhook_networks: str = ""
    """Networks (CIDR, separated by commas) to which webhooks are delivered though they are not public, http too."""
    webhook_ca_file: Path | None = None
    """Certificates (PEM) that webhook endpoints are trusted by; not set: those that browsers trust."""
    webhook_timeout_seconds: float = Field(default=10, gt=0)
    """Longest that one try may take; a lease is three times as long."""
    webhook_poll_seconds: float = Field(default=1, gt=0)
    """How often is looked for due deliveries, beside the moments when an event was recorded here."""
    webhook_retry_seconds: float = Field(default=5, gt=0)
    """Pause before the second try; the later ones grow with it, to 2880 times this."""
    webhook_give_up_seconds: float = Field(default=86400, gt=0)
    """For how long a delivery is tried."""
    webhook_disable_seconds: float = Field(default=5 * 86400, gt=0)
    """For how long an endpoint may fail, with nothing but failures, before it is disabled."""

    def page_secret(self) -> bytes:
        """What signs page tokens, the same in every replica."""
        given = self.page_token_secret.get_secret_value()
        if given:
            return given.encode()
        base = self.service_token_secret.get_secret_value().encode()
        return hmac.digest(base, b"gateway page tokens", hashlib.sha256)
