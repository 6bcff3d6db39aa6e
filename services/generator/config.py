"""Settings of the generator (GENERATOR_...)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from kit import config


class Settings(config.ServiceSettings):
    """What the generator is told."""

    model_config = SettingsConfigDict(env_prefix="GENERATOR_", frozen=True, extra="ignore")

    storage_address: str
    """host:port of the storage service."""
    nats_monitor_url: str = ""
    """`http://host:port` of NATS' monitoring, to show whether it syncs what it acknowledges; empty: not shown."""
    providers_file: Path = Path(__file__).parent / "providers.yaml"
    """The catalogue of provider accounts."""
    provider_base_url: str = ""
    """Base URL of the openai_videos accounts whose entry names none, up to and with `/v1`."""
    provider_api_key: SecretStr = SecretStr("")
    """The key of the openai_videos accounts."""
    azure_base_url: str = ""
    """Base URL of the azure_jobs accounts whose entry names none, up to and with `/openai/v1`."""
    azure_api_key: SecretStr = SecretStr("")
    """The key of the azure_jobs accounts."""
    runway_base_url: str = ""
    """Base URL of the runway accounts whose entry names none, up to and with `/v1`."""
    runway_api_key: SecretStr = SecretStr("")
    """The key of the runway accounts."""
    webhooks_listen: str = ""
    """host:port where `POST /webhooks/PROVIDER_ACCOUNT` of providers comes in; empty: nowhere. TLS ends before it."""
    webhook_secrets: SecretStr = SecretStr("")
    """`PROVIDER_ACCOUNT:SECRET` with commas between, several of one account while its secret is changed."""
    provider_base_urls: dict[str, str] = Field(default_factory=dict)
    """Base URLs by name of the provider account, as a JSON object; before those above and those of the catalogue."""
    provider_api_keys: dict[str, SecretStr] = Field(default_factory=dict)
    """Keys by name of the provider account, as a JSON object; go before those above."""
    provider_keys_dir: Path | None = None
    """A directory of mounted secrets: the file that has the name of a provider account holds its key."""
    time_factor: float = 1.0
    """Divides every provider-facing duration of the catalogue; the simulator runs at the same factor."""
    post_timeout_seconds: float = 0
    """Overrides the accounts' post_timeout_seconds where above 0."""
    prepare_lease_seconds: float = 60
    """Longest a worker may take from its turn to sending."""
    submit_lease_margin_seconds: float = 10
    """How long after a create's timeout its worker is taken for gone."""
    fetch_lease_seconds: float = 60
    """Lease of a fetch; renewed while it goes on."""
    pass_lease_seconds: float = 30
    """Longest that a pass of a process that died keeps others from polling and resolving."""
    concurrent_submits: int = 8
    """Submissions at a time in this process, for each pool."""
    concurrent_fetches: int = 4
    """Fetches at a time in this process."""
    loop_seconds: float = 0.25
    """Pause of the loops when there is nothing to do."""
    spool_dir: Path = Path("/tmp/framewire-spool")  # noqa: S108 - a mounted volume in production
    """Where answers of providers go that the database could not take, and in `films` renders that storage refused."""
    film_spool_bytes: int = 2 * 1024**3
    """As much of renders as may lie there."""
    film_keep_seconds: float = 3 * 24 * 3600
    """How long a render that lies on some worker's disk is waited for."""
