"""The ledger against a small model of it: random lives of accounts on a real Postgres, every invariant after each step.

Time is virtual in the model and real in the database: to let time pass, the lots of the account are made older.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import uvloop
from hypothesis import stateful, strategies

from kit import errors, ids, migrate, postgres
from services.credits import documents, ledger, operations, rules
from services.credits.store import Store
from tests import containers
from tests.model import ledger_model

HERE = Path(rules.__file__).parent
ITEM = rules.Item("sora-2", 1280, 720, 6, 1, rules.Lane.STANDARD)
EPSILON = 1e-7
"""Hours between two operations: keeps the order of what happens in one virtual moment."""
NEVER = float("inf")
T = TypeVar("T")
Expected = str | tuple[str, int]
"""The reason of a refusal, or the state and captured credits of the hold that is answered."""


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
    # What a power cut leaves is for others to test; without waiting for the disk there is time for more examples.
    server = containers.postgres(tmp_path_factory.mktemp("model"), fsync="off")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
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


def by_end(lots: list[tuple[int, int, float]]) -> dict[tuple[int, int | None], int]:
    """Credits by priority and half hour of their end; which of two equal lots burnt first is nobody's business."""
    sums: dict[tuple[int, int | None], int] = {}
    for priority, credits_, hours in lots:
        key = (priority, None if hours == NEVER else round(2 * hours))
        sums[key] = sums.get(key, 0) + credits_
    return sums


async def outcome(work: Awaitable[Any]) -> Any:
    """What the ledger answers, or the reason why not."""
    try:
        return await work
    except errors.ServiceError as error:
        return error.reason


async def outcomes(works: Sequence[Awaitable[Any]]) -> list[Any]:
    """Of calls that are made at once, in this order."""
    return list(await asyncio.gather(*(outcome(work) for work in works)))


