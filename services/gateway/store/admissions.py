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
            WHERE a.account_id = $1
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
        values["lanes"] = tuple(values["lanes"])
        earlier = rows.Request(bytes(fingerprint), resource_id) if resource_id else None
        return rows.Standing(account=rows.Account(**values), earlier=earlier, **rest)

    async def in_flight(self, account_id: str) -> int:
        """Videos of the account that live."""
        return await self._pool.fetchval(_IN_FLIGHT, account_id)

    async def begin(
        self, new: videos.NewVideo, max_in_flight: int, admit_seconds: float
    ) -> videos.Video | rows.Request | rows.Duplicate | None:
        """Inserts the row ADMITTING and its request; the earlier request where there is one, None at the limit.

        Under the account's lock, so that the count is true and one request_id makes one row.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "SELECT pg_advisory_xact_lock($1, $2)", _LOCK_CLASS, _lock(new.account_id)
            )
            known = await connection.fetchrow(
                """
                SELECT fingerprint, resource_id FROM requests
                WHERE account_id = $1 AND principal = $2 AND method = 'CreateVideo' AND request_id = $3
                """,
                new.account_id,
                new.principal,
                new.request_id,
            )
            if known is not None:
                return rows.Request(bytes(known["fingerprint"]), known["resource_id"])
            if await connection.fetchval(_IN_FLIGHT, new.account_id) >= max_in_flight:
                return None
            if (twin := await _duplicate(connection, new)) is not None:
                return rows.Duplicate(twin)
            return await _insert(connection, new, admit_seconds)

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
            return left


_IN_FLIGHT = """
    SELECT count(*) FROM videos WHERE account_id = $1 AND state IN ('ADMITTING', 'PENDING', 'PROCESSING')
"""


def _lock(account_id: str) -> int:
    return zlib.crc32(account_id.encode()) - 2**31


async def _duplicate(connection: postgres.Connection, new: videos.NewVideo) -> str | None:
    """The newest video by the same request, where its caller does not want it twice; a failed one may be sent again."""
    if not new.reject_duplicates_seconds:
        return None
    return await connection.fetchval(
        """
        SELECT r.resource_id FROM requests r JOIN videos v ON v.video_id = r.resource_id
        WHERE r.account_id = $1 AND r.fingerprint = $2 AND r.method = 'CreateVideo'
          AND r.created_at > clock_timestamp() - make_interval(secs => $3)
          AND v.state NOT IN ('FAILED', 'CANCELLED')
        ORDER BY r.created_at DESC LIMIT 1
        """,
        new.account_id,
        new.fingerprint,
        new.reject_duplicates_seconds,
    )


async def _insert(
    connection: postgres.Connection, new: videos.NewVideo, admit_seconds: float
) -> videos.Video:
    row = await connection.fetchrow(
        f"""
        INSERT INTO videos (video_id, account_id, principal, request_id, state, stage, admit_until, spec, lane,
                            weight, start_by, input_image_id, quote_id, max_credits, labels, client_reference,
                            key_id, model, retry_of, has_inputs, fingerprint, similar_to, next_check_at)
        VALUES ($1, $2, $3, $4, 'ADMITTING', 'UNSPECIFIED', clock_timestamp() + make_interval(secs => $5), $6, $7,
                $8, $9, $10, $11, $12, $13, $14, $16, $17, $18, $19, $15,
                COALESCE((SELECT resource_id FROM requests
                          WHERE account_id = $2 AND fingerprint = $15 AND method = 'CreateVideo'
                            AND created_at > clock_timestamp() - interval '1 minute'
                          ORDER BY created_at DESC LIMIT 1), ''),
                clock_timestamp())
        RETURNING {rows.VIDEO_COLUMNS}
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
        new.fingerprint,
        new.key_id,
        new.model,
        new.retry_of,
        new.has_inputs,
    )
    await connection.execute(
        """
        INSERT INTO requests (account_id, principal, method, request_id, fingerprint, resource_id)
        VALUES ($1, $2, 'CreateVideo', $3, $4, $5)
        """,
        new.account_id,
        new.principal,
        new.request_id,
        new.fingerprint,
        new.video_id,
    )
    assert row is not None
    return rows.video(row)
