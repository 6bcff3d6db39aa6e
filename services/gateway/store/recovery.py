"""What a restored gateway forgot, made again from the jobs that the generator kept."""

from __future__ import annotations

from datetime import UTC, datetime

from framewire.events.v1 import vocabulary_pb2
from framewire.generator.v1 import job_pb2
from kit import postgres
from services.gateway import videos
from services.gateway.store import rows

_REQUEST = """
    INSERT INTO requests (account_id, principal, method, request_id, fingerprint, resource_id, created_at)
    SELECT account_id, principal, 'CreateVideo', request_id, fingerprint, video_id, created_at FROM videos
    WHERE video_id = $1 AND octet_length(fingerprint) = 32
    ON CONFLICT (account_id, principal, method, request_id) DO NOTHING
"""


class RecoveryStore:
    """Statements of a recovery."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def page(self, after: str, since: datetime, limit: int) -> list[videos.Video]:
        """Videos that were admitted since then or are live, by id from after one on."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.VIDEO_COLUMNS} FROM videos
            WHERE video_id > $1 AND quoted_credits IS NOT NULL
              AND (created_at >= $2 OR state IN ('PENDING', 'PROCESSING') OR finished_at >= $2)
            ORDER BY video_id LIMIT $3
            """,
            after,
            since,
            limit,
        )
        return [rows.video(row) for row in found]

    async def readmit(self, job: job_pb2.Job, *, dry_run: bool) -> str:
        """Has a video again that the generator has. Answers "" when it was there, "READMITTED", or why it cannot be."""
        async with self._pool.acquire() as connection, connection.transaction():
            known = await connection.fetchrow(
                "SELECT state FROM videos WHERE video_id = $1 FOR UPDATE", job.video_id
            )
            hidden = known is not None and known["state"] in ("ADMITTING", "ABANDONED", "REJECTED")
            if known is not None and not hidden:
                return ""
            if not await connection.fetchval(
                "SELECT EXISTS (SELECT 1 FROM accounts WHERE account_id = $1)", job.account_id
            ):
                return f"account {job.account_id} was forgotten, too"
            if not job.HasField("admission"):
                return "its job is from before the gateway sent along how it was asked for"
            if dry_run:
                return "READMITTED"
            # A row that was not admitted in the restored moment was admitted after it: the generator has its job.
            await connection.execute("DELETE FROM videos WHERE video_id = $1", job.video_id)
            await self._insert(connection, job)
            await connection.execute(_REQUEST, job.video_id)
        return "READMITTED"

    async def _insert(self, connection: postgres.Connection, job: job_pb2.Job) -> None:
        admission = job.admission
        await connection.execute(
            """
            INSERT INTO videos (video_id, account_id, principal, request_id, state, stage, admit_until, spec, lane,
                                weight, start_by, input_image_id, quote_id, labels, client_reference, key_id,
                                fingerprint, similar_to, quoted_credits, price_version, policy_version, publishes,
                                accepted_at, next_check_at, created_at, has_inputs, model,
                                template_name, template_version, retry_of, max_credits)
            VALUES ($1, $2, $3, $4, 'PENDING', 'QUEUED', $5, $6, $7, $8, $9, $10, '', $11, $12, $13, $14, '', $15, $16,
                    $17, 1, clock_timestamp(), clock_timestamp(), $5, $18, $19,
                    $20, $21, $22, $23)
            """,
            job.video_id,
            job.account_id,
            admission.principal,
            admission.request_id,
            job.admitted_at.ToDatetime(tzinfo=UTC),
            job.spec.SerializeToString(),
            _lane(job),
            max(1, job.weight),
            job.start_by.ToDatetime(tzinfo=UTC),
            job.spec.input_image_id,
            dict(admission.labels),
            admission.client_reference,
            admission.key_id,
            admission.fingerprint,
            admission.quoted_credits,
            admission.price_version,
            admission.policy_version,
            bool(job.spec.inputs),
            job.spec.model,
            admission.template_name,
            admission.template_version,
            admission.retry_of,
            admission.max_credits if admission.HasField("max_credits") else None,
        )


def _lane(job: job_pb2.Job) -> str:
    return vocabulary_pb2.Lane.Name(job.lane).removeprefix("LANE_")
