"""The ledger on a real Postgres: what each call promises, also twice, late, and all at once."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from kit import errors, ids, migrate, postgres
from services.credits import documents, floor, holds, rules
from services.credits.store import Store
from tests.credits_world import HERE, HOUR, ONE, TEN, World, has_reason, server, world

__all__ = ["server", "world"]  # fixtures


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
    await world.activate(rules.Kind.PRICE_BOOK, "free")
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
    await world.activate(rules.Kind.PRICE_BOOK, "dear", later)
    assert (await world.reserve(account)).reserved == 10  # nor is what takes effect later
    await world.activate(rules.Kind.PRICE_BOOK, "dear")
    harsh = documents.yaml.safe_load((HERE / "refund_policy.yaml").read_text())
    harsh["version"] = "harsh"
    harsh["captured_percent"]["TIMEOUT"]["default"] = 100
    await world.books.rulebooks.load(rules.Kind.REFUND_POLICY, harsh)
    await world.activate(rules.Kind.REFUND_POLICY, "harsh")
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
