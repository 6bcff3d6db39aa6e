"""Reads the price book and the refund policy that come with the service into its database."""

from __future__ import annotations

import asyncio
from pathlib import Path

import yaml

from kit import telemetry
from services.credits import rules, store

log = telemetry.logger(__name__)


async def load(books: store.Store, prices: Path, refund_policy: Path) -> None:
    """Loads both files; a version that is new is inactive unless it is the first. Idempotent. Raises RulesError."""
    for kind, file in (
        (rules.Kind.PRICE_BOOK, prices),
        (rules.Kind.REFUND_POLICY, refund_policy),
    ):
        text = await asyncio.to_thread(file.read_text)
        try:
            document = yaml.safe_load(text)
            if await books.rulebooks.load(kind, document):
                log.info("rulebook_loaded", kind=kind, version=document["version"])
        except (yaml.YAMLError, rules.RulesError) as error:
            raise rules.RulesError(f"{file}: {error}") from error
