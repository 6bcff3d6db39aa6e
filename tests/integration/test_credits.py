"""The ledger on a real Postgres, its settlement on a real NATS, its contract over real gRPC."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf import json_format, timestamp_pb2

from framewire import subjects
from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.generator.v1 import attempt_pb2
from kit import auth, bus, errors, ids, migrate, outbox, postgres, rpc
from services.credits import api, config, documents, floor, holds, ledger, rules, settlement
from services.credits.store import Store, movements
from services.local import nats as local_nats
from services.local import postgres as local_postgres

HERE = Path(rules.__file__).parent
TEN = rules.Item("sora-2", 1280, 720, 6, 1, rules.Lane.STANDARD)
ONE = replace(TEN, width=320, height=180, seconds=1)
HOUR = timedelta(hours=1)


@dataclass
class World:
    """A ledger in a database of its own."""

    pool: postgres.Pool
    books: Store
    url: str

    async def account(self, *credits_: int, **fields: Any) -> str:
        """A new account with a lot of each size."""
        account_id = ids.new_id()
        await self.books.ledger.open_account(account_id)
        for amount in credits_:
            await self.grant(account_id, amount, **fields)
        return account_id

    async def grant(self, account_id: str, amount: int, **fields: Any) -> movements.Given:
        request = {"request_id": str(uuid.uuid4()), "source": ledger.LotSource.PURCHASE, **fields}
        return await self.books.ledger.grant(movements.Grant(account_id, credits=amount, **request))

    async def reserve(self, account_id: str, item: rules.Item = TEN, **fields: Any) -> holds.Hold:
        soon = datetime.now(UTC) + timedelta(seconds=30)
        request = {"hold_id": ids.new_id(), "not_after": soon, "item": item, **fields}
        return await self.books.ledger.reserve(
            movements.Reservation(account_id=account_id, **request)
        )

    async def numbers(self, account_id: str) -> tuple[int, int]:
        balance = await self.books.statements.get_balance(account_id)
        return balance.available, balance.held

    async def age(self, account_id: str, by: timedelta) -> None:
        """Lets an account's lots grow older; what a hold remembers of them stays."""
        await self.pool.execute(
            "UPDATE lots SET expires_at = expires_at - $2::interval WHERE account_id = $1",
            account_id,
            by,
        )

    async def told(self, kind: str) -> list[event_pb2.Event]:
        rows = await self.pool.fetch(
            "SELECT data FROM outbox WHERE subject LIKE '%.' || $1 ORDER BY created_at", kind
        )
        return [json_format.Parse(row["data"], event_pb2.Event()) for row in rows]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """Postgres with a template that is migrated and has its rulebooks."""
    running = local_postgres.Postgres(tmp_path_factory.mktemp("credits"))
    await running.start()
    try:
        await running.create_database("template_credits")
        url = running.database_url("template_credits")
        assert await migrate.migrate(url, HERE / "migrations")
        assert await migrate.migrate(url, HERE / "migrations") == []
        async with postgres.pool(url, "test", 1) as pool:
            await documents.load(Store(pool), HERE / "prices.yaml", HERE / "refund_policy.yaml")
        yield running
    finally:
        await running.destroy()


@pytest.fixture
async def world(server: Any) -> AsyncIterator[World]:
    name = f"credits_{uuid.uuid4().hex[:12]}"
    await server.create_database(name, "template_credits")
    url = server.database_url(name)
    async with postgres.pool(url, "test", 12) as pool:
        made = World(pool, Store(pool), url)
        yield made
        planted = await pool.fetchval("SELECT to_regclass('planted') IS NOT NULL")
        proof = await made.books.statements.check_books()
        assert planted or proof.findings == ()


def has_reason(reason: str) -> Any:
    return pytest.raises(errors.ServiceError, check=lambda error: error.reason == reason)  # type: ignore[attr-defined]


async def eventually(
    question: Callable[[], Awaitable[bool]], timeout_seconds: float = 10.0
) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not await question():  # noqa: ASYNC110 (what is asked lives in another process)
            await asyncio.sleep(0.02)


async def test_grant_is_idempotent_and_its_id_is_bound(world: World) -> None:
    account = await world.account()
    request_id = str(uuid.uuid4())
    first = await world.grant(account, 5, request_id=request_id, note="welcome")
    again = await world.grant(account, 5, request_id=request_id.upper(), note="welcome")
    assert again == first
    for change in ({"note": "other"}, {"priority": 7}, {"expires_at": datetime.now(UTC) + HOUR}):
        with has_reason("REQUEST_ID_REUSED"):
            await world.grant(account, 5, request_id=request_id, **{"note": "welcome", **change})
    # Another account may use the same id.
    await world.grant(await world.account(), 6, request_id=request_id)
    assert await world.numbers(account) == (5, 0)
    with has_reason("ACCOUNT_NOT_FOUND"):
        await world.grant(ids.new_id(), 5)


