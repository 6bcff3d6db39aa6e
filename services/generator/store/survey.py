"""The generator's side of a reconciliation: videos and attempts at a watermark, and whose a job is. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import postgres
from services.generator.store import videos

_VIDEOS = """
    SELECT v.video_id, v.account_id, v.state, v.last_event, v.cancel_requested, v.created_at, v.job,
           (SELECT a.state FROM attempts a WHERE a.video_id = v.video_id
            ORDER BY a.number DESC LIMIT 1) AS attempt_state
    FROM videos v WHERE
"""


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A video with its attempts, by number."""

    outcome: videos.Outcome
    created_at: datetime
    attempts: Sequence[Mapping[str, Any]]
    job: bytes
    """As it arrived; empty where it never did."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The attempt that a provider's job is on record with."""

    video_id: str
    superseded: bool
    """It has another job, or none at all and could be sent."""


class SurveyStore:
    """Videos, by id, by age, or those that are live; each read with the clock from just before it."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def by_ids(self, video_ids: Sequence[str]) -> tuple[list[Surveyed], datetime]:
        """Those of the videos that there are."""
        return await self._read("v.video_id = ANY($1::text[])", list(video_ids))

    async def since(
        self, created_since: datetime, before: tuple[datetime, str] | None, limit: int
    ) -> tuple[list[Surveyed], datetime]:
        """Videos that came then or later, newest first, from below a place (created_at, video_id) on."""
        return await self._read(
            """
            v.created_at >= $1
              AND ($2::timestamptz IS NULL OR (v.created_at, v.video_id) < ($2, $3::text))
            ORDER BY v.created_at DESC, v.video_id DESC LIMIT $4
            """,
            created_since,
            *(before or (None, None)),
            limit,
        )

    async def live(
        self, before: tuple[datetime, str] | None, limit: int
    ) -> tuple[list[Surveyed], datetime]:
        """Live videos, newest first, from below a place on."""
        return await self._read(
            """
            v.finished_at IS NULL
              AND ($1::timestamptz IS NULL OR (v.created_at, v.video_id) < ($1, $2::text))
            ORDER BY v.created_at DESC, v.video_id DESC LIMIT $3
            """,
            *(before or (None, None)),
            limit,
        )

    async def clock(self) -> datetime:
        """The database's time."""
        return await self._pool.fetchval("SELECT clock_timestamp()")

    async def owners(
        self, provider_account: str, provider_job_ids: Sequence[str]
    ) -> dict[str, Owner]:
        """Whose the jobs are, of those that are on record."""
        found = await self._pool.fetch(
            """
            SELECT j.provider_job_id, a.video_id,
                   a.provider_job_id IS DISTINCT FROM j.provider_job_id AND a.state <> 'SUBMITTING'
                       AS superseded
            FROM provider_jobs j JOIN attempts a USING (attempt_id)
            WHERE j.provider_account = $1 AND j.provider_job_id = ANY($2::text[])
            """,
            provider_account,
            list(provider_job_ids),
        )
        return {row["provider_job_id"]: Owner(row["video_id"], row["superseded"]) for row in found}

    async def videos_of(self, attempt_ids: Sequence[str]) -> dict[str, str]:
        """The videos of attempts."""
        found = await self._pool.fetch(
            "SELECT attempt_id, video_id FROM attempts WHERE attempt_id = ANY($1::text[])",
            list(attempt_ids),
        )
        return {row["attempt_id"]: row["video_id"] for row in found}

    async def _read(self, where: str, *arguments: object) -> tuple[list[Surveyed], datetime]:
        async with self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS) as connection:
            # Before the snapshot is taken: whatever was committed by then is in it.
            as_of: datetime = await connection.fetchval("SELECT clock_timestamp()")
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                found = await connection.fetch(f"{_VIDEOS} {where}", *arguments)
                tries = await connection.fetch(
                    """
                    SELECT attempt_id, video_id, number, account_id, state, provider_account,
                           provider_job_id, cause, message, resolve_by, created_at, updated_at
                    FROM attempts WHERE video_id = ANY($1::text[]) ORDER BY video_id, number
                    """,
                    [row["video_id"] for row in found],
                )
        by_video: dict[str, list[Mapping[str, Any]]] = {}
        for row in tries:
            by_video.setdefault(row["video_id"], []).append(dict(row))
        return [
            Surveyed(
                videos.outcome(row),
                row["created_at"],
                by_video.get(row["video_id"], []),
                bytes(row["job"] or b""),
            )
            for row in found
        ], as_of
