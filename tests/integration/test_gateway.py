"""The gateway as its callers meet it, with stand-ins for the services behind: see tests/gateway_world.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import nats as nats_client
import pytest
import pytest_asyncio

from framewire import errors as public_errors
from framewire import subjects
from framewire.credits.v1 import ledger_pb2
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import account_pb2, operator_pb2, upload_pb2, video_pb2
from kit import errors, ids
from services.gateway.store import sweeping
from tests import gateway_world
from tests.gateway_world import IMAGE, PRICE, World, new_id, wanted
from tests.waiting import eventually


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One gateway for all of these; each makes accounts of its own."""
    async with gateway_world.running(tmp_path_factory.mktemp("gateway")) as running:
        yield running


async def test_one_request_id_is_one_video_and_one_hold(world: World) -> None:
    member, request_id = await world.member(), new_id()
    answers = await asyncio.gather(*(member.insist(request_id) for _ in range(50)))
    assert len({video.video_id for video in answers}) == 1
    assert {video.state for video in answers} == {vocabulary_pb2.VIDEO_STATE_PENDING}
    made = answers[0]
    assert world.behind.holds(member.account_id) == [made.video_id]
    assert (made.spec.model, made.spec.width, made.spec.seconds) == ("sora-2", 1280, 6)
    assert (made.credits.quoted, made.lane) == (PRICE, vocabulary_pb2.LANE_STANDARD)
    job, *_ = await world.jobs(made.video_id)  # rung again where this machine is slow
    assert (job.spec, job.weight, job.account_id) == (made.spec, 100, member.account_id)
    reserved = world.behind.requests[made.video_id]
    assert (reserved.item.seconds, reserved.HasField("max_credits")) == (6, False)
    assert reserved.not_after.seconds >= made.created_at.seconds


async def test_another_request_under_the_same_id_is_refused(world: World) -> None:
    member, request_id = await world.member(), new_id()
    made = await member.create(request_id)
    refused = await member.refused("CreateVideo", wanted(request_id, client_reference="other"))
    assert refused.reason == "REQUEST_ID_REUSED"
    assert (await member.create(request_id)).video_id == made.video_id
    assert (await member.create()).similar_to == made.video_id
    assert (await (await world.member()).create(request_id)).video_id != made.video_id


async def test_who_cannot_wait_for_the_same_request_is_told_so(world: World) -> None:
    member, request_id = await world.member(), new_id()
    made = await member.create(request_id)
    put = """UPDATE videos SET state = $2, stage = $3, quoted_credits = $4, admit_until = 'infinity'
             WHERE video_id = $1"""  # as if it were under way still
    await world.pool.execute(put, made.video_id, "ADMITTING", "UNSPECIFIED", None)

    async def told() -> public_errors.FramewireError | None:
        with pytest.raises(public_errors.FramewireError) as told:
            await member.create(request_id, timeout=1.5)
        return None if told.value.code is grpc.StatusCode.DEADLINE_EXCEEDED else told.value

    answer = await eventually(told, within_seconds=120)  # a slow machine may hang up first
    assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "REQUEST_IN_PROGRESS")
    assert answer.retry_after_seconds
    await world.pool.execute(put, made.video_id, "PENDING", "QUEUED", made.credits.quoted)
    assert (await member.create(request_id)).video_id == made.video_id


async def test_a_refusal_frees_its_id_and_lets_go_of_the_image(world: World) -> None:
    member, request_id = await world.member(), new_id()
    gate = world.behind.hold_up[member.account_id] = asyncio.Event()
    world.behind.refuse[f"Reserve {member.account_id}"] = errors.FailedPrecondition(
        "INSUFFICIENT_CREDITS", "too few", needed=10, available=5
    )
    calls = [asyncio.ensure_future(member.insist(request_id, image=IMAGE)) for _ in range(3)]
    gate.set()
    for refused in await asyncio.gather(*calls, return_exceptions=True):
        assert (refused.reason, refused.metadata["needed"]) == ("INSUFFICIENT_CREDITS", "10")
    refused_id = await world.pool.fetchval(
        "SELECT video_id FROM videos WHERE account_id = $1 AND state = 'REJECTED' LIMIT 1",
        member.account_id,
    )

    async def unpinned() -> bool:
        return world.behind.calls["Unpin", refused_id] >= 1

    await eventually(unpinned)
    assert (await member.refused("GetVideo", video_pb2.GetVideoRequest(video_id=refused_id))).code
    del world.behind.refuse[f"Reserve {member.account_id}"]
    video = await member.create(request_id, image=IMAGE)
    assert video.video_id != refused_id
    assert world.behind.calls["Release", member.account_id] == 0


