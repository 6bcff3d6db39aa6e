"""What operators set for an account. Nothing here moves credits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import failpoints, postgres
from services.credits import batches, caps


@dataclass(frozen=True, slots=True)
class AccountRules:
    """What operators set for an account."""

    account_id: str
    frozen: bool
    daily_caps: Mapping[str, int]


class AccountStore:
    """Sets the rules that Reserve goes by, under the account's lock: whoever reserves next meets them."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def set_frozen(self, account_id: str, frozen: bool) -> AccountRules:
        """Freezes an account, or lets it go on. Idempotent. Raises NotFound/ACCOUNT_NOT_FOUND."""
        async with self._acquire() as connection, connection.transaction():
            before = await _locked(connection, account_id)
            return await _write(connection, AccountRules(account_id, frozen, before.daily_caps))

    async def set_daily_cap(
        self, account_id: str, key_id: str, credits_: int | None
    ) -> AccountRules:
        """Caps an account or a key, or lifts the cap. Idempotent. Raises NotFound/ACCOUNT_NOT_FOUND."""
        async with self._acquire() as connection, connection.transaction():
            before = await _locked(connection, account_id)
            changed = caps.with_cap(before.daily_caps, key_id, credits_)
            return await _write(connection, AccountRules(account_id, before.frozen, changed))

    async def forget_labels(
        self, account_id: str, before: tuple[datetime, str] | None, limit: int
    ) -> tuple[datetime, str] | None:
        """Takes the labels off a page of an account's holds, newest first; the place where the next begins, if any.

        Idempotent. Who settles such a hold meanwhile writes no label.
        """
        async with self._acquire() as connection:
            rows = await connection.fetch(
                """
                WITH page AS (
                    SELECT hold_id, created_at, labels FROM holds
                    WHERE account_id = $1
                        AND ($2::timestamptz IS NULL OR (created_at, hold_id) < ($2, $3::text))
                    ORDER BY created_at DESC, hold_id DESC LIMIT $4
                ), forgotten AS (
                    UPDATE holds h SET labels = '{}' FROM page p
                    WHERE h.hold_id = p.hold_id AND p.labels <> '{}'
                )
                SELECT created_at, hold_id FROM page ORDER BY created_at, hold_id
                """,
                account_id,
                *(before or (None, None)),
                limit,
            )
        return (rows[0]["created_at"], rows[0]["hold_id"]) if len(rows) == limit else None

    def _acquire(self) -> Any:
        return self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS)


async def _locked(connection: postgres.Connection, account_id: str) -> AccountRules:
    row = await connection.fetchrow(
        "SELECT frozen, daily_caps FROM accounts WHERE account_id = $1 FOR NO KEY UPDATE",
        account_id,
    )
    if row is None:
        raise batches.account_unknown(account_id)
    return AccountRules(account_id, row["frozen"], row["daily_caps"])


async def _write(connection: postgres.Connection, changed: AccountRules) -> AccountRules:
    await connection.execute(
        "UPDATE accounts SET frozen = $2, daily_caps = $3 WHERE account_id = $1",
        changed.account_id,
        changed.frozen,
        dict(changed.daily_caps),
    )
    await failpoints.failpoint("credits.account_rules.before_commit")
    return changed
