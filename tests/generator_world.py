"""The generator's database for tests: a real Postgres, emptied for each test."""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import yaml

from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.generator.v1 import job_pb2
from framewire.storage.v1 import storage_pb2
from kit import ids, migrate, postgres
from services.generator import attempts, catalogue, standings, turns
from services.generator.store import Store, recovery, rows
from tests import containers

Account = catalogue.ProviderAccount
SHIPPED = catalogue.parse(
    yaml.safe_load((Path(catalogue.__file__).parent / "providers.yaml").read_text()), 1.0
)["main"]
MIGRATIONS = Path(attempts.__file__).parent / "migrations"
DATABASE = "framewire_generator"
TABLES = (
    "webhook_hints",
    "outputs",
    "late_renders",
    "attempts",
    "videos",
    "attempt_history",
    "provider_jobs",
    "turns",
    "outbox",
    "provider_accounts",
    "queue_counts",
    "queue_rates",
    "queue_counted",
)
LEASE = timedelta(seconds=60)
OVER = timedelta(seconds=-1)
HOUR = timedelta(hours=1)


def job(**fields: Any) -> job_pb2.Job:
    """A job; fields of the spec, or of the job, as keywords."""
    of_spec = {"prompt", "model", "width", "height", "seconds", "variants", "input_image_id"}
    of_spec |= {"inputs", "rendition_heights"}
    spec = {"prompt": f"A cat, {uuid.uuid4()}", "model": "sora-2", "width": 320, "height": 180}
    spec |= {"seconds": 1, "variants": 1}
    spec |= {name: value for name, value in fields.items() if name in of_spec}
    made = job_pb2.Job(
        video_id=ids.new_id(),
        account_id=fields.pop("account_id", "a" * 26),
        spec=vocabulary_pb2.VideoSpec(**spec),
        lane=vocabulary_pb2.LANE_STANDARD,
        weight=100,
    )
    made.start_by.FromDatetime(fields.pop("start_by", datetime.now(UTC) + HOUR))
    for name in ("lane", "weight", "video_id"):
        if name in fields:
            setattr(made, name, fields[name])
    return made


def fingerprint(made: job_pb2.Job) -> str:
    """What a list would show of it."""
    spec = made.spec
    return attempts.visible_fingerprint(
        spec.prompt, spec.model, spec.width, spec.height, spec.seconds
    )


