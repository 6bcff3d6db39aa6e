"""What operators set for the ledger: caps, frozen accounts, versions of price book and refund policy."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from framewire.credits.v1 import ledger_pb2
from kit import errors, ids
from services.credits import caps, documents, holds, rules
from tests.credits_world import (
    HERE,
    HOUR,
    ONE,
    TEN,
    World,
    backdate,
    has_reason,
    served,
    server,
    world,
)

__all__ = ["server", "world"]  # fixtures

KEY, OTHER_KEY = "k" * 26, "j" * 26
DONE = (rules.Cause.NONE, rules.Stage.DONE, (6000,))


# Caps and frozen accounts


async def cap(world: World, account: str, credits_: int | None, key_id: str = "") -> None:
    await world.books.accounts.set_daily_cap(account, key_id, credits_)


async def test_caps_are_kept_to_the_credit_and_remembered(world: World) -> None:
    account = await world.account(1000)
    await cap(world, account, 35)
    await cap(world, account, 15, KEY)
    first = await world.reserve(account, key_id=KEY)
    hold_id = ids.new_id()
    for _ in range(2):
        with has_reason("CREDIT_CAP_REACHED") as refused:
            await world.reserve(account, key_id=KEY, hold_id=hold_id)
        facts = refused.value.metadata
        assert isinstance(refused.value, errors.ResourceExhausted)
        assert (facts["scope"], facts["cap"], facts["left"], facts["needed"]) == (
            "KEY",
            "15",
            "5",
            "10",
        )
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()
        assert facts["resets_at"] == f"{tomorrow}T00:00:00Z"
        assert facts["resets_at"] in refused.value.message
        await cap(world, account, 1000, KEY)  # a refusal stays one, whatever becomes of the cap
    await cap(world, account, 15, KEY)
    assert (await world.reserve(account, ONE, key_id=KEY)).reserved == 1
    for _ in range(2):
        await world.reserve(account, key_id=OTHER_KEY)
    with has_reason("CREDIT_CAP_REACHED") as refused:
        await world.reserve(account)
    assert (refused.value.metadata["scope"], refused.value.metadata["left"]) == ("ACCOUNT", "4")
    # What is given back can be used again; what was captured cannot.
    await world.books.ledger.release(first.hold_id, account, "INTERNAL")
    again = await world.reserve(account)
    await world.books.ledger.capture(again.hold_id, 10, "NONE")
    with has_reason("CREDIT_CAP_REACHED"):
        await world.reserve(account)
    # Yesterday does not count, nor does another account.
    await backdate(world, account, timedelta(days=1))
    await world.reserve(account, key_id=KEY)
    await world.reserve(await world.account(10), key_id=KEY)
    await cap(world, account, None)
    await cap(world, account, None, KEY)
    for _ in range(5):
        await world.reserve(account, key_id=KEY)
    await cap(world, account, 0)
    with has_reason("CREDIT_CAP_REACHED"):
        await world.reserve(account, ONE)


async def test_a_cap_is_exact_under_many_at_once(world: World) -> None:
    account = await world.account(1000)
    await cap(world, account, 73)
    answers = await asyncio.gather(
        *(world.reserve(account) for _ in range(24)), return_exceptions=True
    )
    assert len([one for one in answers if isinstance(one, holds.Hold)]) == 7
    assert await world.numbers(account) == (930, 70)


async def test_a_days_spending_goes_on_from_what_was_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caps, "MARKED_AFTER", 4)
    account = await world.account(1000)
    await cap(world, account, 100)
    await cap(world, account, 45, KEY)
    held = [await world.reserve(account, key_id=KEY) for _ in range(4)]

    async def kept() -> dict[str, tuple[int, int]]:
        rows = await world.pool.fetch("SELECT key_id, seq, credits FROM daily_spending")
        return {row["key_id"]: (row["seq"], row["credits"]) for row in rows}

    assert await kept() == {}
    with has_reason("CREDIT_CAP_REACHED") as refused:  # it, too, keeps the sum
        await world.reserve(account, key_id=KEY)
    assert refused.value.metadata["left"] == "5"
    assert await kept() == {"": (5, 40), KEY: (5, 40)}
    # What comes after that counts, also what asks for no cap; of a hold that is captured in part the rest is free.
    await world.books.ledger.release(held[0].hold_id, account, "INTERNAL")
    await world.books.ledger.capture(held[1].hold_id, 4, "NONE")
    with has_reason("CREDIT_CAP_REACHED") as refused:
        await world.reserve(account, replace(TEN, variants=3), key_id=KEY)
    assert (refused.value.metadata["needed"], refused.value.metadata["left"]) == ("30", "21")
    await world.reserve(account, replace(TEN, variants=2), key_id=KEY)
    for _ in range(5):
        await world.reserve(account)
    with has_reason("CREDIT_CAP_REACHED") as refused:
        await world.reserve(account)
    assert (refused.value.metadata["scope"], refused.value.metadata["left"]) == ("ACCOUNT", "6")
    assert (await kept())[""][1] > 40
    assert not (await world.books.statements.check_books()).findings
    # A cap that was lifted for a while has missed nothing.
    await cap(world, account, None)
    await world.reserve(account)
    await cap(world, account, 113)
    with has_reason("CREDIT_CAP_REACHED") as refused:
        await world.reserve(account)
    assert refused.value.metadata["left"] == "9"
    # The next day begins at nothing.
    await world.pool.execute("UPDATE daily_spending SET began = began - interval '1 day'")
    await backdate(world, account, timedelta(days=1))
    assert (await world.reserve(account, key_id=KEY)).state == "HELD"


async def test_caps_and_freezing_over_grpc(world: World) -> None:
    account = await world.account(100)
    async with served(world) as client:
        gateway = client("gateway")
        frozen = ledger_pb2.SetFrozenRequest(account_id=account, frozen=True)
        for _ in range(2):
            assert (await gateway.SetFrozen(frozen)).frozen
        running = await world.pool.fetchval(
            "SELECT frozen FROM accounts WHERE account_id = $1", account
        )
        assert running
        with has_reason("ACCOUNT_FROZEN"):
            await world.reserve(account)
        request = ledger_pb2.SetDailyCapRequest(account_id=account, key_id=KEY, credits=5)
        found = await gateway.SetDailyCap(request)
        assert (found.frozen, dict(found.key_daily_cap_credits)) == (True, {KEY: 5})
        assert not found.HasField("daily_cap_credits")
        whole = ledger_pb2.SetDailyCapRequest(account_id=account, credits=0)
        found = await gateway.SetDailyCap(whole)
        assert (found.HasField("daily_cap_credits"), found.daily_cap_credits) == (True, 0)
        lifted = ledger_pb2.SetDailyCapRequest(account_id=account)
        assert not (await gateway.SetDailyCap(lifted)).HasField("daily_cap_credits")
        assert not (await gateway.SetFrozen(ledger_pb2.SetFrozenRequest(account_id=account))).frozen
        assert (await world.reserve(account)).state == "HELD"
        for call, wrong in (
            (gateway.SetFrozen, ledger_pb2.SetFrozenRequest(account_id=ids.new_id())),
            (
                gateway.SetDailyCap,
                ledger_pb2.SetDailyCapRequest(account_id=ids.new_id(), credits=1),
            ),
        ):
            with has_reason("ACCOUNT_NOT_FOUND"):
                await call(wrong)
        for credits_ in (-1, 10**12):
            request.credits = credits_
            with has_reason("INVALID_FIELD"):
                await gateway.SetDailyCap(request)


async def test_a_frozen_account_settles_what_it_holds(world: World) -> None:
    account = await world.account(30)
    hold = await world.reserve(account)
    await world.books.accounts.set_frozen(account, True)
    await world.books.ledger.settle(rules.Verdict(hold.hold_id, account, *DONE))
    assert await world.numbers(account) == (20, 0)


# Price books and refund policies

PRICES = (HERE / "prices.yaml").read_text()
POLICY = (HERE / "refund_policy.yaml").read_text()
BAD_RULEBOOKS: list[tuple[str, str, tuple[str, str], str]] = [
    # kind, document, what is changed in it, what is said
    ("PRICE_BOOK", PRICES, ("  BATCH: 50\n", ""), "line 7: lane_percent.BATCH is missing"),
    (
        "PRICE_BOOK",
        PRICES,
        ("lane_percent:", "lanes_percent:"),
        "line 7: lanes_percent is not known",
    ),
    ("PRICE_BOOK", PRICES, ("VIP: 200", "VIP: -200"), "line 8: lane_percent.VIP must be a whole"),
    (
        "PRICE_BOOK",
        PRICES,
        ("credits_per_minute: 50}", "credits_per_minute: -1}"),
        r"line 16: models.sora-2.sizes[1].credits_per_minute must be a whole number from 0",
    ),
    (
        "PRICE_BOOK",
        PRICES,
        ("{max_pixels: 409_920, credits_per_minute: 50}", "{max_pixels: 409_920}"),
        "line 16: models.sora-2.sizes[1].credits_per_minute is missing",
    ),
    ("PRICE_BOOK", PRICES, ("921_600", "1"), "must be above the size before it"),
    (
        "PRICE_BOOK",
        PRICES,
        ("minimum_credits: 1", "minimal: 1"),
        "models.sora-2.minimal is not known",
    ),
    ("PRICE_BOOK", PRICES, ("  sora-1:\n", "  sora-2:\n"), "the key 'sora-2' is there twice"),
    ("PRICE_BOOK", PRICES, ('"2026-11-2"', "2026.11"), "line 6: version must be text, in quotes"),
    ("PRICE_BOOK", PRICES, ('"2026-11-2"', '"a b"'), "version must be text"),
    ("PRICE_BOOK", PRICES, (PRICES, "models: {}"), "lane_percent is missing"),
    ("PRICE_BOOK", PRICES, (PRICES, "[1, 2"), "line 1:"),
    ("PRICE_BOOK", PRICES, (PRICES, "# nothing"), "it is empty"),
    ("PRICE_BOOK", PRICES, (PRICES, "a: &a [1]\nb: *a"), "line 2: anchors and aliases"),
    ("PRICE_BOOK", PRICES, (PRICES, "[" * 40), "nested too deeply"),
    ("PRICE_BOOK", PRICES, (PRICES, "a: !!python/name:os.system"), "line 1:"),
    ("PRICE_BOOK", PRICES, (PRICES, "a\x00b"), "not YAML that can be read"),
    ("PRICE_BOOK", PRICES, ("VIP: 200", f"VIP: {'9' * 5000}"), "not YAML that can be read"),
    ("PRICE_BOOK", POLICY, ("", ""), "captured_percent is not known here"),
    (
        "REFUND_POLICY",
        POLICY,
        ("  TIMEOUT: {default: 0}\n", ""),
        "captured_percent.TIMEOUT is missing",
    ),
    (
        "REFUND_POLICY",
        POLICY,
        ("100}", "101}"),
        "captured_percent.NONE.default must be a whole number",
    ),
    (
        "REFUND_POLICY",
        POLICY,
        ("TIMEOUT: {default: 0}", "TIMEOUT: {LATE: 0}"),
        "TIMEOUT.LATE is not",
    ),
    ("REFUND_POLICY", POLICY, ("full_length_percent: 90", ""), "full_length_percent is missing"),
]


async def test_a_bad_document_is_named_and_not_kept(world: World) -> None:
    async with served(world) as client:
        gateway = client("gateway")
        for kind, document, (old, new), says in BAD_RULEBOOKS:
            text = document.replace(old, new, 1) if old else document
            request = ledger_pb2.AddRulebookRequest(kind=f"RULEBOOK_KIND_{kind}", yaml=text)
            with has_reason("RULEBOOK_INVALID") as refused:
                await gateway.AddRulebook(request)
            assert says in refused.value.message, refused.value.message
            assert "Error(" not in refused.value.message
        with has_reason("INVALID_FIELD"):
            request = ledger_pb2.AddRulebookRequest(
                kind="RULEBOOK_KIND_PRICE_BOOK", yaml="x" * 70_000
            )
            await gateway.AddRulebook(request)
    assert await world.pool.fetchval("SELECT count(*) FROM rulebooks") == 2
    assert await world.pool.fetchval("SELECT count(*) FROM rulebook_activations") == 2


async def test_a_version_is_added_listed_and_put_in_force(world: World) -> None:
    kind = ledger_pb2.RULEBOOK_KIND_PRICE_BOOK
    dear = PRICES.replace('"2026-11-2"', '"2026-12-1"').replace(
        "per_minute: 100}", "per_minute: 150}"
    )
    quote_id, _ = await world.books.ledger.quote(TEN)
    account = await world.account(100)
    async with served(world) as client:
        gateway = client("gateway")
        add = ledger_pb2.AddRulebookRequest(kind=kind, yaml=dear, operator="op-1")
        added = await gateway.AddRulebook(add)
        assert (added.version, added.in_force, added.loaded_by) == ("2026-12-1", False, "op-1")
        assert not added.HasField("effective_from")
        add.yaml = f"# another layout\n{dear}"
        assert await gateway.AddRulebook(add) == added
        add.yaml = dear.replace("VIP: 200", "VIP: 300")
        with has_reason("RULEBOOK_EXISTS"):
            await gateway.AddRulebook(add)
        assert (await world.reserve(account)).reserved == 10
        activate = ledger_pb2.ActivateRulebookRequest(
            kind=kind, version="2026-12-1", content_hash="0" * 64, operator="op-2"
        )
        with has_reason("RULEBOOK_MISMATCH"):
            await gateway.ActivateRulebook(activate)
        activate.content_hash = added.content_hash
        activate.effective_from.FromDatetime(datetime.now(UTC) - HOUR)
        with has_reason("INVALID_FIELD"):
            await gateway.ActivateRulebook(activate)
        activate.ClearField("effective_from")
        activate.version = "2027"
        with has_reason("RULEBOOK_NOT_FOUND"):
            await gateway.ActivateRulebook(activate)
        activate.version = "2026-12-1"
        active = await gateway.ActivateRulebook(activate)
        assert (active.in_force, active.activated_by) == (True, "op-2")
        listed = await gateway.ListRulebooks(ledger_pb2.ListRulebooksRequest(kind=kind))
        assert [(one.version, one.in_force) for one in listed.rulebooks] == [
            ("2026-12-1", True),
            ("2026-11-2", False),
        ]
        assert listed.rulebooks[0] == active
    assert (await world.reserve(account)).reserved == 15
    assert (await world.reserve(account, quote_id=quote_id)).reserved == 10
    # A restart with the old files puts nothing back.
    await documents.load(world.books, HERE / "prices.yaml", HERE / "refund_policy.yaml")
    assert (await world.reserve(account)).reserved == 15


async def test_an_activation_that_is_sent_again_undoes_nothing(world: World) -> None:
    kind = ledger_pb2.RULEBOOK_KIND_PRICE_BOOK
    async with served(world) as client:
        gateway = client("gateway")
        (first,) = (
            await gateway.ListRulebooks(ledger_pb2.ListRulebooksRequest(kind=kind))
        ).rulebooks
        dear = (HERE / "prices.yaml").read_text().replace(first.version, "2026-12-1")
        added = await gateway.AddRulebook(
            ledger_pb2.AddRulebookRequest(kind=kind, yaml=dear.replace("VIP: 200", "VIP: 300"))
        )
        activate = ledger_pb2.ActivateRulebookRequest(
            kind=kind,
            version=added.version,
            content_hash=added.content_hash,
            request_id=str(uuid.uuid4()),
        )
        for _ in range(2):
            assert (await gateway.ActivateRulebook(activate)).in_force
        back = ledger_pb2.ActivateRulebookRequest(
            kind=kind, version=first.version, content_hash=first.content_hash
        )
        assert (await gateway.ActivateRulebook(back)).in_force
        # Its answer was lost, and somebody has put another one in force since.
        assert not (await gateway.ActivateRulebook(activate)).in_force
        back.request_id = activate.request_id
        with has_reason("REQUEST_ID_REUSED"):
            await gateway.ActivateRulebook(back)
        activate.request_id = ""
        assert (await gateway.ActivateRulebook(activate)).in_force