async def test_hanging_up_ends_the_waiting_not_the_admission(world: World) -> None:
    member, request_id = await world.member(), new_id()
    gate = world.behind.hold_up[member.account_id] = asyncio.Event()
    call = asyncio.ensure_future(member.create(request_id, timeout=0.3))
    with pytest.raises(public_errors.FramewireError):
        await call
    gate.set()
    video = await member.create(request_id)
    assert video.state == vocabulary_pb2.VIDEO_STATE_PENDING
    assert world.behind.calls["Reserve", member.account_id] == 1
    assert len(await world.jobs(video.video_id)) >= 1


def abandoned(world: World, account_id: str) -> Callable[[], Awaitable[bool]]:
    async def condition() -> bool:
        row = await world.pool.fetchrow(
            "SELECT state, release_due, unpin_due FROM videos WHERE account_id = $1", account_id
        )
        assert row is not None
        return tuple(row) == ("ABANDONED", False, False)

    return condition


async def test_what_credits_did_not_answer_is_abandoned_and_released_once(world: World) -> None:
    member, request_id = await world.member(), new_id()
    down = errors.Unavailable("DEPENDENCY_UNAVAILABLE", "down")
    world.behind.refuse |= {f"{call} {member.account_id}": down for call in ("Reserve", "Release")}
    refused = await member.refused("CreateVideo", wanted(request_id, image=IMAGE))
    assert (refused.reason, refused.retry_after_seconds) == ("DEPENDENCY_UNAVAILABLE", 1)

    async def release_was_tried() -> bool:
        return world.behind.calls["Release", member.account_id] > 0

    await eventually(release_was_tried)
    for call in ("Reserve", "Release"):
        del world.behind.refuse[f"{call} {member.account_id}"]
    await eventually(abandoned(world, member.account_id))
    released = world.behind.calls["Release", member.account_id]
    listing = video_pb2.ListVideosRequest()
    assert not (await member.call("ListVideos", listing)).videos
    video = await member.create(request_id, image=IMAGE)
    assert len(await world.jobs(video.video_id)) == 1
    assert world.behind.calls["Release", member.account_id] == released
    (gone,) = await world.pool.fetch(
        "SELECT video_id FROM videos WHERE account_id = $1 AND state = 'ABANDONED'",
        member.account_id,
    )
    assert await world.jobs(gone["video_id"]) == [], "only a PENDING video is ever published"


async def test_a_retry_takes_an_undecided_admission_over(world: World) -> None:
    member, request_id = await world.member(), new_id()
    down = errors.Unavailable("DEPENDENCY_UNAVAILABLE", "down")
    world.behind.refuse[f"Reserve {member.account_id}"] = down
    await member.refused("CreateVideo", wanted(request_id))
    del world.behind.refuse[f"Reserve {member.account_id}"]
    video = await member.create(request_id)
    rows = await world.pool.fetch(
        "SELECT video_id, admit_epoch FROM videos WHERE account_id = $1", member.account_id
    )
    assert [tuple(row) for row in rows] == [(video.video_id, 2)]
    assert world.behind.calls["Release", member.account_id] == 0


