"""Accounts, keys, what operators set, and the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from kit import ids, postgres
from services.gateway.store import rows

_KEY = ", ".join(rows.KEY_COLUMNS)
_GOOD = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())"
KEYS_LIMIT = 1000


_ROTATE = """
    WITH earlier AS (
        UPDATE api_keys SET expires_at = LEAST(expires_at, clock_timestamp() + make_interval(secs => $3))
        WHERE key_id = $2
        RETURNING requests_per_minute, videos_per_hour, max_in_flight, upload_bytes_per_day
    )
    UPDATE api_keys k SET requests_per_minute = e.requests_per_minute, videos_per_hour = e.videos_per_hour,
                          max_in_flight = e.max_in_flight, upload_bytes_per_day = e.upload_bytes_per_day
    FROM earlier e WHERE k.key_id = $1
"""


class AccountStore:
    """Statements about who may call and who pays."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def create(
        self, account: Mapping[str, Any], principal: str, request_id: str, fingerprint: bytes
    ) -> tuple[rows.Account, bytes]:
        """Makes an account once per request_id; answers it with the fingerprint under which it was made."""
        async with self._pool.acquire() as connection, connection.transaction():
            account_id = ids.new_id()
            made = await connection.fetchval(
                """
                INSERT INTO requests (account_id, principal, method, request_id, fingerprint, resource_id)
                VALUES ('', '', 'CreateAccount', $1, $2, $3)
                ON CONFLICT DO NOTHING RETURNING resource_id
                """,
                request_id,
                fingerprint,
                account_id,
            )
            if made:
                await connection.execute(
                    """
                    INSERT INTO accounts (account_id, display_name, lanes, weight, max_in_flight,
                                          requests_per_minute, videos_per_hour)
                    VALUES ($1, $2, $3, $4, $5, $6, $7)
                    """,
                    account_id,
                    account["display_name"],
                    account["lanes"],
                    account["weight"],
                    account["max_in_flight"],
                    account["requests_per_minute"],
                    account["videos_per_hour"],
                )
                await audit(connection, principal, "CreateAccount", account_id, "", account, "OK")
            row = await connection.fetchrow(
                """
                SELECT a.*, r.fingerprint FROM requests r JOIN accounts a ON a.account_id = r.resource_id
                WHERE r.account_id = '' AND r.principal = '' AND r.method = 'CreateAccount'
                  AND r.request_id = $1
                """,
                request_id,
            )
            assert row is not None
            return rows.account(row), bytes(row["fingerprint"])

    async def get(self, account_id: str, *, erased_too: bool = False) -> rows.Account | None:
        """An account; one that was erased only for who wants those too."""
        row = await self._pool.fetchrow(
            "SELECT * FROM accounts WHERE account_id = $1 AND ($2 OR erased_at IS NULL)",
            account_id,
            erased_too,
        )
        return rows.account(row) if row else None

    async def set_account(
        self, account_id: str, lanes: Sequence[str], weight: int, why: str, principal: str
    ) -> rows.Account | None:
        """Changes lanes and weight; those that are empty stay. None: there is no such account."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                """
                UPDATE accounts SET lanes = CASE WHEN cardinality($2::text[]) > 0 THEN $2 ELSE lanes END,
                                    weight = COALESCE(NULLIF($3, 0), weight)
                WHERE account_id = $1 AND erased_at IS NULL RETURNING *
                """,
                account_id,
                list(lanes),
                weight,
            )
            if row is None:
                return None
            detail = {"lanes": list(lanes), "weight": weight}
            await audit(connection, principal, "SetAccount", account_id, why, detail, "OK")
            return rows.account(row)

    async def key_by_hash(self, sha256: bytes) -> tuple[rows.ApiKey, int | None] | None:
        """The good key with this secret and the requests per minute of its account; its use is noted once a minute."""
        row = await self._pool.fetchrow(
            f"""
            SELECT {", ".join(f"k.{name}" for name in rows.KEY_COLUMNS)}, a.requests_per_minute AS of_account,
                   (last_used_at > clock_timestamp() - interval '1 minute') IS NOT TRUE AS to_note
            FROM api_keys k LEFT JOIN accounts a USING (account_id)
            WHERE sha256 = $1 AND {_GOOD}
            """,
            sha256,
        )
        if row is None:
            return None
        values = dict(row)
        of_account, to_note = values.pop("of_account"), values.pop("to_note")
        key = rows.ApiKey(**values)
        if to_note:
            await self._pool.execute(
                "UPDATE api_keys SET last_used_at = clock_timestamp() WHERE key_id = $1", key.key_id
            )
        return key, of_account

    async def key_to_rotate(
        self, key_id: str, principal: str, request_id: str
    ) -> rows.ApiKey | None:
        """A key that is good, or that has ended by this very request. None: there is none."""
        row = await self._pool.fetchrow(
            f"""
            SELECT {_KEY} FROM api_keys k
            WHERE key_id = $1 AND ({_GOOD} OR EXISTS (
                SELECT FROM requests WHERE account_id = COALESCE(k.account_id, '') AND principal = $2
                    AND method = 'CreateApiKey' AND request_id = $3))
            """,
            key_id,
            principal,
            request_id,
        )
        return rows.ApiKey(**dict(row)) if row else None

    async def ensure_operator_key(self, sha256: bytes, prefix: str) -> None:
        """The key that everything begins with. Idempotent; one that was revoked stays revoked."""
        await self._pool.execute(
            """
            INSERT INTO api_keys (key_id, role, sha256, prefix, display_name)
            VALUES ($1, 'OPERATOR', $2, $3, 'bootstrap') ON CONFLICT (sha256) DO NOTHING
            """,
            ids.new_id(),
            sha256,
            prefix,
        )

    async def create_key(
        self,
        key: Mapping[str, Any],
        principal: str,
        request_id: str,
        fingerprint: bytes,
        instead_of: str = "",
        grace_seconds: int = 0,
    ) -> tuple[rows.ApiKey, bytes, bool]:
        """Makes a key once per request_id of its maker: the key, the fingerprint of its request, whether it is new.

        `instead_of` ends `grace_seconds` later, or when it would have ended anyway, and leaves the new one its limits.
        """
        scope = key["account_id"] or ""
        async with self._pool.acquire() as connection, connection.transaction():
            key_id = ids.new_id()
            made = await connection.fetchval(
                """
                INSERT INTO requests (account_id, principal, method, request_id, fingerprint, resource_id)
                VALUES ($1, $2, 'CreateApiKey', $3, $4, $5)
                ON CONFLICT DO NOTHING RETURNING resource_id
                """,
                scope,
                principal,
                request_id,
                fingerprint,
                key_id,
            )
            if made:
                await _insert_key(connection, key_id, key)
                detail = {"key_id": key_id, "role": key["role"], "prefix": key["prefix"]}
                if instead_of:
                    await connection.execute(_ROTATE, key_id, instead_of, grace_seconds)
                    detail |= {"instead_of": instead_of, "grace_seconds": grace_seconds}
                await audit(connection, principal, "CreateApiKey", scope, "", detail, "OK")
            row = await connection.fetchrow(
                f"""
                SELECT {", ".join(f"k.{name}" for name in _KEY.split(", "))}, r.fingerprint
                FROM requests r JOIN api_keys k ON k.key_id = r.resource_id
                WHERE r.account_id = $1 AND r.principal = $2 AND r.method = 'CreateApiKey'
                  AND r.request_id = $3
                """,
                scope,
                principal,
                request_id,
            )
            assert row is not None
            values = dict(row)
            earlier = bytes(values.pop("fingerprint"))
            return rows.ApiKey(**values), earlier, bool(made)

    async def list_keys(self, account_id: str | None) -> Sequence[rows.ApiKey]:
        """Keys of an account, or those of none (of services and operators), newest first."""
        found = await self._pool.fetch(
            f"""
            SELECT {_KEY} FROM api_keys WHERE account_id IS NOT DISTINCT FROM $1
            ORDER BY created_at DESC LIMIT {KEYS_LIMIT}
            """,
            account_id,
        )
        return [rows.ApiKey(**dict(row)) for row in found]

    async def revoke_key(
        self, key_id: str, accounts: Sequence[str] | None, principal: str
    ) -> rows.ApiKey | None:
        """Ends a key; of any account where none are named. None: there is no such key. Idempotent."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                f"""
                UPDATE api_keys SET revoked_at = COALESCE(revoked_at, clock_timestamp())
                WHERE key_id = $1 AND ($2::text[] IS NULL OR account_id = ANY($2)) RETURNING {_KEY}
                """,
                key_id,
                accounts,
            )
            if row is None:
                return None
            scope = row["account_id"] or ""
            await audit(connection, principal, "RevokeApiKey", scope, "", {"key_id": key_id}, "OK")
            return rows.ApiKey(**dict(row))

    async def set_admission(self, paused: bool, why: str, principal: str) -> None:
        """Stops or starts admission for everyone; the audit says what it was before."""
        async with self._pool.acquire() as connection, connection.transaction():
            before = await connection.fetchval("SELECT admission_paused FROM settings FOR UPDATE")
            await connection.execute(
                "UPDATE settings SET admission_paused = $1, paused_why = $2", paused, why
            )
            detail = {"before": before, "after": paused}
            await audit(connection, principal, "SetAdmission", "", why, detail, "OK")

    async def admission_paused(self) -> tuple[bool, datetime]:
        """Whether admission is stopped, and the database's clock."""
        row = await self._pool.fetchrow(
            "SELECT admission_paused, clock_timestamp() AS now FROM settings"
        )
        assert row is not None
        return row["admission_paused"], row["now"]

    async def audit_begins(
        self, principal: str, method: str, account_id: str, why: str, detail: Mapping[str, Any]
    ) -> str:
        """Writes down what an operator is about to do in a service behind."""
        return await audit(self._pool, principal, method, account_id, why, detail, "STARTED")

    async def audit_ends(self, audit_id: str, outcome: str) -> None:
        """Writes down what became of it."""
        await self._pool.execute(
            "UPDATE audit SET outcome = $2 WHERE audit_id = $1", audit_id, outcome
        )


async def _insert_key(connection: postgres.Connection, key_id: str, key: Mapping[str, Any]) -> None:
    await connection.execute(
        """
        INSERT INTO api_keys (key_id, account_id, role, sha256, prefix, display_name, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        key_id,
        key["account_id"],
        key["role"],
        key["sha256"],
        key["prefix"],
        key["display_name"],
        key["expires_at"],
    )


async def audit(
    connection: postgres.Connection | postgres.Pool,
    principal: str,
    method: str,
    account_id: str,
    why: str,
    detail: Mapping[str, Any],
    outcome: str,
) -> str:
    """Writes down who does what and why."""
    audit_id = ids.new_id()
    await connection.execute(
        """
        INSERT INTO audit (audit_id, principal, method, account_id, why, detail, outcome)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        audit_id,
        principal,
        method,
        account_id,
        why,
        dict(detail),
        outcome,
    )
    return audit_id
