"""Settlement of holds by policy, from events on a real NATS and by asking; and the contract over real gRPC."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from google.protobuf import json_format, timestamp_pb2
from nats.js import errors as js_errors

from framewire import subjects
from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.generator.v1 import attempt_pb2
from kit import bus, errors, ids, outbox
from services.credits import config, floor, rules, settlement
from tests import containers
from tests.credits_world import ONE, TEN, World, has_reason, served, server, soon, world
from tests.waiting import eventually

__all__ = ["server", "world"]  # fixtures


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


@dataclass
class FakeGenerator:
    """The generator's answers; the contract's only call that credits makes."""

    outcomes: dict[str, attempt_pb2.VideoOutcome]
    asked: int = 0
    away: bool = False

    async def GetVideoOutcome(
        self,
        request: attempt_pb2.GetVideoOutcomeRequest,
        /,
        *,
        timeout: float | None = None,
    ) -> attempt_pb2.VideoOutcome:
        self.asked += 1
        if self.away:
            raise errors.Unavailable("DEPENDENCY_UNAVAILABLE", "away")
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
    generator.away = True
    assert not await asking.run_once()
    # Who could not be asked is asked again by the next pass.
    generator.away, generator.asked = False, 0
    assert not await asking.run_once()
    assert generator.asked == 3
    states = dict(await world.pool.fetch("SELECT hold_id, state FROM holds"))
    assert states == {done: "CAPTURED", running: "HELD", unknown: "HELD", young: "RELEASED"}
    assert not await asking.run_once()
    assert generator.asked == 3  # their turn comes again later


@pytest.fixture(scope="module")
async def nats_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    running = containers.nats(tmp_path_factory.mktemp("credits-nats"))
    await running.start()
    try:
        yield running.url
    finally:
        await running.stop()


@asynccontextmanager
async def consuming(world: World, nats_url: str, **fields: Any) -> AsyncIterator[bus.Bus]:
    """The settlement consumer and the relay on a bus of their own."""
    async with bus.connect(nats_url, "test") as opened:
        await opened.opened.wait()
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


async def test_an_event_before_its_hold_is_delivered_again(world: World, nats_url: str) -> None:
    account, hold_id = await world.account(100), ids.new_id()
    async with consuming(world, nats_url) as opened:
        await publish(opened, completed(hold_id, account), "1")

        async def delivered_twice() -> bool:
            try:
                info = await opened.jetstream.consumer_info("EVENTS", settlement.DURABLE)
            except js_errors.NotFoundError:  # it is only being made
                return False
            return info.delivered is not None and info.delivered.consumer_seq >= 2

        async def captured() -> bool:
            return await world.numbers(account) == (90, 0)

        await eventually(delivered_twice)
        assert await world.pool.fetchval("SELECT count(*) FROM unsettled") == 0
        assert (await world.reserve(account, hold_id=hold_id)).state == "HELD"
        await eventually(captured)


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


async def test_pages_are_whole_and_their_tokens_are_checked(world: World) -> None:
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
        for wrong in ("AAAA", "é", kept):
            request = ledger_pb2.ListEntriesRequest(account_id=other, page_token=wrong)
            with has_reason("PAGE_TOKEN_INVALID"):
                await gateway.ListEntries(request)


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITS_DATABASE_URL", "postgresql://x")
    monkeypatch.setenv("CREDITS_SERVICE_TOKEN_SECRET", "s" * 32)
    monkeypatch.setenv("CREDITS_BALANCE_LOW_CREDITS", "7")
    assert config.Settings().balance_low_credits == 7  # pyright: ignore[reportCallIssue]
