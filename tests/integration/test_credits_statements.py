"""Statements, usage, caps, frozen accounts, and versions of price book and refund policy, over real gRPC."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf import timestamp_pb2

from framewire.credits.v1 import ledger_pb2
from kit import errors, ids, outbox
from services.credits import documents, holds, rules, usage
from tests.credits_world import HERE, HOUR, ONE, TEN, World, has_reason, served, server, soon, world

__all__ = ["server", "world"]  # fixtures

KEY, OTHER_KEY = "k" * 26, "j" * 26
TRACE = "0af7651916cd43dd8448eb211c80319c"
DONE = (rules.Cause.NONE, rules.Stage.DONE, (6000,))


def stamp(moment: datetime) -> timestamp_pb2.Timestamp:
    made = timestamp_pb2.Timestamp()
    made.FromDatetime(moment)
    return made


async def settled(world: World, account: str, item: rules.Item = TEN, **fields: Any) -> str:
    """A video that was made and paid for."""
    hold = await world.reserve(account, item, **fields)
    await world.books.ledger.settle(rules.Verdict(hold.hold_id, account, *DONE))
    return hold.hold_id


async def backdate(world: World, account: str, by: timedelta) -> None:
    """Lets all that happened in an account be longer ago."""
    await world.pool.execute(
        f"""
        SET session_replication_role = replica;
        UPDATE transfers SET created_at = created_at - interval '{by.days} days'
            WHERE account_id = '{account}';
        UPDATE holds SET created_at = created_at - interval '{by.days} days',
            settled_at = settled_at - interval '{by.days} days' WHERE account_id = '{account}';
        SET session_replication_role = origin
        """
    )


# Statements


async def test_a_statement_says_where_each_line_came_from(world: World) -> None:
    account = ids.new_id()
    traced = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),)
    item = ledger_pb2.Item(
        model="sora-2", width=1280, height=720, seconds=6, variants=1, lane="LANE_STANDARD"
    )
    async with served(world) as client:
        gateway = client("gateway")
        await gateway.OpenAccount(ledger_pb2.OpenAccountRequest(account_id=account))
        grant = ledger_pb2.GrantRequest(
            account_id=account,
            request_id=str(uuid.uuid4()),
            credits=30,
            source="LOT_SOURCE_PURCHASE",
            operator="op-1",
            purchase="invoice 2026/17",
        )
        await gateway.Grant(grant, metadata=traced)
        reserve = ledger_pb2.ReserveRequest(
            hold_id=ids.new_id(), account_id=account, item=item, not_after=soon(), key_id=KEY
        )
        hold = await gateway.Reserve(reserve, metadata=traced)
        assert hold.key_id == KEY
        capture = ledger_pb2.CaptureRequest(
            hold_id=hold.hold_id, credits=10, cause="CAUSE_NONE", operator="op-2"
        )
        await gateway.Capture(capture, metadata=traced)
        refund = ledger_pb2.RefundRequest(
            hold_id=hold.hold_id, request_id=str(uuid.uuid4()), credits=2, operator="op-3"
        )
        await gateway.Refund(refund, metadata=traced)
        asked = ledger_pb2.ListEntriesRequest(account_id=account)
        entries = (await gateway.ListEntries(asked)).entries
    assert [(line.operator, line.purchase, line.policy_version) for line in entries] == [
        ("op-3", "", "2026-11-1"),
        ("op-2", "", "2026-11-1"),
        ("", "", "2026-11-1"),
        ("op-1", "invoice 2026/17", ""),
    ]
    assert {line.trace_id for line in entries} == {TRACE}
    assert [line.price_version for line in entries] == ["2026-11-1"] * 3 + [""]


async def test_a_refund_at_the_platforms_cost_leaves_what_was_earned(world: World) -> None:
    account = await world.account(20)
    hold_id, request_id = await settled(world, account), str(uuid.uuid4())
    async with served(world) as client:
        refund = ledger_pb2.RefundRequest(
            hold_id=hold_id, request_id=request_id, credits=4, taken_from="REFUND_FROM_LOSS"
        )
        await client("gateway").Refund(refund)
        refund.taken_from = ledger_pb2.REFUND_FROM_REVENUE
        with has_reason("REQUEST_ID_REUSED"):
            await client("gateway").Refund(refund)
    books = dict(await world.pool.fetch("SELECT book, sum(credits) FROM entries GROUP BY book"))
    assert (books["revenue"], books["loss"], books["available"]) == (10, -4, 14)


async def test_a_statement_is_filtered_and_paged(world: World) -> None:
    account, other = await world.account(100), await world.account(100)
    old = [await settled(world, account, ONE) for _ in range(3)]
    await backdate(world, account, timedelta(days=40))
    new = [await settled(world, account, ONE) for _ in range(3)]
    now = datetime.now(UTC)
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"from": now - timedelta(days=1)}, [hold for hold in new[::-1] for _ in range(2)]),
        ({"to": now - timedelta(days=1), "kinds": ["TRANSFER_KIND_CAPTURE"]}, old[::-1]),
        ({"video_id": old[1]}, [old[1]] * 2),
        ({"kinds": ["TRANSFER_KIND_GRANT"]}, ["", ""]),
        ({"from": now - timedelta(days=9), "to": now - timedelta(days=8)}, []),
        ({"from": now + HOUR}, []),
        ({"to": now - timedelta(days=400)}, []),
    ]
    async with served(world) as client:
        gateway = client("gateway")
        tokens: list[str] = []
        for fields, wanted in cases:
            times = {name: stamp(fields[name]) for name in ("from", "to") if name in fields}
            request = ledger_pb2.ListEntriesRequest(
                account_id=account, page_size=2, **{**fields, **times}
            )
            seen: list[str] = []
            while True:
                page = await gateway.ListEntries(request)
                seen += [entry.video_id for entry in page.entries]
                # Lines that come while somebody reads on do not move the pages.
                if page.next_page_token and not tokens:
                    await world.grant(account, 1)
                if not (token := page.next_page_token):
                    break
                tokens.append(request.page_token or token)
                request.page_token = token
            assert seen == wanted, fields
        token = tokens[0]
        forged = ("A" if token[0] != "A" else "B") + token[1:]
        first = {"from": stamp(cases[0][0]["from"]), "account_id": account}
        assert (
            await gateway.ListEntries(ledger_pb2.ListEntriesRequest(**first, page_token=token))
        ).entries
        for wrong in (
            {**first, "page_token": forged},
            {**first, "page_token": token[:-8]},
            {**first, "page_token": "made up"},
            {**first, "page_token": token, "account_id": other},
            {**first, "page_token": token, "kinds": ["TRANSFER_KIND_GRANT"]},
            {"account_id": account, "page_token": token},
        ):
            with has_reason("PAGE_TOKEN_INVALID"):
                await gateway.ListEntries(ledger_pb2.ListEntriesRequest(**wrong))


async def test_the_search_by_time_finds_every_border(world: World) -> None:
    account = await world.account()
    for _ in range(9):
        await world.grant(account, 1)
    rows = await world.pool.fetch(
        "SELECT seq, created_at FROM transfers WHERE account_id = $1 ORDER BY seq", account
    )
    tiny = timedelta(microseconds=1)
    for row in rows:
        for moment, first in (
            (row["created_at"], row["seq"]),
            (row["created_at"] + tiny, row["seq"] + 1),
        ):
            found = await world.pool.fetchval("SELECT first_seq_at($1, $2)", account, moment)
            assert found == first
    empty = await world.account()
    assert await world.pool.fetchval("SELECT first_seq_at($1, now())", empty) == 1


# Usage


async def test_usage_is_the_statements_sum_in_every_grouping(world: World) -> None:
    account = await world.account(200)
    vip = replace(TEN, lane=rules.Lane.VIP)
    await settled(world, account, TEN, key_id=KEY, labels={"team": "red"})
    await backdate(world, account, timedelta(days=70))
    first = await settled(world, account, TEN, key_id=KEY, labels={"team": "red"})
    await settled(world, account, vip, key_id=OTHER_KEY, labels={"team": "blue"})
    await settled(world, account, replace(ONE, model="sora-2-pro"))
    failed = await world.reserve(account, key_id=KEY)
    await world.books.ledger.release(failed.hold_id, account, "TIMEOUT")
    await world.reserve(account)  # open: not used yet
    await world.books.ledger.refund(first, str(uuid.uuid4()), 4, "")
    now = datetime.now(UTC)
    this, before = (moment.strftime("%Y-%m") for moment in (now, now - timedelta(days=70)))

    async def lines(*groups: str, label: str = "", days: int = 0) -> list[tuple[Any, ...]]:
        request = ledger_pb2.GetUsageRequest(account_id=account, group_by=groups, label=label)
        if days:
            getattr(request, "from").FromDatetime(now - timedelta(days=days))
        answer = await gateway.GetUsage(request)
        return [
            (
                *(line.month, line.model, line.lane, line.key_id, line.label_value),
                *(line.videos, line.captured_credits, line.refunded_credits),
            )
            for line in answer.lines
        ]

    async with served(world) as client:
        gateway = client("gateway")
        assert await lines() == [
            (this, "sora-2", 1, "", "", 1, 20, 0),
            (this, "sora-2", 2, "", "", 1, 10, 4),
            (this, "sora-2-pro", 2, "", "", 1, 1, 0),
        ] or await lines(days=20), "the month may have turned"
        assert await lines("USAGE_GROUP_KEY", days=100) == [
            (this, "", 0, "", "", 1, 1, 0),
            (this, "", 0, OTHER_KEY, "", 1, 20, 0),
            (this, "", 0, KEY, "", 1, 10, 4),
            (before, "", 0, KEY, "", 1, 10, 0),
        ]
        by_label = await lines("USAGE_GROUP_LABEL", label="team", days=20)
        assert [line[4:] for line in by_label] == [
            ("", 1, 1, 0),
            ("blue", 1, 20, 0),
            ("red", 1, 10, 4),
        ]
        for fields in (
            {"group_by": ["USAGE_GROUP_LABEL"]},
            {"label": "team"},
            {"from": stamp(now), "to": stamp(now - HOUR)},
            {"from": stamp(now - timedelta(days=500))},
            {"group_by": ["USAGE_GROUP_KEY", "USAGE_GROUP_KEY"]},
        ):
            with has_reason("INVALID_FIELD"):
                await gateway.GetUsage(ledger_pb2.GetUsageRequest(account_id=account, **fields))
        with has_reason("ACCOUNT_NOT_FOUND"):
            await gateway.GetUsage(ledger_pb2.GetUsageRequest(account_id=ids.new_id()))
    # What usage says and what the statement's lines say is the same, whatever the groups.
    period = usage.Asked(from_=now - timedelta(days=100))
    for groups in ((), tuple(usage.Group)):
        label = "team" if usage.Group.LABEL in groups else ""
        asked = replace(period, groups=groups, label=label)
        _, used = await world.books.statements.get_usage(account, asked)
        statement = await world.books.statements.list_entries(account, None, 100)
        captured = sum(-line.held_change for line in statement if line.kind == "CAPTURE")
        assert sum(line.captured for line in used) == captured == 41
        assert sum(line.refunded for line in used) == 4


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
    ("PRICE_BOOK", PRICES, ('"2026-11-1"', "2026.11"), "line 6: version must be text, in quotes"),
    ("PRICE_BOOK", PRICES, ('"2026-11-1"', '"a b"'), "version must be text"),
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
    dear = PRICES.replace('"2026-11-1"', '"2026-12-1"').replace(
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
            ("2026-11-1", False),
        ]
        assert listed.rulebooks[0] == active
    assert (await world.reserve(account)).reserved == 15
    assert (await world.reserve(account, quote_id=quote_id)).reserved == 10
    # A restart with the old files puts nothing back.
    await documents.load(world.books, HERE / "prices.yaml", HERE / "refund_policy.yaml")
    assert (await world.reserve(account)).reserved == 15


# Bad input that the sections above do not have


async def test_amounts_that_there_are_not(world: World) -> None:
    account = await world.account(10)
    hold_id = await settled(world, account)
    before = await world.numbers(account)
    async with served(world) as client:
        gateway = client("gateway")
        for credits_ in (0, -1, 10**9 + 1, 2**63 - 1):
            grant = ledger_pb2.GrantRequest(
                account_id=account,
                request_id=str(uuid.uuid4()),
                credits=credits_,
                source="LOT_SOURCE_PURCHASE",
            )
            with has_reason("INVALID_FIELD"):
                await gateway.Grant(grant)
        for credits_, reason in (
            (0, "INVALID_FIELD"),
            (-1, "INVALID_FIELD"),
            (2**63 - 1, "AMOUNT_EXCEEDS"),
        ):
            refund = ledger_pb2.RefundRequest(
                hold_id=hold_id, request_id=str(uuid.uuid4()), credits=credits_
            )
            with has_reason(reason):
                await gateway.Refund(refund)
        fresh = await world.account(10)
        held = (await world.reserve(fresh)).hold_id
        for credits_, reason in (
            (-1, "INVALID_FIELD"),
            (11, "AMOUNT_EXCEEDS"),
            (2**63 - 1, "AMOUNT_EXCEEDS"),
        ):
            capture = ledger_pb2.CaptureRequest(hold_id=held, credits=credits_, cause="CAUSE_NONE")
            with has_reason(reason):
                await gateway.Capture(capture)
        for method, message in (
            ("GetBalance", ledger_pb2.GetBalanceRequest(account_id=ids.new_id())),
            ("ListEntries", ledger_pb2.ListEntriesRequest(account_id=ids.new_id())),
        ):
            with has_reason("ACCOUNT_NOT_FOUND"):
                await getattr(gateway, method)(message)
        for text in ("a\0b",):
            grant = ledger_pb2.GrantRequest(
                account_id=account,
                request_id=str(uuid.uuid4()),
                credits=1,
                source="LOT_SOURCE_PURCHASE",
                purchase=text,
            )
            with has_reason("INVALID_FIELD"):
                await gateway.Grant(grant)
    assert await world.numbers(account) == before
    assert await world.numbers(fresh) == (0, 10)


# What waits, and what is forgotten


async def test_the_backlog_is_measured(world: World) -> None:
    account = await world.account(10)
    await world.reserve(account)
    verdict = rules.Verdict(ids.new_id(), account, *DONE)
    await world.books.waiting.keep_unsettled(verdict)
    await world.pool.execute(
        "UPDATE unsettled SET first_seen_at = first_seen_at - interval '2 hours'"
    )
    for sequence in (1, 2):
        await world.books.waiting.park("s", sequence, "not an Event", b"x")
    found = await world.books.waiting.backlog()
    assert (found.open_holds, found.unsettled, found.parked) == (1, 1, 2)
    assert 7200 <= found.oldest_unsettled_seconds < 7300


async def test_what_was_told_is_forgotten_after_its_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await world.account(100)
    for _ in range(5):
        await settled(world, account)
    old = "ce_id IN (SELECT ce_id FROM outbox ORDER BY ce_id LIMIT 3)"
    await world.pool.execute(
        f"UPDATE outbox SET created_at = created_at - interval '36 days', published_at = now() WHERE {old}"
    )
    untold, young = await world.pool.fetch("SELECT ce_id FROM outbox WHERE published_at IS NULL")
    await world.pool.execute(
        "UPDATE outbox SET created_at = created_at - interval '36 days' WHERE ce_id = $1",
        untold["ce_id"],
    )
    await world.pool.execute(
        "UPDATE outbox SET published_at = now() WHERE ce_id = $1", young["ce_id"]
    )
    monkeypatch.setattr(outbox, "RETENTION_BATCH", 2)
    retention = outbox.Retention(world.pool)
    assert await retention.run_once()
    assert not await retention.run_once()
    left = {row["ce_id"] for row in await world.pool.fetch("SELECT ce_id FROM outbox")}
    assert left == {untold["ce_id"], young["ce_id"]}