async def test_reserve_is_idempotent_and_its_id_is_bound(world: World) -> None:
    account, hold_id = await world.account(25), ids.new_id()
    first = await world.reserve(account, hold_id=hold_id, labels={"team": "x"})
    assert (first.state, first.reserved) == ("HELD", 10)
    assert (first.price_version, first.policy_version) == ("2026-11-1", "2026-11-1")
    assert await world.reserve(account, hold_id=hold_id) == first
    # A late repetition gets the first answer as well.
    past = datetime.now(UTC) - HOUR
    assert await world.reserve(account, hold_id=hold_id, not_after=past) == first
    with has_reason("HOLD_MISMATCH"):
        await world.reserve(account, ONE, hold_id=hold_id)
    with has_reason("HOLD_MISMATCH"):
        await world.reserve(await world.account(25), hold_id=hold_id)
    assert await world.numbers(account) == (15, 10)


async def test_a_refusal_is_remembered_for_ever(world: World) -> None:
    account, hold_id = await world.account(9), ids.new_id()
    for _ in range(2):
        with has_reason("INSUFFICIENT_CREDITS") as refused:
            await world.reserve(account, hold_id=hold_id)
        assert refused.value.metadata == {"needed": "10", "available": "9"}
        assert isinstance(refused.value, errors.FailedPrecondition)
        await world.grant(account, 100)
    assert (await world.reserve(account)).reserved == 10
    released = await world.books.ledger.release(hold_id, account, "INTERNAL")
    assert released.state == "REFUSED"


async def test_each_refusal_has_its_reason_and_holds_nothing(world: World) -> None:
    account = await world.account(100)
    past = datetime.now(UTC) - timedelta(seconds=1)
    for reason, fields in [
        ("RESERVE_TOO_LATE", {"not_after": past}),
        ("PRICE_CHANGED", {"max_credits": 9}),
        ("QUOTE_NOT_VALID", {"quote_id": "made-up"}),
        ("NO_PRICE", {"item": replace(TEN, model="unheard-of")}),
    ]:
        hold_id = ids.new_id()
        for _ in range(2):
            with has_reason(reason):
                await world.reserve(account, hold_id=hold_id, **fields)
    await world.pool.execute("UPDATE accounts SET frozen = true WHERE account_id = $1", account)
    with has_reason("ACCOUNT_FROZEN"):
        await world.reserve(account)
    assert await world.numbers(account) == (100, 0)


async def test_an_account_that_was_never_opened_has_no_credits(world: World) -> None:
    account = ids.new_id()
    with has_reason("INSUFFICIENT_CREDITS"):
        await world.reserve(account)
    assert await world.numbers(account) == (0, 0)
    with has_reason("ACCOUNT_NOT_FOUND"):
        await world.books.statements.get_balance(ids.new_id())


async def test_release_before_reserve_leaves_a_tombstone(world: World) -> None:
    account, hold_id = await world.account(50), ids.new_id()
    for _ in range(2):
        void = await world.books.ledger.release(hold_id, account, "INTERNAL")
        assert void.state == "VOID"
    for _ in range(2):
        with has_reason("HOLD_RELEASED"):
            await world.reserve(account, hold_id=hold_id)
    with has_reason("HOLD_RELEASED"):
        await world.books.ledger.capture(hold_id, 1, "NONE")
    assert await world.numbers(account) == (50, 0)
    assert await world.told("settled") == []


async def test_capture_and_release_are_idempotent_and_final(world: World) -> None:
    account = await world.account(30)
    moves = world.books.ledger
    captured, released, zero = [(await world.reserve(account)).hold_id for _ in range(3)]
    with has_reason("AMOUNT_EXCEEDS"):
        await moves.capture(captured, 11, "NONE")
    for _ in range(2):
        hold = await moves.capture(captured, 4, "NONE")
        assert (hold.state, hold.captured, hold.released) == ("CAPTURED", 4, 6)
    with has_reason("HOLD_CAPTURED"):
        await moves.capture(captured, 5, "NONE")
    with has_reason("HOLD_CAPTURED"):
        await moves.release(captured, account, "NONE")
    for _ in range(2):
        assert (await moves.release(released, account, "TIMEOUT")).state == "RELEASED"
    with has_reason("HOLD_RELEASED"):
        await moves.capture(released, 1, "NONE")
    with has_reason("HOLD_MISMATCH"):
        await moves.release(zero, await world.account(), "NONE")
    for _ in range(2):
        assert (await moves.capture(zero, 0, "TIMEOUT")).state == "RELEASED"
    with has_reason("HOLD_NOT_FOUND"):
        await moves.capture(ids.new_id(), 1, "NONE")
    assert await world.numbers(account) == (26, 0)
    assert [one.settled.captured_credits for one in await world.told("settled")] == [4, 0, 0]


