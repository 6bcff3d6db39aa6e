"""Provider accounts as rows: quota and standing, which all replicas share, by this database's clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from kit import postgres
from services.generator import buckets, catalogue, standings

_IN_FLIGHT = """
    a.state IN ('PREPARING', 'SUBMITTING', 'UNKNOWN', 'UNRESOLVED', 'RENDERING')
    AND (a.state NOT IN ('UNKNOWN', 'UNRESOLVED') OR a.render_deadline > clock_timestamp())
"""
_STANDINGS = f"""
    SELECT p.provider_account, p.paused, p.closed_reason, p.troubles, p.jobs_learnt, p.jobs_probe_seconds,
        extract(epoch FROM greatest(p.submits_after, p.requests_after) - clock_timestamp())::float8
            AS opens_in_seconds,
        coalesce(extract(epoch FROM clock_timestamp() - p.jobs_learnt_at), 0)::float8 AS jobs_learnt_seconds_ago,
        f.jobs_in_flight, f.preparing, f.being_sent, f.preparing_micros
    FROM provider_accounts p CROSS JOIN LATERAL (
        SELECT count(*) AS jobs_in_flight,
            count(*) FILTER (WHERE a.state = 'PREPARING') AS preparing,
            count(*) FILTER (WHERE a.state IN ('PREPARING', 'SUBMITTING')) AS being_sent,
            coalesce(sum(a.cost_micros) FILTER (WHERE a.state = 'PREPARING'), 0)::bigint AS preparing_micros
        FROM attempts a WHERE a.provider_account = p.provider_account AND {_IN_FLIGHT}) f
    WHERE p.provider_account = ANY($1::text[]) ORDER BY p.provider_account
"""
_SPENT = """
    SELECT coalesce(sum(cost_micros) FILTER (WHERE submitted_at > clock_timestamp() - $2::interval), 0)::bigint AS hour,
        coalesce(sum(cost_micros), 0)::bigint AS day,
        count(*) FILTER (WHERE provider_job_id IS NOT NULL OR state IN ('SUBMITTING', 'UNKNOWN', 'UNRESOLVED')) AS jobs
    FROM attempts
    WHERE provider_account = $1 AND submitted_at > clock_timestamp() - $3::interval
      AND (state NOT IN ('QUEUED', 'PREPARING') OR key_pinned)
