"""Reconciliation's comparison by itself: what each disagreement is called, what repairs it, and what is none."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from framewire.gateway.v1 import operator_pb2
from services.gateway import provider_lists as lists
from services.gateway import reconciliation as core
from services.gateway.reconciliation import Attempt, Hold, Kind, Output, Pin, Repair, Stored, Video

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
MARKS = core.Watermarks(NOW, NOW, NOW, NOW)
VIDEO, ACCOUNT, OTHER = "v" * 26, "a" * 26, "b" * 26
ASSET, POSTER, IMAGE = "c" * 26, "d" * 26, "e" * 26
SHA = "0" * 64

DONE = Video(ACCOUNT, "COMPLETED", True, "DONE", 10, 0, outputs=(ASSET,))
FAILED = Video(ACCOUNT, "FAILED", True, "DONE", 0, 10, "PROVIDER_ERROR")
LIVE = Video(ACCOUNT, "PROCESSING", True, "PENDING", 0, 0)
WAITING = Video(ACCOUNT, "PENDING", False, "PENDING", 0, 0)
ABANDONED = Video(ACCOUNT, "ABANDONED", False, "PENDING", 0, 0)
HELD = Hold(ACCOUNT, "HELD", 10, 0, 0)
CAPTURED = Hold(ACCOUNT, "CAPTURED", 10, 10, 0, expected=10)
RELEASED = Hold(ACCOUNT, "RELEASED", 10, 0, 10, expected=0)
VOID = Hold(ACCOUNT, "VOID", 0, 0, 0)
RENDERING = Attempt(1, "RENDERING", "main", "job-1", NOW)
ENDED_WELL = Attempt(1, "COMPLETED", "main", "job-1", NOW)
ENDED_BADLY = Attempt(1, "FAILED", "main", "job-1", NOW)
MADE = core.Outcome(
    ACCOUNT, "COMPLETED", outputs=(Output(ASSET, 100, SHA), Output(POSTER)), attempts=(ENDED_WELL,)
)
LOST = core.Outcome(ACCOUNT, "FAILED", "PROVIDER_ERROR", attempts=(ENDED_BADLY,))
BUSY = core.Outcome(ACCOUNT, "PROCESSING", attempts=(RENDERING,))
QUEUED = core.Outcome(ACCOUNT, "PENDING", attempts=(Attempt(1, "QUEUED"),))
TOMBSTONE = core.Outcome(ACCOUNT, "CANCELLED", "CANCELLED_BEFORE_SUBMIT")
FILM = Stored(ACCOUNT, "READY", 100, SHA, False, 100)
FRAME = Stored(ACCOUNT, "READY", 7, "1" * 64, False, 7)
STORED = {ASSET: FILM, POSTER: FRAME}
PINNED = (Pin(IMAGE, ACCOUNT),)


def subject(video: Any, hold: Any, outcome: Any, **more: Any) -> core.Subject:
    stored = STORED if outcome is not None and outcome.state == "COMPLETED" else {}
    return core.Subject(VIDEO, MARKS, video, hold, outcome, **{"stored": stored, **more})


AGREED = {
    "completed and captured": subject(DONE, CAPTURED, MADE),
    "failed and released": subject(FAILED, RELEASED, LOST),
    "being made": subject(LIVE, HELD, BUSY, pins=PINNED),
    "queued": subject(replace(WAITING, accepted=True), HELD, QUEUED),
    "being admitted, held": subject(replace(WAITING, state="ADMITTING"), HELD, None, pins=PINNED),
    "being admitted, not held": subject(replace(WAITING, state="ADMITTING"), None, None),
    "abandoned, released": subject(ABANDONED, replace(RELEASED, expected=None), None),
    "abandoned, never held": subject(ABANDONED, VOID, None),
    "rejected": subject(replace(ABANDONED, state="REJECTED"), replace(VOID, state="REFUSED"), None),
    "rejected and forgotten": subject(None, replace(VOID, state="REFUSED"), None),
    "never admitted, its job told never to be made": subject(ABANDONED, RELEASED, TOMBSTONE),
    "cancelled before its job came": subject(
        replace(FAILED, state="CANCELLED", cause="CANCELLED_BEFORE_SUBMIT"), RELEASED, TOMBSTONE
    ),
    "second attempt": subject(
        LIVE, HELD, replace(BUSY, attempts=(ENDED_BADLY, replace(RENDERING, number=2)))
    ),
    "an operator gave it back": subject(DONE, replace(CAPTURED, refunded=10), MADE),
    "an operator waived it": subject(
        replace(DONE, captured=0, released=10),
        Hold(ACCOUNT, "RELEASED", 10, 0, 10, by_operator=True, expected=10),
        MADE,
    ),
    "taken too much, and refunded": subject(
        replace(FAILED, captured=10, released=0),
        Hold(ACCOUNT, "CAPTURED", 10, 10, 0, refunded=10, by_operator=True, expected=0),
        LOST,
    ),
    "output at the end of its retention": subject(
        DONE, CAPTURED, MADE,
        stored={ASSET: replace(FILM, state="DELETED", expired=True, object_bytes=None), POSTER: FRAME},
    ),
    "deleted by its owner": subject(replace(DONE, deleted=True), CAPTURED, MADE, stored={}),
    "nothing at all": subject(None, None, None),
}  # fmt: skip

DIFFERENCES = {
    "held, and nobody knows the video": (
        subject(None, HELD, None), [(Kind.HOLD_WITHOUT_VIDEO, Repair.RELEASE_HOLD)]),
    "held, the generator ended what the gateway lost": (
        subject(None, HELD, LOST), [(Kind.HOLD_WITHOUT_VIDEO, Repair.SETTLE_HOLD)]),
    "held, the generator makes what the gateway lost": (
        subject(None, HELD, BUSY),
        [(Kind.HOLD_WITHOUT_VIDEO, Repair.NONE), (Kind.VIDEO_UNKNOWN_TO_GATEWAY, Repair.NONE)]),
    "taken for a video that the gateway lost": (
        subject(None, CAPTURED, MADE),
        [(Kind.HOLD_WITHOUT_VIDEO, Repair.NONE), (Kind.VIDEO_UNKNOWN_TO_GATEWAY, Repair.NONE)]),
    "settlement was lost": (
        subject(replace(DONE, settlement="PENDING", captured=0), HELD, MADE),
        [(Kind.HOLD_OPEN_AFTER_END, Repair.SETTLE_HOLD)]),
    "ended, held, and the generator forgot it": (
        subject(FAILED, HELD, None),
        [(Kind.HOLD_OPEN_AFTER_END, Repair.NONE), (Kind.VIDEO_UNKNOWN_TO_GENERATOR, Repair.NONE)]),
    "abandoned and still held": (
        subject(ABANDONED, HELD, None), [(Kind.HOLD_OPEN_AFTER_END, Repair.RELEASE_HOLD)]),
    "abandoned, taken for": (
        subject(ABANDONED, replace(CAPTURED, expected=None), None), [(Kind.HOLD_AGAINST_POLICY, Repair.NONE)]),
    "abandoned, held and made all the same": (
        subject(ABANDONED, HELD, BUSY),
        [(Kind.HOLD_OPEN_AFTER_END, Repair.NONE), (Kind.END_DIFFERS, Repair.NONE)]),
    "abandoned and made all the same": (
        subject(ABANDONED, RELEASED, replace(BUSY)), [(Kind.END_DIFFERS, Repair.NONE)]),
    "released while it is made": (
        subject(LIVE, replace(RELEASED, expected=None), BUSY), [(Kind.HOLD_ENDED_EARLY, Repair.NONE)]),
    "never held": (subject(LIVE, None, BUSY), [(Kind.VIDEO_WITHOUT_HOLD, Repair.NONE)]),
    "only a tombstone of a hold": (subject(LIVE, VOID, BUSY), [(Kind.VIDEO_WITHOUT_HOLD, Repair.NONE)]),
    "captured though it failed": (
        subject(replace(FAILED, captured=10, released=0), replace(CAPTURED, expected=0), LOST),
        [(Kind.HOLD_AGAINST_POLICY, Repair.NONE)]),
    "captured by an operator though it failed": (
        subject(replace(FAILED, captured=10, released=0), replace(CAPTURED, expected=0, by_operator=True), LOST),
        [(Kind.HOLD_AGAINST_POLICY, Repair.NONE)]),
    "captured less than the policy says": (
        subject(replace(DONE, captured=4, released=6), Hold(ACCOUNT, "CAPTURED", 10, 4, 6, expected=10), MADE),
        [(Kind.HOLD_AGAINST_POLICY, Repair.NONE)]),
    "settled, and the video does not say so": (
        subject(replace(DONE, settlement="PENDING", captured=0), CAPTURED, MADE),
        [(Kind.SETTLEMENT_NOT_SHOWN, Repair.PROJECT_SETTLEMENT)]),
    "the video says another amount": (
        subject(replace(DONE, captured=9, released=1), CAPTURED, MADE), [(Kind.AMOUNT_DIFFERS, Repair.NONE)]),
    "the job never came": (
        subject(WAITING, HELD, None), [(Kind.VIDEO_UNKNOWN_TO_GENERATOR, Repair.RING_JOB)]),
    "the generator forgot what it had": (
        subject(LIVE, HELD, None), [(Kind.VIDEO_UNKNOWN_TO_GENERATOR, Repair.NONE)]),
    "ended, and the gateway was not told": (
        subject(LIVE, CAPTURED, MADE), [(Kind.VIDEO_BEHIND, Repair.PROJECT_VIDEO)]),
    "started, and the gateway was not told": (
        subject(WAITING, HELD, BUSY), [(Kind.VIDEO_BEHIND, Repair.PROJECT_VIDEO)]),
    "completed here, failed there": (subject(DONE, CAPTURED, LOST), [(Kind.END_DIFFERS, Repair.NONE)]),
    "failed for another reason": (
        subject(replace(FAILED, cause="TIMEOUT"), RELEASED, LOST), [(Kind.END_DIFFERS, Repair.NONE)]),
    "other outputs": (
        subject(replace(DONE, outputs=(IMAGE,)), CAPTURED, MADE), [(Kind.END_DIFFERS, Repair.NONE)]),
    "live without an attempt": (
        subject(LIVE, HELD, replace(BUSY, attempts=(ENDED_BADLY,))), [(Kind.ATTEMPT_STRANDED, Repair.NONE)]),
    "ended with a live attempt": (
        subject(FAILED, RELEASED, replace(LOST, attempts=(RENDERING,))), [(Kind.ATTEMPT_STRANDED, Repair.NONE)]),
    "held for another account": (
        subject(LIVE, replace(HELD, account_id=OTHER), BUSY), [(Kind.ACCOUNT_DIFFERS, Repair.NONE)]),
    "output of another account": (
        subject(DONE, CAPTURED, MADE, stored={ASSET: replace(FILM, account_id=OTHER), POSTER: FRAME}),
        [(Kind.ACCOUNT_DIFFERS, Repair.NONE)]),
    "output without a row": (
        subject(DONE, CAPTURED, MADE, stored={POSTER: FRAME}), [(Kind.OUTPUT_MISSING, Repair.NONE)]),
    "output being deleted": (
        subject(DONE, CAPTURED, MADE, stored={ASSET: replace(FILM, state="DELETING"), POSTER: FRAME}),
        [(Kind.OUTPUT_MISSING, Repair.NONE)]),
    "output without its object": (
        subject(DONE, CAPTURED, MADE, stored={ASSET: replace(FILM, object_bytes=None), POSTER: FRAME}),
        [(Kind.OUTPUT_OBJECT_MISSING, Repair.NONE)]),
    "object of another size": (
        subject(DONE, CAPTURED, MADE, stored={ASSET: replace(FILM, object_bytes=99), POSTER: FRAME}),
        [(Kind.OUTPUT_DIFFERS, Repair.NONE)]),
    "other bytes than were told": (
        subject(DONE, CAPTURED, MADE, stored={ASSET: replace(FILM, sha256="2" * 64), POSTER: FRAME}),
        [(Kind.OUTPUT_DIFFERS, Repair.NONE)]),
    "poster without its object": (
        subject(DONE, CAPTURED, MADE, stored={ASSET: FILM, POSTER: replace(FRAME, object_bytes=None)}),
        [(Kind.OUTPUT_OBJECT_MISSING, Repair.NONE)]),
    "pinned by a video that ended": (
        subject(DONE, CAPTURED, MADE, pins=PINNED), [(Kind.PIN_AFTER_END, Repair.UNPIN)]),
    "pinned by a video that nobody knows": (
        subject(None, None, None, pins=PINNED), [(Kind.PIN_AFTER_END, Repair.UNPIN)]),
    "pinned by an abandoned one": (
        subject(ABANDONED, VOID, None, pins=PINNED), [(Kind.PIN_AFTER_END, Repair.UNPIN)]),
}  # fmt: skip


@pytest.mark.parametrize("name", AGREED)
def test_agreement_is_no_finding(name: str) -> None:
    assert core.compare(AGREED[name]) == []


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference_is_found_and_named(name: str) -> None:
    compared, expected = DIFFERENCES[name]
    found = core.compare(compared)
    assert [(one.kind, one.repair) for one in found] == expected
    for one in found:
        assert one.video_id == VIDEO
        assert one.statements
        assert one.advice or one.repair is not Repair.NONE, "nobody is left without what to do"


def test_an_ended_video_keeps_its_pins_while_the_generator_is_at_it() -> None:
    found = core.compare(subject(FAILED, RELEASED, BUSY, pins=PINNED))
    assert Kind.PIN_AFTER_END not in {one.kind for one in found}


def test_the_same_difference_has_the_same_id_and_evidence_whenever_it_is_read() -> None:
    (before,) = core.compare(subject(WAITING, HELD, None))
    later = NOW + timedelta(minutes=10)
    (after,) = core.compare(
        replace(subject(WAITING, HELD, None), marks=core.Watermarks(*[later] * 4))
    )
    assert (before.finding_id, before.evidence) == (after.finding_id, after.evidence)
    assert before.statements != after.statements, "the watermarks are told"


def test_what_says_something_else_is_other_evidence_of_the_same_finding() -> None:
    (before,) = core.compare(subject(LIVE, CAPTURED, MADE))
    (after,) = core.compare(subject(LIVE, RELEASED, LOST))
    assert before.finding_id == after.finding_id
    assert before.evidence != after.evidence
    (elsewhere,) = core.compare(replace(subject(LIVE, CAPTURED, MADE), video_id="w" * 26))
    assert elsewhere.finding_id != before.finding_id


def listed(*jobs: lists.ListedJob, exclusive: bool = True) -> lists.ProviderList:
    return lists.ProviderList("main", NOW, jobs, NOW - timedelta(hours=1), exclusive)


def job(job_id: str = "job-1", **fields: Any) -> lists.ListedJob:
    return lists.ListedJob(job_id, NOW, "running", **fields)


SINCE = NOW - timedelta(hours=1)
WAITS = lists.awaited([subject(LIVE, HELD, BUSY)])
OURS = job(video_id=VIDEO)

PROVIDER = {
    "known": (listed(OURS), WAITS, []),
    "nobody's": (listed(OURS, job("x")), WAITS, [Kind.PROVIDER_JOB_UNKNOWN]),
    "nobody's, of before": (
        listed(OURS, replace(job("x"), created_at=SINCE - timedelta(seconds=1))), WAITS, []),
    "nobody's, under a shared key": (listed(job("x"), exclusive=False), [], []),
    "ours by its name, under a shared key": (
        listed(job("x", marked_video_id=VIDEO), exclusive=False), [], [Kind.PROVIDER_JOB_UNKNOWN]),
    "of an attempt that has another": (
        listed(OURS, job("x", video_id=VIDEO, superseded=True)), WAITS, [Kind.PROVIDER_JOB_SUPERSEDED]),
    "not listed any more": (listed(), WAITS, [Kind.PROVIDER_JOB_LOST]),
    "not listed, and the list is not complete": (listed(exclusive=False), WAITS, []),
    "not listed, of before the list begins": (
        replace(listed(), read_back_to=NOW + timedelta(seconds=1)), WAITS, []),
    "not listed by another account": (replace(listed(), provider_account="other"), WAITS, []),
    "not listed, fetched already": (
        listed(), lists.awaited([subject(LIVE, HELD, replace(BUSY, attempts=(replace(RENDERING, state="FETCHING"),)))]),
        []),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVIDER)
def test_a_providers_list_is_compared(name: str) -> None:
    provider, waiting, expected = PROVIDER[name]
    found = lists.compare(provider, SINCE, waiting)
    assert [one.kind for one in found] == expected
    assert all(one.repair is Repair.NONE and one.advice and one.subject_at for one in found)


def test_every_kind_and_repair_is_in_the_contract_and_here() -> None:
    kinds = {name.removeprefix("FINDING_KIND_") for name in operator_pb2.FindingKind.keys()[1:]}
    assert kinds == set(Kind)
    repairs = {name.removeprefix("REPAIR_KIND_") for name in operator_pb2.RepairKind.keys()[1:]}
    assert repairs == set(Repair)
    shown = {kind for _, found in DIFFERENCES.values() for kind, _ in found}
    shown |= {kind for _, _, found in PROVIDER.values() for kind in found}
    assert shown == set(Kind), "each is found in a case above"
