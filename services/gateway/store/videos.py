"""Videos: read, projected, told how far they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from kit import outbox, postgres
from kit.failpoints import failpoint
from services.gateway import announcements, videos
from services.gateway.store import rows

_ADMITTED = "state NOT IN ('ADMITTING', 'REJECTED', 'ABANDONED')"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a video is."""

    video_id: str
    version: int
    stage: str
    progress_percent: int
    queue_position: int
    expected_at: datetime | None


class VideoStore:
    """Statements about videos that were admitted."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def get(self, video_id: str) -> videos.Video | None:
        """A row, whatever its state."""
        row = await self._pool.fetchrow(
            f"SELECT {rows.VIDEO_COLUMNS} FROM videos WHERE video_id = $1", video_id
        )
        return rows.video(row) if row else None

    async def admitting(self, video_id: str) -> tuple[videos.Video, bool] | None:
        """A row, and whether its admission is overdue by the database's clock."""
        row = await self._pool.fetchrow(
            f"""
            SELECT {rows.VIDEO_COLUMNS}, admit_until < clock_timestamp() AS overdue
            FROM videos WHERE video_id = $1
            """,
            video_id,
        )
        return (rows.video(row), row["overdue"]) if row else None

    async def many(self, video_ids: Sequence[str]) -> list[videos.Video]:
        """Those of the videos that there are."""
        found = await self._pool.fetch(
            f"SELECT {rows.VIDEO_COLUMNS} FROM videos WHERE video_id = ANY($1)", list(video_ids)
        )
        return [rows.video(row) for row in found]

    async def listing(
        self, listing: videos.Listing, place: tuple[datetime, str] | None, limit: int
    ) -> list[videos.Video]:
        """The account's admitted videos that are not deleted, from after a place."""
        created_at, video_id = place or (None, "")
        beyond, way = (">", "ASC") if listing.oldest_first else ("<", "DESC")
        conditions = ["account_id = $1", _ADMITTED, "deleted_at IS NULL"]
        conditions.append(f"($2::timestamptz IS NULL OR (created_at, video_id) {beyond} ($2, $3))")
        values: list[object] = [listing.account_id, created_at, video_id]
        for condition, value in _filters(listing):
            values.append(value)
            conditions.append(condition.format(len(values)))
        found = await self._pool.fetch(
            f"""
            SELECT {rows.VIDEO_COLUMNS} FROM videos WHERE {" AND ".join(conditions)}
            ORDER BY created_at {way}, video_id {way} LIMIT {limit}
            """,
            *values,
        )
        return [rows.video(row) for row in found]

    async def revised(
        self,
        account_ids: Sequence[str],
        after: datetime,
        place: tuple[datetime, str] | None,
        limit: int,
    ) -> list[videos.Video]:
        """What was admitted or changed in these accounts after a moment, by when, from after a place."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.VIDEO_COLUMNS} FROM videos
            WHERE account_id = ANY($1) AND {_ADMITTED} AND revised_at > $2
              AND ($3::timestamptz IS NULL OR (revised_at, video_id) > ($3, $4))
            ORDER BY revised_at, video_id LIMIT $5
            """,
            list(account_ids),
            after,
            *(place or (None, "")),
            limit,
        )
        return [rows.video(row) for row in found]

    async def unfinished(self, account_id: str, after: str, limit: int) -> list[videos.Video]:
        """The account's videos that live or are not settled, by id, from after one."""
        found = await self._pool.fetch(
            f"""
            SELECT {rows.VIDEO_COLUMNS} FROM videos
            WHERE account_id = $1 AND video_id > $2 AND {_ADMITTED}
              AND (state IN ('PENDING', 'PROCESSING') OR settlement = 'PENDING')
            ORDER BY video_id LIMIT $3
            """,
            account_id,
            after,
            limit,
        )
        return [rows.video(row) for row in found]

    async def now(self) -> datetime:
        """The database's clock."""
        return await self._pool.fetchval("SELECT clock_timestamp()")

    async def project(
        self, video_id: str, fact: videos.Fact, check_after_seconds: float
    ) -> videos.Video | None:
        """Applies an event; None when it changes nothing. Idempotent."""
        while True:
            row = await self._pool.fetchrow(
                f"SELECT {rows.VIDEO_COLUMNS}, xmin::text AS version FROM videos WHERE video_id = $1",
                video_id,
            )
            before = rows.video(row) if row else None
            changed = videos.project(before, fact) if before else None
            if row is None or before is None or changed is None:
                return None
            gone = changed.deleted_at is not None and before.deleted_at is None
            if await self._replace(
                changed, row["version"], fact.seq > 0, check_after_seconds, gone
            ):
                await failpoint("gateway.project.after_commit")
                return changed

    async def _replace(
        self,
        video: videos.Video,
        version: str,
        accepted: bool,
        check_after_seconds: float,
        gone: bool,
    ) -> bool:
        """Writes the row, and that it is gone. False: another wrote since it was read in this version."""
        await failpoint("gateway.project.before_commit")
        async with self._pool.acquire() as connection:
            if not gone:
                return await _write(connection, video, version, accepted, check_after_seconds)
            async with connection.transaction():
                if not await _write(connection, video, version, accepted, check_after_seconds):
                    return False
                await outbox.add(connection, announcements.deleted(video))
                return True

    async def progress(self, progress: Progress) -> bool:
        """Writes how far a live video is, when that is news. No new revision."""
        changed = await self._pool.fetchval(
            """
            UPDATE videos SET progress_version = $2, progress_percent = $4, queue_position = $5,
                              expected_at = $6, updated_at = clock_timestamp(),
                              stage = CASE WHEN $3 IN ('UNSPECIFIED', 'DONE') THEN stage ELSE $3 END
            WHERE video_id = $1 AND state IN ('PENDING', 'PROCESSING') AND progress_version < $2
            RETURNING true
            """,
            progress.video_id,
            progress.version,
            progress.stage,
            progress.progress_percent,
            progress.queue_position,
            progress.expected_at,
        )
        return bool(changed)

    async def request_cancel(self, video_id: str) -> videos.Video | None:
        """Notes that the end was asked for, once; the sweeper sees to it that the generator hears of it.

        None: the video has ended, or its end was asked for before.
        """
        row = await self._pool.fetchrow(
            f"""
            UPDATE videos SET cancel_requested = true, revision = revision + 1,
                              revised_at = clock_timestamp(),
                              stage = CASE WHEN state = 'PROCESSING' THEN 'CANCELLING' ELSE stage END,
                              next_check_at = clock_timestamp(), updated_at = clock_timestamp()
            WHERE video_id = $1 AND state IN ('PENDING', 'PROCESSING') AND NOT cancel_requested
            RETURNING {rows.VIDEO_COLUMNS}
            """,
            video_id,
        )
        return rows.video(row) if row else None


