"""Many renders in flight in one generator process: its memory, its CPU at rest, how soon it sees that one is done.

The generator has not sent them, which would take long: they are written into the simulator's log, from which it takes
its jobs when it starts, and into the generator's database, as rows that are rendering.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import asyncpg

from bench import generator_stack
from framewire.generator.v1 import job_pb2
from kit import ids
from services.generator import attempts
from services.simulator import jobs
from tests import waiting

RENDER_SECONDS = 1200.0
"""Of those that do not end while we look: their progress has changed at every pass, so every pass writes it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is in flight, and what may be asked of the provider."""

    renders: int
    ending: int
    """How many of them are done in the end, one after the other."""
    poll_interval_seconds: float
    requests_per_minute: int
    rest_seconds: float
    """How long they are looked at before."""
    ending_seconds: float
    """From the first to the last of those that end."""


@dataclass(frozen=True, slots=True)
class Flight:
    """What was measured."""

    resident_mb: float
    resident_before_mb: float
    cpu_at_rest: float
    """Of one core; at rest: nothing begins or ends, all are polled."""
    postgres_cpu_at_rest: float
    simulator_cpu_at_rest: float
    seen_after_seconds: tuple[float, ...]
    """From the provider's end to the row that says so, ascending."""
    requests_at_rest: dict[str, int]
    passes_at_rest: float
    lost: int


async def measure(load: Load) -> Flight:
    """One run."""
    account = {
        "requests_per_minute": load.requests_per_minute,
        "max_jobs_in_flight": 2 * load.renders,
        "poll_interval_seconds": load.poll_interval_seconds,
        "max_render_seconds": 3 * RENDER_SECONDS,
    }
    async with generator_stack.running(account=account) as bench, bench.database() as connection:
        memory = generator_stack.Memory(bench.process("generator"))
        before_mb = memory.begin()
        made = [generator_stack.job() for _ in range(load.renders)]
        rendered = [_rendered(one, number / load.renders) for number, one in enumerate(made)]
        async with _other_jobs(bench, connection) as folder:
            await _write_rows(connection, made, rendered)
            _write_log(folder, rendered)
        await _passed(bench, load)
        memory.begin()
        rest = await _at_rest(bench, load.rest_seconds)
        ends = await _let_end(bench, connection, load, rendered)
        await bench.all_ended(load.ending, within_seconds=load.ending_seconds + 300)
        return Flight(
            resident_mb=memory.peak(),
            resident_before_mb=before_mb,
            seen_after_seconds=tuple(sorted(await _seen(connection, ends))),
            lost=load.ending - sum(end.kind == "completed" for end in bench.ended.values()),
            **rest,
        )


@asynccontextmanager
async def _other_jobs(
    bench: generator_stack.Bench, connection: asyncpg.Connection
) -> AsyncIterator[Path]:
    """The simulator's directory while it stands still, and no poll pass goes on or begins."""

    async def taken() -> bool:
        return await connection.fetchval(
            """
            UPDATE provider_accounts SET poll_lease_until = clock_timestamp() + interval '1 hour'
            WHERE provider_account = 'main' AND poll_lease_until <= clock_timestamp() RETURNING true
            """
        )

    await waiting.eventually(taken, within_seconds=120, what="the end of a pass")
    await bench.stack.supervisor.stop("simulator")
    yield bench.stack.data_dir / "simulator"
    await bench.stack.supervisor.start("simulator")
    await connection.execute(
        """
        UPDATE provider_accounts SET poll_lease_until = '-infinity', next_poll_at = '-infinity'
        WHERE provider_account = 'main'
        """
    )


async def _let_end(
    bench: generator_stack.Bench,
    connection: asyncpg.Connection,
    load: Load,
    rendered: Sequence[jobs.Job],
) -> dict[str, float]:
    """Some of the renders, from all over the list, are done one after the other; when each of them is, by its id."""
    step = load.renders // load.ending
    # Twice as long as it just took: the first must not be done before the simulator is there again.
    began = time.time()
    async with _other_jobs(bench, connection) as folder:
        _write_log(folder, rendered)
    first = time.time() + 2 * (time.time() - began) + load.poll_interval_seconds
    ends = {
        one.id: first + load.ending_seconds * number / load.ending
        for number, one in enumerate(random.sample(rendered[::step], load.ending))
    }
    async with _other_jobs(bench, connection) as folder:
        _write_log(folder, [replace(one, due_at=ends.get(one.id, one.due_at)) for one in rendered])
    if time.time() > first:
        raise TimeoutError("the simulator came back after the first render was done")
    return ends


def _rendered(made: job_pb2.Job, age: float) -> jobs.Job:
    """The job at the provider; `age`: 0 for the newest, 1 for the oldest."""
    created = time.time() - RENDER_SECONDS / 4 * age
    return jobs.Job(
        id=jobs.new_id(jobs.OPENAI_VIDEOS, created, ids.new_id().encode().hex()[:40]),
        key_name="ours",
        model=made.spec.model,
        size=f"{made.spec.width}x{made.spec.height}",
        seconds=str(made.spec.seconds),
        prompt=made.spec.prompt,
        metadata={},
        created_at=created,
        starts_at=created,
        due_at=created + RENDER_SECONDS,
        retained_seconds=3600.0,
        error=None,
        faults={},
        billed_micros=0,
    )


