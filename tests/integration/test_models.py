"""ListModels: what can be asked for, its state, and how long it would take."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import account_pb2, operator_pb2
from framewire.generator.v1 import attempt_pb2
from kit import errors
from tests import gateway_world
from tests import system as systems
from tests.gateway_world import Caller, World
from tests.waiting import eventually

STATE = account_pb2.ModelState
VIP, STANDARD, BATCH = (
    vocabulary_pb2.LANE_VIP,
    vocabulary_pb2.LANE_STANDARD,
    vocabulary_pb2.LANE_BATCH,
)
MODELS = {
    "models": [
        {
            "name": name,
            "sizes": ["320x180"],
            "seconds": [4],
            "text_to_video": True,
            "max_input_images": 0,
            **(
                {"retires_at": (datetime.now(UTC) + timedelta(days=days)).isoformat()}
                if days
                else {}
            ),
        }
        for name, days in (("stays", 0), ("goes", 30), ("went", -1))
    ]
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder: Path = tmp_path_factory.mktemp("models")
    (folder / "models.yaml").write_text(yaml.safe_dump(MODELS))
    settings = {"GATEWAY_MODELS_FILE": str(folder / "models.yaml")}
    async with gateway_world.running(folder / "data", settings) as running:
        yield running


async def models(caller: Caller, account_id: str = "") -> dict[str, account_pb2.Model]:
    request = account_pb2.ListModelsRequest(account_id=account_id)
    listed = (await caller.call("ListModels", request)).models
    return {model.model: model for model in listed}


def estimate(model: str) -> attempt_pb2.ModelEstimate:
    lane = attempt_pb2.LaneEstimate
    return attempt_pb2.ModelEstimate(
        model=model,
        render_seconds=60.5,
        lanes=[
            lane(lane=VIP, queue_position=0, expected_seconds=61),
            lane(lane=STANDARD, queue_position=3, expected_seconds=240.25),
            lane(lane=BATCH, queue_position=9),
        ],
    )


async def test_a_model_says_whether_it_takes_requests_and_until_when(world: World) -> None:
    member = await world.member()
    found = await models(member)
    assert {name: STATE.Name(model.state) for name, model in found.items()} == {
        "stays": "MODEL_STATE_OK", "goes": "MODEL_STATE_RETIRING", "went": "MODEL_STATE_RETIRED",
    }  # fmt: skip
    assert not found["stays"].HasField("retires_at")
    left = found["goes"].retires_at.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(days=29) < left <= timedelta(days=30)
    pause = operator_pb2.SetAdmissionRequest(paused=True)
    await world.operator.call("SetAdmission", pause)
    try:
        paused = await models(member)
    finally:
        await world.operator.call("SetAdmission", operator_pb2.SetAdmissionRequest())
    assert {name: STATE.Name(model.state) for name, model in paused.items()} == {
        "stays": "MODEL_STATE_PAUSED", "goes": "MODEL_STATE_PAUSED", "went": "MODEL_STATE_RETIRED",
    }  # fmt: skip


async def test_lanes_that_the_account_may_use_say_when_a_video_would_be_done(world: World) -> None:
    world.behind.estimates = [estimate("stays")]
    member = await world.member(weight=7)
    found = await models(member)
    assert world.behind.sent["EstimateModels"] == attempt_pb2.EstimateModelsRequest(
        account_id=member.account_id, weight=7
    )
    assert found["stays"].render_seconds == 60.5
    told = {lane.lane: lane for lane in found["stays"].lanes}
    assert told.keys() == {STANDARD, BATCH}
    assert (told[STANDARD].queue_position, told[STANDARD].expected_seconds) == (3, 240.25)
    assert (told[BATCH].queue_position, told[BATCH].HasField("expected_seconds")) == (9, False)
    assert list(found["goes"].lanes) == []

    of_nobody = await models(world.operator)
    assert world.behind.sent["EstimateModels"].account_id == ""
    assert [lane.lane for lane in of_nobody["stays"].lanes] == [VIP, STANDARD, BATCH]
    named = await models(world.operator, member.account_id)
    assert [lane.lane for lane in named["stays"].lanes] == [STANDARD, BATCH]
    other = await world.member()
    request = account_pb2.ListModelsRequest(account_id=member.account_id)
    assert (await other.refused("ListModels", request)).reason == "ACCOUNT_NOT_FOUND"


async def test_without_estimates_there_is_still_a_list(world: World) -> None:
    member = await world.member()
    refusal = errors.PermissionDenied("ROLE_NOT_ALLOWED", "away")
    world.behind.refuse[f"EstimateModels {member.account_id}"] = refusal
    found = await models(member)
    assert found.keys() == {"stays", "goes", "went"}
    assert not any(model.lanes or model.render_seconds for model in found.values())


async def test_the_whole_system_tells_it_by_its_quota_and_its_renders(
    system: systems.System,
) -> None:
    async with await system.account(100) as client:

        async def told() -> bool:
            found = {model.model: model for model in await client.models()}
            lanes = {lane.lane: lane for lane in found["sora-2"].lanes}
            assert lanes.keys() == {"STANDARD", "BATCH"}
            assert found["sora-2"].render_seconds > 0
            assert all((lane.expected_seconds or 0) > 0 for lane in lanes.values())
            return True

        await eventually(told, within_seconds=30)