class LedgerMachine(stateful.RuleBasedStateMachine):
    """One account's life. Operations are sent twice, late, and several at once."""

    real: Ledger

    def __init__(self) -> None:
        super().__init__()
        self.model = ledger_model.Model()
        self.account = ids.new_id()
        self.holds: dict[str, tuple[ledger_model.Hold, int]] = {}
        """With the seconds that they were reserved for."""
        self.moves = self.real.books.ledger
        self.real.do(self.moves.open_account(self.account))

    hold_ids = stateful.Bundle("hold_ids")

    def check(self, *calls: tuple[Coroutine[Any, Any, Any], Expected]) -> list[Any]:
        """Makes calls at once; each is answered as the model, which met them in this order, says."""
        self.model.now += EPSILON
        answers = self.real.do(outcomes([work for work, _ in calls]))
        for answer, (_, expected) in zip(answers, calls, strict=True):
            told = answer if isinstance(answer, str) else (str(answer.state), answer.captured)
            assert told == expected
        return answers

    def _reserve(self, hold_id: str, seconds: int) -> tuple[Coroutine[Any, Any, Any], Expected]:
        soon = datetime.now(UTC) + timedelta(minutes=1)
        item = replace(ITEM, seconds=seconds)
        work = self.moves.reserve(operations.Reservation(hold_id, self.account, item, soon))
        if hold_id in self.holds:
            return work, "HOLD_RELEASED"  # only VOID ones are asked for again here
        hold = self.model.reserve(-(-seconds * 100 // 60))
        self.holds[hold_id] = hold, seconds
        return work, (hold.state, 0) if hold.state == "HELD" else "INSUFFICIENT_CREDITS"

    def _release(self, hold_id: str) -> tuple[Coroutine[Any, Any, Any], Expected]:
        work = self.moves.release(hold_id, self.account, "NONE")
        void = ledger_model.Hold(state="VOID"), 1
        hold, _ = self.holds.setdefault(hold_id, void)
        if hold.state == "HELD":
            self.model.settle(hold, 0)
        return work, "HOLD_CAPTURED" if hold.state == "CAPTURED" else (hold.state, 0)

    def _settle(
        self, hold_id: str, cause: rules.Cause, percent: int
    ) -> tuple[Coroutine[Any, Any, Any], Expected]:
        hold, seconds = self.holds[hold_id]
        durations = (max(1, seconds * 10 * percent),)
        verdict = rules.Verdict(hold_id, self.account, cause, rules.Stage.RENDERING, durations)
        if hold.state == "HELD":
            captured = hold.reserved if cause is rules.Cause.CANCELLED_AFTER_SUBMIT else 0
            if cause is rules.Cause.NONE:
                delivered = seconds * 1000 if percent >= 90 else durations[0]
                captured = hold.reserved * delivered // (seconds * 1000)
            self.model.settle(hold, captured)
        return self.moves.settle(verdict), (hold.state, hold.captured)

    @stateful.rule(
        credits_=strategies.integers(1, 40),
        hours=strategies.sampled_from([NEVER, NEVER, 2.5, 10.5, 30.5, 100.5]),
        priority=strategies.sampled_from([1, 50, 50]),
        twice=strategies.booleans(),
    )
    def grant(self, credits_: int, hours: float, priority: int, twice: bool) -> None:
        self.model.now += EPSILON
        expires = None if hours == NEVER else datetime.now(UTC) + timedelta(hours=hours)
        source = ledger.LotSource.PROMOTION
        request = str(uuid.uuid4())
        grant = operations.Grant(self.account, request, credits_, source, priority, expires)
        changed = replace(grant, credits=credits_ + 1)
        calls = [self.moves.grant(one) for one in (grant, grant, changed)[: 3 if twice else 1]]
        first, *others = self.real.do(outcomes(calls))
        assert (
            [others[0].lot_id, others[1]] == [first.lot_id, "REQUEST_ID_REUSED"] if twice else first
        )
        ends = self.model.now + hours
        self.model.lots.append(ledger_model.Lot(priority, ends, self.model.now, credits_))

    @stateful.rule(target=hold_ids, seconds=strategies.integers(1, 18), twice=strategies.booleans())
    def reserve(self, seconds: int, twice: bool) -> str:
        hold_id = ids.new_id()
        work, expected = self._reserve(hold_id, seconds)
        self.check((work, expected))
        if twice:
            soon, item = datetime.now(UTC) + timedelta(minutes=1), replace(ITEM, seconds=seconds)
            again = operations.Reservation(hold_id, self.account, item, soon)
            self.check((self.moves.reserve(again), expected))
        return hold_id

    @stateful.rule(
        target=hold_ids,
        steps=strategies.lists(
            strategies.tuples(
                strategies.sampled_from(["reserve", "reserve", "void", "release", "settle"]),
                strategies.integers(1, 18),
            ),
            min_size=2,
            max_size=8,
        ),
    )
    def at_once(self, steps: list[tuple[str, int]]) -> Any:
        """A batch: each call sees what those before it did."""
        calls, made = [], [ids.new_id() for _ in steps]
        for hold_id, (kind, number) in zip(made, steps, strict=True):
            known = list(self.holds)
            if kind == "reserve" or not known:
                calls.append(self._reserve(hold_id, number))
            elif kind == "void":
                calls += [self._release(hold_id), self._reserve(hold_id, number)]
            elif kind == "release":
                calls.append(self._release(known[-number % len(known)]))
            else:
                calls.append(self._settle(known[-number % len(known)], rules.Cause.NONE, 100))
        self.check(*calls)
        return stateful.multiple(*(hold_id for hold_id in made if hold_id in self.holds))

    @stateful.rule(hold_id=hold_ids, share=strategies.integers(0, 12))
    def capture(self, hold_id: str, share: int) -> None:
        hold, _ = self.holds[hold_id]
        credits_ = hold.reserved * share // 10
        expected: Expected = ""
        if hold.state == "HELD" and credits_ > hold.reserved:
            expected = "AMOUNT_EXCEEDS"
        elif hold.state == "CAPTURED" and credits_ != hold.captured:
            expected = "HOLD_CAPTURED"
        elif hold.state not in ("HELD", "CAPTURED") and credits_:
            expected = "HOLD_RELEASED"
        elif hold.state == "HELD":
            self.model.settle(hold, credits_)
        work = self.moves.capture(hold_id, credits_, "NONE")
        self.check((work, expected or (hold.state, hold.captured)))

    @stateful.rule(hold_id=hold_ids)
    def release(self, hold_id: str) -> None:
        self.check(self._release(hold_id))

    @stateful.rule(
        hold_id=hold_ids,
        cause=strategies.sampled_from(rules.Cause),
        percent=strategies.integers(0, 130),
    )
    def settle(self, hold_id: str, cause: rules.Cause, percent: int) -> None:
        self.check(self._settle(hold_id, cause, percent))

    @stateful.rule(
        hold_id=hold_ids, credits_=strategies.integers(1, 12), twice=strategies.booleans()
    )
    def refund(self, hold_id: str, credits_: int, twice: bool) -> None:
        self.model.now += EPSILON
        (hold, _), request_id = self.holds[hold_id], str(uuid.uuid4())
        calls = [self.moves.refund(hold_id, request_id, credits_, "") for _ in range(1 + twice)]
        first, *again = self.real.do(outcomes(calls))
        if hold.refunded + credits_ > hold.captured:
            assert [first, *again] == ["AMOUNT_EXCEEDS"] * (1 + twice)
            return
        self.model.refund(hold, credits_)
        assert [one.lot_id for one in again] == [first.lot_id] * twice

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
        self.model.now += EPSILON
        self.real.do(self.moves.expire_due(self.account))

    @stateful.invariant()
    def numbers_are_the_models_and_the_entries(self) -> None:
        self.model.now += EPSILON
        row = self.real.do(
            self.real.pool.fetchrow(
                """
                SELECT a.available, a.held, a.last_seq, l.*, e.*,
                    (SELECT count(*) FROM transfers WHERE account_id = $1) AS transfers
                FROM accounts a, (
                    SELECT coalesce(sum(available), 0) AS lots, coalesce(sum(held), 0) AS lots_held,
                        coalesce(sum(available) FILTER (WHERE expires_at <= clock_timestamp()), 0) AS due
                    FROM lots WHERE account_id = $1
                ) l, (
                    SELECT coalesce(sum(credits), 0) AS total,
                        coalesce(sum(credits) FILTER (WHERE book = 'available'), 0) AS e_available,
                        coalesce(sum(credits) FILTER (WHERE book = 'held'), 0) AS e_held,
                        coalesce(sum(credits) FILTER (WHERE book = 'revenue'), 0) AS revenue
                    FROM entries WHERE account_id = $1
                ) e WHERE a.account_id = $1
                """,
                self.account,
            )
        )
        assert row is not None
        assert row["total"] == 0
        assert row["available"] == row["e_available"] == row["lots"] >= 0
        assert row["held"] == row["e_held"] == row["lots_held"] >= 0
        assert row["last_seq"] == row["transfers"]
        assert row["available"] - row["due"] == self.model.available()
        open_holds = [hold for hold, _ in self.holds.values() if hold.state == "HELD"]
        assert row["held"] == sum(hold.reserved for hold in open_holds)
        assert row["revenue"] == self.model.revenue

    def teardown(self) -> None:
        """The balance is the model's, and the model's credits end when the ledger's do."""
        self.model.now += EPSILON
        balance = self.real.do(self.real.books.statements.get_balance(self.account))
        assert balance.available == self.model.available()
        rows = self.real.do(
            self.real.pool.fetch(
                """
                SELECT priority, available,
                    coalesce(extract(epoch FROM expires_at - clock_timestamp())::float8 / 3600,
                        'infinity') AS hours
                FROM lots WHERE account_id = $1 AND available > 0
                    AND (expires_at IS NULL OR expires_at > clock_timestamp())
                """,
                self.account,
            )
        )
        theirs = [(row["priority"], row["available"], row["hours"]) for row in rows]
        ours = [
            (lot.priority, lot.available, lot.expires - self.model.now)
            for lot in self.model.lots
            if lot.available and lot.expires > self.model.now
        ]
        assert by_end(theirs) == by_end(ours)


def run(real: Ledger, examples: int, *, derandomize: bool) -> None:
    LedgerMachine.real = real
    stateful.run_state_machine_as_test(
        LedgerMachine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            derandomize=derandomize,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
    assert real.do(real.books.statements.check_books()).findings == ()


def test_the_ledger_does_what_its_model_does(real: Ledger) -> None:
    run(real, 200, derandomize=True)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_ledger_does_what_its_model_does_for_long(real: Ledger) -> None:
    """Other lives each time; a failure prints the steps, and the blob that plays them again."""
    run(real, 2000, derandomize=False)


def test_the_model_is_small() -> None:
    text = Path(ledger_model.__file__).read_text()
    assert text.count("\n") <= 60