async def test_refund_is_idempotent_and_never_above_what_was_captured(world: World) -> None:
    account, moves = await world.account(10), world.books.ledger
    hold_id, request_id = (await world.reserve(account)).hold_id, str(uuid.uuid4())
    with has_reason("AMOUNT_EXCEEDS"):
        await moves.refund(hold_id, request_id, 1, "")
    await moves.capture(hold_id, 10, "NONE")
    first = await moves.refund(hold_id, request_id, 6, "sorry")
    assert await moves.refund(hold_id, request_id, 6, "sorry") == first
    with has_reason("REQUEST_ID_REUSED"):
        await moves.refund(hold_id, request_id, 5, "sorry")
    with has_reason("AMOUNT_EXCEEDS"):
        await moves.refund(hold_id, str(uuid.uuid4()), 5, "")
    await moves.refund(hold_id, str(uuid.uuid4()), 4, "")
    assert await world.numbers(account) == (10, 0)
    with has_reason("HOLD_NOT_FOUND"):
        await moves.refund(ids.new_id(), request_id, 1, "")


async def test_concurrent_reserves_spend_a_balance_exactly(world: World) -> None:
    account = await world.account(30, 30, 40)
    answers = await asyncio.gather(
        *(world.reserve(account) for _ in range(20)), return_exceptions=True
    )
    refused = [one for one in answers if isinstance(one, errors.FailedPrecondition)]
    assert len(refused) == 10
    assert await world.numbers(account) == (0, 100)


async def test_the_same_hold_reserved_at_once_is_held_once(world: World) -> None:
    accounts, hold_id = [await world.account(100), await world.account(100)], ids.new_id()
    answers = await asyncio.gather(
        *(world.reserve(accounts[number % 2], hold_id=hold_id) for number in range(12)),
        return_exceptions=True,
    )
    held = [one for one in answers if isinstance(one, holds.Hold)]
    mismatched = [one for one in answers if isinstance(one, errors.AlreadyExists)]
    assert (len(held), len(mismatched)) == (6, 6)
    assert sum([(await world.numbers(account))[1] for account in accounts]) == 10


async def test_everything_at_once_neither_deadlocks_nor_loses_a_credit(world: World) -> None:
    accounts = [await world.account(60) for _ in range(3)]
    moves = world.books.ledger

    async def live(number: int) -> None:
        account = accounts[number % 3]
        hold_id = ids.new_id()
        early = number % 4 == 0
        if early:
            await moves.release(hold_id, account, "INTERNAL")
        try:
            await world.reserve(account, hold_id=hold_id)
        except errors.FailedPrecondition:
            return
        verdict = rules.Verdict(hold_id, account, rules.Cause.PROVIDER_ERROR, rules.Stage.RENDERING)
        await asyncio.gather(
            moves.settle(verdict),
            moves.settle(verdict),
            moves.release(hold_id, account, "NONE"),
            world.grant(account, 1),
            world.books.waiting.keep_unsettled(verdict),
            world.books.waiting.claim_overdue(0, 5),
        )

    await asyncio.gather(*(live(number) for number in range(45)))
    given = await world.pool.fetchval("SELECT count(*) FROM requests WHERE method = 'GRANT'") - 3
    assert sum([(await world.numbers(one))[0] for one in accounts]) == 180 + given


async def test_due_lots_expire_inside_the_posting(world: World) -> None:
    account = await world.account(50, expires_at=datetime.now(UTC) + HOUR)
    await world.grant(account, 4)
    await world.age(account, HOUR)
    # Nothing has swept them, and nobody may see or spend them.
    assert await world.numbers(account) == (4, 0)
    assert await world.pool.fetchval("SELECT sum(available) FROM lots") == 54
    with has_reason("INSUFFICIENT_CREDITS") as refused:
        await world.reserve(account)
    assert refused.value.metadata["available"] == "4"
    assert await world.pool.fetchval("SELECT sum(available) FROM lots") == 4
    (line, *_) = await world.books.statements.list_entries(account, None, 10)
    assert (line.kind, line.available_change) == ("EXPIRE", -50)


