"""The ledger against a small model of it: random lives of accounts on a real Postgres, every invariant after each step.

Time is virtual in the model and real in the database: to let time pass, the lots of the account are made older.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
from hypothesis import stateful, strategies

from kit import errors, ids, migrate, postgres
from services.credits import documents, ledger, operations, rules
from services.credits.store import Store
from tests import containers

HERE = Path(rules.__file__).parent
ITEM = rules.Item("sora-2", 1280, 720, 6, 1, rules.Lane.STANDARD)
EPSILON = (
    1e-7  # hours between two operations: keeps the order of what happens in one virtual moment
)
T = TypeVar("T")


@dataclass
class Ledger:
    """The real one, driven from outside of its event loop."""

    runner: asyncio.Runner
    pool: postgres.Pool
    books: Store

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    server = containers.postgres(tmp_path_factory.mktemp("model"))
    with asyncio.Runner() as runner:
        runner.run(server.start())
        try:
            runner.run(server.create_database("model"))
            url = server.database_url("model")
            runner.run(migrate.migrate(url, HERE / "migrations"))
            opening = postgres.pool(url, "test", 4)
            pool = runner.run(opening.__aenter__())
            books = Store(pool)
            runner.run(documents.load(books, HERE / "prices.yaml", HERE / "refund_policy.yaml"))
            yield Ledger(runner, pool, books)
            runner.run(opening.__aexit__(None, None, None))
        finally:
            runner.run(server.destroy())


@dataclass
class Lot:
    """A lot of the model; times in hours."""

    priority: int
    expires: float | None
    born: float
    available: int

    def order(self) -> tuple[int, float, float]:
        return (self.priority, float("inf") if self.expires is None else self.expires, self.born)


@dataclass
class Hold:
    """A hold of the model: parts are (lot, credits, life left)."""

    parts: list[tuple[Lot, int, float | None]] = field(default_factory=list)
    reserved: int = 0
    captured: int = 0
    refunded: int = 0
    state: str = "HELD"


@dataclass
class Model:
    """One account."""

    now: float = 0.0
    lots: list[Lot] = field(default_factory=list)
    revenue: int = 0

    def tick(self) -> None:
        """Each posting expires what is due before anything else."""
        self.now += EPSILON
        for lot in self.lots:
            if lot.expires is not None and lot.expires <= self.now:
                lot.available = 0

    @property
    def available(self) -> int:
        return sum(lot.available for lot in self.lots)

    def reserve(self, price: int) -> Hold | None:
        if price > self.available:
            return None
        hold = Hold(reserved=price)
        for lot in sorted(self.lots, key=Lot.order):
            taken = min(price, lot.available)
            if taken:
                life = None if lot.expires is None else lot.expires - self.now
                hold.parts.append((lot, taken, life))
                lot.available -= taken
                price -= taken
        return hold

    def settle(self, hold: Hold, captured: int) -> None:
        hold.state, hold.captured = ("CAPTURED" if captured else "RELEASED"), captured
        self.revenue += captured
        for lot, credits_, life in hold.parts:
            taken = min(captured, credits_)
            captured -= taken
            if credits_ > taken:
                self._give_back(lot, credits_ - taken, life)

    def _give_back(self, lot: Lot, credits_: int, life: float | None) -> None:
        until = None if life is None else self.now + max(24.0, life)
        if lot.expires is None or until is None or lot.expires >= until:
            lot.available += credits_
        elif not lot.available:
            lot.expires, lot.available = until, credits_
        else:
            self.lots.append(Lot(lot.priority, until, lot.born, credits_))

    def refund(self, hold: Hold, credits_: int) -> None:
        hold.refunded += credits_
        self.revenue -= credits_
        left, taken = hold.captured, []
        for lot, pinned, life in hold.parts:
            if left > 0:
                taken.append((float("inf") if life is None else life, lot.priority))
            left -= pinned
        life, priority = max(taken, key=lambda pair: pair[0])
        expires = None if life == float("inf") else self.now + max(24.0, life)
        self.lots.append(Lot(priority, expires, self.now, credits_))


def by_end(lots: list[tuple[int, int, float | None]]) -> dict[tuple[int, int | None], int]:
    """Credits by priority and half hour of their end; which of two equal lots burnt first is nobody's business."""
    sums: dict[tuple[int, int | None], int] = {}
    for priority, credits_, hours in lots:
        key = (priority, None if hours is None else round(2 * hours))
        sums[key] = sums.get(key, 0) + credits_
    return sums