async def test_nats_away_costs_the_caller_nothing(world: World) -> None:
    member = await world.member()
    await world.bus.kill()
    try:
        video = await member.create(timeout=3)
        assert video.state == vocabulary_pb2.VIDEO_STATE_PENDING
    finally:
        await world.bus.start()

    async def rung() -> bool:
        return len(await world.jobs(video.video_id)) >= 1

    await eventually(rung)
    event = event_pb2.Event(kind=event_pb2.EVENT_KIND_QUEUED, seq=1)
    world.behind.outcomes[video.video_id] = event

    async def heard_of() -> bool:
        return (await member.video(video.video_id)).revision == 2

    await eventually(heard_of, what="the sweeper projects what the generator says")
    jobs = len(await world.jobs(video.video_id))
    del world.behind.outcomes[video.video_id]
    asked = world.behind.calls["GetVideoOutcome", video.video_id]

    async def asked_again() -> bool:
        return world.behind.calls["GetVideoOutcome", video.video_id] > asked + 1

    await eventually(asked_again)
    assert len(await world.jobs(video.video_id)) == jobs, "a video that is known is not rung again"


async def test_watching_to_the_end(world: World) -> None:
    member = await world.member()
    video = await member.create(image=IMAGE)
    seen: list[Any] = []
    watching = aiter(member.watch(video.video_id))
    seen.append((await anext(watching)).video)
    await world.tell(video, "started", 2)
    seen.append((await anext(watching)).video)
    assert seen[-1].state == vocabulary_pb2.VIDEO_STATE_PROCESSING
    progress = event_pb2.Progress(
        video_id=video.video_id, version=5, stage=vocabulary_pb2.VIDEO_STAGE_RENDERING
    )
    client = await nats_client.connect(world.bus.url)
    for version, percent in ((5, 40), (4, 20)):
        progress.version, progress.progress_percent = version, percent
        subject = subjects.progress_subject(member.account_id)
        await client.publish(subject, progress.SerializeToString())
    await client.close()
    seen.append((await anext(watching)).video)
    assert (seen[-1].progress_percent, seen[-1].revision) == (40, seen[-2].revision)
    output = event_pb2.Output(asset_id="o" * 26, variant=0, poster_asset_id="p" * 26)
    await world.tell(video, "completed", 3, outputs=[output], variants_requested=1)
    await world.tell(video, "queued", 1)
    seen.append((await anext(watching)).video)
    assert seen[-1].credits.settlement == vocabulary_pb2.SETTLEMENT_PENDING
    await world.tell(video, "settled", 0, captured_credits=PRICE)
    seen += [item.video async for item in watching]
    assert seen[-1].state == vocabulary_pb2.VIDEO_STATE_COMPLETED
    assert (seen[-1].credits.captured, seen[-1].credits.settlement) == (PRICE, 2)
    assert [item.revision for item in seen] == [1, 2, 2, 3, 4]
    assert [item async for item in member.watch(video.video_id, 4)] == []
    assert [item.video async for item in member.watch(video.video_id, 3)] == [seen[-1]]
    asked = video_pb2.GetDownloadUrlRequest(video_id=video.video_id, poster=True)
    signed = await member.call("GetDownloadUrl", asked)
    assert signed.url == f"http://s3/{'p' * 26}/{video.video_id}-0.jpg"

    async def unpinned() -> bool:
        return world.behind.calls["Unpin", video.video_id] == 1

    await eventually(unpinned)


async def test_a_lost_nudge_is_made_good_by_the_floor(world: World) -> None:
    member = await world.member()
    video = await member.create()
    watching = aiter(member.watch(video.video_id))
    await anext(watching)
    statement = "UPDATE videos SET revision = 7 WHERE video_id = $1"
    await world.pool.execute(statement, video.video_id)
    assert (await anext(watching)).video.revision == 7


async def test_services_have_request_ids_of_their_own(world: World) -> None:
    member, request_id = await world.member(), new_id()
    made = []
    for _ in range(2):
        asked = account_pb2.CreateApiKeyRequest(request_id=new_id(), role=account_pb2.ROLE_SERVICE)
        secret = (await world.operator.call("CreateApiKey", asked)).secret
        service = gateway_world.Caller(world.channel, secret)
        assert (await service.refused("CreateVideo", wanted())).reason == "ACCOUNT_REQUIRED"
        twice = [service.create(request_id, account_id=member.account_id) for _ in range(2)]
        made += await asyncio.gather(*twice)
    made.append(await member.create(request_id, account_id=member.account_id))
    assert len({video.video_id for video in made}) == 3


