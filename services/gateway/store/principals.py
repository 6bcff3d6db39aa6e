"""Who comes with an issuer's tokens: principals, their role, and the accounts that they are members of."""

from __future__ import annotations

from collections.abc import Sequence

from kit import ids, postgres
from services.gateway.store import accounts, rows

LIMIT = 1000
_MEMBER = "principal_id, issuer, subject, email, role, account_id, COALESCE(added_at, created_at) AS added_at"


class PrincipalStore:
    """Statements about principals."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def known(
        self, issuer: str, subject: str, email: str
    ) -> tuple[str, str, dict[str, int]] | None:
        """Id, role and accounts, each with its requests per minute, of who comes with a token. None: not known.

        A principal that was named by its e-mail address is bound to the first subject that comes with it.
        """
        found = await self._pool.fetch(_KNOWN, issuer, subject)
        if not found and email:
            bound = await self._pool.fetchval(
                """
                UPDATE principals SET subject = $2 WHERE issuer = $1 AND email = $3 AND subject = ''
                RETURNING principal_id
                """,
                issuer,
                subject,
                email,
            )
            found = await self._pool.fetch(_KNOWN, issuer, subject) if bound else []
        if not found:
            return None
        allowed = {row["account_id"]: row["requests_per_minute"] for row in found}
        allowed.pop(None, None)
        return found[0]["principal_id"], found[0]["role"], allowed

    async def add(
        self, new: rows.Member, why: str, principal: str
    ) -> tuple[rows.Member | None, str]:
        """Adds a principal or a membership; the row, and the role that the principal has. None: it has another role."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                """
                INSERT INTO principals (principal_id, issuer, subject, email, role) VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT DO NOTHING
                """,
                ids.new_id(),
                new.issuer,
                new.subject,
                new.email,
                new.role,
            )
            row = await connection.fetchrow(
                """
                SELECT principal_id, role FROM principals
                WHERE issuer = $1 AND (($2 <> '' AND subject = $2) OR ($3 <> '' AND email = $3)) FOR UPDATE
                """,
                new.issuer,
                new.subject,
                new.email,
            )
            assert row is not None
            if row["role"] != new.role:
                return None, row["role"]
            if new.account_id:
                await connection.execute(
                    "INSERT INTO members (principal_id, account_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                    row["principal_id"],
                    new.account_id,
                )
            added = await connection.fetchrow(
                f"""
                SELECT {_MEMBER} FROM principals LEFT JOIN members USING (principal_id)
                WHERE principal_id = $1 AND account_id IS NOT DISTINCT FROM $2
                """,
                row["principal_id"],
                new.account_id,
            )
            assert added is not None
            detail = {"principal_id": row["principal_id"], "role": new.role, "issuer": new.issuer}
            scope = new.account_id or ""
            await accounts.audit(connection, principal, "AddMember", scope, why, detail, "OK")
            return rows.Member(**dict(added)), new.role

    async def remove(self, principal_id: str, account_id: str, why: str, principal: str) -> int:
        """Ends a membership; without an account, the principal with all of them."""
        async with self._pool.acquire() as connection, connection.transaction():
            if account_id:
                done = await connection.execute(
                    "DELETE FROM members WHERE principal_id = $1 AND account_id = $2",
                    principal_id,
                    account_id,
                )
            else:
                done = await connection.execute(
                    "DELETE FROM principals WHERE principal_id = $1", principal_id
                )
            removed = int(done.split()[-1])
            detail = {"principal_id": principal_id, "removed": removed}
            await accounts.audit(
                connection, principal, "RemoveMember", account_id, why, detail, "OK"
            )
            return removed

    async def listing(self, account_id: str) -> Sequence[rows.Member]:
        """Members of an account, or who has a role without one, the oldest first."""
        found = await self._pool.fetch(
            f"""
            SELECT {_MEMBER} FROM principals LEFT JOIN members USING (principal_id)
            WHERE CASE WHEN $1 = '' THEN role <> 'MEMBER' ELSE account_id = $1 END
            ORDER BY COALESCE(added_at, created_at), principal_id LIMIT {LIMIT}
            """,
            account_id,
        )
        return [rows.Member(**dict(row)) for row in found]


_KNOWN = """
    SELECT p.principal_id, p.role, m.account_id, a.requests_per_minute
    FROM principals p LEFT JOIN members m USING (principal_id) LEFT JOIN accounts a ON a.account_id = m.account_id
    WHERE p.issuer = $1 AND p.subject = $2 ORDER BY m.account_id
"""
