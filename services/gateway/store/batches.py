"""Batches: nothing is kept of one but what its request_id stands for."""

from __future__ import annotations

from kit import postgres


class BatchStore:
    """Statements about batches."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def bind(
        self, account_id: str, principal: str, request_id: str, fingerprint: bytes
    ) -> bytes:
        """Makes the request_id stand for this batch; answers the fingerprint of the batch that it stands for."""
        return await self._pool.fetchval(
            """
            INSERT INTO requests (account_id, principal, method, request_id, fingerprint, resource_id)
            VALUES ($1, $2, 'BatchCreateVideos', $3, $4, '')
            ON CONFLICT (account_id, principal, method, request_id) DO UPDATE SET resource_id = ''
            RETURNING fingerprint
            """,
            account_id,
            principal,
            request_id,
            fingerprint,
        )

    async def forget(self, account_id: str, principal: str, request_id: str) -> None:
        """Nothing of the batch was accepted: its request_id is free."""
        await self._pool.execute(
            """
            DELETE FROM requests
            WHERE account_id = $1 AND principal = $2 AND method = 'BatchCreateVideos' AND request_id = $3
            """,
            account_id,
            principal,
            request_id,
        )
