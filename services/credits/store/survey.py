"""The ledger's side of a reconciliation: holds at a watermark. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from kit import postgres
from services.credits import holds, rules
from services.credits.store import posting, rulebooks


class SurveyStore:
    """Holds, by id, by age, or those that are open; each read with the clock from just before it."""

    def __init__(self, pool: postgres.Pool, rulebooks_: rulebooks.RulebookStore) -> None:
        self._pool = pool
        self._rulebooks = rulebooks_

    async def by_ids(self, hold_ids: Sequence[str]) -> tuple[list[holds.Hold], datetime]:
        """Those of the holds that there are."""
        return await self._read("hold_id = ANY($1::text[])", list(hold_ids))

    async def since(
        self, created_since: datetime, before: tuple[datetime, str] | None, limit: int
    ) -> tuple[list[holds.Hold], datetime]:
        """Holds that were made then or later, newest first, from below a place (created_at, hold_id) on."""
        return await self._read(
            """
            created_at >= $1 AND ($2::timestamptz IS NULL OR (created_at, hold_id) < ($2, $3::text))
            ORDER BY created_at DESC, hold_id DESC LIMIT $4
            """,
            created_since,
            *(before or (None, None)),
            limit,
        )

    async def open(
        self, before: tuple[datetime, str] | None, limit: int
    ) -> tuple[list[holds.Hold], datetime]:
        """Open holds, newest first, from below a place on."""
        return await self._read(
            """
            state = 'HELD' AND ($1::timestamptz IS NULL OR (created_at, hold_id) < ($1, $2::text))
            ORDER BY created_at DESC, hold_id DESC LIMIT $3
            """,
            *(before or (None, None)),
            limit,
        )

    async def assess(self, ends: Sequence[rules.Verdict]) -> list[tuple[str, int]]:
        """What the policy on each hold takes for how its video ended; without holds that were never made."""
        by_id = {end.video_id: end for end in ends}
        found, _ = await self.by_ids(list(by_id))
        answers: dict[str, int] = {}
        async with self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS) as connection:
            for hold in found:
                if hold.item is None or not hold.policy_version:
                    continue
                policy = await self._rulebooks.refund_policy(connection, hold.policy_version)
                answers[hold.hold_id] = policy.captured(
                    hold.reserved, rules.item_from(hold.item), by_id[hold.hold_id]
                )
        return [(hold_id, answers[hold_id]) for hold_id in by_id if hold_id in answers]

    async def _read(self, where: str, *arguments: object) -> tuple[list[holds.Hold], datetime]:
        async with self._pool.acquire(timeout=postgres.ACQUIRE_TIMEOUT_SECONDS) as connection:
            # Before the rows, in a statement of its own: whatever was committed by then is among them.
            as_of: datetime = await connection.fetchval("SELECT clock_timestamp()")
            rows = await connection.fetch(
                f"SELECT {posting.HOLD_COLUMNS} FROM holds WHERE {where}", *arguments
            )
        return [posting.hold_from(row) for row in rows], as_of
