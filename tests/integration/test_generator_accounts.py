"""The whole generator with two accounts, at two servers, for one model: shares, failover, caps, limits, the queue."""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from nats.aio.msg import Msg

from framewire import subjects
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.generator.v1 import attempt_pb2, job_pb2
from tests import generator_process, simulated
from tests.generator_process import Generator
from tests.waiting import eventually

WHOLE = ["queued", "started", "completed"]
SECOND_KEY = "key-of-the-second"
PRICE = 100_000


def change(accounts: list[dict[str, Any]]) -> None:
    """`second` serves sora-2 as well; three more accounts, each alone with a model."""
    main = accounts[0]
    main["weight"] = 2
    second = copy.deepcopy(main) | {"name": "second", "weight": 1}
    del second["models"]["sora-2-pro"]
    accounts.append(second)
    for name, more in (
        ("retired", {"retires_at": "2026-01-01"}),
        ("capped", {}),
        ("narrow", {}),
    ):
        entry = copy.deepcopy(main) | {"name": name, "pool": name}
        entry["models"] = {f"sora-{name}": {**main["models"]["sora-2"], **more}}
        accounts.append(entry)
    accounts[-2] |= {"max_cost_micros_per_hour": PRICE * 5 // 2}
    accounts[-1] |= {"max_jobs_in_flight": 1}


@dataclass
class Two:
    """The generator, and the simulators of `main` and `second`."""

    generator: Generator
    main: simulated.Simulator
    second: simulated.Simulator
    progress: dict[str, list[event_pb2.Progress]] = field(default_factory=dict)

    async def ask(self, count: int = 1, **fields: Any) -> list[job_pb2.Job]:
        return [await self.generator.ask(**fields) for _ in range(count)]

    async def ended(self, asked: list[job_pb2.Job], kinds: list[str] = WHOLE) -> None:
        for made in asked:
            assert await self.generator.ended(made, within_seconds=90) == kinds

    async def accepted(self, asked: list[job_pb2.Job]) -> tuple[int, int]:
        """Jobs that each server would bill for these."""
        wanted = {made.spec.prompt for made in asked}
        logs = [await server.log(kind="accepted") for server in (self.main, self.second)]
        main, second = ([e for e in log if e["prompt"] in wanted] for log in logs)
        return len(main), len(second)

    async def account(self, name: str) -> attempt_pb2.ProviderAccount:
        async with self.generator.stub() as stub:
            request = attempt_pb2.ListProviderAccountsRequest()
            listed = await stub.ListProviderAccounts(request, timeout=10)
        return next(item for item in listed.provider_accounts if item.provider_account == name)

    async def pause(self, name: str, paused: bool) -> None:
        request = attempt_pb2.PauseProviderAccountRequest(provider_account=name, paused=paused)
        async with self.generator.stub() as stub:
            await stub.PauseProviderAccount(request, timeout=10)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Two]:
    folder = tmp_path_factory.mktemp("accounts")
    keys = folder / "keys"
    keys.mkdir()
    (keys / "second").write_text(f"{SECOND_KEY}\n")
    settings = {"time_factor": generator_process.FACTOR, "draw_prompt": False}
    async with simulated.running(folder / "other", api_keys=SECOND_KEY, **settings) as second:
        variables = {
            "GENERATOR_PROVIDER_BASE_URLS": json.dumps({"second": f"{second.url}/v1"}),
            "GENERATOR_PROVIDER_KEYS_DIR": str(keys),
            "GENERATOR_POST_TIMEOUT_SECONDS": "4",
            "GENERATOR_PREPARE_LEASE_SECONDS": "10",
        }
        async with generator_process.running(folder, change, variables=variables) as started:
            made = Two(started, started.simulator, second)
            await _listen(made)
            # A completed video at each serves as the sentinel that proves absence.
            await made.ended(await made.ask(6))
            yield made


async def _listen(two: Two) -> None:
    async def heard(message: Msg) -> None:
        progress = event_pb2.Progress.FromString(message.data)
        two.progress.setdefault(progress.video_id, []).append(progress)

    await two.generator.client.subscribe(subjects.progress_subject("*"), cb=heard)


