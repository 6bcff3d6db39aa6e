"""Every SQL statement of storage, by what it is about."""

from __future__ import annotations

from kit import postgres
from services.storage.store.announced import AnnouncedStore
from services.storage.store.keeping import KeepingStore
from services.storage.store.library import LibraryStore
from services.storage.store.making import MakingStore
from services.storage.store.measures import MeasureStore


class Store:
    """The database of storage."""

    def __init__(self, pool: postgres.Pool) -> None:
        self.making = MakingStore(pool)
        self.announced = AnnouncedStore(pool)
        self.library = LibraryStore(pool)
        self.keeping = KeepingStore(pool)
        self.measures = MeasureStore(pool)
