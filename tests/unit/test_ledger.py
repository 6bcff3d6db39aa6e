"""The pure ledger: burning order, settlement, what comes back, prices, policies, quotes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import event_pb2, vocabulary_pb2
from kit import errors
from services.credits import holds, ledger, quotes, rules, settlement

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
ACCOUNT, HOLD = "a" * 26, "h" * 26
HERE = Path(rules.__file__).parent
STANDARD = rules.Item("sora-2", 1280, 720, 6, 1, rules.Lane.STANDARD)


def price_document() -> dict[str, Any]:
    return yaml.safe_load((HERE / "prices.yaml").read_text())


def policy_document() -> dict[str, Any]:
    return yaml.safe_load((HERE / "refund_policy.yaml").read_text())


BOOK = rules.price_book(price_document())
POLICY = rules.refund_policy(policy_document())


def fresh_ids() -> Iterator[str]:
    return (f"fresh{number}" for number in range(100))


def lot(lot_id: str, credits_: int, expires: timedelta | None = None, priority: int = 50) -> Any:
    source = ledger.LotSource.PROMOTION
    expires_at = NOW + expires if expires is not None else None
    return ledger.Lot(lot_id, source, priority, expires_at, NOW - 9 * HOUR, credits_)


def books_with(*lots: ledger.Lot) -> ledger.Books:
    books = ledger.Books(ACCOUNT)
    for one in lots:
        books = ledger.grant(books, one, "", NOW - 9 * HOUR)
    return replace(books, transfers=())


def available(books: ledger.Books) -> dict[str, int]:
    return {one.lot_id: one.available for one in books.lots.values() if one.available}


def settle(books: ledger.Books, parts: Any, captured: int, now: datetime) -> ledger.Books:
    new_id = fresh_ids().__next__
    return ledger.settle(books, HOLD, parts, captured, "TIMEOUT", now, new_id)[0]


def test_lots_burn_by_priority_then_expiry_then_age() -> None:
    books = books_with(
        lot("never", 5),
        lot("late", 5, 9 * HOUR),
        lot("soon", 5, 2 * HOUR),
        lot("first", 5, priority=1),
        replace(lot("old", 5), created_at=NOW - 20 * HOUR),
    )
    _, parts = ledger.reserve(books, HOLD, 23, NOW)
    assert [part.lot_id for part in parts] == ["first", "soon", "late", "old", "never"]
    assert [part.credits for part in parts] == [5, 5, 5, 5, 3]
    assert parts[1].lifetime_left == 2 * HOUR
    assert parts[4].lifetime_left is None


def test_due_lots_go_to_breakage_before_anything_else() -> None:
    books = books_with(lot("due", 7, timedelta(0)), lot("alive", 3, HOUR))
    books = ledger.expire_due(books, NOW)
    assert (books.available, available(books)) == (3, {"alive": 3})
    (transfer,) = books.transfers
    assert transfer.kind is ledger.TransferKind.EXPIRE
    assert transfer.change(ledger.Book.BREAKAGE) == 7
    assert ledger.expire_due(books, NOW) == books


def test_reserve_above_the_balance_is_refused_with_both_numbers() -> None:
    with pytest.raises(errors.FailedPrecondition) as refused:
        ledger.reserve(books_with(lot("x", 9)), HOLD, 10, NOW)
    assert refused.value.reason == "INSUFFICIENT_CREDITS"
    assert refused.value.metadata == {"needed": "10", "available": "9"}


def test_hold_of_zero_posts_nothing() -> None:
    books, parts = ledger.reserve(ledger.Books(ACCOUNT), HOLD, 0, NOW)
    assert (books.transfers, parts) == ((), ())
    books = settle(books, parts, 0, NOW)
    assert books.transfers == ()


def test_capture_takes_first_what_would_have_burnt_first() -> None:
    books = books_with(lot("soon", 5, 48 * HOUR), lot("late", 5, 96 * HOUR))
    books, parts = ledger.reserve(books, HOLD, 8, NOW)
    books = settle(books, parts, 6, NOW)
    assert available(books) == {"late": 4}
    assert (books.available, books.held) == (4, 0)
    kinds = [transfer.kind for transfer in books.transfers]
    assert kinds == [
        ledger.TransferKind.RESERVE,
        ledger.TransferKind.CAPTURE,
        ledger.TransferKind.RELEASE,
    ]
    assert books.transfers[1].change(ledger.Book.REVENUE) == 6


@pytest.mark.parametrize(
    ("left", "later", "expected"),
    [
        (HOUR, 3 * HOUR, 24 * HOUR),  # died meanwhile: at least a day
        (100 * HOUR, 200 * HOUR, 100 * HOUR),  # died meanwhile: what it had
        (100 * HOUR, 3 * HOUR, 100 * HOUR),  # still alive: also what it had
    ],
)
def test_release_gives_back_the_life_that_was_left(
    left: timedelta, later: timedelta, expected: timedelta
) -> None:
    books, parts = ledger.reserve(books_with(lot("promo", 5, left)), HOLD, 5, NOW)
    now = NOW + later
    books = settle(ledger.expire_due(books, now), parts, 0, now)
    assert available(books) == {"promo": 5}
    assert books.lots["promo"].expires_at == now + expected


def test_release_does_not_lengthen_the_life_of_credits_that_were_not_held() -> None:
    books, parts = ledger.reserve(books_with(lot("promo", 100, HOUR)), HOLD, 1, NOW)
    books = settle(books, parts, 0, NOW + timedelta(minutes=30))
    assert available(books) == {"promo": 99, "fresh0": 1}
    assert books.lots["promo"].expires_at == NOW + HOUR
    assert books.lots["fresh0"].parent_lot_id == "promo"
    books = ledger.expire_due(books, NOW + 2 * HOUR)
    assert available(books) == {"fresh0": 1}


def test_release_of_what_never_expires_goes_back_as_it_was() -> None:
    books, parts = ledger.reserve(books_with(lot("bought", 5)), HOLD, 3, NOW)
    books = settle(books, parts, 0, NOW + 999 * HOUR)
    assert (available(books), books.lots["bought"].expires_at) == ({"bought": 5}, None)


def test_refund_makes_a_correction_lot_with_the_longest_life() -> None:
    books = books_with(lot("soon", 5, HOUR, 1), lot("late", 5, 96 * HOUR, 2), lot("no", 5, None, 3))
    books, parts = ledger.reserve(books, HOLD, 8, NOW)
    books, parts = ledger.settle(books, HOLD, parts, 8, "NONE", NOW, fresh_ids().__next__)
    now = NOW + 10 * HOUR
    books = ledger.refund(books, HOLD, parts, 7, "sorry", now, "back")
    back = books.lots["back"]
    assert (back.source, back.available, back.priority) == (ledger.LotSource.CORRECTION, 7, 2)
    assert back.expires_at == now + 96 * HOUR
    assert books.transfers[-1].change(ledger.Book.REVENUE) == -7


def test_grant_that_is_over_already_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="expires_at is already over"):
        ledger.grant(ledger.Books(ACCOUNT), lot("dead", 5, timedelta(0)), "", NOW)


def test_a_lopsided_transfer_cannot_be_made() -> None:
    line = ledger.Line(ledger.Book.REVENUE, 1)
    with pytest.raises(AssertionError):
        ledger.Transfer(ledger.TransferKind.CAPTURE, (line,))


def test_balance_names_the_next_expiry_whatever_its_priority() -> None:
    books = books_with(lot("a", 1, 9 * HOUR, 1), lot("b", 2, HOUR, 99), lot("c", 3))
    balance = ledger.balance(books)
    assert (balance.available, balance.next_expiry_credits) == (6, 2)
    assert balance.next_expiry_at == NOW + HOUR
    assert ledger.balance(ledger.Books(ACCOUNT)).next_expiry_at is None


def hold(state: holds.HoldState, **fields: Any) -> holds.Hold:
    return holds.Hold(HOLD, ACCOUNT, state, NOW, **fields)


def test_what_may_become_of_a_hold() -> None:
    held = hold(holds.HoldState.HELD, reserved=10)
    captured = hold(holds.HoldState.CAPTURED, reserved=10, captured=6, released=4)
    released = hold(holds.HoldState.RELEASED, reserved=10, released=10)
    assert holds.check_capture(held, 10)
    assert not holds.check_capture(captured, 6)
    assert not holds.check_capture(released, 0)
    assert holds.check_release(held, ACCOUNT)
    assert not holds.check_release(released, ACCOUNT)
    holds.check_refund(captured, 6)
    for reason, call in [
        ("AMOUNT_EXCEEDS", lambda: holds.check_capture(held, 11)),
        ("HOLD_CAPTURED", lambda: holds.check_capture(captured, 5)),
        ("HOLD_RELEASED", lambda: holds.check_capture(released, 1)),
        ("HOLD_CAPTURED", lambda: holds.check_release(captured, ACCOUNT)),
        ("HOLD_MISMATCH", lambda: holds.check_release(held, "b" * 26)),
        ("AMOUNT_EXCEEDS", lambda: holds.check_refund(replace(captured, refunded=1), 6)),
        ("AMOUNT_EXCEEDS", lambda: holds.check_refund(held, 1)),
    ]:
        with pytest.raises(errors.ServiceError) as raised:
            call()
        assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("item", "credits_"),
    [
        (STANDARD, 10),
        (replace(STANDARD, width=720, height=1280), 10),
        (replace(STANDARD, lane=rules.Lane.VIP), 20),
        (replace(STANDARD, lane=rules.Lane.BATCH), 5),
        (replace(STANDARD, variants=3), 30),
        (replace(STANDARD, model="sora-2-pro"), 30),
        (replace(STANDARD, width=320, height=180, seconds=1), 1),
        (replace(STANDARD, width=320, height=180, seconds=1, lane=rules.Lane.BATCH), 1),
        (replace(STANDARD, seconds=4), 7),
        (rules.Item("sora-1", 1080, 1080, 1, 1, rules.Lane.STANDARD), 3),
    ],
)
def test_price(item: rules.Item, credits_: int) -> None:
    assert BOOK.price(item) == credits_


def test_options_that_are_charged_for() -> None:
    document = price_document()
    document["models"]["sora-2"]["option_percent"] = {
        "sound": {"true": 150, "false": 100},
        "fps": {"24": 100, "48": 205},
    }
    book = rules.price_book(document)
    assert book.price(replace(STANDARD, options=(("sound", "true"),))) == 15
    assert book.price(replace(STANDARD, options=(("fps", "48"), ("sound", "false")))) == 21
    both = replace(STANDARD, options=(("fps", "48"), ("sound", "true")))
    assert book.price(both) == 31, "rounded up once"
    assert rules.item_from(both.fields()) == both
    assert "options" not in STANDARD.fields()
    for options in ((("sound", "loud"),), (("style", "x"),)):
        with pytest.raises(errors.InvalidArgument) as raised:
            book.price(replace(STANDARD, options=options))
        assert raised.value.reason == "NO_PRICE"
    for wrong in ({"sound": {}}, {"sound": {True: 150}}, {"sound": {"true": -1}}, {"sound": 3}):
        document["models"]["sora-2"]["option_percent"] = wrong
        with pytest.raises(rules.RulesError):
            rules.price_book(document)


@pytest.mark.parametrize("change", [{"model": "nope"}, {"width": 8192, "height": 8192}])
def test_no_price(change: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        BOOK.price(replace(STANDARD, **change))
    assert raised.value.reason == "NO_PRICE"


def verdict(cause: rules.Cause, *durations_ms: int) -> rules.Verdict:
    return rules.Verdict(HOLD, ACCOUNT, cause, rules.Stage.RENDERING, durations_ms)


def test_policy_defaults_take_only_for_a_delivery_and_a_late_cancel() -> None:
    charged = {cause: POLICY.captured(10, STANDARD, verdict(cause, 6000)) for cause in rules.Cause}
    assert {cause for cause, taken in charged.items() if taken} == {
        rules.Cause.NONE,
        rules.Cause.CANCELLED_AFTER_SUBMIT,
    }
    assert set(charged.values()) == {0, 10}


@pytest.mark.parametrize(
    ("durations_ms", "captured"),
    [
        ((6000, 6000, 6000), 30),
        ((6000, 6000), 20),
        ((), 0),
        ((5500, 5900, 6100), 30),  # near enough is full
        ((3000, 6000, 6000), 25),
        ((0, 0, 0), 30),  # not measured
        ((60_000, 60_000, 60_000, 60_000), 30),  # never more than reserved
        ((1,), 0),  # rounded down
    ],
)
def test_shortfall_is_paid_by_measure(durations_ms: tuple[int, ...], captured: int) -> None:
    item = replace(STANDARD, variants=3)
    assert POLICY.captured(30, item, verdict(rules.Cause.NONE, *durations_ms)) == captured


def test_a_stage_overrides_its_causes_default() -> None:
    document = policy_document()
    document["captured_percent"]["TIMEOUT"] = {"default": 10, "RENDERING": 55}
    policy = rules.refund_policy(document)
    late = verdict(rules.Cause.TIMEOUT)
    assert policy.captured(10, STANDARD, late) == 5
    assert policy.captured(10, STANDARD, replace(late, stage=rules.Stage.QUEUED)) == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("captured_percent", "TIMEOUT"), None, "captured_percent.TIMEOUT is missing"),
        (("captured_percent", "TIMEOUT", "default"), 101, "from 0 to 100"),
        (("captured_percent", "TIMEOUT", "default"), True, "whole number"),
        (("captured_percent", "TIMOUT"), {"default": 0}, "TIMOUT is not known"),
        (("captured_percent", "TIMEOUT", "LATER"), 0, "LATER is not known"),
        (("version",), 2026.11, "version must be text"),
    ],
)
def test_a_wrong_policy_is_refused_whole(path: tuple[str, ...], value: Any, message: str) -> None:
    document = policy_document()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(rules.RulesError, match=message):
        rules.refund_policy(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lane_percent": {"VIP": 1, "STANDARD": 1}}, "lane_percent.BATCH"),
        ({"models": {"m": {"minimum_credits": -1, "sizes": []}}}, "sizes must be a list"),
        ({"models": []}, "models is missing or not a mapping"),
        ({"prices": 1}, "prices is not known"),
    ],
)
def test_a_wrong_price_book_is_refused_whole(change: dict[str, Any], message: str) -> None:
    with pytest.raises(rules.RulesError, match=message):
        rules.price_book({**price_document(), **change})


def test_content_hash_is_of_what_is_said_not_of_how() -> None:
    document = price_document()
    assert rules.content_hash(dict(reversed(document.items()))) == rules.content_hash(document)
    document["models"]["sora-2"]["minimum_credits"] = 2
    assert rules.content_hash(document) != rules.content_hash(price_document())


def test_quotes_hold_for_their_item_their_time_and_their_key() -> None:
    quote = quotes.Quote("2026-11-1", "f" * 64, 10, NOW)
    word = quotes.sign(b"key", quote)
    assert len(word) <= 400
    before = NOW - HOUR
    assert quotes.check(b"key", word, "f" * 64, before) == quote
    for key, text, item, now in [
        (b"key", word, "f" * 64, NOW),
        (b"key", word, "e" * 64, before),
        (b"other", word, "f" * 64, before),
        (b"key", word[:-2] + "AA", "f" * 64, before),
        (b"key", "not base64!", "f" * 64, before),
        (b"key", "é", "f" * 64, before),
        (b"key", "AAAA", "f" * 64, before),
    ]:
        with pytest.raises(errors.FailedPrecondition) as raised:
            quotes.check(key, text, item, now)
        assert raised.value.reason == "QUOTE_NOT_VALID"


@pytest.mark.parametrize(
    ("ours", "contract", "prefix"),
    [
        (rules.Cause, vocabulary_pb2.Cause, "CAUSE_"),
        (rules.Stage, vocabulary_pb2.VideoStage, "VIDEO_STAGE_"),
        (rules.Lane, vocabulary_pb2.Lane, "LANE_"),
        (ledger.LotSource, ledger_pb2.LotSource, "LOT_SOURCE_"),
        (ledger.TransferKind, ledger_pb2.TransferKind, "TRANSFER_KIND_"),
        (holds.HoldState, ledger_pb2.HoldState, "HOLD_STATE_"),
    ],
)
def test_our_words_are_the_contracts(ours: Any, contract: Any, prefix: str) -> None:
    names = {name.removeprefix(prefix) for name in contract.keys()}  # noqa: SIM118 (no mapping)
    assert set(ours) == names - {"UNSPECIFIED"}


def event(**detail: Any) -> event_pb2.Event:
    return event_pb2.Event(video_id=HOLD, account_id=ACCOUNT, **detail)


def test_terminal_events_become_verdicts() -> None:
    outputs = [event_pb2.Output(duration_ms=6000), event_pb2.Output()]
    completed = settlement.verdict(event(completed=event_pb2.Completed(outputs=outputs)))
    assert (completed.cause, completed.durations_ms) == (rules.Cause.NONE, (6000, 0))
    failed = event_pb2.Failed(
        cause=vocabulary_pb2.CAUSE_TIMEOUT, stage=vocabulary_pb2.VIDEO_STAGE_RENDERING
    )
    found = settlement.verdict(event(failed=failed))
    assert (found.cause, found.stage) == (rules.Cause.TIMEOUT, rules.Stage.RENDERING)


def test_a_failure_without_a_cause_we_know_is_never_charged() -> None:
    for cause in (0, vocabulary_pb2.CAUSE_NONE, 99):
        failed = event_pb2.Failed(cause=cause)  # pyright: ignore[reportArgumentType]
        assert settlement.verdict(event(failed=failed)).cause is rules.Cause.INTERNAL


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"null", b"1", b"\xff", b"{}", b"[" * 5000, b"NaN", b'{"seq":"1e400"}'),
        b'{"videoId":"\\u0000","accountId":"x","failed":{}}',
        f'{{"videoId":"{HOLD}","accountId":"{ACCOUNT}","queued":{{}}}}'.encode(),
    ],
)
def test_what_is_no_terminal_event_is_unreadable(data: bytes) -> None:
    with pytest.raises(settlement.UnreadableError):
        settlement.decode(data)
