"""Admission: from the row ADMITTING to its commit point, and the ways out of it. Every change is a compare-and-set."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from kit import postgres
from services.gateway import videos
from services.gateway.store import rows

CREATE_VIDEO = "CreateVideo"
_LOCK_CLASS = 0x61646D74
_FORGET = """
    DELETE FROM requests WHERE account_id = $1 AND principal = $2 AND method = 'CreateVideo' AND request_id = $3
"""

_NOT_COUNTED = """
    UPDATE video_counts SET videos = GREATEST(videos - 1, 0)
    WHERE subject = ANY($1::text[]) AND minute = date_trunc('minute', $2::timestamptz)
"""


class AdmissionStore:
    """Statements of the saga."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def standing(
        self, account_id: str, principal: str = "", request_id: str = ""
    ) -> rows.Standing | None:
        """The account, the pause, the clock, and what the request_id already stands for. None: no such account."""
        row = await self._pool.fetchrow(
            """
            SELECT a.*, s.admission_paused, s.paused_why, clock_timestamp() AS now,
                   r.fingerprint, r.resource_id
            FROM accounts a CROSS JOIN settings s
            LEFT JOIN requests r ON r.account_id = a.account_id AND r.principal = $2
                                AND r.method = 'CreateVideo' AND r.request_id = $3
            WHERE a.account_id = $1 AND a.erased_at IS NULL
            """,
            account_id,
            principal,
            request_id,
        )
        if row is None:
            return None
        values = dict(row)
        resource_id, fingerprint = values.pop("resource_id"), values.pop("fingerprint")
        rest = {name: values.pop(name) for name in ("admission_paused", "paused_why", "now")}
        earlier = rows.Request(bytes(fingerprint), resource_id) if resource_id else None
        return rows.Standing(account=rows.account(values), earlier=earlier, **rest)

    async def in_flight(self, account_id: str) -> int:
        """Videos of the account that live."""
        return await self._pool.fetchval(_IN_FLIGHT, account_id)

    async def begin(
        self, new: videos.NewVideo, admit_seconds: float
    ) -> videos.Video | rows.Request | rows.AtLimit | rows.Duplicate:
        """Inserts the row ADMITTING and its request; the earlier request where there is one, or the limit it meets.

        Under the account's lock, so that counts are true and one request_id makes one row: all in one statement.
        """
        row = await self._pool.fetchrow(
            f"""
            WITH claim AS MATERIALIZED (SELECT * FROM claim_admission($17, $18, $2, $15, $3, $4, $16, $20)),
            made AS (
                INSERT INTO videos (video_id, account_id, principal, request_id, state, stage, admit_until, spec,
                                    lane, weight, start_by, input_image_id, quote_id, max_credits, labels,
                                    client_reference, key_id, has_inputs, model, retry_of, fingerprint,
                                    similar_to, next_check_at, template_name, template_version)
                SELECT $1, $2, $3, $4, 'ADMITTING', 'UNSPECIFIED', clock_timestamp() + make_interval(secs => $5),
                       $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $19, $21,
                       $22, $16,
                       COALESCE((SELECT resource_id FROM requests
                                 WHERE account_id = $2 AND fingerprint = $16 AND method = 'CreateVideo'
                                   AND created_at > clock_timestamp() - interval '1 minute'
                                 ORDER BY created_at DESC LIMIT 1), ''),
                       clock_timestamp(), $23, $24
                FROM claim WHERE verdict = 'ADMIT'
                RETURNING {rows.VIDEO_COLUMNS}
            ),
            noted AS (
                INSERT INTO requests (account_id, principal, method, request_id, fingerprint, resource_id)
                SELECT $2, $3, 'CreateVideo', $4, $16, $1 FROM claim WHERE verdict = 'ADMIT'
            )
            SELECT claim.*, made.* FROM claim LEFT JOIN made ON true
            """,
            new.video_id,
            new.account_id,
            new.principal,
            new.request_id,
            admit_seconds,
            new.spec,
            new.lane,
            new.weight,
            new.start_by,
            new.input_image_id,
            new.quote_id,
            new.max_credits,
            dict(new.labels),
            new.client_reference,
            new.key_id,
            new.fingerprint,
            _LOCK_CLASS,
            _lock(new.account_id),
            new.has_inputs,
            new.reject_duplicates_seconds,
            new.model,
            new.retry_of,
            new.template_name,
            new.template_version,
        )
        assert row is not None
        return _begun(row)

    async def take_over(
        self, video_id: str, epoch: int, admit_seconds: float
    ) -> videos.Video | None:
        """Makes an overdue admission ours. None: it is not overdue, or another was first."""
        row = await self._pool.fetchrow(
            f"""
            UPDATE videos SET admit_epoch = admit_epoch + 1,
                              admit_until = clock_timestamp() + make_interval(secs => $3),
                              updated_at = clock_timestamp()
            WHERE video_id = $1 AND state = 'ADMITTING' AND admit_epoch = $2
              AND admit_until < clock_timestamp()
            RETURNING {rows.VIDEO_COLUMNS}
            """,
            video_id,
            epoch,
            admit_seconds,
        )
        return rows.video(row) if row else None

    async def give_way(self, video_id: str, epoch: int) -> None:
        """Ends our claim on an admission that we cannot finish: another call may take it over at once."""
        await self._pool.execute(
            """
            UPDATE videos SET admit_until = LEAST(admit_until, clock_timestamp())
            WHERE video_id = $1 AND state = 'ADMITTING' AND admit_epoch = $2
            """,
            video_id,
            epoch,
        )

    async def commit(
        self, video_id: str, epoch: int, hold: rows.Hold, check_after_seconds: float
    ) -> videos.Video | None:
        """The commit point: ADMITTING becomes PENDING. None: the row is no longer ours to admit."""
        row = await self._pool.fetchrow(
            f"""
            UPDATE videos SET state = 'PENDING', stage = 'QUEUED', quoted_credits = $3, price_version = $4,
                              policy_version = $5, publishes = 1, updated_at = clock_timestamp(),
                              revised_at = clock_timestamp(),
                              next_check_at = clock_timestamp() + make_interval(secs => $6)
            WHERE video_id = $1 AND state = 'ADMITTING' AND admit_epoch = $2
            RETURNING {rows.VIDEO_COLUMNS}
            """,
            video_id,
            epoch,
            hold.credits,
            hold.price_version,
            hold.policy_version,
            check_after_seconds,
        )
        return rows.video(row) if row else None

    async def reject(self, video: videos.Video, refusal: Mapping[str, Any]) -> videos.Video | None:
        """ADMITTING becomes REJECTED and frees its request_id. None: the row is no longer ours."""
        return await self._leave(
            f"""
            UPDATE videos SET state = 'REJECTED', stage = 'DONE', refusal = $3,
                              unpin_due = (input_image_id <> '' OR has_inputs),
                              next_check_at = clock_timestamp(), updated_at = clock_timestamp()
            WHERE video_id = $1 AND state = 'ADMITTING' AND admit_epoch = $2
            RETURNING {rows.VIDEO_COLUMNS}
            """,
            video.video_id,
            video.admit_epoch,
            dict(refusal),
        )

    async def cancel(self, video_id: str) -> videos.Video | None:
        """ADMITTING becomes ABANDONED because its owner wants it so. None: it is not ADMITTING."""
        return await self._leave(
            f"""
            UPDATE videos SET state = 'ABANDONED', stage = 'DONE', cancel_requested = true,
                              release_due = true, unpin_due = (input_image_id <> '' OR has_inputs),
                              next_check_at = clock_timestamp(), updated_at = clock_timestamp()
            WHERE video_id = $1 AND state = 'ADMITTING' RETURNING {rows.VIDEO_COLUMNS}
            """,
            video_id,
        )

    async def _leave(self, statement: str, *arguments: object) -> videos.Video | None:
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(statement, *arguments)
            if row is None:
                return None
            left = rows.video(row)
            await connection.execute(_FORGET, left.account_id, left.principal, left.request_id)
            await connection.execute(_NOT_COUNTED, [left.account_id, left.key_id], left.created_at)
            return left


_IN_FLIGHT = """
    SELECT count(*) FROM videos WHERE account_id = $1 AND state IN ('ADMITTING', 'PENDING', 'PROCESSING')
"""


def _lock(account_id: str) -> int:
    return zlib.crc32(account_id.encode()) - 2**31


def _begun(row: Any) -> videos.Video | rows.Request | rows.AtLimit | rows.Duplicate:
    if row["verdict"] == "ADMIT":
        return rows.video(row)
    if row["verdict"] == "KNOWN":
        return rows.Request(bytes(row["known_fingerprint"]), row["known_resource"])
    if row["verdict"] == "DUPLICATE":
        return rows.Duplicate(row["known_resource"])
    return rows.AtLimit(row["verdict"], row["subject"], row["allowed"], row["wait_seconds"])
