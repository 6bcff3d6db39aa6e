"""What reconciliations found, and the gateway's own side of them: videos at a watermark."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from kit import postgres
from services.gateway import reconciliation, videos
from services.gateway.store import rows

_VIDEO_SIDE = "videos"
_COLUMNS = """finding_id, kind, video_id, account_id, subject, subject_at, evidence, statements, repair, advice,
    first_seen_at, last_seen_at, confirmed_at"""


@dataclass(frozen=True, slots=True)
class Kept:
    """A finding with its history."""

    finding: reconciliation.Finding
    first_seen_at: datetime
    last_seen_at: datetime
    confirmed: bool


class FindingStore:
    """Statements of reconciliations."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def clock(self) -> datetime:
        """The database's time."""
        return await self._pool.fetchval("SELECT clock_timestamp()")

    async def take_turn(self, seconds: float) -> bool:
        """Whether a reconciliation is due, and this replica's. The first one is due so long after the first call."""
        taken = await self._pool.fetchval(
            """
            INSERT INTO reconciliation_turn AS t (taken_at) VALUES (clock_timestamp())
            ON CONFLICT (only_row) DO UPDATE SET taken_at = excluded.taken_at
            WHERE t.taken_at <= excluded.taken_at - make_interval(secs => $1)
            RETURNING xmax <> 0 -- a row that was there before
            """,
            seconds,
        )
        return bool(taken)

    async def videos_since(
        self, created_since: datetime, before: tuple[datetime, str] | None, limit: int
    ) -> list[tuple[datetime, str]]:
        """(created_at, id) of videos that were made then or later, newest first, from below a place on."""
        found = await self._pool.fetch(
            """
            SELECT created_at, video_id FROM videos
            WHERE created_at >= $1
              AND ($2::timestamptz IS NULL OR (created_at, video_id) < ($2, $3::text))
            ORDER BY created_at DESC, video_id DESC LIMIT $4
            """,
            created_since,
            *(before or (None, None)),
            limit,
        )
        return [(row["created_at"], row["video_id"]) for row in found]

    async def live_videos(self, after: str, limit: int) -> list[str]:
        """Ids of live videos, whatever their age, in order, from after one on."""
        found = await self._pool.fetch(
            """
            SELECT video_id FROM videos
            WHERE state IN ('PENDING', 'PROCESSING') AND video_id > $1 ORDER BY video_id LIMIT $2
            """,
            after,
            limit,
        )
        return [row["video_id"] for row in found]

    async def videos(self, video_ids: Sequence[str]) -> tuple[list[videos.Video], datetime]:
        """Those of the videos that there are, and the clock from just before they were read."""
        as_of = await self.clock()
        found = await self._pool.fetch(
            f"SELECT {rows.VIDEO_COLUMNS} FROM videos WHERE video_id = ANY($1)", list(video_ids)
        )
        return [rows.video(row) for row in found], as_of

    async def videos_with_findings(self) -> list[str]:
        """Videos of which something was found: every pass looks at them again."""
        found = await self._pool.fetch(
            "SELECT DISTINCT video_id FROM findings WHERE video_id <> ''"
        )
        return [row["video_id"] for row in found]

    async def oldest_job(self, side: str) -> datetime | None:
        """When the oldest job of a provider was made of which something was found."""
        return await self._pool.fetchval(
            "SELECT min(subject_at) FROM findings WHERE side = $1", side
        )

    async def keep(
        self, found: Sequence[reconciliation.Finding], interval: timedelta, side: str = _VIDEO_SIDE
    ) -> list[Kept]:
        """Writes down that a pass shows these, now; one that says something else than before begins anew."""
        if not found:
            return []
        async with self._pool.acquire() as connection, connection.transaction():
            kept = [
                await connection.fetchrow(
                    f"""
                    INSERT INTO findings AS f (finding_id, kind, video_id, account_id, subject, subject_at, side,
                        evidence, statements, repair, advice, first_seen_at, last_seen_at)
                    SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, now, now
                    FROM (SELECT clock_timestamp() AS now) moment
                    ON CONFLICT (finding_id) DO UPDATE SET
                        account_id = EXCLUDED.account_id, evidence = EXCLUDED.evidence, repair = EXCLUDED.repair,
                        statements = EXCLUDED.statements, advice = EXCLUDED.advice,
                        last_seen_at = EXCLUDED.last_seen_at,
                        first_seen_at = CASE WHEN f.evidence = EXCLUDED.evidence THEN f.first_seen_at
                                             ELSE EXCLUDED.first_seen_at END,
                        confirmed_at = CASE WHEN f.evidence <> EXCLUDED.evidence THEN NULL
                                            WHEN f.confirmed_at IS NOT NULL THEN f.confirmed_at
                                            WHEN EXCLUDED.last_seen_at >= f.first_seen_at + $12
                                            THEN EXCLUDED.last_seen_at END
                    RETURNING {_COLUMNS}
                    """,
                    finding.finding_id,
                    finding.kind,
                    finding.video_id,
                    finding.account_id,
                    finding.subject,
                    finding.subject_at,
                    side,
                    finding.evidence,
                    [
                        {"side": one.side, "as_of": one.as_of.isoformat(), "says": one.says}
                        for one in finding.statements
                    ],
                    finding.repair,
                    finding.advice,
                    interval,
                )
                for finding in sorted(found, key=lambda finding: finding.finding_id)
            ]
        return [_kept(row) for row in kept]

    async def clear(self, started_at: datetime, unread: Collection[str]) -> int:
        """Forgets what a pass that began then did not show any more, but for sides that it could not read."""
        gone = await self._pool.fetch(
            "DELETE FROM findings WHERE last_seen_at < $1 AND side <> ALL($2::text[]) RETURNING 1",
            started_at,
            list(unread),
        )
        return len(gone)

    async def find(self, finding_id: str) -> tuple[Kept, datetime] | None:
        """A finding that the last pass showed, and the clock."""
        row = await self._pool.fetchrow(
            f"SELECT {_COLUMNS}, clock_timestamp() AS now FROM findings WHERE finding_id = $1",
            finding_id,
        )
        return (_kept(row), row["now"]) if row else None


def _kept(row: Any) -> Kept:
    finding = reconciliation.Finding(
        reconciliation.Kind(row["kind"]),
        row["video_id"],
        row["account_id"],
        tuple(
            reconciliation.Statement(
                said["side"], datetime.fromisoformat(said["as_of"]), said["says"]
            )
            for said in row["statements"]
        ),
        reconciliation.Repair(row["repair"]),
        row["advice"],
        row["subject"],
        row["subject_at"],
    )
    confirmed = row["confirmed_at"] is not None
    return Kept(finding, row["first_seen_at"], row["last_seen_at"], confirmed)
