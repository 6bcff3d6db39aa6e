"""Limits of accounts and keys, and what they are counted by."""

from __future__ import annotations

from collections.abc import Mapping

from kit import postgres
from services.gateway.store import accounts, rows

_NAMES = ("requests_per_minute", "videos_per_hour", "max_in_flight", "upload_bytes_per_day")
_OF_ACCOUNTS = (*_NAMES, "moderation_refusals_per_hour", "moderation_refusals_per_day")
_CHANGE_ACCOUNT = f"""
    UPDATE accounts SET {", ".join(f"{name} = COALESCE(${at}, {name})" for at, name in enumerate(_OF_ACCOUNTS, 2))}
    WHERE account_id = $1 RETURNING *
"""
_CHANGE_KEY = f"""
    UPDATE api_keys SET {", ".join(f"{name} = NULLIF(COALESCE(${at}, {name}), 0)" for at, name in enumerate(_NAMES, 3))}
    WHERE key_id = $1 AND account_id IS NOT DISTINCT FROM $2 RETURNING {", ".join(rows.KEY_COLUMNS)}
"""


class LimitStore:
    """Statements about limits."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def change(
        self, account_id: str, key_id: str, limits: Mapping[str, int], why: str, principal: str
    ) -> rows.Account | rows.ApiKey | None:
        """Changes those that are named: of the account, or of its key. None: there is none."""
        async with self._pool.acquire() as connection, connection.transaction():
            if key_id:
                values = [limits.get(name) for name in _NAMES]
                row = await connection.fetchrow(_CHANGE_KEY, key_id, account_id or None, *values)
            else:
                values = [limits.get(name) for name in _OF_ACCOUNTS]
                row = await connection.fetchrow(_CHANGE_ACCOUNT, account_id, *values)
            if row is None:
                return None
            detail = {**limits, "key_id": key_id}
            await accounts.audit(connection, principal, "SetLimits", account_id, why, detail, "OK")
            return rows.ApiKey(**dict(row)) if key_id else rows.account(row)

    async def take_requests(
        self, subject: str, per_minute: int, wanted: int, back: int
    ) -> tuple[int, float]:
        """Takes up to so many requests, putting back those that were not used: how many, else how long to wait."""
        row = await self._pool.fetchrow(
            "SELECT * FROM take_requests($1, $2, $3, $4)", subject, per_minute, wanted, back
        )
        assert row is not None
        return row["granted"], row["wait_seconds"]

    async def uploads(
        self, account_id: str, key_id: str, owner: str
    ) -> tuple[list[tuple[str, int, int]], float]:
        """(whose, bytes used today, allowed) of the account and of a key with a limit; seconds of the day left.

        Nothing for what this owner has sent before: it costs nothing.
        """
        found = await self._pool.fetch(
            """
            WITH today AS (SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date AS day)
            SELECT whose, allowed, used::bigint,
                   extract(epoch FROM (day + 1)::timestamp AT TIME ZONE 'UTC' - clock_timestamp())::float8 AS left
            FROM today, LATERAL (
                SELECT 'account' AS whose, upload_bytes_per_day AS allowed,
                       (SELECT COALESCE(sum(bytes), 0) FROM upload_counts c
                        WHERE c.account_id = $1 AND c.day = today.day) AS used
                FROM accounts WHERE account_id = $1
                UNION ALL
                SELECT 'key', upload_bytes_per_day,
                       (SELECT COALESCE(sum(bytes), 0) FROM upload_counts c
                        WHERE c.key_id = $2 AND c.day = today.day)
                FROM api_keys WHERE key_id = $2 AND upload_bytes_per_day IS NOT NULL) limited
            WHERE NOT EXISTS (SELECT FROM upload_counts WHERE account_id = $1 AND owner = $3)
            """,
            account_id,
            key_id,
            owner,
        )
        standing = [(row["whose"], row["used"], row["allowed"]) for row in found]
        return standing, max((row["left"] for row in found), default=1.0)

    async def count_upload(self, account_id: str, key_id: str, owner: str, size_bytes: int) -> None:
        """Counts an upload of today, once."""
        await self._pool.execute(
            """
            INSERT INTO upload_counts (account_id, owner, key_id, day, bytes)
            VALUES ($1, $2, $3, (clock_timestamp() AT TIME ZONE 'UTC')::date, $4) ON CONFLICT DO NOTHING
            """,
            account_id,
            owner,
            key_id,
            size_bytes,
        )
