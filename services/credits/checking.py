"""The loop that proves the books again and again, so that a row that disagrees is an alert and not a discovery."""

from __future__ import annotations

import asyncio
from collections import Counter

from prometheus_client import Gauge

from kit import loops, telemetry
from services.credits import store

log = telemetry.logger(__name__)

FINDINGS = Gauge(
    "framewire_credits_books_findings",
    "Rows of the ledger that disagree, at the last check, by what they are.",
    ["row"],
)
ROWS = ("transfer", "account", "lot", "hold", "entry", "rulebook", "other")
"""What a finding begins with."""
CHECKED_AT = Gauge(
    "framewire_credits_books_checked_timestamp_seconds", "When the books were last checked."
)
RECOMPUTED = Gauge(
    "framewire_credits_books_recomputed_holds",
    "Holds whose price and capture the last check computed again.",
)


class BooksCheck:
    """Proves the books of the whole ledger; one replica at a time does."""

    def __init__(self, books: store.Store, seconds: float) -> None:
        self._statements = books.statements
        self._seconds = seconds

    async def run(self, stopping: asyncio.Event) -> None:
        """Proves until told to stop."""
        await loops.every("credits_books_check", self._seconds, self.run_once, stopping)

    async def run_once(self) -> None:
        """One proof, unless another replica is at it; what disagrees is logged, row by row."""
        proof = await self._statements.check_books_alone()
        if proof is None:
            return
        counts = Counter(_row(finding) for finding in proof.findings)
        for row in ROWS:
            FINDINGS.labels(row).set(counts[row])
        RECOMPUTED.set(proof.recomputed_holds)
        CHECKED_AT.set_to_current_time()
        for finding in proof.findings:
            log.error("books_disagree", finding=finding)
        log.info("books_checked", transfers=proof.transfers, findings=len(proof.findings))


def _row(finding: str) -> str:
    word = finding.split(maxsplit=1)[0]
    return word if word in ROWS else "other"