async def test_what_was_never_admitted_is_kept_a_day_and_requests_thirty(world: World) -> None:
    member, request_id = await world.member(), new_id()
    world.behind.refuse[f"Reserve {member.account_id}"] = errors.FailedPrecondition(
        "INSUFFICIENT_CREDITS", "too few"
    )
    await member.refused("CreateVideo", wanted())
    del world.behind.refuse[f"Reserve {member.account_id}"]
    video = await member.create(request_id)
    store = sweeping.SweepStore(world.pool)

    async def left(table: str) -> int:
        counted = f"SELECT count(*) FROM {table} WHERE account_id = $1"
        return await world.pool.fetchval(counted, member.account_id)

    assert (await store.purge(), await left("videos"), await left("requests")) == (0, 2, 2)
    for table in ("videos", "requests"):
        await world.pool.execute(
            f"UPDATE {table} SET created_at = now() - interval '31 days' WHERE account_id = $1",
            member.account_id,
        )
    assert (await store.purge(), await left("videos"), await left("requests")) == (3, 1, 0)
    assert (await member.video(video.video_id)).video_id == video.video_id


async def test_another_accounts_things_are_not_found(world: World) -> None:
    owner, other = await world.member(), await world.member()
    video = await owner.create()
    for name, kind in (
        ("GetVideo", video_pb2.GetVideoRequest),
        ("CancelVideo", video_pb2.CancelVideoRequest),
        ("GetDownloadUrl", video_pb2.GetDownloadUrlRequest),
    ):
        refused = await other.refused(name, kind(video_id=video.video_id))
        assert refused.reason == "VIDEO_NOT_FOUND"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await other.watch(video.video_id).read()
    assert public_errors.from_rpc(caught.value).reason == "VIDEO_NOT_FOUND"
    for account in (owner.account_id, ids.new_id()):
        listing = video_pb2.ListVideosRequest(account_id=account)
        assert (await other.refused("ListVideos", listing)).reason == "ACCOUNT_NOT_FOUND"
    assert (await world.operator.refused("CreateVideo", wanted())).reason == "ACCOUNT_REQUIRED"
    assert (await world.operator.video(video.video_id)).video_id == video.video_id


async def test_cancel_reaches_the_generator_and_is_idempotent(world: World) -> None:
    member = await world.member()
    video = await member.create()
    request = video_pb2.CancelVideoRequest(video_id=video.video_id)
    world.behind.refuse[f"CancelAttempt {video.video_id}"] = errors.Unavailable("INTERNAL", "down")
    refused = await member.refused("CancelVideo", request)
    assert refused.reason == "DEPENDENCY_UNAVAILABLE"
    assert (await member.video(video.video_id)).cancel_requested
    del world.behind.refuse[f"CancelAttempt {video.video_id}"]

    async def cancelled() -> bool:
        state = (await member.video(video.video_id)).state
        return state == vocabulary_pb2.VIDEO_STATE_CANCELLED

    await eventually(cancelled, what="the sweeper tells the generator what the call could not")
    again = await member.call("CancelVideo", request)
    assert again.failure.cause == vocabulary_pb2.CAUSE_CANCELLED_BEFORE_SUBMIT
    at_once = await member.create()
    request = video_pb2.CancelVideoRequest(video_id=at_once.video_id)
    answer = await member.call("CancelVideo", request)
    assert (answer.state, answer.revision) == (vocabulary_pb2.VIDEO_STATE_CANCELLED, 3)


async def test_cancel_of_an_admission_that_is_under_way(world: World) -> None:
    member = await world.member()
    gate = world.behind.hold_up[member.account_id] = asyncio.Event()
    creating = asyncio.ensure_future(member.refused("CreateVideo", wanted()))

    async def begun() -> str | None:
        statement = "SELECT video_id FROM videos WHERE account_id = $1 AND state = 'ADMITTING'"
        return await world.pool.fetchval(statement, member.account_id)

    video_id = await eventually(begun)
    cancelled = await member.call("CancelVideo", video_pb2.CancelVideoRequest(video_id=video_id))
    assert cancelled.state == vocabulary_pb2.VIDEO_STATE_CANCELLED
    gate.set()
    assert (await creating).code is grpc.StatusCode.UNAVAILABLE
    await eventually(abandoned(world, member.account_id))
    assert await world.jobs(video_id) == []


