"""Pools: which provider accounts serve which models, with the client of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from framewire.events.v1 import vocabulary_pb2
from services.generator import catalogue, config
from services.generator.providers import contract, openai_videos

DIALECTS = {"openai_videos": openai_videos.OpenAIVideos}
LANE_WEIGHTS = {"VIP": 8.0, "STANDARD": 3.0, "BATCH": 1.0}


class Pools:
    """The provider accounts of the catalogue, opened."""

    def __init__(
        self,
        accounts: Mapping[str, catalogue.ProviderAccount],
        providers: Mapping[str, contract.Provider],
    ) -> None:
        self.accounts = accounts
        self.providers = providers
        self.names = sorted({account.pool for account in accounts.values()})

    def pool_of(self, model: str) -> str | None:
        """The pool that serves a model."""
        return next(
            (account.pool for account in self.accounts.values() if model in account.models), None
        )

    def of_pool(self, pool: str) -> list[catalogue.ProviderAccount]:
        """The accounts of a pool."""
        return [account for account in self.accounts.values() if account.pool == pool]

    def fingerprint(self, spec: vocabulary_pb2.VideoSpec) -> str:
        """What a list will show of it, at whichever account of its pool."""
        name = next(name for name, item in self.accounts.items() if spec.model in item.models)
        return self.providers[name].shown(spec)

    async def aclose(self) -> None:
        """Closes all clients."""
        for provider in self.providers.values():
            await provider.close()


def open_pools(settings: config.Settings) -> Pools:
    """Reads the catalogue and opens a client per account. Raises CatalogueError naming the mistake."""
    accounts = catalogue.parse(_read(settings.providers_file, settings), settings.time_factor)
    providers: dict[str, contract.Provider] = {}
    for name, account in accounts.items():
        dialect = DIALECTS.get(account.dialect)
        if dialect is None:
            raise catalogue.CatalogueError(f"{name}: no client for dialect {account.dialect}")
        base_url = account.base_url or settings.provider_base_url
        if not base_url:
            raise catalogue.CatalogueError(
                f"{name}: no base_url, and no GENERATOR_PROVIDER_BASE_URL"
            )
        key = settings.provider_api_key.get_secret_value()
        providers[name] = dialect(account, base_url, key)
    return Pools(accounts, providers)


def _read(path: Path, settings: config.Settings) -> dict[str, object]:
    document = yaml.safe_load(path.read_text()) or {}
    if settings.post_timeout_seconds > 0:
        for entry in document.get("provider_accounts") or ():
            entry["post_timeout_seconds"] = settings.post_timeout_seconds
    return document
