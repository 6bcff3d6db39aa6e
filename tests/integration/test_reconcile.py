"""Reconciliation on a whole system: nothing on a healthy one, exactly what was planted, nothing after its repair."""

from __future__ import annotations

import asyncio
import io
import json
import urllib.request
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import minio
import nats
import pytest
import pytest_asyncio

from framewire import client as clients
from framewire import errors, reconciliation, subjects, types
from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import operator_pb2
from kit import auth, ids
from tests import pictures
from tests import system as systems
from tests.waiting import eventually

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

TINY = {"model": "sora-2", "width": 320, "height": 180, "seconds": 1}
INTERVAL = 1.0
BUCKET = "framewire-outputs"
SERVICES = ("gateway", "credits", "generator", "storage")
# What heals by itself is put off, so that it is there to be found.
PUT_OFF = {
    "gateway": {
        "GATEWAY_RECONCILE_INTERVAL_SECONDS": str(INTERVAL),
        "GATEWAY_SWEEP_UNACCEPTED_SECONDS": "3600",
        "GATEWAY_SWEEP_OVERDUE_SECONDS": "3600",
    },
    "credits": {"CREDITS_HOLD_OVERDUE_SECONDS": "3600"},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    """A system in which nothing heals by itself."""
    async with systems.running(tmp_path_factory.mktemp("reconcile"), PUT_OFF) as running:
        yield running


def prompt(text: str) -> str:
    return f"{text} {uuid.uuid4().hex}"


async def reconciled(system: systems.System) -> reconciliation.Reconciliation:
    """One pass."""
    found = await system.operator.operations.reconcile()
    assert [side for side in found.done.sides if side.error] == []
    return found


async def confirmed(system: systems.System, count: int) -> dict[str, reconciliation.Finding]:
    """Passes until so many findings are confirmed, and no other is left; by kind."""

    async def all_of_them() -> tuple[reconciliation.Finding, ...]:
        found = (await reconciled(system)).findings
        said = [(one.kind, one.video_id, one.confirmed, one.statements) for one in found]
        assert len(found) == count, said
        assert all(one.confirmed for one in found), said
        return found or (_NOTHING,)

    found = await eventually(all_of_them, every_seconds=0.3)
    return {} if found == (_NOTHING,) else {one.kind: one for one in found}


_NOTHING = reconciliation.Finding("", "", "", "", "", (), "", "", None, None, True)


def s3(system: systems.System) -> minio.Minio:
    places = system.stack.addresses
    return minio.Minio(
        places.s3_endpoint,
        access_key=places.s3_access_key,
        secret_key=places.s3_secret_key,
        secure=False,
        region=places.s3_region,
    )


async def object_key(system: systems.System, asset_id: str) -> str:
    async with system.database("storage") as database:
        return await database.fetchval(
            "SELECT object_key FROM assets WHERE asset_id = $1", asset_id
        )


async def purge(system: systems.System, stream: str, subject: str) -> None:
    """The bus loses what it has under a subject."""
    connection = await nats.connect(system.stack.addresses.nats_url)
    try:
        await connection.jetstream().purge_stream(stream, subject=subject)
    finally:
        await connection.close()


async def in_state(client: clients.Client, video_id: str, state: str) -> None:
    async def there() -> bool:
        return (await client.get_video(video_id)).state == state

    await eventually(there, every_seconds=0.1)


async def lost_settlement(system: systems.System, client: clients.Client) -> str:
    """A video whose terminal event the bus loses while credits is away."""
    video = await client.create_video(prompt("[slow] nobody settles"), **TINY)
    await system.supervisor.stop("credits")
    await in_state(client, video.video_id, "COMPLETED")
    await purge(system, "EVENTS", subjects.event_subject(client.account_id, "completed"))
    await system.supervisor.start("credits")
    return video.video_id


async def lost_job(system: systems.System, client: clients.Client) -> str:
    """A video whose job the bus loses while the generator is away."""
    await system.supervisor.stop("generator")
    video = await client.create_video(prompt("nobody rings"), **TINY)
    await purge(system, "JOBS", subjects.JOBS_SUBJECT)
    await system.supervisor.start("generator")
    return video.video_id


async def stray_hold(system: systems.System, account_id: str) -> str:
    """Credits that are held for no video."""
    secret = system.stack.addresses.service_token_secret
    headers = auth.ServiceTokens("gateway", secret).headers()
    item = ledger_pb2.Item(
        model="sora-2", width=320, height=180, seconds=1, variants=1, lane=vocabulary_pb2.LANE_STANDARD
    )  # fmt: skip
    request = ledger_pb2.ReserveRequest(hold_id=ids.new_id(), account_id=account_id, item=item)
    request.not_after.GetCurrentTime()
    request.not_after.seconds += 60
    async with grpc.aio.insecure_channel(system.stack.addresses.listen["credits"]) as channel:
        stub = ledger_pb2_grpc.LedgerServiceStub(channel)
        hold = await stub.Reserve(request, metadata=tuple(headers.items()), timeout=10)
    return hold.hold_id


async def stray_job(system: systems.System) -> str:
    """A job at the provider that was sent by nobody here."""
    places = system.stack.addresses
    body = {"model": "sora-2", "prompt": prompt("a stranger"), "size": "320x180", "seconds": "1"}

    def send() -> Any:
        request = urllib.request.Request(
            f"{places.provider_base_url}/videos", data=json.dumps(body).encode()
        )
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {places.provider_api_key}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    return (await asyncio.to_thread(send))["id"]


async def test_a_healthy_system_has_no_findings(system: systems.System) -> None:
    async with await system.account(100) as client:
        image = await client.upload_image(pictures.plain((30, 160, 30)))
        await client.generate(prompt("from an image"), **{**TINY, "image_id": image.image_id})
        await client.generate(prompt("from text"), rendition_heights=[90], **TINY)
        with pytest.raises(errors.FramewireError):
            await client.generate(prompt("[fault:moderated_now] refused"), **TINY)
        cancelled = await client.create_video(prompt("cancelled"), **TINY)
        await client.cancel_video(cancelled.video_id)
        await system.quiet()
        await confirmed(system, 0)
        found = await reconciled(system)
    assert found.findings == ()
    assert found.done.videos == 4
    assert found.done.objects >= 5, "two outputs, their posters, and a smaller version"
    assert found.done.provider_jobs >= 2
    sides = {side.side for side in found.done.sides}
    assert sides >= {*SERVICES, "provider main"}
    assert found.done.interval_seconds == INTERVAL


@dataclass(frozen=True, slots=True)
class Planted:
    """What was done behind the services' backs."""

    damaged: types.Video
    key: str
    film: bytes
    behind: str
    unsettled: str
    pinned: str
    held: str
    unheard: str
    stray: str
    job: str

    def findings(self) -> dict[str, tuple[str, str, str]]:
        """Kind to (video, subject, repair)."""
        return {
            "OUTPUT_OBJECT_MISSING": (
                self.damaged.video_id,
                self.damaged.outputs[0].asset_id,
                "NONE",
            ),
            "VIDEO_BEHIND": (self.behind, "", "PROJECT_VIDEO"),
            "SETTLEMENT_NOT_SHOWN": (self.unsettled, "", "PROJECT_SETTLEMENT"),
            "PIN_AFTER_END": (self.pinned, "", "UNPIN"),
            "HOLD_OPEN_AFTER_END": (self.held, "", "SETTLE_HOLD"),
            "VIDEO_UNKNOWN_TO_GENERATOR": (self.unheard, "", "RING_JOB"),
            "HOLD_WITHOUT_VIDEO": (self.stray, "", "RELEASE_HOLD"),
            "PROVIDER_JOB_UNKNOWN": ("", f"main/{self.job}", "NONE"),
        }


async def plant(
    system: systems.System, client: clients.Client, outputs: Sequence[types.Video]
) -> Planted:
    """Eight real differences."""
    damaged, behind, unsettled, pinned = outputs
    key = await object_key(system, damaged.outputs[0].asset_id)
    film = s3(system).get_object(BUCKET, key).data
    s3(system).remove_object(BUCKET, key)
    async with system.database("gateway") as database:
        await database.execute(
            """
            UPDATE videos SET state = 'PROCESSING', stage = 'RENDERING', outputs = '',
                finished_at = NULL, next_check_at = clock_timestamp() + interval '1 hour'
            WHERE video_id = $1
            """,
            behind.video_id,
        )
        await database.execute(
            """
            UPDATE videos SET settlement = 'PENDING', captured_credits = 0, released_credits = 0
            WHERE video_id = $1
            """,
            unsettled.video_id,
        )
    async with system.database("storage") as database:
        await database.execute(
            "INSERT INTO pins (asset_id, owner, account_id) VALUES ($1, $2, $3)",
            pinned.spec.input_image_id,
            pinned.video_id,
            client.account_id,
        )
    return Planted(
        damaged,
        key,
        film,
        behind.video_id,
        unsettled.video_id,
        pinned.video_id,
        await lost_settlement(system, client),
        await lost_job(system, client),
        await stray_hold(system, client.account_id),
        await stray_job(system),
    )


async def refused(system: systems.System, finding: reconciliation.Finding, reason: str) -> None:
    """A repair is not made."""
    with pytest.raises(errors.FramewireError) as caught:
        await system.operator.operations.repair(finding.finding_id)
    assert caught.value.reason == reason


async def test_exactly_what_was_planted_is_found_and_repaired(system: systems.System) -> None:
    async with await system.account(200) as client:
        outputs = [await client.generate(prompt("to be damaged"), **TINY) for _ in range(3)]
        image = await client.upload_image(pictures.plain((160, 30, 30)))
        fields = {**TINY, "image_id": image.image_id}
        outputs.append(await client.generate(prompt("pinned"), **fields))
        await system.quiet()
        await confirmed(system, 0)  # the input's own pin has gone by itself
        planted = await plant(system, client, outputs)

        first = (await reconciled(system)).findings
        assert len(first) == 8
        assert not any(one.confirmed for one in first)
        await refused(system, first[0], "FINDING_NOT_CONFIRMED")
        found = await confirmed(system, 8)
        assert {
            kind: (one.video_id, one.subject, one.repair) for kind, one in found.items()
        } == planted.findings()
        said = [said for one in found.values() for said in one.statements]
        assert {one.side for one in said} == {*SERVICES, "provider main"}
        assert all(one.as_of for one in said)
        await refused(system, found["PROVIDER_JOB_UNKNOWN"], "NO_REPAIR")

        repairable = [one for one in found.values() if one.is_repairable]
        assert len(repairable) == 6
        for one in repairable:
            await system.operator.operations.repair(one.finding_id, why="planted")
        for one in repairable:  # it looks again first: the second time there is nothing to do
            if one.repair != "RING_JOB":  # the generator may not have heard it yet
                await refused(system, one, "FINDING_NOT_FOUND")
        await in_state(client, planted.unheard, "COMPLETED")
        await system.quiet()
        left = await confirmed(system, 2)
        assert set(left) == {"OUTPUT_OBJECT_MISSING", "PROVIDER_JOB_UNKNOWN"}
        s3(system).put_object(BUCKET, planted.key, io.BytesIO(planted.film), len(planted.film))
        assert set(await confirmed(system, 1)) == {"PROVIDER_JOB_UNKNOWN"}
        again = [await client.get_video(one.video_id) for one in outputs]
        assert [(one.credits, one.outputs) for one in again] == [
            (one.credits, one.outputs) for one in outputs
        ]
        balance = await client.balance()
    assert (balance.held_credits, (await system.check_books()).balanced) == (0, True)
    assert balance.available_credits == 200 - 6 * outputs[0].credits.captured
    await audited(system, repairable)


async def audited(system: systems.System, repaired: Sequence[reconciliation.Finding]) -> None:
    """Each repair has its row."""
    async with system.database("gateway") as database:
        audit = await database.fetch(
            "SELECT outcome, detail FROM audit WHERE method = 'Repair' AND why = 'planted'"
        )
    assert sorted(json.loads(row["detail"])["finding_id"] for row in audit) == sorted(
        one.finding_id for one in repaired
    )
    assert {row["outcome"] for row in audit} == {"OK"}


async def test_a_provider_that_does_not_answer_leaves_what_was_found_of_it(
    system: systems.System,
) -> None:
    await stray_job(system)
    before = (await reconciled(system)).findings
    jobs = {one.finding_id for one in before if one.kind == "PROVIDER_JOB_UNKNOWN"}
    assert jobs
    await system.supervisor.stop("simulator")
    try:
        found = await system.operator.operations.reconcile()
    finally:
        await system.supervisor.start("simulator")
    assert {side.side for side in found.done.sides if side.error} >= {"provider main"}
    assert [one for one in found.findings if one.finding_id in jobs] == []
    async with system.database("gateway") as database:
        kept = await database.fetch("SELECT finding_id FROM findings")
    assert jobs <= {row["finding_id"] for row in kept}


async def test_bad_requests_are_refused(system: systems.System) -> None:
    ask = system.operator.operations
    with pytest.raises(errors.FramewireError) as caught:
        await ask.repair(ids.new_id())
    assert caught.value.reason == "FINDING_NOT_FOUND"
    stub = ask._stub
    metadata = (("authorization", f"Bearer {system.stack.operator_key}"),)
    late = operator_pb2.ReconcileRequest()
    late.since.GetCurrentTime()
    late.since.seconds += 3600
    early = operator_pb2.ReconcileRequest()
    early.since.GetCurrentTime()
    early.since.seconds -= 40 * 86400
    for request in (late, early):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [part async for part in stub.Reconcile(request, metadata=metadata, timeout=20)]
        assert errors.from_rpc(refused.value).reason == "INVALID_FIELD"
    async with await system.account(0) as member:
        with pytest.raises(errors.FramewireError) as caught:
            await member.operations.reconcile()
    assert caught.value.reason == "ROLE_NOT_ALLOWED"