async def test_limits_come_after_replays(world: World) -> None:
    member, request_id = await world.member(max_in_flight=1), new_id()
    video = await member.create(request_id)
    refused = await member.refused("CreateVideo", wanted())
    assert (refused.reason, refused.retry_after_seconds) == ("TOO_MANY_IN_FLIGHT", 10)
    assert (await member.create(request_id)).video_id == video.video_id
    vip = wanted(lane=vocabulary_pb2.LANE_VIP)
    assert (await member.refused("CreateVideo", vip)).reason == "LANE_NOT_ALLOWED"
    paused = operator_pb2.SetAdmissionRequest(paused=True, why="repairs")
    await world.operator.call("SetAdmission", paused)
    try:
        refused = await member.refused("CreateVideo", wanted())
        assert (refused.reason, "repairs" in refused.message) == ("ADMISSION_PAUSED", True)
        assert (await member.create(request_id)).video_id == video.video_id
    finally:
        await world.operator.call("SetAdmission", operator_pb2.SetAdmissionRequest())
    audit = await world.pool.fetch(
        "SELECT detail FROM audit WHERE method = 'SetAdmission' ORDER BY created_at"
    )
    assert len(audit) == 2


async def test_fifty_at_once_do_not_pass_the_limit(world: World) -> None:
    member = await world.member(max_in_flight=7)
    answers = await asyncio.gather(*(member.create() for _ in range(50)), return_exceptions=True)
    refused = [item for item in answers if isinstance(item, public_errors.FramewireError)]
    assert {error.reason for error in refused} == {"TOO_MANY_IN_FLIGHT"}
    assert len(answers) - len(refused) == 7


async def test_validate_only_makes_nothing(world: World) -> None:
    member = await world.member()
    checked = await member.create(validate_only=True, image=IMAGE)
    assert (checked.video_id, checked.credits.quoted, checked.spec.seconds) == ("", PRICE, 6)
    dear = wanted(validate_only=True, max_credits=PRICE - 1)
    assert (await member.refused("CreateVideo", dear)).reason == "PRICE_CHANGED"
    count = "SELECT count(*) FROM videos WHERE account_id = $1"
    assert await world.pool.fetchval(count, member.account_id) == 0
    quote = video_pb2.QuoteVideoRequest(spec=wanted().spec)
    assert (await member.call("QuoteVideo", quote)).credits == PRICE


async def test_bad_requests_say_what_to_do(world: World) -> None:
    member = await world.member()
    for spec, reason in (
        ({"model": "sora-9"}, "MODEL_UNKNOWN"),
        ({"width": 11, "height": 11}, "SIZE_NOT_SUPPORTED"),
        ({"prompt": ""}, "INVALID_FIELD"),
    ):
        request = wanted()
        request.spec.MergeFrom(vocabulary_pb2.VideoSpec(**spec))
        if "prompt" in spec:
            request.spec.prompt = ""
        refused = await member.refused("CreateVideo", request)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    late = wanted()
    late.start_by.seconds = 1
    assert (await member.refused("CreateVideo", late)).reason == "START_BY_PASSED"
    delete = video_pb2.DeleteVideoRequest(video_id="v" * 26)
    assert (await member.refused("DeleteVideo", delete)).reason == "VIDEO_NOT_FOUND"


