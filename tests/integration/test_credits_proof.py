"""CheckBooks: each kind of disagreement, planted, is found and its row named, and no other row."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
from prometheus_client import REGISTRY

from framewire.credits.v1 import ledger_pb2
from services.credits import checking, rules
from services.credits.store import proof
from tests.credits_world import TEN, World, served, server, world

__all__ = ["server", "world"]  # fixtures


@dataclass(frozen=True)
class Life:
    """An account in which everything has happened once: transfer 1 is its grant, 6 the capture of `settled`."""

    account: str
    lot: str
    settled: str
    captured: str
    open: str


async def live(world: World) -> Life:
    account = await world.account()
    lot = (await world.grant(account, 100)).lot_id
    moves = world.books.ledger
    settled, captured, released, held = [(await world.reserve(account)).hold_id for _ in range(4)]
    done = rules.Verdict(settled, account, rules.Cause.NONE, rules.Stage.DONE, (6000,))
    await moves.settle(done)
    await moves.capture(captured, 10, "NONE")
    await moves.release(released, account, "TIMEOUT")
    await moves.refund(captured, "0f7cfb1c-6b0e-4b57-8d43-0d52f4a0c6a1", 3, "sorry")
    return Life(account, lot, settled, captured, held)


# What is planted (the victim's ids in braces), and the rows that disagree then.
PLANTED = {
    "account available": (
        "UPDATE accounts SET available = available + 1 WHERE account_id = '{account}'",
        {"account {account}"},
    ),
    "account held": (
        "UPDATE accounts SET held = held + 1 WHERE account_id = '{account}'",
        {"account {account}"},
    ),
    "account below zero": (
        (
            "ALTER TABLE accounts DROP CONSTRAINT accounts_available_check;"
            "UPDATE accounts SET available = -5 WHERE account_id = '{account}'"
        ),
        {"account {account}"},
    ),
    "a day's spending": (
        (
            "INSERT INTO daily_spending"
            " SELECT '{account}', '', date_trunc('day', now(), 'UTC'), last_seq, 7 FROM accounts"
            " WHERE account_id = '{account}'"
        ),
        {"daily spending of {account}, key "},
    ),
    "a transfer is missing at the end": (
        "UPDATE accounts SET last_seq = last_seq + 1 WHERE account_id = '{account}'",
        {"account {account}"},
    ),
    "a company's line": (
        (
            "UPDATE entries SET credits = credits + 1 WHERE account_id = '{account}' AND seq = 6"
            " AND book = 'revenue'"
        ),
        {"transfer {account}-6"},
    ),
    "a customer's line": (
        (
            "UPDATE entries SET credits = credits + 1 WHERE account_id = '{account}' AND seq = 1"
            " AND book = 'available'"
        ),
        {"transfer {account}-1", "account {account}", "lot {lot}"},
    ),
    "the statement": (
        "UPDATE transfers SET available_change = 7 WHERE account_id = '{account}' AND seq = 1",
        {"transfer {account}-1"},
    ),
    "a transfer without lines": (
        (
            "DELETE FROM entries WHERE account_id = '{account}' AND seq = 6;"
            "INSERT INTO transfers VALUES ('{account}', 11, 'EXPIRE', 0, 0, NULL, NULL, '', now());"
            "UPDATE accounts SET last_seq = 11 WHERE account_id = '{account}'"
        ),
        {"transfer {account}-6", "transfer {account}-11", "account {account}", "lot {lot}"},
    ),
    "a line without a transfer": (
        "INSERT INTO entries VALUES ('{account}', 77, 0, 'revenue', NULL, 5)",
        {"entry {account}-77-0"},
    ),
    "a line in another's lot": (
        (
            "UPDATE entries SET lot_id = '{other_lot}' WHERE account_id = '{account}' AND seq = 1"
            " AND book = 'available'"
        ),
        {"entry {account}-1-0", "lot {lot}", "lot {other_lot}"},
    ),
    "a lot": (
        "UPDATE lots SET held = held + 1 WHERE lot_id = '{lot}'",
        {"lot {lot}", "account {account}"},
    ),
    "a lot below zero": (
        (
            "ALTER TABLE lots DROP CONSTRAINT lots_available_check;"
            "UPDATE lots SET available = -1 WHERE lot_id = '{lot}'"
        ),
        {"lot {lot}", "account {account}"},
    ),
    "a hold's amounts": (
        "UPDATE holds SET captured = 9, released = 1 WHERE hold_id = '{captured}'",
        {"hold {captured}"},
    ),
    "a hold's refund": (
        "UPDATE holds SET refunded = 4 WHERE hold_id = '{captured}'",
        {"hold {captured}"},
    ),
    "a hold's parts": (
        "UPDATE hold_lots SET captured = 0, released = 0 WHERE hold_id = '{captured}'",
        {"hold {captured}", "lot {lot}"},
    ),
    "L7: another cause than was charged for": (
        (
            "UPDATE holds SET cause = 'TIMEOUT', verdict = jsonb_set(verdict, '{{cause}}', '\"TIMEOUT\"')"
            " WHERE hold_id = '{settled}'"
        ),
        {"hold {settled}"},
    ),
    "L7: less was delivered than was charged for": (
        (
            "UPDATE holds SET verdict = jsonb_set(verdict, '{{durations_ms}}', '[3000]')"
            " WHERE hold_id = '{settled}'"
        ),
        {"hold {settled}"},
    ),
    "L7: the cause is not the verdict's": (
        "UPDATE holds SET cause = 'INTERNAL' WHERE hold_id = '{settled}'",
        {"hold {settled}"},
    ),
    "L7: another video's verdict": (
        (
            "UPDATE holds SET verdict = jsonb_set(verdict, '{{video_id}}', '\"{open}\"')"
            " WHERE hold_id = '{settled}'"
        ),
        {"hold {settled}"},
    ),
    "L7: a verdict that cannot be read": (
        "UPDATE holds SET verdict = '{{}}' WHERE hold_id = '{settled}'",
        {"hold {settled}"},
    ),
    "the price": (
        "UPDATE holds SET item = jsonb_set(item, '{{seconds}}', '12') WHERE hold_id = '{open}'",
        {"hold {open}"},
    ),
    "a price book": (
        (
            "UPDATE rulebooks SET content = jsonb_set(content, '{{lane_percent,VIP}}', '1')"
            " WHERE kind = 'PRICE_BOOK'"
        ),
        {"rulebook PRICE_BOOK 2026-11-2"},
    ),
}


async def test_every_planted_disagreement_is_found_and_nothing_else(world: World) -> None:
    other, victim = await live(world), await live(world)
    known = {name: getattr(victim, name) for name in ("account", "lot", "settled", "captured")}
    known |= {"open": victim.open, "other_lot": other.lot}
    found: dict[str, set[str]] = {}
    async with world.pool.acquire() as connection:
        for what, (planted, _) in PLANTED.items():
            undone = connection.transaction()
            await undone.start()
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute(planted.format(**known))
            proved = await proof.prove(connection, world.books.rulebooks)
            found[what] = {re.split(":| [(]", line)[0] for line in proved.findings}
            await undone.rollback()
    wanted = {
        what: {name.format(**known) for name in names} for what, (_, names) in PLANTED.items()
    }
    assert found == wanted


def disagreeing(row: str) -> float | None:
    return REGISTRY.get_sample_value("framewire_credits_books_findings", {"row": row})


async def test_the_loop_tells_what_disagrees_and_one_replica_at_a_time_looks(world: World) -> None:
    victim = await live(world)
    check = checking.BooksCheck(world.books, 60)
    await check.run_once()
    assert disagreeing("hold") == 0
    # The hold that an operator captured has no verdict; its price is computed again all the same.
    assert REGISTRY.get_sample_value("framewire_credits_books_recomputed_holds") == 4
    await world.pool.execute("CREATE TABLE planted ()")
    await world.pool.execute(
        "SET session_replication_role = replica; UPDATE holds SET refunded = 9"
        f" WHERE hold_id = '{victim.captured}'; SET session_replication_role = origin"
    )
    async with world.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", 0x70726F6F)
        await check.run_once()
        assert disagreeing("hold") == 0
    await check.run_once()
    assert disagreeing("hold") == 1
    async with served(world) as client:
        proof_ = await client("gateway").CheckBooks(ledger_pb2.CheckBooksRequest())
    assert (proof_.balanced, proof_.transfers, proof_.open_holds) == (False, 9, 1)
    (finding,) = proof_.findings
    assert finding.startswith(f"hold {victim.captured} (CAPTURED): ")


async def test_old_versions_prove_old_holds(world: World) -> None:
    """L7 goes by the version on the hold: what is in force today proves nothing about yesterday."""
    account = await world.account(100)
    old = await world.reserve(account)
    harsh = rules.refund_policy  # only its shape is needed here
    document = await world.pool.fetchval(
        "SELECT content FROM rulebooks WHERE kind = 'REFUND_POLICY'"
    )
    document |= {"version": "harsh"}
    document["captured_percent"]["TIMEOUT"]["default"] = 100
    assert harsh(document).version == "harsh"
    await world.books.rulebooks.load(rules.Kind.REFUND_POLICY, document)
    await world.activate(rules.Kind.REFUND_POLICY, "harsh")
    new = await world.reserve(account, replace(TEN, seconds=12))
    for hold, captured in ((old, 0), (new, 20)):
        late = rules.Verdict(hold.hold_id, account, rules.Cause.TIMEOUT, rules.Stage.RENDERING)
        settled = await world.books.ledger.settle(late)
        assert settled is not None
        assert settled.captured == captured
    proved = await world.books.statements.check_books()
    assert (proved.findings, proved.recomputed_holds) == ((), 2)


@pytest.mark.parametrize("rows", [0, 1200])
async def test_the_proof_reads_holds_in_portions(world: World, rows: int) -> None:
    account = await world.account(1)
    await world.pool.execute(
        """
        INSERT INTO holds (hold_id, account_id, state, fingerprint, item, reserved, price_version,
            policy_version, not_after, created_at, captured, released, cause, verdict, settled_at)
        SELECT lpad(n::text, 26, '0'), $1, 'RELEASED', '', '{"model": "sora-2", "width": 1, "height": 1,
            "seconds": 1, "variants": 1, "lane": "STANDARD"}', 0, '2026-11-2', '2026-11-1', now(),
            now(), 0, 0, 'TIMEOUT', NULL, now()
        FROM generate_series(1, $2::int) n
        """,
        account,
        rows,
    )
    await world.pool.execute("CREATE TABLE planted ()")
    proved = await world.books.statements.check_books()
    # Each was reserved with 0 credits where the book says 1; no more are listed than can be read.
    assert len(proved.findings) == min(rows, proof.MOST_FINDINGS)
    assert all("price book 2026-11-2 says 1" in line for line in proved.findings)