async def test_idle_accounts_expire_in_the_loop(world: World) -> None:
    account = await world.account(50, expires_at=datetime.now(UTC) + HOUR)
    await world.age(account, HOUR)
    expiry = floor.Expiry(world.books, 60)
    assert not await expiry.run_once()
    assert await world.pool.fetchval("SELECT sum(available) FROM lots") == 0
    assert [one.balance_low.available_credits for one in await world.told("balance_low")] == [0]


async def test_a_promotion_that_dies_during_the_render_comes_back_alive(world: World) -> None:
    account = await world.account(30, expires_at=datetime.now(UTC) + HOUR)
    hold = await world.reserve(account)
    await world.age(account, 5 * HOUR)
    verdict = rules.Verdict(hold.hold_id, account, rules.Cause.TIMEOUT, rules.Stage.RENDERING)
    await world.books.ledger.settle(verdict)
    balance = await world.books.statements.get_balance(account)
    # What was not held has expired; what we held lives for another day.
    assert (balance.available, balance.next_expiry_credits) == (10, 10)
    assert balance.next_expiry_at is not None
    assert timedelta(hours=23) < balance.next_expiry_at - datetime.now(UTC) <= 24 * HOUR


async def test_a_price_of_zero_is_held_and_settled_like_any_other(world: World) -> None:
    free = documents.yaml.safe_load((HERE / "prices.yaml").read_text())
    free["version"] = "free"
    free["models"]["free"] = {
        "minimum_credits": 0,
        "sizes": [{"max_pixels": 10**6, "credits_per_minute": 0}],
    }
    assert await world.books.rulebooks.load(rules.Kind.PRICE_BOOK, free)
    item, account = replace(TEN, model="free"), ids.new_id()
    with has_reason("NO_PRICE"):
        await world.reserve(account, item)
    await world.books.rulebooks.activate(rules.Kind.PRICE_BOOK, "free", None, "test")
    hold = await world.reserve(account, item)
    assert (hold.state, hold.reserved, hold.price_version) == ("HELD", 0, "free")
    done = rules.Verdict(hold.hold_id, account, rules.Cause.NONE, rules.Stage.DONE, (6000,))
    settled = await world.books.ledger.settle(done)
    assert settled is not None
    assert (settled.state, settled.captured) == ("RELEASED", 0)
    assert len(await world.told("settled")) == 1
    assert await world.pool.fetchval("SELECT count(*) FROM transfers") == 0


async def test_versions_are_append_only_and_holds_keep_theirs(world: World) -> None:
    account = await world.account(100)
    quote_id, quote = await world.books.ledger.quote(TEN)
    old = await world.reserve(account)
    await documents.load(world.books, HERE / "prices.yaml", HERE / "refund_policy.yaml")
    dear = documents.yaml.safe_load((HERE / "prices.yaml").read_text())
    dear["models"]["sora-2"]["minimum_credits"] = 25
    with pytest.raises(rules.RulesError, match="known with other content"):
        await world.books.rulebooks.load(rules.Kind.PRICE_BOOK, dear)
    dear["version"] = "dear"
    await world.books.rulebooks.load(rules.Kind.PRICE_BOOK, dear)
    assert (await world.reserve(account)).reserved == 10  # loaded is not active
    later = datetime.now(UTC) + HOUR
    await world.books.rulebooks.activate(rules.Kind.PRICE_BOOK, "dear", later, "test")
    assert (await world.reserve(account)).reserved == 10  # nor is what takes effect later
    await world.books.rulebooks.activate(rules.Kind.PRICE_BOOK, "dear", None, "test")
    harsh = documents.yaml.safe_load((HERE / "refund_policy.yaml").read_text())
    harsh["version"] = "harsh"
    harsh["captured_percent"]["TIMEOUT"]["default"] = 100
    await world.books.rulebooks.load(rules.Kind.REFUND_POLICY, harsh)
    await world.books.rulebooks.activate(rules.Kind.REFUND_POLICY, "harsh", None, "test")
    quoted = await world.reserve(account, quote_id=quote_id, max_credits=quote.credits)
    assert (quoted.reserved, quoted.price_version, quoted.policy_version) == (
        *(10, "2026-11-1"),
        "harsh",
    )
    assert (await world.reserve(account)).reserved == 25
    with has_reason("QUOTE_NOT_VALID"):
        await world.reserve(account, ONE, quote_id=quote_id)
    for hold, captured in ((old, 0), (quoted, 10)):
        late = rules.Verdict(hold.hold_id, account, rules.Cause.TIMEOUT, rules.Stage.RENDERING)
        settled = await world.books.ledger.settle(late)
        assert settled is not None
        assert settled.captured == captured


