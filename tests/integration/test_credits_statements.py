"""Statements, usage, caps, frozen accounts, and versions of price book and refund policy, over real gRPC."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf import timestamp_pb2

from framewire.credits.v1 import ledger_pb2
from kit import ids, outbox
from services.credits import api, rules, usage
from tests.credits_world import (
    HOUR,
    ONE,
    TEN,
    World,
    backdate,
    has_reason,
    served,
    server,
    soon,
    world,
)

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
    assert [line.price_version for line in entries] == ["2026-11-2"] * 3 + [""]


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


def shown(line: ledger_pb2.UsageLine) -> tuple[Any, ...]:
    return (
        *(line.month, line.model, line.lane, line.key_id, line.label_value),
        *(line.videos, line.captured_credits, line.refunded_credits),
    )


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

    async def lines(*groups: str, label: str = "", days: int = 20) -> list[tuple[Any, ...]]:
        request = ledger_pb2.GetUsageRequest(account_id=account, group_by=groups, label=label)
        getattr(request, "from").FromDatetime(now - timedelta(days=days))
        return [shown(line) for line in (await gateway.GetUsage(request)).lines]

    async with served(world) as client:
        gateway = client("gateway")
        assert await lines() == [
            (this, "sora-2", 2, "", "", 1, 10, 4),
            (this, "sora-2", 1, "", "", 1, 20, 0),
            (this, "sora-2-pro", 2, "", "", 1, 1, 0),
        ]
        assert await lines("USAGE_GROUP_KEY", days=100) == [
            (this, "", 0, "", "", 1, 1, 0),
            (this, "", 0, OTHER_KEY, "", 1, 20, 0),
            (this, "", 0, KEY, "", 1, 10, 4),
            (before, "", 0, KEY, "", 1, 10, 0),
        ]
        by_label = await lines("USAGE_GROUP_LABEL", label="team")
        assert [line[4:] for line in by_label] == [
            ("", 1, 1, 0),
            ("blue", 1, 20, 0),
            ("red", 1, 10, 4),
        ]
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


async def test_usage_that_cannot_be_asked_for(world: World) -> None:
    account, now = await world.account(), datetime.now(UTC)
    async with served(world) as client:
        gateway = client("gateway")
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
        this_month = await gateway.GetUsage(ledger_pb2.GetUsageRequest(account_id=account))
    assert getattr(this_month, "from").ToJsonString().endswith("-01T00:00:00Z")


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


async def test_labels_are_taken_off_the_holds_of_an_account_that_is_erased(
    world: World, monkeypatch: Any
) -> None:
    monkeypatch.setattr(api, "FORGOTTEN", 2)
    account, other = await world.account(100), await world.account(100)
    for whose in (account, account, account, other):
        await world.reserve(whose, labels={"name": "jane"})
    settled = await world.reserve(account, labels={"name": "jane"})
    await world.books.ledger.capture(settled.hold_id, 10, "NONE")
    async with served(world) as client:
        request, pages = ledger_pb2.ForgetLabelsRequest(account_id=account), 0
        while pages == 0 or request.page_token:
            answer = await client("gateway").ForgetLabels(request)
            request.page_token, pages = answer.next_page_token, pages + 1
        assert pages == 3
        with has_reason("ROLE_NOT_ALLOWED"):
            await client("operator").ForgetLabels(request)
        request.page_token = "AAAA"
        with has_reason("PAGE_TOKEN_INVALID"):
            await client("gateway").ForgetLabels(request)
    left = await world.pool.fetch("SELECT account_id, labels FROM holds WHERE labels <> '{}'")
    assert [(row["account_id"], row["labels"]) for row in left] == [(other, {"name": "jane"})]
    assert await world.numbers(account) == (60, 30)
