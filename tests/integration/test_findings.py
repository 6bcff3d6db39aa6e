"""What the gateway keeps of reconciliations, on a real Postgres: when a finding counts, begins anew, and is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio

import services.gateway
from kit import errors, migrate, postgres
from services.gateway import reconciler, sides
from services.gateway import reconciliation as core
from services.gateway.store import findings
from tests import containers

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
VIDEO = "v" * 26
MIGRATIONS = Path(services.gateway.__file__).parent / "migrations"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pool(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[postgres.Pool]:
    """The gateway's own database."""
    running = containers.postgres(tmp_path_factory.mktemp("findings"))
    await running.start()
    try:
        await running.create_database("findings")
        url = running.database_url("findings")
        await migrate.migrate(url, MIGRATIONS)
        async with postgres.pool(url, "test", 2) as opened:
            yield opened
    finally:
        await running.stop()


@pytest.fixture
async def store(pool: postgres.Pool) -> findings.FindingStore:
    """Without findings."""
    await pool.execute("TRUNCATE findings")
    return findings.FindingStore(pool)


def finding(says: str = "HELD", as_of: datetime = NOW, **fields: Any) -> core.Finding:
    said = (core.Statement("credits", as_of, says),)
    values = {"advice": "look", "subject": "", **fields}
    return core.Finding(
        core.Kind.HOLD_OPEN_AFTER_END, VIDEO, "a" * 26, said, core.Repair.SETTLE_HOLD, **values
    )


async def kept(store: findings.FindingStore, one: core.Finding, **fields: Any) -> findings.Kept:
    (answer,) = await store.keep([one], HOUR, **fields)
    return answer


async def older(pool: postgres.Pool, by: timedelta) -> None:
    await pool.execute("UPDATE findings SET first_seen_at = first_seen_at - $1::interval", by)


async def test_it_counts_when_two_passes_an_interval_apart_showed_it(
    pool: postgres.Pool, store: findings.FindingStore
) -> None:
    first = await kept(store, finding())
    again = await kept(store, finding(as_of=NOW + HOUR))
    assert (first.confirmed, again.confirmed) == (False, False)
    assert again.first_seen_at == first.first_seen_at < again.last_seen_at
    assert again.finding.statements[0].as_of == NOW + HOUR
    await older(pool, HOUR - timedelta(minutes=1))
    assert not (await kept(store, finding())).confirmed
    await older(pool, timedelta(minutes=1))
    assert (await kept(store, finding())).confirmed
    found = await store.find(finding().finding_id)
    assert found is not None
    assert (found[0].finding, found[0].confirmed) == (finding(), True)
    assert await store.videos_with_findings() == [VIDEO]


async def test_what_says_something_else_begins_anew(
    pool: postgres.Pool, store: findings.FindingStore
) -> None:
    await kept(store, finding())
    await older(pool, 2 * HOUR)
    assert (await kept(store, finding())).confirmed
    before = datetime.now(UTC) - HOUR
    other = await kept(store, finding("CAPTURED"))
    assert not other.confirmed
    assert other.first_seen_at > before
    assert other.finding.statements[0].says == "CAPTURED"
    await older(pool, HOUR)
    assert (await kept(store, finding("CAPTURED"))).confirmed


async def test_what_a_pass_does_not_show_is_gone_unless_its_side_was_not_read(
    pool: postgres.Pool, store: findings.FindingStore
) -> None:
    job = finding(subject="main/job", subject_at=NOW)
    await kept(store, finding())
    await kept(store, job, side="provider main")
    started_at = await store.clock()
    assert await store.clear(started_at, ["provider main"]) == 1
    assert await store.find(finding().finding_id) is None
    assert await store.find(job.finding_id) is not None
    assert await store.oldest_job("provider main") == NOW
    assert await store.oldest_job("provider other") is None
    await kept(store, job, side="provider main")
    assert await store.clear(started_at, []) == 0, "this pass showed it"
    assert await store.clear(await store.clock(), []) == 1
    assert await store.find(job.finding_id) is None


async def test_too_many_videos_for_one_pass_are_refused(
    store: findings.FindingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kept(store, finding())
    read = sides.Sides(SimpleNamespace(findings=store), SimpleNamespace())  # pyright: ignore
    monkeypatch.setattr(sides, "MAX_VIDEOS", 0)
    monkeypatch.setattr(read, "_ids", one_page)
    with pytest.raises(errors.InvalidArgument) as caught:
        await read.video_ids(NOW)
    assert caught.value.reason == "INVALID_FIELD"
    monkeypatch.setattr(sides, "MAX_VIDEOS", 2)
    assert await read.video_ids(NOW) == [VIDEO, "w" * 26]


async def one_page(since: datetime) -> AsyncIterator[list[str]]:
    yield ["w" * 26, "not an id"]


async def test_one_replica_at_a_time_reconciles_by_itself(
    pool: postgres.Pool, store: findings.FindingStore
) -> None:
    """The first is due after the pause, then one every pause, whoever of them asks."""
    passes: list[int] = []

    class Reconciler:
        def __init__(self, replica: int) -> None:
            self._replica = replica

        async def run_pass(self, since: datetime | None) -> AsyncIterator[findings.Kept]:
            assert since is None
            passes.append(self._replica)
            yield await kept(store, finding())

    replicas = [
        reconciler.Routine(cast("reconciler.Reconciler", Reconciler(replica)), store, 600)
        for replica in range(3)
    ]

    async def all_ask() -> int:
        await asyncio.gather(*(one.run_once() for one in replicas))
        return len(passes)

    assert await all_ask() == 0
    for passed, done in ((599, 0), (1, 1), (300, 1), (300, 2)):
        age = timedelta(seconds=passed)
        await pool.execute("UPDATE reconciliation_turn SET taken_at = taken_at - $1::interval", age)
        assert await all_ask() == done
    never = reconciler.Routine(cast("reconciler.Reconciler", Reconciler(9)), store, 0)
    await never.run(asyncio.Event())  # ends at once