async def test_settlement_by_policy_is_told_once(world: World) -> None:
    account = await world.account(100)
    hold = await world.reserve(account, replace(TEN, variants=2))
    verdict = rules.Verdict(hold.hold_id, account, rules.Cause.NONE, rules.Stage.DONE, (6000,))
    for _ in range(3):
        settled = await world.books.ledger.settle(verdict)
        assert settled is not None
        assert (settled.state, settled.captured, settled.released) == ("CAPTURED", 10, 10)
    other = replace(verdict, account_id=await world.account())
    with has_reason("HOLD_MISMATCH"):
        await world.books.ledger.settle(other)
    (event,) = await world.told("settled")
    assert (event.video_id, event.account_id, event.seq) == (hold.hold_id, account, 0)
    assert event.settled == event_pb2.Settled(
        captured_credits=10,
        released_credits=10,
        cause=vocabulary_pb2.CAUSE_NONE,
        policy_version="2026-11-1",
        available_credits=90,
    )
    row = await world.pool.fetchrow("SELECT ce_id, subject, headers FROM outbox")
    assert row is not None
    assert row["ce_id"] == f"{hold.hold_id}:settled"
    assert row["subject"] == f"framewire.events.v1.{account}.settled"
    assert row["headers"]["ce-subject"] == hold.hold_id


async def test_balance_low_is_told_when_the_threshold_is_crossed(world: World) -> None:
    account = await world.account(35)
    await world.reserve(account)  # 25
    assert await world.told("balance_low") == []
    await world.reserve(account)  # 15
    await world.reserve(account, ONE)  # 14: below already
    (event,) = await world.told("balance_low")
    assert event.balance_low == event_pb2.BalanceLow(available_credits=15, threshold_credits=20)
    assert event.video_id == ""


async def test_an_event_before_its_hold_settles_the_reserve(world: World) -> None:
    account, hold_id = await world.account(100), ids.new_id()
    verdict = rules.Verdict(hold_id, account, rules.Cause.NONE, rules.Stage.DONE, (6000,))
    assert await world.books.ledger.settle(verdict) is None
    assert await world.books.waiting.keep_unsettled(verdict)
    hold = await world.reserve(account, hold_id=hold_id)
    assert (hold.state, hold.captured) == ("CAPTURED", 10)
    assert not await world.books.waiting.keep_unsettled(verdict)
    assert await world.pool.fetchval("SELECT count(*) FROM unsettled") == 0


async def test_history_cannot_be_changed(world: World) -> None:
    account = await world.account(10)
    hold = await world.reserve(account)
    await world.books.ledger.release(hold.hold_id, account, "NONE")
    for statement in (
        "UPDATE entries SET credits = 1",
        "DELETE FROM entries",
        "TRUNCATE entries CASCADE",
        "DELETE FROM transfers",
        "UPDATE rulebooks SET version = 'x'",
        "DELETE FROM holds",
        "UPDATE holds SET state = 'HELD', released = 0, cause = NULL, settled_at = NULL",
    ):
        with pytest.raises(asyncpg.RestrictViolationError):
            await world.pool.execute(statement)
    for statement in (
        f"INSERT INTO entries VALUES ('{account}', 1, 9, 'revenue', NULL, 5)",
        f"INSERT INTO transfers VALUES ('{account}', 9, 'EXPIRE', 0, 0, NULL, NULL, '', now())",
        "UPDATE accounts SET available = -1",
        "UPDATE holds SET refunded = 1",
    ):
        with pytest.raises(asyncpg.CheckViolationError):
            await world.pool.execute(statement)