def _write_log(folder: Path, rendered: Sequence[jobs.Job]) -> None:
    # In the order of creation, as a list that was written to one by one.
    ordered = sorted(rendered, key=lambda one: one.created_at)
    entries = [
        {"n": number, "kind": "accepted", "at": one.created_at, **jobs.as_entry(one)}
        for number, one in enumerate(ordered, 1)
    ]
    with (folder / "oplog.jsonl").open("w") as file:
        for entry in entries:
            file.write(json.dumps({**entry, "idempotency_key": None, "fingerprint": None}) + "\n")


async def _write_rows(
    connection: asyncpg.Connection, made: Sequence[job_pb2.Job], rendered: Sequence[jobs.Job]
) -> None:
    """Videos that are PROCESSING, attempts that are RENDERING, what the provider accepted."""
    pairs = [(one, there, ids.new_id()) for one, there in zip(made, rendered, strict=True)]
    videos = [
        (one.video_id, one.account_id, one.SerializeToString(), "PROCESSING", 2)
        for one, _, _ in pairs
    ]
    columns = "attempt_id video_id number account_id pool lane weight state provider_account"
    columns += " provider_job_id fingerprint submissions submitted_at render_deadline resolve_by"
    columns += " start_by"
    values = [_row(*pair) for pair in pairs]
    accepted = [("main", there.id, attempt_id, 1) for _, there, attempt_id in pairs]
    async with connection.transaction():
        await connection.copy_records_to_table(
            "videos", records=videos, columns=["video_id", "account_id", "job", "state", "seq"]
        )
        await connection.copy_records_to_table("attempts", records=values, columns=columns.split())
        await connection.copy_records_to_table(
            "provider_jobs",
            records=accepted,
            columns=["provider_account", "provider_job_id", "attempt_id", "fence"],
        )
    await connection.execute("ANALYZE")


def _row(made: job_pb2.Job, there: jobs.Job, attempt_id: str) -> tuple[object, ...]:
    spec = made.spec
    submitted = datetime.fromtimestamp(there.created_at, UTC)
    later = datetime.fromtimestamp(there.created_at + 4 * RENDER_SECONDS, UTC)
    shown = attempts.visible_fingerprint(
        spec.prompt, spec.model, spec.width, spec.height, spec.seconds
    )
    return (
        *(attempt_id, made.video_id, 1, made.account_id, "sora", "STANDARD", 100, "RENDERING"),
        *("main", there.id, shown, 1, submitted, later, later, later),
    )


async def _passed(bench: generator_stack.Bench, load: Load) -> None:
    """Waits until two whole passes over the list are over: what the first one finds is not what rest is like."""

    async def listed() -> bool:
        pages = (await bench.requests("ours")).get("list", 0)
        return pages >= 2 * -(-load.renders // 100)

    await waiting.eventually(listed, within_seconds=300, every_seconds=0.2, what="two passes")


async def _at_rest(bench: generator_stack.Bench, seconds: float) -> dict[str, object]:
    """CPU of the processes while nothing begins or ends, and what was asked meanwhile."""
    names = ("generator", "postgres", "simulator")
    processes = {name: bench.process(name) for name in names}
    asked = await bench.requests("ours")
    before = {name: generator_stack.cpu_seconds(process) for name, process in processes.items()}
    started = time.monotonic()
    await asyncio.sleep(seconds)
    spent = time.monotonic() - started
    share = {
        name: (generator_stack.cpu_seconds(process) - before[name]) / spent
        for name, process in processes.items()
    }
    now = await bench.requests("ours")
    requests = {name: count - asked.get(name, 0) for name, count in now.items()}
    async with bench.database() as connection:
        in_flight = await connection.fetchval(
            "SELECT count(*) FROM attempts WHERE state = 'RENDERING'"
        )
    return {
        "cpu_at_rest": share["generator"],
        "postgres_cpu_at_rest": share["postgres"],
        "simulator_cpu_at_rest": share["simulator"],
        "requests_at_rest": requests,
        "passes_at_rest": requests.get("list", 0) / -(-in_flight // 100),
    }


async def _seen(connection: asyncpg.Connection, due: dict[str, float]) -> list[float]:
    """Seconds from each end to the moment that the generator's row said so: the clock is the same machine's."""
    found = await connection.fetch(
        """
        SELECT a.provider_job_id, extract(epoch FROM h.at)::float8 AS at
        FROM attempts a JOIN attempt_history h USING (attempt_id)
        WHERE a.provider_job_id = ANY($1::text[]) AND h.state_after = 'FETCHING'
          AND h.state_before = 'RENDERING'
        """,
        list(due),
    )
    return [row["at"] - due[row["provider_job_id"]] for row in found]
