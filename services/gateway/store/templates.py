"""Templates: versions are added and archived, nothing else."""

from __future__ import annotations

import zlib
from typing import Any

from kit import postgres
from services.gateway.store import rows
from services.gateway.store.accounts import audit

_LOCK_CLASS = 0x746D706C
_COLUMNS = "account_id, name, version, definition, created_at, archived_at"


class TemplateStore:
    """Statements about templates. The account of everyone's is ''."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def create(
        self,
        new: rows.NewTemplate,
        principal: str,
        request_id: str,
        fingerprint: bytes,
        most: int,
    ) -> tuple[rows.Template, bytes] | None:
        """Adds the next version, once per request_id; answers it with the fingerprint under which it was made.

        None: the account has `most` versions in use, and nothing was made.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "SELECT pg_advisory_xact_lock($1, $2)",
                _LOCK_CLASS,
                zlib.crc32(new.account_id.encode()) - 2**31,
            )
            scope = (new.account_id, new.scope, request_id)
            earlier = await _made_by(connection, *scope)
            if earlier is not None:
                return earlier
            row = await connection.fetchrow(
                f"""
                INSERT INTO templates (account_id, name, version, definition)
                SELECT $1, $2, 1 + COALESCE((SELECT max(version) FROM templates
                                             WHERE account_id = $1 AND name = $2), 0), $3
                WHERE (SELECT count(*) FROM templates WHERE account_id = $1 AND archived_at IS NULL) < $4
                RETURNING {_COLUMNS}
                """,
                new.account_id,
                new.name,
                new.definition,
                most,
            )
            if row is None:
                return None
            made = rows.Template(**dict(row))
            await connection.execute(
                """
                INSERT INTO requests (account_id, principal, method, request_id, fingerprint, resource_id)
                VALUES ($1, $2, 'CreateTemplate', $3, $4, $5)
                """,
                *scope,
                fingerprint,
                f"{made.name}@{made.version}",
            )
            if not new.account_id:
                detail = {"name": made.name, "version": made.version}
                await audit(connection, principal, "CreateTemplate", "", "", detail, "OK")
        return made, fingerprint

    async def made_by(
        self, account_id: str, scope: str, request_id: str
    ) -> tuple[rows.Template, bytes] | None:
        """What a request_id made, and the fingerprint of its request; None: nothing."""
        return await _made_by(self._pool, account_id, scope, request_id)

    async def get(self, account_id: str, name: str, version: int) -> rows.Template | None:
        """A version; for 0 the latest in use, or the newest where none is."""
        row = await self._pool.fetchrow(
            f"""
            SELECT {_COLUMNS} FROM templates
            WHERE account_id = $1 AND name = $2 AND ($3 = 0 OR version = $3)
            ORDER BY archived_at IS NOT NULL, version DESC LIMIT 1
            """,
            account_id,
            name,
            version,
        )
        return rows.Template(**dict(row)) if row else None

    async def latest(
        self, account_ids: list[str], archived: bool, after: str, limit: int
    ) -> list[rows.Template]:
        """The latest version of each name, by name, from after one; of those in use, unless archived ones count too."""
        found = await self._pool.fetch(
            f"""
            SELECT DISTINCT ON (name) {_COLUMNS} FROM templates
            WHERE account_id = ANY($1) AND (archived_at IS NULL OR $2) AND name > $3
            ORDER BY name, version DESC LIMIT $4
            """,
            account_ids,
            archived,
            after,
            limit,
        )
        return _templates(found)

    async def versions(
        self, account_id: str, name: str, archived: bool, before: int | None, limit: int
    ) -> list[rows.Template]:
        """Versions of a name, the newest first, from before one."""
        found = await self._pool.fetch(
            f"""
            SELECT {_COLUMNS} FROM templates
            WHERE account_id = $1 AND name = $2 AND (archived_at IS NULL OR $3)
              AND ($4::integer IS NULL OR version < $4)
            ORDER BY version DESC LIMIT $5
            """,
            account_id,
            name,
            archived,
            before,
            limit,
        )
        return _templates(found)

    async def archive(
        self, account_id: str, name: str, version: int, principal: str
    ) -> rows.Template | None:
        """Takes a version, for 0 all of them, out of use; answers the newest. None: there is none. Idempotent."""
        async with self._pool.acquire() as connection, connection.transaction():
            found = await connection.fetch(
                f"""
                UPDATE templates SET archived_at = COALESCE(archived_at, clock_timestamp())
                WHERE account_id = $1 AND name = $2 AND ($3 = 0 OR version = $3) RETURNING {_COLUMNS}
                """,
                account_id,
                name,
                version,
            )
            if found and not account_id:
                detail = {"name": name, "version": version}
                await audit(connection, principal, "ArchiveTemplate", "", "", detail, "OK")
        return max(_templates(found), key=lambda one: one.version, default=None)


async def _made_by(
    connection: postgres.Connection | postgres.Pool, account_id: str, scope: str, request_id: str
) -> tuple[rows.Template, bytes] | None:
    row = await connection.fetchrow(
        f"""
        SELECT {", ".join(f"t.{name}" for name in _COLUMNS.split(", "))}, r.fingerprint
        FROM requests r JOIN templates t
            ON t.account_id = r.account_id AND t.name || '@' || t.version = r.resource_id
        WHERE r.account_id = $1 AND r.principal = $2 AND r.method = 'CreateTemplate' AND r.request_id = $3
        """,
        account_id,
        scope,
        request_id,
    )
    if row is None:
        return None
    values = dict(row)
    fingerprint = bytes(values.pop("fingerprint"))
    return rows.Template(**values), fingerprint


def _templates(found: list[Any]) -> list[rows.Template]:
    return [rows.Template(**dict(row)) for row in found]
