"""What may be concluded about a create whose answer was lost: each row of the table in docs/state-machines.md."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.generator import attempts, events
from services.generator.attempts import Adopt, Evidence, ListedJob, ListPass, SendAgain, Wait

SENT = datetime(2026, 11, 20, 12, tzinfo=UTC)
POST, SETTLE, SKEW, TTL = (timedelta(seconds=s) for s in (30, 20, 5, 86400))
QUIET = SENT + POST + SETTLE
OURS, OTHERS = "ours", "others"
SEARCHABLE = attempts.Undecided(
    evidence=Evidence.SEARCHABLE,
    fingerprint=OURS,
    submitted_at=SENT,
    post_timeout=POST,
    settle_time=SETTLE,
    clock_skew=SKEW,
    key_ttl=TTL,
    sender_gone=True,
    claimants=1,
    absent_since=None,
)
KEYED = replace(SEARCHABLE, evidence=Evidence.KEYED)
BLIND = replace(SEARCHABLE, evidence=Evidence.BLIND)
LATER = QUIET + SETTLE + timedelta(seconds=1)


def listed(
    *jobs: ListedJob, reached: bool = True, sentinel: bool = True, at: datetime = LATER
) -> ListPass:
    return ListPass(jobs, reached, sentinel, at)


def shown(number: int = 1, after_seconds: float = 1, fingerprint: str = OURS) -> ListedJob:
    return ListedJob(f"video_{number}", fingerprint, SENT + timedelta(seconds=after_seconds))


# Keyed


@pytest.mark.parametrize("seen", [None, listed(), listed(shown())])
def test_keyed_inside_half_of_the_ttl_sends_again_under_the_same_key(seen: ListPass | None) -> None:
    assert attempts.decide(KEYED, seen, SENT) == SendAgain(same_key=True)
    running = replace(KEYED, sender_gone=False)
    assert attempts.decide(running, seen, SENT) == Wait(50)
    assert attempts.decide(running, seen, QUIET) == SendAgain(same_key=True)


def test_keyed_past_half_of_the_ttl_is_blind_where_there_is_no_list() -> None:
    waits = attempts.decide(KEYED, None, SENT + TTL / 2)
    assert isinstance(waits, Wait)
    assert waits.unresolved


# Searchable


def test_one_unknown_job_and_one_claimant_adopt() -> None:
    for sender_gone in (True, False):
        attempt = replace(SEARCHABLE, sender_gone=sender_gone)
        seen = listed(shown(), shown(2, fingerprint=OTHERS))
        assert attempts.decide(attempt, seen, SENT + SKEW) == Adopt("video_1")


def test_several_jobs_or_claimants_wait_and_become_unresolved() -> None:
    several = listed(shown(1), shown(2))
    two = replace(SEARCHABLE, claimants=2)
    for attempt, seen in ((SEARCHABLE, several), (two, listed(shown()))):
        early, late = (attempts.decide(attempt, seen, now) for now in (SENT, QUIET))
        assert isinstance(early, Wait)
        assert isinstance(late, Wait)
        assert (early.unresolved, late.unresolved) == (False, True)
        assert not early.absent
        assert not late.absent


def test_absence_is_proved_twice_a_settle_time_apart() -> None:
    assert attempts.decide(SEARCHABLE, listed(), SENT) == Wait(50)
    first = attempts.decide(SEARCHABLE, listed(at=QUIET), QUIET)
    assert first == Wait(20, absent=True)
    once = replace(SEARCHABLE, absent_since=QUIET)
    soon = QUIET + timedelta(seconds=5)
    assert attempts.decide(once, listed(at=soon), soon) == Wait(15, absent=True)
    assert attempts.decide(once, listed(at=QUIET + SETTLE), LATER) == SendAgain(same_key=False)


def test_a_pass_that_found_something_begins_the_proof_anew() -> None:
    once = replace(SEARCHABLE, absent_since=QUIET)
    for seen in (listed(shown(), shown(2)), listed(sentinel=False), listed(reached=False)):
        waits = attempts.decide(once, seen, LATER)
        assert isinstance(waits, Wait)
        assert not waits.absent


@pytest.mark.parametrize("missing", ["reached", "sentinel", "sender"])
def test_without_any_one_part_of_the_proof_nothing_is_sent_again(missing: str) -> None:
    attempt = replace(SEARCHABLE, absent_since=QUIET, sender_gone=missing != "sender")
    seen = listed(reached=missing != "reached", sentinel=missing != "sentinel")
    waits = attempts.decide(attempt, seen, LATER + TTL)
    assert isinstance(waits, Wait)
    assert waits.unresolved


@pytest.mark.parametrize(
    ("after_seconds", "adopted"), [(-5.1, False), (-5, True), (55, True), (55.1, False)]
)
def test_only_a_job_of_its_time_is_adopted(after_seconds: float, adopted: bool) -> None:
    seen = listed(shown(after_seconds=after_seconds))
    decision = attempts.decide(replace(SEARCHABLE, absent_since=QUIET), seen, LATER)
    assert (decision == Adopt("video_1")) == adopted
    if after_seconds > 55:  # it looks like ours and was made after: no proof that ours was not made
        assert isinstance(decision, Wait)
    elif not adopted:
        assert decision == SendAgain(same_key=False)


# Searchable, with a name of ours that the list shows again

NAMED = replace(SEARCHABLE, marker=attempts.marker("a"))


def named(job: ListedJob, name: str) -> ListedJob:
    return replace(job, marker=name)


def test_a_job_of_our_name_is_adopted_whatever_else_looks_like_it() -> None:
    ours = named(shown(1), attempts.marker("a"))
    unlike = replace(ours, fingerprint="")
    late = replace(ours, created_at=LATER + TTL)
    for attempt in (NAMED, replace(NAMED, claimants=2), replace(NAMED, sender_gone=False)):
        for job in (ours, unlike, late):
            seen = listed(named(shown(2), attempts.marker("b")), shown(3), job, sentinel=False)
            assert attempts.decide(attempt, seen, SENT) == Adopt("video_1")


def test_a_job_of_another_name_of_ours_is_neither_adopted_nor_in_the_way() -> None:
    others = listed(named(shown(), attempts.marker("b")))
    once = replace(NAMED, absent_since=QUIET)
    assert attempts.decide(once, others, LATER) == SendAgain(same_key=False)
    # Nor is it that of an attempt without a name, which sends no image.
    text = replace(SEARCHABLE, absent_since=QUIET)
    assert attempts.decide(text, others, LATER) == SendAgain(same_key=False)


@pytest.mark.parametrize("name", ["", "photo.png"])
def test_a_named_attempt_adopts_no_likeness_and_is_not_absent_beside_one(name: str) -> None:
    """The server may have left our name out, or changed it."""
    once = replace(NAMED, absent_since=QUIET)
    waits = attempts.decide(once, listed(named(shown(), name)), LATER)
    assert isinstance(waits, Wait)
    assert (waits.absent, waits.unresolved) == (False, True)


def test_an_attempt_without_a_name_adopts_none_with_one() -> None:
    decision = attempts.decide(SEARCHABLE, listed(named(shown(), "photo.png")), QUIET)
    assert not isinstance(decision, Adopt)


# Blind


def test_blind_waits_for_ever() -> None:
    for attempt, seen in ((BLIND, None), (BLIND, listed()), (SEARCHABLE, None)):
        early, late = (attempts.decide(attempt, seen, now) for now in (SENT, SENT + 99 * TTL))
        assert isinstance(early, Wait)
        assert not early.unresolved
        assert isinstance(late, Wait)
        assert late.unresolved


# All of them


seconds = st.floats(-200, 200_000, allow_nan=False)
moments = seconds.map(lambda value: SENT + timedelta(seconds=value))
spans = st.floats(0, 1000).map(lambda value: timedelta(seconds=value))
jobs = st.builds(ListedJob, st.integers(1, 5).map(str), st.sampled_from([OURS, OTHERS]), moments)
undecided = st.builds(
    attempts.Undecided,
    evidence=st.sampled_from(Evidence),
    fingerprint=st.just(OURS),
    submitted_at=st.just(SENT),
    post_timeout=spans,
    settle_time=spans,
    clock_skew=spans,
    key_ttl=st.one_of(st.just(timedelta(0)), spans),
    sender_gone=st.booleans(),
    claimants=st.integers(1, 3),
    absent_since=st.none() | moments,
)
passes = st.none() | st.builds(
    ListPass, st.lists(jobs, max_size=3).map(tuple), st.booleans(), st.booleans(), moments
)


@given(undecided, passes, moments)
def test_nothing_is_sent_or_adopted_without_its_proof(
    attempt: attempts.Undecided, seen: ListPass | None, now: datetime
) -> None:
    decision = attempts.decide(attempt, seen, now)
    if isinstance(decision, Wait):
        assert decision.seconds > 0
        return
    if decision == SendAgain(same_key=True):
        assert attempt.evidence is Evidence.KEYED
        assert now < SENT + attempt.key_ttl / 2
        return
    assert seen is not None
    assert attempt.evidence is not Evidence.BLIND
    earliest = SENT - attempt.clock_skew
    like = [job for job in seen.jobs if job.fingerprint == OURS and job.created_at >= earliest]
    if isinstance(decision, Adopt):
        assert attempt.claimants == 1
        assert [job.provider_job_id for job in like] == [decision.provider_job_id]
    else:
        assert like == []
        assert seen.reached_start
        assert seen.sentinel_seen
        assert attempt.sender_gone
        assert now >= SENT + attempt.post_timeout + attempt.settle_time
        assert attempt.absent_since is not None
        assert seen.at >= attempt.absent_since + attempt.settle_time


# The machine, fingerprints, progress


def test_the_machine_has_no_way_out_of_its_ends_and_none_that_skips_the_write_ahead() -> None:
    assert set(attempts.NEXT) == set(attempts.State)
    assert {state for state, after in attempts.NEXT.items() if not after} == attempts.TERMINAL
    sent_from = {state for state, after in attempts.NEXT.items() if "SUBMITTING" in after}
    assert sent_from == {attempts.State.PREPARING}
    # A cancel never takes back what may have been sent.
    for state in ("SUBMITTING", "UNKNOWN", "UNRESOLVED", "FETCHING"):
        assert attempts.State.CANCELLED not in attempts.NEXT[attempts.State(state)]


def test_fingerprints_tell_apart_what_a_list_shows_and_nothing_else() -> None:
    base = ("a cat\n on  a mat", "sora-2", 1280, 720, 8)
    assert attempts.visible_fingerprint(*base) == attempts.visible_fingerprint(
        " a cat on a mat ", *base[1:]
    )
    others = [("a dog", "sora-2-pro", 720, 1280, 4)[i] for i in range(5)]
    prints = {attempts.visible_fingerprint(*base)}
    for index, other in enumerate(others):
        changed = [*base[:index], other, *base[index + 1 :]]
        prints.add(attempts.visible_fingerprint(*changed))  # pyright: ignore[reportArgumentType]
    assert len(prints) == 6


@pytest.mark.parametrize(
    ("before", "after", "seconds_since", "told"),
    [
        (0, 0, None, True),
        (10, 10, 99, False),
        (10, 14, 14, False),
        (10, 15, 1, True),
        (10, 11, 15, True),
        (10, 10, None, True),
    ],
)
def test_progress_is_told_at_five_points_or_fifteen_seconds(
    before: int, after: int, seconds_since: float | None, told: bool
) -> None:
    assert attempts.worth_telling(before, after, seconds_since) == told


def test_without_prompt() -> None:
    assert attempts.without_prompt("no 'a cat' here", "a cat") == "no '[prompt]' here"
    assert attempts.without_prompt("nothing", "") == "nothing"


def test_every_stage_is_a_stage_of_the_contract() -> None:
    assert all(events.stage(name) for name in attempts.STAGES.values())
    assert len(list(itertools.chain(*attempts.NEXT.values()))) > 20
