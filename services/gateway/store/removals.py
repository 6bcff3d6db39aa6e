"""Videos that their owners delete: the row stays, without what was asked for and made."""

from __future__ import annotations

from kit import outbox, postgres
from kit.failpoints import failpoint
from services.gateway import announcements, videos
from services.gateway.store import rows


class RemovalStore:
    """Statements of deletion."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def when_terminal(self, video_id: str) -> bool:
        """Notes that a live video is to be deleted when it has ended. False: it does not live."""
        noted = await self._pool.fetchval(
            """
            UPDATE videos SET delete_when_terminal = true
            WHERE video_id = $1 AND state IN ('PENDING', 'PROCESSING') RETURNING true
            """,
            video_id,
        )
        return bool(noted)

    async def delete(self, video_id: str) -> videos.Video | None:
        """A video that has ended is deleted from here on, and the event told. None: it lives, or was deleted before."""
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                f"""
                UPDATE videos SET deleted_at = clock_timestamp(), delete_due = true, revision = revision + 1,
                                  revised_at = clock_timestamp(), updated_at = clock_timestamp(),
                                  next_check_at = clock_timestamp() + interval '5 seconds'
                WHERE video_id = $1 AND deleted_at IS NULL AND state IN ('COMPLETED', 'FAILED', 'CANCELLED')
                RETURNING {rows.VIDEO_COLUMNS}
                """,
                video_id,
            )
            if row is None:
                return None
            video = rows.video(row)
            await outbox.add(connection, announcements.deleted(video))
        await failpoint("gateway.delete.after_commit")
        return video

    async def is_used(self, video: videos.Video, asset_id: str) -> bool:
        """Whether another video, which is not deleted, was made from the same asset."""
        return await self._pool.fetchval(
            """
            SELECT EXISTS (SELECT FROM videos
                WHERE input_image_id = $1 AND account_id = $2 AND video_id <> $3
                  AND deleted_at IS NULL AND state NOT IN ('REJECTED', 'ABANDONED'))
            OR EXISTS (SELECT FROM videos
                WHERE has_inputs AND account_id = $2 AND video_id <> $3
                  AND deleted_at IS NULL AND state NOT IN ('REJECTED', 'ABANDONED')
                  -- Ids are 26 random characters: they stand in a spec as an input and by no chance.
                  AND position(convert_to($1, 'UTF8') IN spec) > 0)
            """,
            asset_id,
            video.account_id,
            video.video_id,
        )

    async def removed(self, video: videos.Video, spec: bytes) -> None:
        """Storage has removed everything that this state of the row names; its spec goes without the words."""
        await self._pool.execute(
            "UPDATE videos SET spec = $3, delete_due = (revision <> $2) WHERE video_id = $1 AND delete_due",
            video.video_id,
            video.revision,
            spec,
        )
