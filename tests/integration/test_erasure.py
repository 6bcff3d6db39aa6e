"""Erasure of an account, and what a deletion takes with it besides outputs; the services behind are stand-ins."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from framewire import errors as public_errors
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import account_pb2, operator_pb2, upload_pb2, video_pb2
from framewire.storage.v1 import storage_pb2
from kit import errors
from tests import gateway_world
from tests.gateway_world import Caller, World, new_id
from tests.waiting import eventually

MINE, THEIRS, FILM = "m" * 26, "t" * 26, "f" * 26
LIMIT_SECONDS = 20


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("armed") / "failpoints"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory, armed: Path) -> AsyncIterator[World]:
    settings = {"GATEWAY_ERASE_SETTLE_SECONDS": "0.5", "FRAMEWIRE_FAILPOINTS": str(armed)}
    async with gateway_world.running(tmp_path_factory.mktemp("erasure"), settings) as running:
        yield running


async def ended(world: World, member: Caller, kind: str = "completed", **fields: Any) -> Any:
    made = (
        await member.create(**fields) if "spec" not in fields else await of_spec(member, **fields)
    )
    detail: dict[str, Any] = {}
    if kind == "completed":
        detail = {"outputs": [event_pb2.Output(asset_id="o" * 26, poster_asset_id="p" * 26)]}
    await world.tell(made, "queued", 1)
    await world.tell(made, kind, 2, **detail)

    async def seen() -> Any:
        video = await member.video(made.video_id)
        return video if video.HasField("finished_at") else None

    return await eventually(seen)


async def of_spec(member: Caller, spec: Any) -> Any:
    request = video_pb2.CreateVideoRequest(request_id=new_id(), spec=spec)
    return await member.call("CreateVideo", request)


def started_from(**asset: str) -> Any:
    """A video from an image at a later frame, or from a video."""
    frame = 12 if "image_id" in asset else 0
    made_of = vocabulary_pb2.VideoInput(**asset, frame_index=frame)
    return vocabulary_pb2.VideoSpec(prompt="a cat", model="sora-1", inputs=[made_of])


async def delete(member: Caller, video: Any) -> Any:
    return await member.call("DeleteVideo", video_pb2.DeleteVideoRequest(video_id=video.video_id))


async def erase(world: World, account_id: str) -> Any:
    request = operator_pb2.EraseAccountRequest(account_id=account_id, why="asked by letter")
    return await world.operator.call("EraseAccount", request)


async def erased(world: World, account_id: str) -> None:
    """By itself, without another call."""

    async def done() -> bool:
        await world.pool.execute("UPDATE videos SET next_check_at = clock_timestamp()")
        query = "SELECT done_at IS NOT NULL FROM erasures WHERE account_id = $1"
        return await world.pool.fetchval(query, account_id)

    await eventually(done, within_seconds=LIMIT_SECONDS)


async def rows(world: World, account_id: str) -> list[Any]:
    return await world.pool.fetch("SELECT * FROM videos WHERE account_id = $1", account_id)


# Deletion


async def test_a_deletion_has_the_generator_forget_the_prompt_and_is_not_done_before(
    world: World,
) -> None:
    member = await world.member()
    video = await ended(world, member)
    world.behind.refuse[f"ErasePrompt {video.video_id}"] = errors.Unavailable("X", "away")
    await delete(member, video)
    (row,) = await rows(world, member.account_id)
    assert row["delete_due"]
    del world.behind.refuse[f"ErasePrompt {video.video_id}"]

    async def removed() -> bool:
        await world.pool.execute("UPDATE videos SET next_check_at = clock_timestamp()")
        return not (await rows(world, member.account_id))[0]["delete_due"]

    await eventually(removed)
    assert world.behind.calls["ErasePrompt", video.video_id] >= 2


async def test_inputs_go_with_the_last_video_made_from_them_and_outputs_stay(world: World) -> None:
    member = await world.member()
    world.behind.stats[FILM] = storage_pb2.Asset(
        kind=storage_pb2.ASSET_KIND_OUTPUT_VIDEO, media_type="video/mp4", duration_ms=4000
    )
    first = await ended(world, member, spec=started_from(image_id=MINE))
    second = await ended(world, member, spec=started_from(image_id=MINE))
    third = await ended(world, member, spec=started_from(input_video_id=FILM))
    await delete(member, first)
    assert world.behind.calls["Delete", MINE] == 0
    await delete(member, second)
    assert world.behind.calls["Delete", MINE] == 1
    await delete(member, third)
    assert world.behind.calls["Delete", FILM] == 0


async def test_an_image_that_another_video_has_among_its_inputs_stays(world: World) -> None:
    member = await world.member()
    plain = await ended(world, member, image=THEIRS)
    other = await ended(world, member, spec=started_from(image_id=THEIRS))
    await delete(member, plain)
    assert world.behind.calls["Delete", THEIRS] == 0
    await delete(member, other)
    assert world.behind.calls["Delete", THEIRS] == 1


# Erasure


async def test_an_erasure_ends_everything_but_the_books(world: World) -> None:
    member, other = await world.member(), await world.member()
    account_id = member.account_id
    spared = await ended(world, other, client_reference="stays")
    whole = await ended(world, member, labels={"name": "Jane"}, client_reference="Jane's")
    broken = await ended(world, member, "failed")
    live = await member.create(client_reference="Jane's other")
    world.behind.needed[account_id] = 1
    answer = await erase(world, account_id)
    assert answer.HasField("asked_at")
    assert not answer.HasField("done_at")
    await eventually(lambda: world.behind.calls["CancelAttempt", live.video_id])
    await eventually(lambda: world.behind.calls["EraseAccount", account_id] >= 2)
    assert world.behind.calls["ForgetLabels", account_id] >= 2
    again = await erase(world, account_id)
    assert (again.asked_at, again.assets_to_remove) == (answer.asked_at, 1)
    assert not again.HasField("done_at")
    del world.behind.needed[account_id]
    await erased(world, account_id)
    for row in await rows(world, account_id):
        assert row["deleted_at"] is not None
        spec = vocabulary_pb2.VideoSpec.FromString(row["spec"])
        words = (spec.prompt, row["labels"], row["client_reference"], row["failure_message"])
        assert words in (("", {}, "", ""), ("", "{}", "", ""))
        assert world.behind.calls["ErasePrompt", row["video_id"]] >= 1
    assert {row["video_id"] for row in await rows(world, account_id)} == {
        whole.video_id, broken.video_id, live.video_id,
    }  # fmt: skip
    assert (await erase(world, account_id)).HasField("done_at")
    balance = account_pb2.GetBalanceRequest(account_id=account_id)
    assert (await world.operator.call("GetBalance", balance)).account_id == account_id
    assert (await other.video(spared.video_id)).client_reference == "stays"
    audit = await world.pool.fetch(
        "SELECT why, outcome FROM audit WHERE method = 'EraseAccount' AND account_id = $1",
        account_id,
    )
    assert {tuple(row) for row in audit} == {("asked by letter", "OK")}


async def test_nobody_calls_for_an_erased_account(world: World) -> None:
    member = await world.member()
    account_id = member.account_id
    await member.create()
    await erase(world, account_id)

    async def refused() -> bool:
        try:
            await member.call("ListVideos", video_pb2.ListVideosRequest())
        except public_errors.FramewireError as error:
            return error.reason == "CREDENTIALS_INVALID"
        return False

    await eventually(refused)
    operator = world.operator
    for method, request in {
        "CreateVideo": video_pb2.CreateVideoRequest(
            request_id=new_id(), account_id=account_id, spec=vocabulary_pb2.VideoSpec(prompt="a")
        ),
        "CreateApiKey": account_pb2.CreateApiKeyRequest(
            request_id=new_id(), account_id=account_id, role=account_pb2.ROLE_MEMBER
        ),
        "CreateUpload": upload_pb2.CreateUploadRequest(
            request_id=new_id(), account_id=account_id, size_bytes=9, media_type="image/png"
        ),
        "SetAccount": operator_pb2.SetAccountRequest(account_id=account_id, weight=7),
    }.items():
        assert (await operator.refused(method, request)).reason == "ACCOUNT_NOT_FOUND", method
    unknown = operator_pb2.EraseAccountRequest(account_id="z" * 26, why="x")
    assert (await operator.refused("EraseAccount", unknown)).reason == "ACCOUNT_NOT_FOUND"
    await erased(world, account_id)


async def test_webhooks_go_with_what_they_were_to_tell(world: World) -> None:
    one, two = await world.member(), await world.member()
    for number, member in enumerate((one, two)):
        endpoint, event, delivery = (letter * 25 + str(number) for letter in "abc")
        for statement, values in (
            (
                "webhook_endpoints (endpoint_id, url, secret)",
                (endpoint, "https://jane.example", b"s"),
            ),
            (
                "webhook_events (event_id, video_id, kind, headers, body)",
                (event, "v", "completed", "{}", b"{}"),
            ),
        ):
            table, columns = statement.split(" (")
            places = ", ".join(f"${place}" for place in range(2, 2 + len(values)))
            await world.pool.execute(
                f"INSERT INTO {table} (account_id, {columns} VALUES ($1, {places})",
                member.account_id,
                *values,
            )
        await world.pool.execute(
            """
            INSERT INTO webhook_deliveries (delivery_id, endpoint_id, event_id, next_attempt_at, give_up_at)
            VALUES ($1, $2, $3, 'infinity', 'infinity')
            """,
            *(delivery, endpoint, event),
        )
    await erase(world, one.account_id)
    for table in ("webhook_endpoints", "webhook_events"):
        left = await world.pool.fetch(f"SELECT DISTINCT account_id FROM {table}")
        assert [row["account_id"] for row in left] == [two.account_id], table
    assert await world.pool.fetchval("SELECT count(*) FROM webhook_deliveries") == 1


async def test_a_member_goes_with_its_address_unless_it_is_in_another_account(
    world: World,
) -> None:
    one, two = await world.member(), await world.member()
    insert = "INSERT INTO principals (principal_id, issuer, subject, email, role) VALUES ($1, 'i', '', $2, 'MEMBER')"
    only, both = "c" * 26, "d" * 26
    await world.pool.execute(insert, only, "jane@example.com")
    await world.pool.execute(insert, both, "john@example.com")
    join = "INSERT INTO members (principal_id, account_id) VALUES ($1, $2)"
    for principal, account in ((only, one), (both, one), (both, two)):
        await world.pool.execute(join, principal, account.account_id)
    await erase(world, one.account_id)
    left = await world.pool.fetch("SELECT principal_id FROM principals")
    assert [row["principal_id"] for row in left] == [both]
    name = "SELECT display_name FROM accounts WHERE account_id = $1"
    assert await world.pool.fetchval(name, one.account_id) == "erased"
    assert await world.pool.fetchval("SELECT count(*) FROM members") == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    "point",
    ["gateway.erase.after_begin", "gateway.delete.before_prompt", "gateway.erase.after_assets"],
)
async def test_an_erasure_goes_on_after_a_kill(world: World, armed: Path, point: str) -> None:
    member = await world.member()
    video = await ended(world, member)
    (gateway,) = world.services
    await asyncio.to_thread(armed.write_text, f"{point}=kill\n")
    with contextlib.suppress(public_errors.FramewireError):
        await erase(world, member.account_id)
    await eventually(lambda: not gateway.running, what=f"the gateway to die at {point}")
    armed.unlink()
    await gateway.start()
    await erased(world, member.account_id)
    assert world.behind.calls["ErasePrompt", video.video_id] >= 1
    assert world.behind.calls["EraseAccount", member.account_id] >= 1
