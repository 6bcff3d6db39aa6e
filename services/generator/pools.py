"""Pools: which provider accounts serve which models, with the client of each."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import yaml

from framewire.events.v1 import vocabulary_pb2
from kit import telemetry
from services.generator import catalogue, config
from services.generator.providers import azure_jobs, contract, openai_videos, runway

log = telemetry.logger(__name__)

DIALECTS = {
    "openai_videos": openai_videos.OpenAIVideos,
    "azure_jobs": azure_jobs.AzureJobs,
    "runway": runway.Runway,
}


class Pools:
    """The provider accounts of the catalogue, opened."""

    def __init__(
        self,
        accounts: Mapping[str, catalogue.ProviderAccount],
        providers: Mapping[str, contract.Provider],
        closed: frozenset[str] = frozenset(),
    ) -> None:
        """`closed`: accounts without an address. Jobs for their models are taken, and wait until start_by."""
        self.accounts = accounts
        self._closed = closed
        self.providers = providers
        self.names = sorted({account.pool for account in accounts.values()})

        self.pool_of_model = {
            model: account.pool for account in accounts.values() for model in account.models
        }

    def pool_of(self, model: str) -> str | None:
        """The pool that serves a model."""
        return self.pool_of_model.get(model)

    def reachable(self, name: str) -> bool:
        """Whether there is such an account, with an address."""
        return name in self.accounts and name not in self._closed

    def has_list(self, name: str) -> bool:
        """Whether it can be asked for a list of its jobs."""
        return self.reachable(name) and self.providers[name].has_list

    def of_pool(self, pool: str) -> dict[str, catalogue.ProviderAccount]:
        """The accounts of a pool that can be sent to, by name."""
        return {
            name: account
            for name, account in self.accounts.items()
            if account.pool == pool and name not in self._closed
        }

    def ends(self) -> dict[str, datetime]:
        """By model that nobody will serve any more: the last moment at which one could be sent."""
        found: dict[str, list[datetime | None]] = {}
        for account in self.accounts.values():
            for model in account.models:
                found.setdefault(model, []).append(catalogue.serves_until(account, model))
        return {
            model: max(moment for moment in moments if moment is not None)
            for model, moments in found.items()
            if None not in moments
        }

    def fingerprint(self, spec: vocabulary_pb2.VideoSpec) -> str:
        """What a list will show of it, at whichever account of its pool."""
        name = next(name for name, item in self.accounts.items() if spec.model in item.models)
        return self.providers[name].shown(spec)

    async def aclose(self) -> None:
        """Closes all clients."""
        for provider in self.providers.values():
            await provider.close()


def open_pools(settings: config.Settings) -> Pools:
    """Reads the catalogue and opens a client per account.

    Raises CatalogueError naming the mistake, and where no account has one.
    """
    accounts = catalogue.parse(_read(settings.providers_file, settings), settings.time_factor)
    providers: dict[str, contract.Provider] = {}
    closed: set[str] = set()
    for name, account in accounts.items():
        dialect = DIALECTS.get(account.dialect)
        if dialect is None:
            raise catalogue.CatalogueError(f"{name}: no client for dialect {account.dialect}")
        base_url, key = _access(account, settings)
        if not base_url:
            log.warning("provider_account_without_base_url", provider_account=name)
            closed.add(name)
        providers[name] = dialect(account, base_url, key)
    if len(closed) == len(accounts):
        raise catalogue.CatalogueError(
            "no provider account has a base_url: set GENERATOR_PROVIDER_BASE_URL, GENERATOR_AZURE_BASE_URL,"
            " GENERATOR_RUNWAY_BASE_URL or GENERATOR_PROVIDER_BASE_URLS"
        )
    return Pools(accounts, providers, frozenset(closed))


def _access(account: catalogue.ProviderAccount, settings: config.Settings) -> tuple[str, str]:
    """Base URL and key of an account: its own, else what is set for its dialect."""
    base_url, key = {
        "openai_videos": (settings.provider_base_url, settings.provider_api_key),
        "azure_jobs": (settings.azure_base_url, settings.azure_api_key),
        "runway": (settings.runway_base_url, settings.runway_api_key),
    }[account.dialect]
    base_url = settings.provider_base_urls.get(account.name) or account.base_url or base_url
    return base_url, _own_key(account.name, settings) or key.get_secret_value()


def _own_key(name: str, settings: config.Settings) -> str:
    """The account's own key: given by name, or a file of its name. Empty where there is none."""
    if name in settings.provider_api_keys:
        return settings.provider_api_keys[name].get_secret_value()
    if settings.provider_keys_dir is None:
        return ""
    path = settings.provider_keys_dir / name
    return path.read_text().strip() if path.is_file() else ""


def _read(path: Path, settings: config.Settings) -> dict[str, object]:
    document = yaml.safe_load(path.read_text()) or {}
    if settings.post_timeout_seconds > 0:
        for entry in document.get("provider_accounts") or ():
            entry["post_timeout_seconds"] = settings.post_timeout_seconds
    return document
