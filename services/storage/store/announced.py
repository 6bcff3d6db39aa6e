"""Uploads that were announced: by clients that PUT the bytes themselves, and those that we fetch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import asyncpg

from kit import errors, postgres

_COLUMNS = "upload_id, account_id, owner, way, fingerprint, object_key, media_type, size_bytes"


class Way(StrEnum):
    """How the bytes come."""

    PRESIGNED = "PRESIGNED"
    IMPORT = "IMPORT"


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload as it was announced."""

    upload_id: str
    account_id: str
    owner: str
    way: Way
    fingerprint: str
    object_key: str | None = None
    media_type: str | None = None
    size_bytes: int | None = None


class AnnouncedStore:
    """What was announced, by the asset that it becomes."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def add(self, upload: Upload, keep_seconds: float) -> Upload:
        """Notes it, or answers what was noted before. AlreadyExists/REQUEST_ID_REUSED when that was something else."""
        await self._pool.execute(
            f"""
            INSERT INTO uploads ({_COLUMNS}, sweep_at)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp() + $9::interval)
            ON CONFLICT (upload_id) DO NOTHING
            """,
            upload.upload_id,
            upload.account_id,
            upload.owner,
            upload.way,
            upload.fingerprint,
            upload.object_key,
            upload.media_type,
            upload.size_bytes,
            timedelta(seconds=keep_seconds),
        )
        there = await self.find(upload.account_id, upload.upload_id)
        if there is None:
            raise errors.Aborted("CONFLICT", "the upload was swept in between; try again")
        check_same(there, upload)
        return there

    async def find(self, account_id: str, upload_id: str) -> Upload | None:
        """The upload, if it is this account's."""
        row = await self._pool.fetchrow(
            f"SELECT {_COLUMNS} FROM uploads WHERE upload_id = $1 AND account_id = $2",
            upload_id,
            account_id,
        )
        return _upload(row) if row is not None else None

    async def over(self, limit: int) -> Sequence[Upload]:
        """Uploads whose time is over."""
        found = await self._pool.fetch(
            f"SELECT {_COLUMNS} FROM uploads WHERE sweep_at < clock_timestamp() ORDER BY sweep_at LIMIT $1",
            limit,
        )
        return [_upload(row) for row in found]

    async def forget(self, upload_id: str) -> None:
        """Its object is gone. Idempotent."""
        await self._pool.execute("DELETE FROM uploads WHERE upload_id = $1", upload_id)


def check_same(there: Upload, upload: Upload) -> None:
    """Raises AlreadyExists/REQUEST_ID_REUSED where another upload has its id."""
    if (there.way, there.fingerprint) != (upload.way, upload.fingerprint):
        raise errors.AlreadyExists(
            "REQUEST_ID_REUSED", "this request_id was used with another request; make a new one"
        )


def _upload(row: asyncpg.Record) -> Upload:
    return Upload(**{**dict(row), "way": Way(row["way"])})