@pytest.fixture(autouse=True)
async def healthy(two: Two) -> AsyncIterator[None]:
    yield
    await two.main.clear()
    await two.second.clear()
    await two.generator.fetch(
        "UPDATE provider_accounts SET submits_after = '-infinity', troubles = 0, paused = false"
    )


async def test_both_serve_by_weight_each_with_its_own_address_and_key(two: Two) -> None:
    await two.pause("main", True)
    await two.pause("second", True)
    asked = await two.ask(12)
    for made in asked:
        await two.generator.until(made, "QUEUED")
    await two.pause("main", False)
    await two.pause("second", False)
    await two.ended(asked)
    main, second = await two.accepted(asked)
    assert main + second == 12, "each once"
    assert 3 <= second <= main
    # A model that only one of them has.
    asked = await two.ask(2, model="sora-2-pro")
    await two.ended(asked)
    assert await two.accepted(asked) == (2, 0)


async def test_a_key_that_is_revoked_costs_no_video_and_the_other_account_goes_on(two: Two) -> None:
    await two.main.arm("unauthorized", times=0)
    asked = await two.ask(8)
    await two.ended(asked)
    assert await two.accepted(asked) == (0, 8)
    shown = await two.account("main")
    assert shown.troubles >= 1
    refused = [e for e in await two.main.log(kind="refused") if e["status"] == 401]
    creates = [e for e in refused if e["method"] == "POST"]
    assert len(creates) <= 6, "closed, not hammered"
    # The key works again: one is sent to see, then all.
    await two.main.clear()
    await two.pause("second", True)
    asked = await two.ask(6)
    await two.ended(asked)
    assert await two.accepted(asked) == (6, 0)
    shown = await two.account("main")
    assert (shown.open, shown.troubles, shown.closed_reason) == (True, 0, "")


@pytest.mark.parametrize("fault", ["lost_answer", "error_after=500"])
async def test_what_may_have_been_sent_goes_to_no_other_account(two: Two, fault: str) -> None:
    await two.pause("second", True)
    made = await two.generator.ask(f"A cat, {uuid.uuid4()} [fault:{fault}]")

    async def sent() -> bool:
        return (await two.accepted([made])) == (1, 0)

    await eventually(sent)
    await two.pause("main", True)
    await two.pause("second", False)
    await two.ended([made])
    assert await two.accepted([made]) == (1, 0)


async def test_jobs_at_once_are_learnt_from_the_providers_word(two: Two) -> None:
    await two.pause("second", True)
    await two.main.arm("too_many_tasks", times=1)
    asked = await two.ask(6)
    await two.ended(asked)
    assert await two.accepted(asked) == (6, 0)
    rows = await two.generator.fetch(
        "SELECT jobs_learnt FROM provider_accounts WHERE provider_account = 'main'"
    )
    assert 1 <= rows[0]["jobs_learnt"] <= 6
    shown = await two.account("main")
    assert 1 <= shown.usable_jobs_in_flight <= shown.max_jobs_in_flight == 50


async def test_over_its_cap_an_account_waits_and_says_why(two: Two) -> None:
    asked = await two.ask(2, model="sora-capped")
    await two.ended(asked)
    start_by = datetime.now(UTC) + timedelta(seconds=2)
    (late,) = await two.ask(1, model="sora-capped", start_by=start_by)
    (dear,) = await two.ask(1, model="sora-capped", seconds=2)
    shown = await two.account("capped")
    assert (shown.cost_micros_hour, shown.cost_micros_day) == (2 * PRICE, 2 * PRICE)
    assert shown.max_cost_micros_per_hour == PRICE * 5 // 2
    # No error for those that wait, until start_by: then it is nobody's money.
    await two.ended([late], ["queued", "failed"])
    failed = two.generator.told[late.video_id][-1].failed
    assert vocabulary_pb2.Cause.Name(failed.cause) == "CAUSE_QUEUE_TIMEOUT"
    assert (await two.generator.state(dear)).startswith("QUEUED")
    assert await two.accepted([late, dear]) == (0, 0)


