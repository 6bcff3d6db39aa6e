"""Every SQL statement of the ledger, by what it is about."""

from __future__ import annotations

from collections.abc import Callable

from kit import postgres
from services.credits.store.accounts import AccountStore
from services.credits.store.movements import LedgerStore
from services.credits.store.rulebooks import RulebookStore
from services.credits.store.statements import StatementStore
from services.credits.store.survey import SurveyStore
from services.credits.store.waiting import WaitingStore


class Store:
    """The ledger's database. `ring` is called when a commit left something to tell on the bus."""

    def __init__(
        self,
        pool: postgres.Pool,
        *,
        ring: Callable[[], None] = lambda: None,
        quote_seconds: int = 900,
        balance_low_credits: int = 20,
        posting_shards: int = 1,
    ) -> None:
        self.rulebooks = RulebookStore(pool)
        self.ledger = LedgerStore(
            pool,
            self.rulebooks,
            ring=ring,
            quote_seconds=quote_seconds,
            balance_low_credits=balance_low_credits,
            posting_shards=posting_shards,
        )
        self.accounts = AccountStore(pool)
        self.statements = StatementStore(pool, self.rulebooks)
        self.waiting = WaitingStore(pool)
        self.survey = SurveyStore(pool, self.rulebooks)