def _filters(listing: videos.Listing) -> list[tuple[str, object]]:
    """Conditions with a hole for their number, and the values for them."""
    every: list[tuple[str, object]] = [
        ("state = ${0}", listing.state),
        ("created_at >= ${0}", listing.created_from),
        ("created_at < ${0}", listing.created_to),
        ("model = ${0}", listing.model),
        ("labels <> '{{}}' AND labels @> ${0}", dict(listing.labels)),
        ("template_name <> '' AND template_name = ${0}", listing.template_name),
        ("template_version = ${0}", listing.template_version),
        ("client_reference <> '' AND client_reference = ${0}", listing.client_reference),
    ]
    return [(condition, value) for condition, value in every if value]


async def _write(
    connection: postgres.Connection,
    video: videos.Video,
    version: str,
    accepted: bool,
    check_after_seconds: float,
) -> bool:
    written = await connection.fetchval(
        """
        UPDATE videos SET
            state = $2, stage = $3, revision = $4, last_seq = $5, progress_percent = $6, queue_position = $7,
            expected_at = $8, outputs = $9, late_outputs = $10, failure_cause = $11, failure_message = $12,
            failure_retryable = $13, cancel_requested = $14, captured_credits = $15, released_credits = $16,
            settlement = $17, unpin_due = $18, started_at = $19, finished_at = $20,
            deleted_at = $23, delete_due = $24, revised_at = clock_timestamp(),
            accepted_at = CASE WHEN $21 THEN COALESCE(accepted_at, clock_timestamp()) ELSE accepted_at END,
            next_check_at = CASE WHEN $18 OR $24 THEN clock_timestamp()
                                 ELSE clock_timestamp() + make_interval(secs => $22) END,
            updated_at = clock_timestamp()
        WHERE video_id = $1 AND xmin = $25::text::xid RETURNING true
        """,
        video.video_id,
        video.state,
        video.stage,
        video.revision,
        video.last_seq,
        video.progress_percent,
        video.queue_position,
        video.expected_at,
        video.outputs,
        video.late_outputs,
        video.failure_cause,
        video.failure_message,
        video.failure_retryable,
        video.cancel_requested,
        video.captured_credits,
        video.released_credits,
        video.settlement,
        video.unpin_due,
        video.started_at,
        video.finished_at,
        accepted,
        check_after_seconds,
        video.deleted_at,
        video.delete_due,
        version,
    )
    return bool(written)