async def test_keys(world: World) -> None:
    member, request_id = await world.member(), new_id()
    request = account_pb2.CreateApiKeyRequest(request_id=request_id, display_name="ci")
    made = await member.call("CreateApiKey", request)
    again = await member.call("CreateApiKey", request)
    assert (again.key, again.secret) == (made.key, "")
    other = gateway_world.Caller(world.channel, made.secret)
    assert (await other.create()).account_id == member.account_id
    listed = await member.call("ListApiKeys", account_pb2.ListApiKeysRequest())
    assert made.key.key_id in {key.key_id for key in listed.keys if key.HasField("last_used_at")}
    assert made.secret not in str(listed)
    ending = account_pb2.RevokeApiKeyRequest(key_id=made.key.key_id)
    stranger = await world.member()
    assert (await stranger.refused("RevokeApiKey", ending)).code is grpc.StatusCode.NOT_FOUND
    ended = await member.call("RevokeApiKey", ending)
    assert ended == await member.call("RevokeApiKey", ending)
    above = account_pb2.CreateApiKeyRequest(request_id=new_id(), role=account_pb2.ROLE_OPERATOR)
    assert (await member.refused("CreateApiKey", above)).reason == "ROLE_NOT_ALLOWED"
    books = operator_pb2.CheckBooksRequest()
    assert (await member.refused("CheckBooks", books)).reason == "ROLE_NOT_ALLOWED"
    nobody = gateway_world.Caller(world.channel, "fw_" + "x" * 40)
    assert (await nobody.refused("CheckBooks", books)).reason == "CREDENTIALS_INVALID"


async def test_operators_leave_an_audit(world: World) -> None:
    member, request_id = await world.member(), new_id()
    grant = ledger_pb2.GrantRequest(
        account_id=member.account_id, request_id=request_id, credits=5, source=1
    )
    asked = operator_pb2.GrantRequest(grant=grant, why="welcome")
    assert (await world.operator.call("Grant", asked)).lot_id == "l"
    world.behind.refuse[f"Grant {member.account_id}"] = errors.NotFound("ACCOUNT_NOT_FOUND", "no")
    assert (await world.operator.refused("Grant", asked)).reason == "ACCOUNT_NOT_FOUND"
    audit = await world.pool.fetch(
        "SELECT why, outcome FROM audit WHERE account_id = $1 AND method = 'Grant' ORDER BY created_at",
        member.account_id,
    )
    assert [tuple(row) for row in audit] == [("welcome", "OK"), ("welcome", "ACCOUNT_NOT_FOUND")]
    account = operator_pb2.CreateAccountRequest(request_id=request_id, display_name="twice")
    first = await world.operator.call("CreateAccount", account)
    assert await world.operator.call("CreateAccount", account) == first
    assert list(first.lanes) == [vocabulary_pb2.LANE_STANDARD, vocabulary_pb2.LANE_BATCH]
    account.weight = 5
    assert (await world.operator.refused("CreateAccount", account)).reason == "REQUEST_ID_REUSED"
    models = await member.call("ListModels", account_pb2.ListModelsRequest())
    assert [(model.model, model.default_credits) for model in models.models] == [
        ("sora-2", PRICE),
        ("runway-gen4-turbo", PRICE),
        ("sora-1", PRICE),
        ("sora-2-pro", PRICE),
    ]


async def test_uploads_pass_through_and_are_bounded(world: World) -> None:
    member, request_id = await world.member(), new_id()
    header = upload_pb2.UploadImageRequest(
        header=upload_pb2.UploadImageHeader(request_id=request_id)
    )
    chunk = upload_pb2.UploadImageRequest(chunk=b"x" * 2**20)
    image = await member.call("UploadImage", iter([header, chunk, chunk]))
    assert (image.image_id, image.size_bytes) == (IMAGE, 2 * 2**20)
    assert world.behind.calls["Put", f"upload:{request_id}"] == 1
    for parts, reason in (
        ([header, *[chunk] * 11], "TOO_LARGE"),
        ([chunk], "INVALID_FIELD"),
        ([header, header], "INVALID_FIELD"),
    ):
        assert (await member.refused("UploadImage", iter(parts))).reason == reason
    world.behind.refuse[f"Put upload:{request_id}"] = errors.InvalidArgument("NOT_AN_IMAGE", "no")
    refused = await member.refused("UploadImage", iter([header, chunk]))
    assert refused.reason == "NOT_AN_IMAGE"
