"""Webhook endpoints: made, changed, rotated, removed."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

from kit import postgres
from services.gateway import webhooks

_LOCK_CLASS = 0x77686F6B
_COLUMNS = ", ".join(field.name for field in dataclasses.fields(webhooks.Endpoint))

Made = tuple[webhooks.Endpoint, bytes, int]
"""The endpoint as it is now, the fingerprint of the request that made it or its secret, and that secret's number."""


class EndpointStore:
    """Statements about endpoints. Every one is told whose: the accounts of the caller, None for all."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def made_by(
        self, account_id: str, scope: str, method: str, request_id: str
    ) -> Made | None:
        """What a request_id made, and the fingerprint of its request; None: nothing, or it was removed."""
        return await _made_by(self._pool, account_id, scope, method, request_id)

    async def create(
        self,
        new: webhooks.Endpoint,
        scope: str,
        request_id: str,
        fingerprint: bytes,
    ) -> Made | None:
        """Adds an endpoint, once per request_id. None: the account has as many as it may have."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "SELECT pg_advisory_xact_lock($1, $2)",
                _LOCK_CLASS,
                zlib.crc32(new.account_id.encode()) - 2**31,
            )
            known = (new.account_id, scope, "CreateEndpoint", request_id)
            earlier = await _made_by(connection, *known)
            if earlier is not None:
                return earlier
            row = await connection.fetchrow(
                f"""
                INSERT INTO webhook_endpoints (endpoint_id, account_id, url, description, kinds, secret)
                SELECT $1, $2, $3, $4, $5, $6
                WHERE (SELECT count(*) FROM webhook_endpoints
                       WHERE account_id = $2 AND deleted_at IS NULL) < $7
                RETURNING {_COLUMNS}
                """,
                new.endpoint_id,
                new.account_id,
                new.url,
                new.description,
                list(new.kinds),
                new.secret,
                webhooks.MOST_ENDPOINTS,
            )
            if row is None:
                return None
            await _note(connection, known, fingerprint, f"{new.endpoint_id}@1")
        return _endpoint(row), fingerprint, 1

    async def get(
        self, endpoint_id: str, account_ids: Sequence[str] | None
    ) -> webhooks.Endpoint | None:
        """An endpoint of these accounts."""
        row = await self._pool.fetchrow(
            f"""
            SELECT {_COLUMNS} FROM webhook_endpoints
            WHERE endpoint_id = $1 AND deleted_at IS NULL AND ($2::text[] IS NULL OR account_id = ANY($2))
            """,
            endpoint_id,
            _listed(account_ids),
        )
        return _endpoint(row) if row else None

    async def of_account(self, account_id: str) -> list[webhooks.Endpoint]:
        """All of an account, the oldest first."""
        found = await self._pool.fetch(
            f"""
            SELECT {_COLUMNS} FROM webhook_endpoints
            WHERE account_id = $1 AND deleted_at IS NULL ORDER BY created_at, endpoint_id
            """,
            account_id,
        )
        return [_endpoint(row) for row in found]

    async def update(
        self,
        endpoint_id: str,
        account_ids: Sequence[str] | None,
        url: str | None,
        description: str | None,
        kinds: Sequence[str] | None,
        enabled: bool | None,
    ) -> webhooks.Endpoint | None:
        """Changes what is not None. Enabled, it begins anew; disabled, it keeps the reason that it had."""
        row = await self._pool.fetchrow(
            f"""
            UPDATE webhook_endpoints SET
                url = COALESCE($3, url), description = COALESCE($4, description), kinds = COALESCE($5, kinds),
                disabled_why = CASE WHEN $6 THEN '' WHEN NOT $6 AND disabled_why = '' THEN 'OWNER'
                                    ELSE disabled_why END,
                disabled_at = CASE WHEN $6 THEN NULL WHEN NOT $6 THEN COALESCE(disabled_at, clock_timestamp())
                                   ELSE disabled_at END,
                failures = CASE WHEN $6 THEN 0 ELSE failures END,
                failing_since = CASE WHEN $6 THEN NULL ELSE failing_since END
            WHERE endpoint_id = $1 AND deleted_at IS NULL AND ($2::text[] IS NULL OR account_id = ANY($2))
            RETURNING {_COLUMNS}
            """,
            endpoint_id,
            _listed(account_ids),
            url,
            description,
            _listed(kinds),
            enabled,
        )
        return _endpoint(row) if row else None

    async def delete(self, endpoint_id: str, account_ids: Sequence[str] | None) -> bool:
        """Removes an endpoint; its deliveries go with the purge. False: there is and was none."""
        done = await self._pool.fetchval(
            """
            UPDATE webhook_endpoints SET deleted_at = COALESCE(deleted_at, clock_timestamp())
            WHERE endpoint_id = $1 AND ($2::text[] IS NULL OR account_id = ANY($2)) RETURNING true
            """,
            endpoint_id,
            _listed(account_ids),
        )
        return bool(done)

    async def rotate(
        self,
        endpoint: webhooks.Endpoint,
        secret: bytes,
        grace_seconds: int,
        scope: str,
        request_id: str,
        fingerprint: bytes,
    ) -> Made | None:
        """Gives it a new secret, once per request_id; the one before signs too for a time. None: it is gone."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                "SELECT 1 FROM webhook_endpoints WHERE endpoint_id = $1 AND deleted_at IS NULL FOR UPDATE",
                endpoint.endpoint_id,
            )
            known = (endpoint.account_id, scope, "RotateSecret", request_id)
            earlier = await _made_by(connection, *known)
            if row is None or earlier is not None:
                return earlier
            row = await connection.fetchrow(
                f"""
                UPDATE webhook_endpoints SET secret = $2, secret_number = secret_number + 1,
                    old_secret = CASE WHEN $3 > 0 THEN secret END,
                    old_secret_until = CASE WHEN $3 > 0 THEN clock_timestamp() + make_interval(secs => $3) END
                WHERE endpoint_id = $1 RETURNING {_COLUMNS}
                """,
                endpoint.endpoint_id,
                secret,
                grace_seconds,
            )
            assert row is not None
            made = _endpoint(row)
            await _note(connection, known, fingerprint, f"{made.endpoint_id}@{made.secret_number}")
        return made, fingerprint, made.secret_number


async def _made_by(
    connection: postgres.Connection | postgres.Pool,
    account_id: str,
    scope: str,
    method: str,
    request_id: str,
) -> Made | None:
    row = await connection.fetchrow(
        f"""
        SELECT {", ".join(f"e.{name}" for name in _COLUMNS.split(", "))}, r.fingerprint, r.resource_id
        FROM requests r JOIN webhook_endpoints e ON e.endpoint_id = split_part(r.resource_id, '@', 1)
        WHERE r.account_id = $1 AND r.principal = $2 AND r.method = $3 AND r.request_id = $4
          AND e.deleted_at IS NULL
        """,
        account_id,
        scope,
        method,
        request_id,
    )
    if row is None:
        return None
    return _endpoint(row), bytes(row["fingerprint"]), int(row["resource_id"].partition("@")[2])


async def _note(
    connection: postgres.Connection,
    known: tuple[str, str, str, str],
    fingerprint: bytes,
    resource_id: str,
) -> None:
    await connection.execute(
        """
        INSERT INTO requests (account_id, principal, method, request_id, fingerprint, resource_id)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (account_id, principal, method, request_id)
            DO UPDATE SET fingerprint = EXCLUDED.fingerprint, resource_id = EXCLUDED.resource_id
        """,
        *known,
        fingerprint,
        resource_id,
    )


def _listed(values: Sequence[str] | None) -> list[str] | None:
    return None if values is None else list(values)


def _endpoint(row: Any) -> webhooks.Endpoint:
    names = [field.name for field in dataclasses.fields(webhooks.Endpoint)]
    return webhooks.Endpoint(**{name: row[name] for name in names})
