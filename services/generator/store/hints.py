"""Hints of providers' webhooks: they make the next poll due now, and nothing else."""

from __future__ import annotations

from kit import postgres
from kit.failpoints import failpoint


class HintStore:
    """What webhooks have hinted at."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def add(self, provider_account: str, webhook_id: str, provider_job_id: str) -> bool:
        """Takes a hint: the account's next poll is due now, where the job is one that we wait for.

        A job that is not known yet may become so within the hour: then the hint counts. False for a webhook that was
        taken before.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1 || ' ' || $2, 0))",
                provider_account,
                provider_job_id,
            )
            new = await connection.fetchval(
                """
                INSERT INTO webhook_hints (provider_account, webhook_id, provider_job_id) VALUES ($1, $2, $3)
                ON CONFLICT DO NOTHING RETURNING true
                """,
                provider_account,
                webhook_id,
                provider_job_id,
            )
            if not new:
                return False
            await connection.execute(
                """
                WITH waited_for AS (
                    SELECT EXISTS (
                        SELECT 1 FROM provider_jobs j JOIN attempts a USING (attempt_id)
                        WHERE j.provider_account = $1 AND j.provider_job_id = $2
                          AND a.state IN ('RENDERING', 'UNRESOLVED')) AS yes)
                UPDATE provider_accounts SET webhook_heard_at = clock_timestamp(),
                    next_poll_at = CASE WHEN yes THEN least(next_poll_at, clock_timestamp()) ELSE next_poll_at END,
                    hinted_at = CASE WHEN yes THEN clock_timestamp() ELSE hinted_at END
                FROM waited_for WHERE provider_account = $1
                """,
                provider_account,
                provider_job_id,
            )
            await connection.execute(
                "DELETE FROM webhook_hints WHERE received_at < clock_timestamp() - interval '1 hour'"
            )
            await failpoint("generator.webhook.before_commit")
        await failpoint("generator.webhook.after_commit")
        return True