async def test_the_service_role_cannot_change_history(server: Any) -> None:
    name = f"credits_{uuid.uuid4().hex[:12]}"
    await server.create_database(name)
    url = server.database_url(name)
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CREATE ROLE framewire_credits")
        await migrate.migrate(url, HERE / "migrations")
        async with postgres.pool(url, "test", 2) as pool:
            owner = Store(pool)
            await documents.load(owner, HERE / "prices.yaml", HERE / "refund_policy.yaml")
        # Triggers or not.
        await connection.execute("ALTER TABLE entries DISABLE TRIGGER USER")
        await connection.execute("SET ROLE framewire_credits")
        for statement in ("UPDATE entries SET credits = 1", "DELETE FROM transfers"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
        async with asyncpg.create_pool(
            url,
            init=postgres.prepare,
            server_settings={"role": "framewire_credits"},
            min_size=1,
            max_size=2,
        ) as pool:
            served = World(pool, Store(pool), url)
            account = await served.account(25)
            hold = await served.reserve(account)
            await served.books.ledger.capture(hold.hold_id, 10, "NONE")
            await served.books.ledger.refund(hold.hold_id, str(uuid.uuid4()), 3, "")
            assert await served.numbers(account) == (18, 0)
    finally:
        await connection.execute("RESET ROLE")
        await connection.execute("DROP OWNED BY framewire_credits")
        await connection.execute("DROP ROLE framewire_credits")
        await connection.close()


@pytest.mark.parametrize(
    ("planted", "finding"),
    [
        ("UPDATE accounts SET available = available + 1", "available 21, entries say 20"),
        ("UPDATE accounts SET last_seq = 9", "newest transfer 9 of 3"),
        ("UPDATE entries SET credits = credits + 1 WHERE book = 'revenue'", "lines sum to 1"),
        ("UPDATE transfers SET available_change = 7 WHERE kind = 'GRANT'", "available 7"),
        ("UPDATE lots SET held = 1", "held 1, entries say 0"),
        ("UPDATE holds SET captured = 9, released = 1", "captured 9, transfers say 10"),
        ("UPDATE hold_lots SET captured = 0, released = 0", "open holds say 10"),
    ],
)
async def test_check_books_finds_a_planted_error(world: World, planted: str, finding: str) -> None:
    account = await world.account(30)
    hold = await world.reserve(account)
    await world.books.ledger.capture(hold.hold_id, 10, "NONE")
    proof = await world.books.statements.check_books()
    assert (proof.findings, proof.transfers, proof.accounts, proof.open_holds) == ((), 3, 1, 0)
    await world.pool.execute(
        f"CREATE TABLE planted (); SET session_replication_role = replica; {planted};"
        " SET session_replication_role = origin"
    )
    findings = (await world.books.statements.check_books()).findings
    assert any(finding in sentence for sentence in findings), findings


@dataclass
class FakeGenerator:
    """The generator's answers; the contract's only call that credits makes."""

    outcomes: dict[str, attempt_pb2.VideoOutcome]
    asked: int = 0

    async def GetVideoOutcome(  # noqa: N802
        self,
        request: attempt_pb2.GetVideoOutcomeRequest,
        /,
        *,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
    ) -> attempt_pb2.VideoOutcome:
        self.asked += 1
        if request.video_id not in self.outcomes:
            raise errors.NotFound("ATTEMPT_NOT_FOUND", "never heard of it")
        return self.outcomes[request.video_id]


def completed(video_id: str, account_id: str) -> event_pb2.Event:
    return event_pb2.Event(
        video_id=video_id,
        account_id=account_id,
        seq=3,
        kind=event_pb2.EVENT_KIND_COMPLETED,
        completed=event_pb2.Completed(outputs=[event_pb2.Output(duration_ms=6000)]),
    )


def settling(world: World, unsettled_after_seconds: float = 600) -> settlement.Settlement:
    return settlement.Settlement(
        world.books,
        unsettled_after_seconds=unsettled_after_seconds,
        unsettled_retry_seconds=0.05,
    )


async def test_the_floor_settles_what_is_overdue(world: World) -> None:
    account = await world.account(100)
    done, running, unknown, young = [(await world.reserve(account)).hold_id for _ in range(4)]
    await world.pool.execute(
        "UPDATE holds SET created_at = created_at - interval '1 hour' WHERE hold_id <> $1", young
    )
    started = event_pb2.Event(video_id=running, kind=event_pb2.EVENT_KIND_STARTED)
    generator = FakeGenerator(
        {
            done: attempt_pb2.VideoOutcome(video_id=done, last_event=completed(done, account)),
            running: attempt_pb2.VideoOutcome(video_id=running, last_event=started),
        }
    )
    # A hold that came while its event was being laid aside.
    late = rules.Verdict(young, account, rules.Cause.TIMEOUT, rules.Stage.RENDERING)
    await world.pool.execute(
        "INSERT INTO unsettled (video_id, account_id, verdict) VALUES ($1, $2, $3)",
        *(young, account, late.fields()),
    )
    asking = floor.Floor(settling(world), world.books, generator, overdue_seconds=600, seconds=1)
    assert not await asking.run_once()
    assert generator.asked == 3
    states = dict(await world.pool.fetch("SELECT hold_id, state FROM holds"))
    assert states == {done: "CAPTURED", running: "HELD", unknown: "HELD", young: "RELEASED"}
    assert not await asking.run_once()
    assert generator.asked == 3  # their turn comes again later


@pytest.fixture(scope="module")
async def nats_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    running = local_nats.Nats(tmp_path_factory.mktemp("credits-nats"))
    await running.start()
    try:
        yield running.url
    finally:
        await running.stop()


@asynccontextmanager
async def consuming(world: World, nats_url: str, **fields: Any) -> AsyncIterator[bus.Bus]:
    """The settlement consumer and the relay on a bus of their own."""
    async with bus.connect(nats_url, "test") as opened:
        for stream in subjects.STREAMS:
            await opened.ensure_streams()
            await opened.jetstream.delete_stream(stream.name)
        await opened.ensure_streams()
        relay = outbox.Relay(world.pool, opened, subjects.EVENTS_STREAM, seconds=0.05)
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(settlement.Consumer(opened, settling(world, **fields)).run(stopping))
            group.create_task(relay.run(stopping))
            try:
                yield opened
            finally:
                stopping.set()


async def publish(opened: bus.Bus, event: event_pb2.Event, message_id: str) -> None:
    data = json_format.MessageToJson(event).encode()
    await opened.publish(
        subjects.event_subject(event.account_id, "completed"), data, {}, message_id
    )


async def test_terminal_events_settle_and_settled_is_told(world: World, nats_url: str) -> None:
    account = await world.account(100)
    hold = await world.reserve(account)
    async with consuming(world, nats_url) as opened:
        told = await opened.jetstream.subscribe(subjects.event_subject(account, "settled"))
        # Bytes that nobody can read, from the same subject, must not stand in the way.
        subject = subjects.event_subject(account, "failed")
        await opened.publish(subject, b"\x00 not an event", {}, "poison")
        event = completed(hold.hold_id, account)
        await publish(opened, event, "1")
        await publish(opened, event, "2")
        message = await told.next_msg(timeout=10)
        settled = json_format.Parse(message.data, event_pb2.Event())
        assert settled.settled.captured_credits == 10
        assert message.headers is not None
        assert message.headers["ce-id"] == f"{hold.hold_id}:settled"

        async def nothing_left() -> bool:
            info = await opened.jetstream.consumer_info("EVENTS", settlement.DURABLE)
            return (info.num_pending, info.num_ack_pending) == (0, 0)

        await eventually(nothing_left)
    parked = await world.pool.fetch("SELECT subject, data FROM parked_events")
    assert [tuple(row) for row in parked] == [(subject, b"\x00 not an event")]
    assert await world.numbers(account) == (90, 0)


async def test_an_event_without_its_hold_waits_and_then_is_laid_aside(
    world: World, nats_url: str
) -> None:
    account, hold_id = await world.account(100), ids.new_id()
    async with consuming(world, nats_url, unsettled_after_seconds=0.3) as opened:
        await publish(opened, completed(hold_id, account), "1")

        async def laid_aside() -> bool:
            return await world.pool.fetchval("SELECT count(*) FROM unsettled") == 1

        assert not await laid_aside()
        await eventually(laid_aside)
    assert (await world.reserve(account, hold_id=hold_id)).state == "CAPTURED"


@asynccontextmanager
async def served(world: World) -> AsyncIterator[Callable[[str], Any]]:
    """The contract over gRPC; gives a client of a named service."""
    secret = "s" * 32
    tokens = auth.ServiceTokens("credits", secret)
    server = grpc.aio.server(interceptors=[rpc.ServerInterceptor(api.authenticate(tokens))])
    ledger_pb2_grpc.add_LedgerServiceServicer_to_server(api.LedgerService(world.books), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channels: list[grpc.aio.Channel] = []

    def client(service: str) -> Any:
        channels.append(rpc.channel(f"127.0.0.1:{port}", auth.ServiceTokens(service, secret)))
        return ledger_pb2_grpc.LedgerServiceStub(channels[-1])

    try:
        yield client
    finally:
        for channel in channels:
            await channel.close()
        await server.stop(None)


def soon() -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + HOUR)
    return stamp


async def test_the_contract_over_grpc(world: World) -> None:
    account, hold_id = ids.new_id(), ids.new_id()
    item = ledger_pb2.Item(
        model="sora-2", width=1280, height=720, seconds=6, variants=1, lane="LANE_STANDARD"
    )
    async with served(world) as client:
        gateway = client("gateway")
        opened = await gateway.OpenAccount(ledger_pb2.OpenAccountRequest(account_id=account))
        assert (opened.available_credits, opened.HasField("next_expiry_at")) == (0, False)
        given = await gateway.Grant(
            ledger_pb2.GrantRequest(
                account_id=account,
                request_id=str(uuid.uuid4()),
                credits=30,
                source="LOT_SOURCE_PROMOTION",
                expires_at=soon(),
                note="welcome",
            )
        )
        assert given.balance.next_expiry_credits == 30
        quote = await gateway.Quote(ledger_pb2.QuoteRequest(item=item))
        assert (quote.credits, quote.price_version) == (10, "2026-11-1")
        request = ledger_pb2.ReserveRequest(
            hold_id=hold_id,
            account_id=account,
            item=item,
            quote_id=quote.quote_id,
            max_credits=10,
            not_after=soon(),
        )
        hold = await gateway.Reserve(request)
        assert (hold.state, hold.reserved_credits) == (ledger_pb2.HOLD_STATE_HELD, 10)
        captured = await gateway.Capture(
            ledger_pb2.CaptureRequest(hold_id=hold_id, credits=7, cause="CAUSE_NONE")
        )
        assert (captured.captured_credits, captured.released_credits) == (7, 3)
        refund = ledger_pb2.RefundRequest(hold_id=hold_id, request_id=str(uuid.uuid4()), credits=2)
        assert (await gateway.Refund(refund)).balance.available_credits == 25
        balance = await gateway.GetBalance(ledger_pb2.GetBalanceRequest(account_id=account))
        assert (balance.available_credits, balance.held_credits) == (25, 0)
        proof = await gateway.CheckBooks(ledger_pb2.CheckBooksRequest())
        assert (proof.balanced, proof.transfers, proof.accounts) == (True, 5, 1)


async def test_bad_calls_over_grpc_get_their_reason(world: World) -> None:
    account = await world.account(9)
    item = ledger_pb2.Item(
        model="sora-2", width=1280, height=720, seconds=6, variants=1, lane="LANE_STANDARD"
    )
    reserve = ledger_pb2.ReserveRequest(
        hold_id=ids.new_id(), account_id=account, item=item, not_after=soon()
    )
    never = ledger_pb2.GrantRequest(
        account_id=account,
        request_id=str(uuid.uuid4()),
        credits=1,
        source="LOT_SOURCE_PURCHASE",
        expires_at=timestamp_pb2.Timestamp(seconds=2**60),
    )
    async with served(world) as client:
        gateway = client("gateway")
        with has_reason("INSUFFICIENT_CREDITS") as refused:
            await gateway.Reserve(reserve)
        assert refused.value.metadata == {"needed": "10", "available": "9"}
        with has_reason("INVALID_FIELD"):
            await gateway.Grant(never)
        # Postgres cannot keep this character; it must not become an internal error.
        for fields in ({"item": {"model": "\0"}}, {"labels": {"a": "\0"}}, {"labels": {"\0": "a"}}):
            hostile = ledger_pb2.ReserveRequest()
            hostile.CopyFrom(reserve)
            json_format.ParseDict(fields, hostile)
            with has_reason("INVALID_FIELD"):
                await gateway.Reserve(hostile)
        with has_reason("INVALID_FIELD"):
            await gateway.Reserve(ledger_pb2.ReserveRequest(hold_id="x"))
        with has_reason("ROLE_NOT_ALLOWED"):
            await client("generator").GetBalance(ledger_pb2.GetBalanceRequest(account_id=account))


async def test_pages_are_whole_and_their_tokens_are_of_their_listing(world: World) -> None:
    account, other = await world.account(100), await world.account(100)
    made = [(await world.reserve(account)).hold_id for _ in range(5)]
    await world.reserve(other)
    async with served(world) as client:
        gateway = client("gateway")
        seen: list[str] = []
        token = ""
        while True:
            page = await gateway.ListHolds(
                ledger_pb2.ListHoldsRequest(account_id=account, page_size=2, page_token=token)
            )
            seen += [hold.hold_id for hold in page.holds]
            token = page.next_page_token
            if not token:
                break
            kept = token
        assert seen == made[::-1]
        entries = ledger_pb2.ListEntriesRequest(account_id=account, page_size=4)
        first = await gateway.ListEntries(entries)
        rest = await gateway.ListEntries(
            ledger_pb2.ListEntriesRequest(account_id=account, page_token=first.next_page_token)
        )
        changes = [entry.available_change for entry in (*first.entries, *rest.entries)]
        assert (len(first.entries), changes) == (4, [-10] * 5 + [100])
        everyone = await gateway.ListHolds(ledger_pb2.ListHoldsRequest(state="HOLD_STATE_HELD"))
        assert len(everyone.holds) == 6
        for wrong in ("AAAA", "é", kept, "W10="):
            with has_reason("PAGE_TOKEN_INVALID"):
                await gateway.ListHolds(
                    ledger_pb2.ListHoldsRequest(account_id=other, page_token=wrong)
                )


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITS_DATABASE_URL", "postgresql://x")
    monkeypatch.setenv("CREDITS_SERVICE_TOKEN_SECRET", "s" * 32)
    monkeypatch.setenv("CREDITS_BALANCE_LOW_CREDITS", "7")
    assert config.Settings().balance_low_credits == 7  # pyright: ignore[reportCallIssue]