"""


async def read(
    connection: postgres.Connection | postgres.Pool,
    accounts: Mapping[str, catalogue.ProviderAccount],
    *,
    uncapped: bool = False,
) -> tuple[list[standings.Standing], datetime]:
    """How these accounts stand, and the moment. Jobs in flight and money spent are counted from rows, never kept.

    What was spent is read where it is capped; `uncapped`: everywhere.
    """
    found: list[standings.Standing] = []
    now = await connection.fetchval("SELECT clock_timestamp()")
    for row in await connection.fetch(_STANDINGS, list(accounts)):
        values = dict(row)
        preparing_micros = values.pop("preparing_micros")
        account = accounts[values["provider_account"]]
        if uncapped or standings.capped(account):
            spent = await connection.fetchrow(
                _SPENT,
                account.name,
                timedelta(seconds=account.hour_seconds),
                timedelta(seconds=account.day_seconds),
            )
            assert spent is not None
            values["cost_micros_hour"] = spent["hour"] + preparing_micros
            values["cost_micros_day"] = spent["day"] + preparing_micros
            values["jobs_day"] = spent["jobs"] + values["preparing"]
        found.append(standings.Standing(**values))
    return found, now


class AccountStore:
    """Quota, circuit and what was learnt of each provider account."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def ensure(self, names: Sequence[str]) -> None:
        """A row for each provider account of the catalogue. Idempotent."""
        await self._pool.executemany(
            "INSERT INTO provider_accounts (provider_account) VALUES ($1) ON CONFLICT DO NOTHING",
            [(name,) for name in names],
        )

    async def standings(
        self, accounts: Mapping[str, catalogue.ProviderAccount], *, uncapped: bool = True
    ) -> tuple[list[standings.Standing], datetime]:
        """Every one of these accounts as it stands, with what was spent, and the moment."""
        return await read(self._pool, accounts, uncapped=uncapped)

    async def bucket(self, provider_account: str) -> tuple[buckets.Bucket, int, float]:
        """The request bucket, its version, and the moment."""
        row = await self._pool.fetchrow(
            """
            SELECT bucket_version, rate_share, extract(epoch FROM clock_timestamp())::float8 AS now,
                extract(epoch FROM requests_tat)::float8 AS tat,
                extract(epoch FROM creates_tat)::float8 AS creates_tat,
                extract(epoch FROM requests_after)::float8 AS held_until,
                extract(epoch FROM rate_share_at)::float8 AS rate_share_at,
                extract(epoch FROM submits_first_until)::float8 AS submits_first_until,
                ARRAY[extract(epoch FROM download_owed_at), extract(epoch FROM submit_owed_at),
                      extract(epoch FROM poll_owed_at)]::float8[] AS owed_at,
                ARRAY[extract(epoch FROM download_waits_until), extract(epoch FROM submit_waits_until),
                      extract(epoch FROM poll_waits_until)]::float8[] AS waits_until
            FROM provider_accounts WHERE provider_account = $1
            """,
            provider_account,
        )
        assert row is not None
        bucket = buckets.Bucket(
            tat=row["tat"],
            creates_tat=row["creates_tat"],
            held_until=row["held_until"],
            rate_share=row["rate_share"],
            rate_share_at=row["rate_share_at"],
            submits_first_until=row["submits_first_until"],
            owed_at=dict(zip(buckets.Use, row["owed_at"], strict=False)),
            waits_until=dict(zip(buckets.Use, row["waits_until"], strict=False)),
        )
        return bucket, row["bucket_version"], row["now"]

    async def write_bucket(
        self, provider_account: str, bucket: buckets.Bucket, version: int
    ) -> bool:
        """Writes it, if nobody has written since it was read; false: read it again."""
        written = await self._pool.fetchval(
            """
            UPDATE provider_accounts SET bucket_version = bucket_version + 1,
                requests_tat = to_timestamp($3), creates_tat = to_timestamp($4),
                requests_after = to_timestamp($5), rate_share = $6, rate_share_at = to_timestamp($7),
                download_owed_at = to_timestamp($8), submit_owed_at = to_timestamp($9),
                poll_owed_at = to_timestamp($10), download_waits_until = to_timestamp($11),
                submit_waits_until = to_timestamp($12), poll_waits_until = to_timestamp($13),
                submits_first_until = to_timestamp($14)
            WHERE provider_account = $1 AND bucket_version = $2 RETURNING true
            """,
            provider_account,
            version,
            bucket.tat,
            bucket.creates_tat,
            bucket.held_until,
            bucket.rate_share,
            bucket.rate_share_at,
            *(bucket.owed_at.get(use, buckets.NEVER) for use in _WITH_FLOORS),
            *(bucket.waits_until.get(use, buckets.NEVER) for use in _WITH_FLOORS),
            bucket.submits_first_until,
        )
        return bool(written)

    async def trouble(
        self,
        provider_account: str,
        reason: str,
        pause: timedelta,
        most: timedelta,
        said: timedelta = timedelta(0),
    ) -> None:
        """Closes an account after a create went wrong: for `pause`, twice that after the next in a row, up to `most`.

        Several that were on their way together count once. `said` is the provider's own time; it only ever tightens.
        """
        await self._pool.execute(
            """
            UPDATE provider_accounts SET
                closed_reason = CASE WHEN submits_after <= clock_timestamp() + $5::interval
                    THEN $2 ELSE closed_reason END,
                troubles = troubles + CASE WHEN submits_after <= clock_timestamp() THEN 1 ELSE 0 END,
                submits_after = greatest(submits_after, clock_timestamp() + $5::interval,
                    CASE WHEN submits_after <= clock_timestamp()
                         THEN clock_timestamp() + least($4::interval, $3::interval * power(2, least(troubles, 20))) END)
            WHERE provider_account = $1
            """,
            provider_account,
            reason[:300],
            pause,
            most,
            said,
        )

    async def went_well(self, provider_account: str) -> None:
        """A create was answered as it should: the account is open again, whole."""
        await self._pool.execute(
            "UPDATE provider_accounts SET troubles = 0 WHERE provider_account = $1 AND troubles > 0",
            provider_account,
        )

    async def too_many_jobs(
        self, provider_account: str, attempt_id: str, probe: timedelta, most: timedelta
    ) -> int:
        """The provider has as many jobs as it takes: those of ours that it may have. Answers how many those are.

        One more is tried after `probe`, after twice that when it turns out so again, up to `most`.
        """
        return await self._pool.fetchval(
            f"""
            UPDATE provider_accounts p SET jobs_learnt_at = clock_timestamp(),
                jobs_learnt = greatest(1, (
                    SELECT count(*) FROM attempts a
                    WHERE a.provider_account = $1 AND a.attempt_id <> $2 AND a.state <> 'PREPARING'
                      AND {_IN_FLIGHT})),
                jobs_probe_seconds = CASE
                    WHEN jobs_learnt IS NULL THEN $3
                    WHEN jobs_learnt_at > clock_timestamp() - make_interval(secs => least($3, jobs_probe_seconds))
                        THEN jobs_probe_seconds
                    ELSE least($4, 2 * jobs_probe_seconds) END
            WHERE p.provider_account = $1 RETURNING jobs_learnt
            """,
            provider_account,
            attempt_id,
            probe.total_seconds(),
            most.total_seconds(),
        )

    async def pause(self, provider_account: str, paused: bool) -> bool:
        """Stops or starts an account by hand. False when there is none of that name."""
        return bool(
            await self._pool.fetchval(
                "UPDATE provider_accounts SET paused = $2 WHERE provider_account = $1 RETURNING true",
                provider_account,
                paused,
            )
        )


_WITH_FLOORS = (buckets.Use.DOWNLOAD, buckets.Use.SUBMIT, buckets.Use.POLL)
