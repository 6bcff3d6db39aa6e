"""The generator's SQL on a real Postgres: acceptance, fences, verdicts, events, the edges of the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from framewire.events.v1 import vocabulary_pb2
from kit import ids
from services.generator import attempts
from services.generator.store import videos
from tests import generator_world as worlds
from tests.generator_world import HOUR, LEASE, OVER, World, server, world
from tests.waiting import eventually

__all__ = ["server", "world"]

A, B, C = "a" * 26, "b" * 26, "c" * 26
VERDICT = videos.Verdict("PROVIDER_ERROR", "it broke", retryable=True)
NOW = timedelta(0)


async def test_accepting_twice_is_accepting_once(world: World) -> None:
    made = worlds.job()
    print_ = worlds.fingerprint(made)
    answers = await asyncio.gather(
        *(world.store.videos.accept(made, "sora", print_) for _ in range(8))
    )
    assert sorted(answers) == [False] * 7 + [True]
    assert await world.pool.fetchval("SELECT count(*) FROM attempts") == 1
    assert await world.events(made.video_id) == ["queued"]
    assert world.rings == 1
    outcome = await world.store.videos.outcome(made.video_id)
    assert outcome is not None
    assert (outcome.state, outcome.stage) == ("PENDING", "QUEUED")
    assert await world.store.videos.outcome(ids.new_id()) is None


@pytest.mark.parametrize(("given", "kept"), [(0, 100), (7, 7), (5000, 1000)])
async def test_a_weight_out_of_range_stops_nobody(world: World, given: int, kept: int) -> None:
    made = await world.accept(weight=given)
    assert (await world.attempt(made.video_id)).weight == kept


async def test_a_pinned_attempt_ends_at_resolve_by_though_it_waits(world: World) -> None:
    attempt = await world.unknown()
    assert await world.store.queue.put_back(attempt, NOW, "again", key_pinned=True)
    await world.pool.execute("UPDATE attempts SET start_by = '-infinity'")
    assert await world.store.queue.overdue(10) == []
    assert await world.store.renders.late() == []
    await world.pool.execute("UPDATE attempts SET resolve_by = '-infinity'")
    assert [late.video_id for late in await world.store.renders.late()] == [attempt.video_id]


async def test_no_twin_is_sent_while_one_is_undecided(world: World) -> None:
    first = await world.sending(prompt="the same")
    other = await world.picked()
    # Its prompt is another, and what the list will show is the same.
    assert not await world.begin(other, shown=first.fingerprint)
    assert await world.store.submissions.unknown(first, "lost")
    assert not await world.begin(other, shown=first.fingerprint)
    undecided = await world.attempt(first.video_id)
    assert await world.record(undecided, "video_1")
    assert await world.begin(other, shown=first.fingerprint)
    assert (await world.attempt(other.video_id)).fingerprint == first.fingerprint


# Fences, leases, terminal states


async def snapshot(world: World, video_id: str) -> dict[str, Any]:
    row = await world.pool.fetchrow("SELECT * FROM attempts WHERE video_id = $1", video_id)
    assert row is not None
    return dict(row)


async def test_a_stale_fence_changes_nothing(world: World) -> None:
    old = await world.sending(lease=OVER)
    assert await world.store.submissions.expire_leases() == (0, 1)
    before = await snapshot(world, old.video_id)
    submissions, queue = world.store.submissions, world.store.queue
    assert not await submissions.unknown(old, "late")
    assert not await queue.put_back(old, NOW, "late", key_pinned=False)
    assert not await world.store.videos.fail(old, VERDICT, another_try=True)
    assert not await submissions.adopt(old, "video_9")
    await submissions.wait(old, HOUR, absent=True, unresolved=True)
    assert not await world.begin(old)
    assert await snapshot(world, old.video_id) == before
    # What it paid for is recorded all the same, and followed.
    assert not await world.record(old, "video_1")
    await submissions.expire_leases()
    found = await world.attempt(old.video_id)
    assert (found.state, found.provider_job_id) == (attempts.State.RENDERING, "video_1")


async def test_a_stale_fetch_changes_nothing(world: World) -> None:
    video = await world.fetching()
    (old,) = await world.store.renders.claim_fetch(OVER, 5)
    (new,) = await world.store.renders.claim_fetch(LEASE, 5)
    assert await world.store.renders.claim_fetch(LEASE, 5) == []
    assert not await world.store.renders.renew_fetch(old, LEASE)
    assert not await world.store.videos.complete(old, {0: worlds.asset()})
    await world.store.renders.fetch_again(old, HOUR, "late")
    assert (await world.attempt(video.video_id)).fetch_tries == 0
    assert await world.store.renders.renew_fetch(new, LEASE)
    assert await world.store.videos.complete(new, {0: worlds.asset()})
    assert not await world.store.videos.complete(new, {0: worlds.asset()})
    assert await world.events(video.video_id) == ["queued", "started", "completed"]


async def test_fetches_go_by_expiry_and_count_what_is_gone(world: World) -> None:
    late, soon = await world.fetching(), await world.fetching()
    await world.pool.execute(
        "UPDATE attempts SET content_expires_at = clock_timestamp() WHERE video_id = $1",
        soon.video_id,
    )
    (first,) = await world.store.renders.claim_fetch(LEASE, 1)
    assert first.video_id == soon.video_id
    for gone, count in ((True, 1), (True, 2), (False, 0)):
        await world.store.renders.fetch_again(first, NOW, "404", gone=gone)
        assert (await world.attempt(soon.video_id)).not_found_count == count
        (first,) = await world.store.renders.claim_fetch(LEASE, 1)
    (second,) = await world.store.renders.claim_fetch(LEASE, 2)
    assert second.video_id == late.video_id


@pytest.mark.parametrize("end", ["COMPLETED", "FAILED", "CANCELLED"])
async def test_terminal_states_absorb(world: World, end: str) -> None:
    if end == "COMPLETED":
        attempt = await world.fetching()
        (claimed,) = await world.store.renders.claim_fetch(LEASE, 1)
        assert await world.store.videos.complete(claimed, {0: worlds.asset()})
    elif end == "FAILED":
        attempt = await world.rendering()
        assert await world.store.videos.fail(attempt, VERDICT, another_try=False)
    else:
        attempt = await world.picked()
        await world.store.videos.cancel(attempt.video_id, A)
    assert await world.state(attempt.video_id) == end
    for state in attempts.State:
        if state.value != end:
            with pytest.raises(asyncpg.RaiseError, match="stays so"):
                await world.pool.execute(
                    "UPDATE attempts SET state = $2 WHERE video_id = $1", attempt.video_id, state
                )
    before = await world.events(attempt.video_id)
    await world.store.videos.cancel(attempt.video_id, A)
    newest = await world.attempt(attempt.video_id)
    assert not await world.store.videos.fail(newest, VERDICT, another_try=True)
    assert await world.events(attempt.video_id) == before


async def test_leases_that_are_over(world: World) -> None:
    preparing = await world.picked(lease=OVER)
    kept = await world.picked()
    sending = await world.sending(lease=OVER)  # `lease` is the create's here
    recorded = await world.sending(lease=OVER)
    assert recorded.provider_account is not None
    await world.store.submissions.add_job(
        recorded.attempt_id, recorded.provider_account, "video_1", recorded.fence
    )
    assert await world.store.submissions.expire_leases() == (1, 1)
    assert await world.state(preparing.video_id) == "QUEUED"
    assert await world.state(kept.video_id) == "PREPARING"
    assert await world.state(sending.video_id) == "UNKNOWN"
    assert await world.state(recorded.video_id) == "RENDERING"
    assert await world.store.submissions.expire_leases() == (0, 0)


async def test_the_late_word_of_the_sender_that_it_has_not_sent(world: World) -> None:
    attempt = await world.sending(lease=OVER, worker=42)
    await world.store.submissions.expire_leases()
    assert not await world.store.submissions.unsent(attempt, 41, attempt.submissions)
    assert not await world.store.submissions.unsent(attempt, 42, attempt.submissions + 1)
    assert await world.store.submissions.unsent(attempt, 42, attempt.submissions)
    assert await world.state(attempt.video_id) == "QUEUED"
    assert not await world.store.submissions.unsent(attempt, 42, attempt.submissions)


async def test_a_job_that_turns_up_for_a_queued_attempt_is_not_paid_again(world: World) -> None:
    attempt = await world.unknown()
    assert await world.store.queue.put_back(attempt, NOW, "proved absent", key_pinned=False)
    again = await world.pick()
    assert again is not None
    assert again.provider_account is not None
    await world.store.submissions.add_job(
        again.attempt_id, again.provider_account, "video_late", attempt.fence
    )
    assert not await world.begin(again)
    assert await world.store.queue.put_back(again, NOW, "turned up", key_pinned=False)
    await world.store.submissions.expire_leases()
    found = await world.attempt(attempt.video_id)
    assert (found.state, found.provider_job_id) == (attempts.State.RENDERING, "video_late")


async def test_whether_a_sender_is_gone_is_told_by_its_lock(world: World) -> None:
    sender = await asyncpg.connect(world.url)
    await sender.execute("SELECT pg_advisory_lock(99)")
    attempt = await world.sending(worker=99, lease=OVER)
    await world.store.submissions.expire_leases()
    (claimed,) = await world.store.submissions.undecided(LEASE, 10)
    assert await world.store.submissions.undecided(LEASE, 10) == []
    _, gone = await world.store.submissions.senders_gone([claimed])
    assert gone == set()
    await world.store.submissions.sender_done(claimed, 99, claimed.submissions + 1)
    assert (await world.attempt(attempt.video_id)).worker == 99
    await sender.close()

    async def free() -> bool:
        return (await world.store.submissions.senders_gone([claimed]))[1] == {attempt.attempt_id}

    await eventually(free)
    await world.store.submissions.sender_done(claimed, 99, claimed.submissions)
    assert (await world.attempt(attempt.video_id)).worker is None


async def test_adoption_takes_nobodys_job_only(world: World) -> None:
    rendering = await world.rendering("video_1")
    lost = await world.unknown(prompt="one")
    around = await world.store.submissions.surroundings(lost, ["video_1", "video_2"])
    assert (around.claimants, around.known_job_ids) == (1, {"video_1"})
    assert not await world.store.submissions.adopt(lost, "video_1")
    assert await world.store.submissions.adopt(lost, "video_2")
    assert await world.store.submissions.accepted(lost, "video_2")
    assert not await world.store.submissions.accepted(rendering, "video_2")

    # Two that look the same are two claimants, whatever state they are undecided in.
    first = await world.unknown(prompt="two")
    await world.store.submissions.wait(first, NOW, absent=False, unresolved=True)
    second = await world.sending(prompt="two")
    for attempt in (first, second):
        assert (await world.store.submissions.surroundings(attempt, [])).claimants == 2


async def test_absence_must_be_proved_pass_after_pass(world: World) -> None:
    attempt = await world.unknown()
    wait = world.store.submissions.wait
    await wait(attempt, NOW, absent=True, unresolved=False)
    since = (await world.attempt(attempt.video_id)).absent_since
    assert since is not None
    await wait(attempt, NOW, absent=True, unresolved=True)
    found = await world.attempt(attempt.video_id)
    assert (found.absent_since, found.state) == (since, attempts.State.UNRESOLVED)
    await wait(attempt, NOW, absent=False, unresolved=False)
    assert (await world.attempt(attempt.video_id)).absent_since is None


# Cancel, poison, deadlines, verdicts


async def test_cancel_before_acceptance_makes_the_job_a_no_op(world: World) -> None:
    made = worlds.job()
    outcome = await world.store.videos.cancel(made.video_id, made.account_id)
    assert (outcome.state, outcome.stage) == ("CANCELLED", "DONE")
    assert not await world.store.videos.accept(made, "sora", worlds.fingerprint(made))
    again = await world.store.videos.cancel(made.video_id, made.account_id)
    assert again.state == "CANCELLED"
    assert await world.events(made.video_id) == ["cancelled"]
    assert await world.pool.fetchval("SELECT count(*) FROM attempts") == 0


async def test_cancel_before_it_was_sent_ends_it_and_later_only_asks(world: World) -> None:
    queued, preparing = await world.accept(), None
    await world.store.videos.cancel(queued.video_id, A)
    assert await world.events(queued.video_id) == ["queued", "cancelled"]
    preparing = await world.picked()
    await world.store.videos.cancel(preparing.video_id, A)
    assert await world.state(preparing.video_id) == "CANCELLED"
    assert not await world.begin(preparing)
    sent = await world.rendering()
    outcome = await world.store.videos.cancel(sent.video_id, A)
    assert (outcome.state, outcome.stage) == ("PROCESSING", "CANCELLING")
    assert await world.store.renders.finished(sent, datetime.now(UTC) + HOUR)
    (claimed,) = await world.store.renders.claim_fetch(LEASE, 5)
    assert await world.store.videos.complete(claimed, {0: worlds.asset()})
    event = await world.last_event(sent.video_id)
    assert event.completed.cancel_requested


async def test_cancel_and_begin_race_and_one_wins(world: World) -> None:
    for _ in range(20):
        attempt = await world.picked()
        begun, outcome = await asyncio.gather(
            world.begin(attempt), world.store.videos.cancel(attempt.video_id, A)
        )
        assert begun == (outcome.state == "PROCESSING"), (begun, outcome)


async def test_poison_fails_a_video_only_where_it_is_not_known(world: World) -> None:
    known, unheard = await world.accept(), ids.new_id()
    assert not await world.store.videos.refuse_poison(known.video_id, A, "unreadable")
    assert await world.events(known.video_id) == ["queued"]
    assert await world.store.videos.refuse_poison(unheard, A, "unreadable")
    assert not await world.store.videos.refuse_poison(unheard, A, "unreadable")
    assert await world.events(unheard) == ["failed"]
    assert (await world.last_event(unheard)).failed.cause == vocabulary_pb2.CAUSE_POISON_JOB


async def test_queue_timeout(world: World) -> None:
    late = await world.accept(start_by=datetime.now(UTC) - HOUR)
    await world.accept()
    (overdue,) = await world.store.queue.overdue(10)
    assert overdue.video_id == late.video_id
    verdict = videos.Verdict("QUEUE_TIMEOUT", "too late", retryable=True)
    assert await world.store.videos.fail(overdue, verdict, another_try=False)
    event = await world.last_event(late.video_id)
    assert event.failed.cause == vocabulary_pb2.CAUSE_QUEUE_TIMEOUT
    assert await world.store.queue.overdue(10) == []


async def test_an_unbilled_failure_gets_another_attempt_on_the_same_video(world: World) -> None:
    first = await world.rendering()
    assert await world.store.videos.fail(first, VERDICT, another_try=True)
    second = await world.attempt(first.video_id)
    assert (second.number, second.state) == (2, attempts.State.QUEUED)
    assert await world.events(first.video_id) == ["queued", "started"]
    picked = await world.pick()
    assert picked is not None
    assert picked.attempt_id == second.attempt_id
    assert await world.store.videos.fail(picked, VERDICT, another_try=False)
    assert await world.events(first.video_id) == ["queued", "started", "failed"]
    # None that could not start in time, nor for one that is to end: they tell the true cause.
    for change in (
        "UPDATE attempts SET start_by = clock_timestamp() - interval '1 s' WHERE video_id = $1",
        "UPDATE videos SET cancel_requested = true WHERE video_id = $1",
    ):
        video_id = (await world.rendering()).video_id
        await world.pool.execute(change, video_id)
        attempt = await world.attempt(video_id)
        assert await world.store.videos.fail(attempt, VERDICT, another_try=True)
        event = await world.last_event(attempt.video_id)
        assert event.failed.cause == vocabulary_pb2.CAUSE_PROVIDER_ERROR


async def test_the_prompt_is_in_no_event(world: World) -> None:
    attempt = await world.rendering(prompt="a secret plan")
    verdict = videos.Verdict("INPUT_REFUSED", "blocked: 'a secret plan' is not allowed", False)
    assert await world.store.videos.fail(attempt, verdict, another_try=False)
    data = await world.pool.fetch("SELECT data, headers, subject FROM outbox")
    assert b"is not allowed" in data[-1]["data"]
    assert not any("secret" in str(dict(row)) for row in data)
    assert "secret" not in str(await world.pool.fetch("SELECT message FROM attempts"))


async def test_a_late_render_is_unresolved_and_late_success_counts(world: World) -> None:
    attempt = await world.rendering()
    assert await world.store.renders.late() == []
    await world.pool.execute("UPDATE attempts SET render_deadline = '-infinity'")
    assert await world.store.renders.late() == []
    assert await world.state(attempt.video_id) == "UNRESOLVED"
    (asked,) = await world.store.renders.in_flight("main", NOW)
    assert await world.store.submissions.undecided(LEASE, 5) == []
    assert (await world.standing()).jobs_in_flight == 0
    assert await world.store.renders.finished(asked, datetime.now(UTC) + HOUR)
    assert await world.state(attempt.video_id) == "FETCHING"


async def test_progress_grows_only_and_a_404_is_counted_in_a_row(world: World) -> None:
    attempt = await world.rendering()
    other = await world.rendering()
    renders = world.store.renders
    render, second = await renders.in_flight("main", NOW)
    (told,) = await renders.progress([(render, 40)])
    assert await renders.progress([(render, 30)]) == []
    more = await renders.progress([(render, 60), (second, 5)])
    assert [item.video_id for item in more] == [attempt.video_id, other.video_id]
    assert more[0].version > told.version
    assert (await world.store.renders.not_found(attempt))[0] == 1
    assert (await world.store.renders.not_found(attempt))[0] == 2
    await renders.progress([(render, 60)])
    assert (await world.attempt(attempt.video_id)).not_found_count == 0


async def test_every_change_of_state_is_in_the_history(world: World) -> None:
    video = await world.fetching()
    (claimed,) = await world.store.renders.claim_fetch(LEASE, 1)
    assert await world.store.videos.complete(claimed, {0: worlds.asset()})
    path = "QUEUED PREPARING SUBMITTING RENDERING FETCHING COMPLETED"
    assert await world.history(video.attempt_id) == path.split()


async def test_events_are_numbered_and_addressed(world: World) -> None:
    attempt = await world.picked(account_id=B)
    found = await world.pool.fetch("SELECT * FROM outbox ORDER BY seq")
    assert [row["ce_id"] for row in found] == [f"{attempt.video_id}:{n}" for n in (1, 2)]
    assert found[1]["subject"] == f"framewire.events.v1.{B}.started"
    headers = found[1]["headers"]
    assert headers["ce-subject"] == attempt.video_id
    assert headers["ce-type"] == "framewire.events.v1.started"
    assert headers["ce-sequence"] == "2"


# The edges of the machine, against the database


async def test_every_edge_that_the_store_takes_is_an_edge_of_the_machine(world: World) -> None:
    """Drives every method of the store from every state, and compares each move that happens with NEXT."""
    moves: set[tuple[str, str]] = set()
    for state in attempts.State:
        for method in range(14):
            attempt = await in_state(world, state)
            if attempt is None:
                continue
            await drive(world, attempt, method)
            after = await world.pool.fetchval(
                "SELECT state FROM attempts WHERE attempt_id = $1", attempt.attempt_id
            )
            if after != state:
                moves.add((state.value, after))
    allowed = {(state.value, to.value) for state, all_ in attempts.NEXT.items() for to in all_}
    assert moves <= allowed, f"not in NEXT: {moves - allowed}"
    # Cancelling a render needs a server that can; all others happen.
    assert allowed - moves <= {("RENDERING", "CANCELLED")}, f"never taken: {allowed - moves}"
    terminal = {state for state in attempts.State if not attempts.NEXT[state]}
    assert terminal == attempts.TERMINAL
    assert set(attempts.STAGES) == set(attempts.State)


async def in_state(world: World, state: attempts.State) -> Any:
    match state:
        case attempts.State.QUEUED:
            made = await world.accept(start_by=datetime.now(UTC) + HOUR)
            return await world.attempt(made.video_id)
        case attempts.State.PREPARING:
            # Of others the turn may come first: whichever it is, it is being prepared.
            await world.accept()
            return await world.pick(OVER)
        case attempts.State.SUBMITTING:
            attempt = await in_state(world, attempts.State.PREPARING)
            assert await world.begin(attempt, lease=OVER)
        case attempts.State.UNKNOWN:
            attempt = await in_state(world, attempts.State.SUBMITTING)
            assert await world.store.submissions.unknown(attempt, "")
        case attempts.State.UNRESOLVED:
            attempt = await in_state(world, attempts.State.UNKNOWN)
            await world.store.submissions.wait(attempt, NOW, absent=False, unresolved=True)
        case attempts.State.RENDERING:
            attempt = await in_state(world, attempts.State.SUBMITTING)
            assert await world.record(attempt, f"video_{attempt.attempt_id}")
        case attempts.State.FETCHING:
            attempt = await in_state(world, attempts.State.RENDERING)
            assert await world.store.renders.finished(attempt, datetime.now(UTC) + HOUR)
        case _:
            return None
    return await world.attempt(attempt.video_id)


async def drive(world: World, attempt: Any, method: int) -> None:
    submissions, renders, queue = world.store.submissions, world.store.renders, world.store.queue
    made_up = f"adopted_{attempt.attempt_id}"
    methods: list[Callable[[], Awaitable[Any]]] = [
        world.pick,
        lambda: world.begin(attempt),
        lambda: submissions.unknown(attempt, ""),
        lambda: queue.put_back(attempt, NOW, "", key_pinned=False),
        lambda: submissions.wait(attempt, NOW, absent=False, unresolved=True),
        lambda: world.store.videos.complete(attempt, {0: worlds.asset()}),
        lambda: world.store.videos.fail(attempt, VERDICT, another_try=False),
        lambda: world.store.videos.cancel(attempt.video_id, attempt.account_id),
        submissions.expire_leases,
        renders.late,
        lambda: renders.finished(attempt, datetime.now(UTC) + HOUR),
        lambda: _adopted(world, attempt, made_up),
        lambda: world.doubted(attempt),
        lambda: world.doubted(attempt, beside_twin=True),
    ]
    if methods[method] == renders.late:
        await world.pool.execute("UPDATE attempts SET render_deadline = '-infinity'")
    if methods[method] == submissions.expire_leases and attempt.state is attempts.State.QUEUED:
        # It was put back, and then its job turned up.
        await world.pool.execute(
            """
            UPDATE attempts SET submitted_at = clock_timestamp(), resolve_by = clock_timestamp(),
                provider_account = 'main', submissions = 1, cost_micros = 1
            WHERE attempt_id = $1
            """,
            attempt.attempt_id,
        )
        await submissions.add_job(attempt.attempt_id, "main", made_up, 0)
    if method == 10 and attempt.state is attempts.State.UNRESOLVED:  # a late render
        await world.pool.execute(
            "UPDATE attempts SET provider_job_id = $2 WHERE attempt_id = $1",
            *(attempt.attempt_id, made_up),
        )
    await methods[method]()


async def _adopted(world: World, attempt: Any, provider_job_id: str) -> None:
    if attempt.state is attempts.State.SUBMITTING:
        await world.record(attempt, provider_job_id)
    elif await world.store.submissions.adopt(attempt, provider_job_id):
        await world.store.submissions.accepted(attempt, provider_job_id)