class LedgerMachine(stateful.RuleBasedStateMachine):
    """One account's life. Every operation is sometimes sent twice."""

    real: Ledger

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.account = ids.new_id()
        self.holds: dict[str, Hold] = {}
        self.moves = self.real.books.ledger
        self.real.do(self.moves.open_account(self.account))

    hold_ids = stateful.Bundle("hold_ids")

    def outcome(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What the ledger answers, or the reason why not."""
        try:
            return self.real.do(work)
        except errors.ServiceError as error:
            return error.reason

    @stateful.rule(
        credits_=strategies.integers(1, 40),
        hours=strategies.sampled_from([None, None, 2.5, 10.5, 30.5, 100.5]),
        priority=strategies.sampled_from([1, 50, 50]),
        twice=strategies.booleans(),
    )
    def grant(self, credits_: int, hours: float | None, priority: int, twice: bool) -> None:
        self.model.tick()
        expires = None if hours is None else datetime.now(UTC) + timedelta(hours=hours)
        source = ledger.LotSource.PROMOTION
        request = str(uuid.uuid4())
        grant = operations.Grant(self.account, request, credits_, source, priority, expires)
        first = self.real.do(self.moves.grant(grant))
        if twice:
            assert self.real.do(self.moves.grant(grant)).lot_id == first.lot_id
            changed = replace(grant, credits=credits_ + 1)
            assert self.outcome(self.moves.grant(changed)) == "REQUEST_ID_REUSED"
        ends = None if hours is None else self.model.now + hours
        self.model.lots.append(Lot(priority, ends, self.model.now, credits_))

    @stateful.rule(target=hold_ids, seconds=strategies.integers(1, 18), twice=strategies.booleans())
    def reserve(self, seconds: int, twice: bool) -> str:
        self.model.tick()
        hold_id, item = ids.new_id(), replace(ITEM, seconds=seconds)
        soon = datetime.now(UTC) + timedelta(minutes=1)
        reservation = operations.Reservation(hold_id, self.account, item, soon)
        price = -(-seconds * 100 // 60)
        hold = self.model.reserve(price)
        self.holds[hold_id] = hold or Hold(state="REFUSED")
        for _ in range(1 + twice):
            answer = self.outcome(self.moves.reserve(reservation))
            if hold is None:
                assert answer == "INSUFFICIENT_CREDITS"
            else:
                assert (answer.state, answer.reserved) == ("HELD", price)
        return hold_id

    @stateful.rule(target=hold_ids)
    def release_what_was_never_reserved(self) -> str:
        self.model.now += EPSILON
        hold_id = ids.new_id()
        self.real.do(self.moves.release(hold_id, self.account, "INTERNAL"))
        soon = datetime.now(UTC) + timedelta(minutes=1)
        late = operations.Reservation(hold_id, self.account, ITEM, soon)
        assert self.outcome(self.moves.reserve(late)) == "HOLD_RELEASED"
        self.holds[hold_id] = Hold(state="VOID")
        return hold_id

    @stateful.rule(hold_id=hold_ids, share=strategies.integers(0, 12))
    def capture(self, hold_id: str, share: int) -> None:
        self.model.tick()
        hold = self.holds[hold_id]
        credits_ = hold.reserved * share // 10
        answer = self.outcome(self.moves.capture(hold_id, credits_, "NONE"))
        if hold.state == "HELD" and credits_ > hold.reserved:
            assert answer == "AMOUNT_EXCEEDS"
        elif hold.state == "HELD":
            self.model.settle(hold, credits_)
        elif hold.state == "CAPTURED" and credits_ != hold.captured:
            assert answer == "HOLD_CAPTURED"
        elif hold.state != "CAPTURED" and credits_:
            assert answer == "HOLD_RELEASED"
        if not isinstance(answer, str):
            assert (answer.state, answer.captured) == (hold.state, hold.captured)

    @stateful.rule(hold_id=hold_ids)
    def release(self, hold_id: str) -> None:
        self.model.tick()
        hold = self.holds[hold_id]
        answer = self.outcome(self.moves.release(hold_id, self.account, "NONE"))
        if hold.state == "HELD":
            self.model.settle(hold, 0)
        if hold.state == "CAPTURED":
            assert answer == "HOLD_CAPTURED"
        else:
            assert answer.state == hold.state

    @stateful.rule(
        hold_id=hold_ids,
        cause=strategies.sampled_from(rules.Cause),
        percent=strategies.integers(0, 130),
    )
    def settle(self, hold_id: str, cause: rules.Cause, percent: int) -> None:
        self.model.tick()
        hold, stage = self.holds[hold_id], rules.Stage.RENDERING
        row = self.real.do(self._item_seconds(hold_id))
        durations = (max(1, row * 10 * percent),)
        verdict = rules.Verdict(hold_id, self.account, cause, stage, durations)
        answer = self.real.do(self.moves.settle(verdict))
        assert answer is not None
        if hold.state == "HELD":
            if cause is rules.Cause.NONE:
                delivered = row * 1000 if percent >= 90 else durations[0]
                captured = hold.reserved * delivered // (row * 1000)
            else:
                captured = hold.reserved if cause is rules.Cause.CANCELLED_AFTER_SUBMIT else 0
            self.model.settle(hold, captured)
        assert (answer.state, answer.captured) == (hold.state, hold.captured)

    @stateful.rule(
        hold_id=hold_ids, credits_=strategies.integers(1, 12), twice=strategies.booleans()
    )
    def refund(self, hold_id: str, credits_: int, twice: bool) -> None:
        self.model.tick()
        hold, request_id = self.holds[hold_id], str(uuid.uuid4())
        answer = self.outcome(self.moves.refund(hold_id, request_id, credits_, ""))
        if hold.refunded + credits_ > hold.captured:
            assert answer == "AMOUNT_EXCEEDS"
            return
        self.model.refund(hold, credits_)
        if twice:
            again = self.real.do(self.moves.refund(hold_id, request_id, credits_, ""))
            assert again.lot_id == answer.lot_id

    @stateful.rule(hours=strategies.sampled_from([1, 5, 13, 30]))
    def let_time_pass(self, hours: int) -> None:
        self.model.now += hours
        self.real.do(
            self.real.pool.execute(
                "UPDATE lots SET expires_at = expires_at - $2::interval WHERE account_id = $1",
                self.account,
                timedelta(hours=hours),
            )
        )

    @stateful.rule()
    def expire(self) -> None:
        self.model.tick()
        self.real.do(self.moves.expire_due(self.account))

    async def _item_seconds(self, hold_id: str) -> int:
        seconds = await self.real.pool.fetchval(
            "SELECT (item ->> 'seconds')::int FROM holds WHERE hold_id = $1", hold_id
        )
        return seconds or 1

    @stateful.invariant()
    def numbers_are_the_models(self) -> None:
        self.model.tick()
        balance = self.real.do(self.real.books.statements.get_balance(self.account))
        open_holds = [hold for hold in self.holds.values() if hold.state == "HELD"]
        assert balance.available == self.model.available
        assert balance.held == sum(hold.reserved for hold in open_holds)

    @stateful.invariant()
    def entries_are_the_balances(self) -> None:
        row = self.real.do(
            self.real.pool.fetchrow(
                """
                SELECT a.available, a.held, a.last_seq,
                    (SELECT coalesce(sum(credits), 0) FROM entries WHERE account_id = $1) AS total,
                    (SELECT coalesce(sum(credits), 0) FROM entries
                     WHERE account_id = $1 AND book = 'available') AS entries_available,
                    (SELECT coalesce(sum(credits), 0) FROM entries
                     WHERE account_id = $1 AND book = 'held') AS entries_held,
                    (SELECT coalesce(sum(credits), 0) FROM entries
                     WHERE account_id = $1 AND book = 'revenue') AS revenue,
                    (SELECT coalesce(sum(available), 0) FROM lots WHERE account_id = $1) AS lots,
                    (SELECT count(*) FROM transfers WHERE account_id = $1) AS transfers
                FROM accounts a WHERE account_id = $1
                """,
                self.account,
            )
        )
        assert row is not None
        assert row["total"] == 0
        assert row["available"] == row["entries_available"] == row["lots"] >= 0
        assert row["held"] == row["entries_held"] >= 0
        assert row["last_seq"] == row["transfers"]
        assert row["revenue"] == self.model.revenue

    def teardown(self) -> None:
        """The model's credits end when the ledger's do; and the books prove themselves."""
        self.model.tick()
        self.real.do(self.moves.expire_due(self.account))
        rows = self.real.do(
            self.real.pool.fetch(
                """
                SELECT priority, available,
                    extract(epoch FROM expires_at - clock_timestamp())::float8 / 3600 AS hours
                FROM lots WHERE account_id = $1 AND available > 0
                """,
                self.account,
            )
        )
        theirs = [(row["priority"], row["available"], row["hours"]) for row in rows]
        ours = [
            (lot.priority, lot.available, lot.expires and lot.expires - self.model.now)
            for lot in self.model.lots
            if lot.available
        ]
        assert by_end(theirs) == by_end(ours)
        assert self.real.do(self.real.books.statements.check_books()).findings == ()


def test_the_ledger_does_what_its_model_does(real: Ledger) -> None:
    LedgerMachine.real = real
    stateful.run_state_machine_as_test(
        LedgerMachine,
        settings=hypothesis.settings(
            max_examples=50,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
