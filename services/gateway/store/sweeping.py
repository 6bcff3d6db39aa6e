"""What the sweeper looks for. A row that is taken is put off first, so that two replicas never do the same at once."""

from __future__ import annotations

from kit import postgres
from services.gateway import videos
from services.gateway.store import rows

BATCH = 100


class SweepStore:
    """Statements of the sweeper."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def abandon(self, grace_seconds: float) -> list[videos.Video]:
        """Overdue admissions become ABANDONED and free their request_ids; who gets them here releases them."""
        async with self._pool.acquire() as connection, connection.transaction():
            found = await connection.fetch(
                f"""
                UPDATE videos SET state = 'ABANDONED', stage = 'DONE', release_due = true,
                                  unpin_due = (input_image_id <> '' OR has_inputs),
                                  next_check_at = clock_timestamp(), updated_at = clock_timestamp()
                WHERE video_id IN (
                    SELECT video_id FROM videos
                    WHERE state = 'ADMITTING'
                      AND admit_until < clock_timestamp() - make_interval(secs => $1)
                    ORDER BY admit_until LIMIT {BATCH} FOR UPDATE SKIP LOCKED
                ) AND state = 'ADMITTING'
                RETURNING {rows.VIDEO_COLUMNS}
                """,
                grace_seconds,
            )
            await connection.executemany(
                """
                DELETE FROM requests
                WHERE account_id = $1 AND principal = $2 AND method = 'CreateVideo' AND request_id = $3
                """,
                [(row["account_id"], row["principal"], row["request_id"]) for row in found],
            )
        return [rows.video(row) for row in found]

    async def take_undo(self, retry_seconds: float) -> list[videos.Video]:
        """Videos whose Release or Unpin is due, or the removal of their assets."""
        found = await self._pool.fetch(
            f"""
            UPDATE videos SET next_check_at = clock_timestamp() + make_interval(secs => $1)
            WHERE video_id IN (
                SELECT video_id FROM videos
                WHERE (release_due OR unpin_due OR delete_due) AND next_check_at <= clock_timestamp()
                ORDER BY next_check_at LIMIT {BATCH} FOR UPDATE SKIP LOCKED
            )
            RETURNING {rows.VIDEO_COLUMNS}
            """,
            retry_seconds,
        )
        return [rows.video(row) for row in found]

    async def released(self, video_id: str) -> None:
        """Credits acknowledged the Release."""
        await self._pool.execute(
            "UPDATE videos SET release_due = false WHERE video_id = $1", video_id
        )

    async def unpinned(self, video_id: str) -> None:
        """Storage acknowledged the Unpin."""
        await self._pool.execute(
            "UPDATE videos SET unpin_due = false WHERE video_id = $1", video_id
        )

    async def unpin_again(self, video_id: str) -> None:
        """What an admission pinned that went on after its video had been let go of already; of others nothing."""
        await self._pool.execute(
            """
            UPDATE videos SET unpin_due = true, next_check_at = clock_timestamp()
            WHERE video_id = $1 AND (input_image_id <> '' OR has_inputs)
              AND state IN ('ABANDONED', 'REJECTED', 'COMPLETED', 'FAILED', 'CANCELLED')
            """,
            video_id,
        )

    async def take_silent(self, retry_seconds: float) -> list[videos.Video]:
        """Live videos that have not been heard of for too long."""
        found = await self._pool.fetch(
            f"""
            UPDATE videos SET next_check_at = clock_timestamp() + make_interval(secs => $1)
            WHERE video_id IN (
                SELECT video_id FROM videos
                WHERE state IN ('PENDING', 'PROCESSING') AND next_check_at <= clock_timestamp()
                ORDER BY next_check_at LIMIT {BATCH} FOR UPDATE SKIP LOCKED
            )
            RETURNING {rows.VIDEO_COLUMNS}
            """,
            retry_seconds,
        )
        return [rows.video(row) for row in found]

    async def heard_of(self, video_id: str, check_after_seconds: float) -> None:
        """The generator knows the video: nothing to do for a while."""
        await self._pool.execute(
            """
            UPDATE videos SET accepted_at = COALESCE(accepted_at, clock_timestamp()),
                              next_check_at = clock_timestamp() + make_interval(secs => $2)
            WHERE video_id = $1 AND state IN ('PENDING', 'PROCESSING')
            """,
            video_id,
            check_after_seconds,
        )

    async def ring_again(self, video_id: str, check_after_seconds: float) -> videos.Video | None:
        """Counts one more publication. None: the video is no longer waiting to be heard of."""
        row = await self._pool.fetchrow(
            f"""
            UPDATE videos SET publishes = publishes + 1,
                              next_check_at = clock_timestamp() + make_interval(secs => $2)
            WHERE video_id = $1 AND state = 'PENDING' AND accepted_at IS NULL
            RETURNING {rows.VIDEO_COLUMNS}
            """,
            video_id,
            check_after_seconds,
        )
        return rows.video(row) if row else None

    async def purge(self) -> int:
        """Removes what was never admitted after a day, and requests after 30 days. Answers how much."""
        gone = await self._pool.fetch(
            """
            DELETE FROM videos WHERE video_id IN (
                SELECT video_id FROM videos
                WHERE state IN ('REJECTED', 'ABANDONED') AND NOT release_due AND NOT unpin_due
                  AND created_at < clock_timestamp() - interval '1 day' LIMIT 1000
            ) RETURNING 1
            """
        )
        forgotten = await self._pool.execute(
            """
            DELETE FROM requests WHERE ctid = ANY(ARRAY(
                SELECT ctid FROM requests
                WHERE created_at < clock_timestamp() - interval '30 days'
                  AND method <> 'CreateAccount' -- accounts stay for ever, and so does what they are known by
                LIMIT 1000
            ))
            """
        )
        await self._pool.execute(
            "DELETE FROM video_counts WHERE minute < clock_timestamp() - interval '2 hours'"
        )
        await self._pool.execute(
            "DELETE FROM upload_counts WHERE day < (clock_timestamp() AT TIME ZONE 'UTC')::date - 1"
        )
        return len(gone) + int(forgotten.split()[-1])