@dataclass
class World:
    """A generator's database, with what tests do to it."""

    pool: postgres.Pool
    url: str
    limits: dict[str, int] = field(default_factory=lambda: {"main": 1000})
    """Jobs at once of each provider account that is open for picks."""
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What else of a provider account is not as shipped."""
    rings: int = 0

    def __post_init__(self) -> None:
        self.store = Store(self.pool, self._ring)

    def _ring(self) -> None:
        self.rings += 1

    async def accept(self, **fields: Any) -> job_pb2.Job:
        made = job(**fields)
        assert await self.store.videos.accept(made, "sora", fingerprint(made))
        return made

    async def pick(self, lease: timedelta = LEASE) -> rows.Attempt | None:
        accounts = {name: self.account(name, most) for name, most in self.limits.items()}
        most_preparing = dict.fromkeys(accounts, 1000)
        weights = turns.LANE_WEIGHTS
        return await self.store.queue.pick("sora", accounts, most_preparing, weights, lease)

    def account(self, name: str = "main", max_jobs_in_flight: int = 1000) -> Account:
        """A provider account of the shipped catalogue, under that name."""
        changed = {"name": name, "max_jobs_in_flight": max_jobs_in_flight}
        return dataclasses.replace(SHIPPED, **{**changed, **self.fields.get(name, {})})

    async def standing(self, name: str = "main") -> standings.Standing:
        found, _ = await self.store.accounts.standings({name: self.account(name)})
        return found[0]

    async def picked(self, lease: timedelta = LEASE, **fields: Any) -> rows.Attempt:
        """A new video whose turn has come."""
        made = await self.accept(**fields)
        attempt = await self.pick(lease)
        assert attempt is not None
        assert attempt.video_id == made.video_id
        return attempt

    async def begin(
        self,
        attempt: rows.Attempt,
        worker: int = 7,
        lease: timedelta = LEASE,
        resolve_after: timedelta = HOUR,
        render_limit: timedelta = HOUR,
        key_good_for: timedelta = HOUR,
        shown: str = "",
    ) -> bool:
        connection = await asyncpg.connect(self.url)
        try:
            return await self.store.submissions.begin(
                connection,
                attempt,
                worker,
                lease=lease,
                resolve_after=resolve_after,
                render_limit=render_limit,
                body_sha256=hashlib.sha256(b"body").hexdigest(),
                fingerprint=shown or attempt.fingerprint,
                key_good_for=key_good_for,
                cost_micros=100_000,
            )
        finally:
            await connection.close()

    async def sending(self, **fields: Any) -> rows.Attempt:
        """A new video whose create is on its way."""
        begin = {name: fields.pop(name) for name in ("worker", "lease") if name in fields}
        attempt = await self.picked(**fields)
        assert await self.begin(attempt, **begin)
        return await self.attempt(attempt.video_id)

    async def unknown(self, **fields: Any) -> rows.Attempt:
        attempt = await self.sending(**fields)
        assert await self.store.submissions.unknown(attempt, "lost")
        return await self.attempt(attempt.video_id)

    async def rendering(self, provider_job_id: str = "", **fields: Any) -> rows.Attempt:
        attempt = await self.sending(**fields)
        await self.record(attempt, provider_job_id or f"video_{attempt.attempt_id}")
        return await self.attempt(attempt.video_id)

    async def record(self, attempt: rows.Attempt, provider_job_id: str) -> bool:
        assert attempt.provider_account is not None
        await self.store.submissions.add_job(
            attempt.attempt_id, attempt.provider_account, provider_job_id, attempt.fence
        )
        return await self.store.submissions.accepted(attempt, provider_job_id)

    async def fetching(self, **fields: Any) -> rows.Attempt:
        attempt = await self.rendering(**fields)
        assert await self.store.renders.finished(attempt, datetime.now(UTC) + HOUR)
        return await self.attempt(attempt.video_id)

    async def attempt(self, video_id: str) -> rows.Attempt:
        """The newest attempt of a video."""
        row = await self.pool.fetchrow(
            f"SELECT {rows.ATTEMPT_COLUMNS} FROM {rows.ATTEMPT_FROM} WHERE video_id = $1"
            " ORDER BY a.number DESC LIMIT 1",
            video_id,
        )
        assert row is not None
        return rows.attempt(row)

    async def state(self, video_id: str) -> str:
        """Of its newest attempt."""
        return str((await self.attempt(video_id)).state)

    async def doubted(self, attempt: rows.Attempt, *, beside_twin: bool = False) -> None:
        """A restore forgot whether it was sent."""
        shown = attempt.fingerprint
        if beside_twin:
            twin = await self.attempt((await self.accept()).video_id)
            await self.doubted(twin)
            shown = twin.fingerprint
        suspicion = recovery.Suspicion(("main", "second"), shown, 1, HOUR, HOUR)

        def suspect(job: job_pb2.Job, _: str, __: str | None) -> recovery.Suspicion | None:
            return suspicion if job.video_id == attempt.video_id else None

        window = recovery.Window(datetime.now(UTC), datetime.now(UTC))
        await self.store.recovery.doubt_rest(window, suspect, dry_run=False)

    async def events(self, video_id: str) -> list[str]:
        """Kinds, in order."""
        found = await self.pool.fetch(
            "SELECT subject FROM outbox WHERE ordering_key = $1 ORDER BY seq", video_id
        )
        return [row["subject"].rsplit(".", 1)[1] for row in found]

    async def last_event(self, video_id: str) -> event_pb2.Event:
        outcome = await self.store.videos.outcome(video_id)
        assert outcome is not None
        assert outcome.last_event is not None
        return outcome.last_event

    async def history(self, attempt_id: str) -> list[str]:
        found = await self.pool.fetch(
            "SELECT state_after FROM attempt_history WHERE attempt_id = $1 ORDER BY id", attempt_id
        )
        return [row["state_after"] for row in found]

    async def ready(self, video_ids: Sequence[str]) -> None:
        """Makes the next step of these due now."""
        await self.pool.execute(
            "UPDATE attempts SET next_step_at = '-infinity' WHERE video_id = ANY($1::text[])",
            video_ids,
        )


def asset(**fields: Any) -> storage_pb2.Asset:
    """A stored film."""
    facts = {"asset_id": ids.new_id(), "sha256": "0" * 64, "size_bytes": 9, "codec": "h264"}
    return storage_pb2.Asset(**{**facts, **fields})


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """Postgres with the generator's database."""
    running = containers.postgres(tmp_path_factory.mktemp("generator"))
    await running.start()
    try:
        await running.create_database(DATABASE)
        await migrate.migrate(running.database_url(DATABASE), MIGRATIONS)
        yield running
    finally:
        await running.destroy()


@pytest.fixture
async def world(server: Any) -> AsyncIterator[World]:
    url = server.database_url(DATABASE)
    async with postgres.pool(url, "test", 12) as pool:
        await pool.execute("".join(f"DELETE FROM {table};" for table in TABLES))
        made = World(pool, url)
        await made.store.accounts.ensure(["main", "second"])
        yield made
