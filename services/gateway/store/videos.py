"""Videos: read, projected, told how far they are."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from kit import batches, outbox, postgres
from kit.failpoints import failpoint
from services.gateway import announcements, videos
from services.gateway.store import rows

PROJECTED_AT_ONCE = 64
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


@dataclass(frozen=True, slots=True)
class _Told:
    video_id: str
    fact: videos.Fact
    check_after_seconds: float


class VideoStore:
    """Statements about videos that were admitted."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool
        self._projections = batches.Batcher(self._project, PROJECTED_AT_ONCE)

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
        return await self._projections.do(_Told(video_id, fact, check_after_seconds))

    async def _project(self, told: Sequence[_Told]) -> list[videos.Video | None]:
        """What each made of its video; None: nothing. Of one video's in their order."""
        changed: dict[int, videos.Video] = {}
        left = dict(enumerate(told))
        while left:
            found = await self._pool.fetch(
                f"SELECT {rows.VIDEO_COLUMNS}, xmin::text AS version FROM videos WHERE video_id = ANY($1)",
                list({one.video_id for one in left.values()}),
            )
            before = {row["video_id"]: rows.video(row) for row in found}
            versions = {row["video_id"]: row["version"] for row in found}
            made = _projected(before, left)
            written = await self._replace(before, versions, made, told) if made else set[str]()
            changed |= {at: video for at, video in made.items() if video.video_id in written}
            # What another wrote since it was read is read again.
            again = {video.video_id for video in made.values()} - written
            left = {at: one for at, one in left.items() if one.video_id in again}
        if changed:
            await failpoint("gateway.project.after_commit")
        return [changed.get(at) for at in range(len(told))]

    async def _replace(
        self,
        before: Mapping[str, videos.Video],
        versions: Mapping[str, str],
        made: Mapping[int, videos.Video],
        told: Sequence[_Told],
    ) -> set[str]:
        """Writes the rows that nobody has written since they were read, and tells what is gone, in one commit."""
        await failpoint("gateway.project.before_commit")
        last = {video.video_id: at for at, video in sorted(made.items())}
        accepted = {told[at].video_id for at in made if told[at].fact.seq > 0}
        gone = {
            video_id: made[at]
            for video_id, at in last.items()
            if made[at].deleted_at is not None and before[video_id].deleted_at is None
        }
        values = [
            _values(made[at], versions[key], key in accepted, told[at].check_after_seconds)
            for key, at in sorted(last.items())  # so that no two replicas wait for each other
        ]
        async with self._pool.acquire() as connection, contextlib.AsyncExitStack() as whole:
            if gone:  # else the one statement is its own transaction
                await whole.enter_async_context(connection.transaction())
            written = {row["video_id"] for row in await connection.fetchmany(_WRITE, values)}
            for video_id in gone.keys() & written:
                await outbox.add(connection, announcements.deleted(gone[video_id]))
        return written

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


def _projected(
    before: Mapping[str, videos.Video], told: Mapping[int, _Told]
) -> dict[int, videos.Video]:
    """The videos that were changed, each as it is after that fact."""
    now, made = dict(before), dict[int, videos.Video]()
    for at, one in told.items():
        video = now.get(one.video_id)
        changed = videos.project(video, one.fact) if video else None
        if changed is not None:
            now[one.video_id] = made[at] = changed
    return made


_WRITE = """
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
    WHERE video_id = $1 AND xmin = $25::text::xid RETURNING video_id
"""


def _values(
    video: videos.Video, version: str, accepted: bool, check_after_seconds: float
) -> tuple[object, ...]:
    """The parameters of _WRITE."""
    return (
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