async def test_a_model_that_goes_is_refused_with_a_clear_cause(two: Two) -> None:
    asked = await two.ask(2, model="sora-retired")
    await two.ended(asked, ["queued", "failed"])
    failed = two.generator.told[asked[0].video_id][-1].failed
    assert vocabulary_pb2.Cause.Name(failed.cause) == "CAUSE_MODEL_RETIRED"
    assert "sora-retired" in failed.message
    assert not failed.retryable
    assert await two.accepted(asked) == (0, 0)


async def test_a_closed_pool_holds_up_no_other(two: Two) -> None:
    await two.pause("main", True)
    await two.pause("second", True)
    waiting = await two.ask(20)
    await two.ended(await two.ask(1, model="sora-narrow"))
    await two.pause("main", False)
    await two.ended(waiting)


async def test_those_that_wait_are_told_their_place_and_when_they_may_be_done(two: Two) -> None:
    await two.pause("narrow", True)
    asked = await two.ask(4, model="sora-narrow")

    async def told() -> bool:
        # By its event, and by progress where what that said has changed since.
        queued = {made.video_id: two.generator.told.get(made.video_id) for made in asked}
        assert all(queued.values()), "not all are queued"
        places = [
            (two.progress.get(video_id) or [events[0].queued])[-1]
            for video_id, events in queued.items()
            if events
        ]
        assert sorted(item.queue_position for item in places) == [0, 1, 2, 3], places
        # Nobody serves them: when they may be done is not known.
        return not any(item.HasField("expected_at") for item in places)

    # After a count that took long, as on a busy machine, the next one waits longer.
    await eventually(told, within_seconds=90)
    events = [two.generator.told[made.video_id][0].queued for made in asked]
    assert sorted(event.queue_position for event in events) == [0, 1, 2, 3]
    await two.pause("narrow", False)
    await two.ended(asked)
    for made in asked:
        told_of = two.progress[made.video_id]
        assert [item.version for item in told_of] == sorted({item.version for item in told_of})
        begun = [item for item in told_of if item.stage == vocabulary_pb2.VIDEO_STAGE_RENDERING]
        assert begun
        assert all(item.queue_position == 0 and item.HasField("expected_at") for item in begun)
    rows = await two.generator.fetch(
        "SELECT bool_and(rendered_at > submitted_at) AS measured FROM attempts WHERE model = 'sora-narrow'"
    )
    assert rows[0]["measured"]


@pytest.mark.long
@pytest.mark.parametrize("configured", [60, 240])
async def test_a_quota_is_used_and_its_server_hardly_ever_has_to_refuse(
    tmp_path: Path, configured: int
) -> None:
    """60 requests in each (shortened) minute, as configured and as only the server says."""
    count, factor = 30, 10.0
    settings = {"requests_per_minute": 60, "time_factor": factor, "draw_prompt": False}
    variables = {
        "GENERATOR_TIME_FACTOR": str(factor),
        "GENERATOR_POST_TIMEOUT_SECONDS": "5",
        "GENERATOR_PREPARE_LEASE_SECONDS": "30",
        "GENERATOR_FETCH_LEASE_SECONDS": "30",
        "GENERATOR_PASS_LEASE_SECONDS": "10",
    }
    async with generator_process.running(
        tmp_path,
        simulator_settings=settings,
        variables=variables,
        requests_per_minute=configured,
        max_jobs_in_flight=100,
    ) as generator:
        began = time.monotonic()
        asked = [await generator.ask() for _ in range(count)]
        for made in asked:
            assert await generator.ended(made, within_seconds=100) == WHOLE
        spent = time.monotonic() - began
        refused = await generator.simulator.log(kind="refused")
        assert len([entry for entry in refused if entry["status"] == 429]) <= 1
        assert len(await generator.simulator.log(kind="accepted")) == count
        print(
            f"{count} videos in {spent:.1f} s; their {2 * count} requests alone take {count * 2 / factor:.1f} s"
        )
