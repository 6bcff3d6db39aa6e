"""S3 on bad days: what callers are told, what is left behind, what storage says of it, that it goes on by itself."""

from __future__ import annotations

import asyncio
import hashlib
import re
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from framewire.storage.v1 import storage_pb2 as pb
from kit import errors, ids
from services.storage import parts
from tests import observed, pictures, s3_front
from tests import storage_world as worlds
from tests.storage_world import BODY, VIDEO, World, complete, create, film, incoming, send
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(120)]

STORAGE = Path(__file__).parents[2] / "services" / "storage"
S3_SECONDS = 0.3
ANSWER_SECONDS = 20.0
"""Of any call, whatever S3 does: four tries, then cleaning up, on a busy machine."""
OTHERS_SECONDS = 3.0
"""Of calls that need no S3, meanwhile."""
SETTINGS = {
    "STORAGE_S3_TIMEOUT_SECONDS": f"{S3_SECONDS}",
    "STORAGE_S3_WATCH_SECONDS": "0.1",
}
WRITES = "PUT POST"
AWAY = "DEPENDENCY_UNAVAILABLE"
MAKING = ("put", "large", "fit", "complete")
"""The calls that make an asset."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def bad(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bad]:
    async with (
        s3_front.running() as front,
        worlds.running(tmp_path_factory.mktemp("faults"), front, **SETTINGS) as world,
    ):
        yield Bad(world, front)


@pytest.fixture(autouse=True)
def healed(bad: Bad) -> Any:
    """Each test finds S3 well, and leaves it so."""
    yield
    bad.front.heal()


@dataclass(frozen=True, slots=True)
class Bad:
    """The service, and the front between it and S3."""

    world: World
    front: s3_front.Front

    async def health(self, name: str) -> int:
        options = [("grpc.enable_http_proxy", 0)]
        address = self.world.stack.addresses.listen["storage"]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            request = health_pb2.HealthCheckRequest(service=name)
            return (await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)).status

    async def says(self, *, up: bool) -> bool:
        """By the name s3; of itself it always says SERVING."""
        states = health_pb2.HealthCheckResponse
        assert await self.health("") == states.SERVING
        assert await self.metric("framewire_storage_s3_up") == up
        return await self.health("s3") == (states.SERVING if up else states.NOT_SERVING)

    async def metric(self, name: str, **labels: str) -> float:
        scraped = await observed.scrape(self.world.stack.addresses.metrics_listen["storage"])
        return scraped.values.get((name, frozenset(labels.items())), 0.0)


@dataclass(frozen=True, slots=True)
class Laid:
    """What an account has before S3 turns bad, and the calls that are made then."""

    account: str
    kept: pb.Asset
    doomed: pb.Asset
    calls: dict[str, Callable[[], Awaitable[Any]]]

    async def all_at_once(self) -> dict[str, Any]:
        """What each call gives: an answer, or its error."""
        running = [asyncio.wait_for(call(), ANSWER_SECONDS) for call in self.calls.values()]
        return dict(
            zip(self.calls, await asyncio.gather(*running, return_exceptions=True), strict=True)
        )


async def laid(world: World, tmp_path: Path) -> Laid:
    account, body = ids.new_id(), film(tmp_path / "film.mp4")
    kept = await world.put(account, BODY, owner="kept")
    doomed = await world.put(account, pictures.plain((1, 1, 9)), owner="doomed")
    upload = await create(world, account, owner="upload")
    assert await send(upload.url, upload.headers) == 200
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "put": lambda: world.put(account, body, VIDEO),
        "large": lambda: world.put(account, padded(body, 6_000_000), VIDEO, owner="large"),
        "get": lambda: world.get(kept),
        "fit": lambda: world.fit(kept, 30, 20),
        "complete": lambda: complete(world, account, upload.upload_id),
        "delete": lambda: world.delete(doomed),
    }
    return Laid(account, kept, doomed, calls)


def padded(body: bytes, size_bytes: int) -> bytes:
    """The same film with a box that means nothing behind it: enough of them go to S3 in parts."""
    return body + (size_bytes + 8).to_bytes(4, "big") + b"free" + bytes(size_bytes)


async def others_answer(world: World, one: Laid, until: asyncio.Task[Any]) -> float:
    """Calls that need no S3, for as long as that runs; the slowest of them."""
    slowest = 0.0
    while not until.done():
        began = time.monotonic()
        assert (await world.stat(one.kept)).state == pb.ASSET_STATE_READY
        await world.listed(one.account)
        slowest = max(slowest, time.monotonic() - began)
        await asyncio.wait({until}, timeout=0.02)
    return slowest


async def well_again(bad: Bad, one: Laid) -> None:
    """S3 is well: the same calls give the one asset each, what was deleted goes, nothing is left."""
    bad.front.heal()
    await eventually(lambda: bad.says(up=True), what="storage to say that S3 is back")
    found = await one.all_at_once()
    assert [(name, each) for name, each in found.items() if isinstance(each, Exception)] == []
    again = await one.all_at_once()
    assert again == found
    assert hashlib.sha256(found["get"]).hexdigest() == one.kept.sha256
    for name in MAKING:
        body = await bad.world.get(found[name])
        assert hashlib.sha256(body).hexdigest() == found[name].sha256, name
    await bad.world.pool.execute(
        "UPDATE uploads SET sweep_at = clock_timestamp() WHERE account_id = $1", one.account
    )
    await eventually(lambda: not incoming(bad.world, one.account))
    await worlds.swept(bad.world, one.account)
    assert await unfinished(bad, one.account) == []
    shown = {asset.asset_id for asset in (await bad.world.listed(one.account)).assets}
    made = {found[name].asset_id for name in MAKING}
    posters = {found[name].poster_asset_id for name in ("put", "large")}
    assert shown == made | posters | {one.kept.asset_id}


async def unfinished(bad: Bad, account: str) -> list[str]:
    """Uploads in parts that were begun for the account and that S3 still holds parts of."""
    where = bad.world.stack.addresses
    client = parts.Client(
        where.s3_endpoint, where.s3_access_key, where.s3_secret_key, secure=False,
        region=where.s3_region,
    )  # fmt: skip
    begun = {path.partition("?")[0] for method, path in bad.front.seen
             if method == "POST" and account in path}  # fmt: skip
    assert begun, "the large one goes in parts"
    places = [path.removeprefix("/").split("/", 1) for path in begun]
    found = [await asyncio.to_thread(client.unfinished, bucket, key) for bucket, key in places]
    return [upload for uploads in found for upload in uploads]


def faults(front: s3_front.Front) -> dict[str, tuple[Callable[[Any], object], str]]:
    """By name: what S3 does, and the reason that callers are given."""
    ahead = timedelta(minutes=20)
    return {
        "busy": (front.answer(503, "SlowDown"), AWAY),
        "broken": (front.answer(500, "InternalError"), AWAY),
        "denied": (front.answer(403, "AccessDenied"), AWAY),
        "full": (front.answer(507, "XMinioStorageFull"), "STORE_FULL"),
        "skewed": (front.answer(403, "RequestTimeTooSkewed", date=ahead), "STORE_CLOCK_SKEWED"),
        "garbage": (front.answer(418, "", body=b"\xff\xfe not <xml"), AWAY),
        "bad_xml": (front.answer(400, "", body=b"<Error><Code>"), AWAY),
        "no_bucket": (front.answer(404, "NoSuchBucket"), AWAY),
        "cut": (front.cut, AWAY),
        "stall": (front.stall, AWAY),
    }


NAMES = tuple(faults(s3_front.Front(0)))
READABLE = frozenset({"full"})
"""What keeps S3 from writing only."""


@pytest.mark.parametrize("name", NAMES)
async def test_a_fault_of_s3_is_told_and_leaves_nothing(
    bad: Bad, name: str, tmp_path: Path
) -> None:
    world, one = bad.world, await laid(bad.world, tmp_path)
    do, reason = faults(bad.front)[name]
    methods = WRITES if name in READABLE else s3_front.EVERY
    before = await bad.metric("framewire_storage_s3_failures_total", why=name)
    fault = bad.front.add(do, methods)
    calling = asyncio.create_task(one.all_at_once())
    assert await others_answer(world, one, calling) < OTHERS_SECONDS
    found = await calling
    failing = set(MAKING) if name in READABLE else set(one.calls)
    assert {key for key, each in found.items() if isinstance(each, Exception)} == failing
    for key in failing:
        assert isinstance(found[key], errors.Unavailable), (key, found[key])
        assert found[key].reason == reason, (key, found[key])
        assert found[key].retry_after_seconds, key
    assert fault.struck
    if name in ("full", "skewed"):
        assert await bad.metric("framewire_storage_s3_failures_total", why=name) > before
    await eventually(lambda: bad.says(up=name in READABLE))
    shown = {asset.asset_id for asset in (await world.listed(one.account)).assets}
    assert shown == {one.kept.asset_id}, "nothing half done, and what was deleted is out of sight"
    assert world.scratch() == []
    await well_again(bad, one)


@pytest.mark.parametrize("methods", ["PUT", "POST", "HEAD", "DELETE"])
async def test_one_lost_answer_costs_nobody_anything(
    bad: Bad, methods: str, tmp_path: Path
) -> None:
    """What was asked was done; asked again, by the client of S3 or by our caller, it is done once."""
    one = await laid(bad.world, tmp_path)
    bad.front.add(bad.front.lose, methods, times=1)
    found = await one.all_at_once()
    # The beginning and the end of an upload in parts are not asked again by themselves.
    failing = {"large"} if methods == "POST" else set()
    assert {name for name, each in found.items() if isinstance(each, Exception)} == failing
    assert all(isinstance(found[name], errors.Unavailable) for name in failing)
    await well_again(bad, one)


async def test_answers_that_are_always_lost_leave_nothing(bad: Bad, tmp_path: Path) -> None:
    one = await laid(bad.world, tmp_path)
    bad.front.add(bad.front.lose, WRITES)
    found = await one.all_at_once()
    for name in MAKING:
        assert isinstance(found[name], errors.Unavailable), (name, found[name])
    await well_again(bad, one)


async def test_an_s3_that_says_done_and_did_nothing_is_not_believed(
    bad: Bad, tmp_path: Path
) -> None:
    one = await laid(bad.world, tmp_path)
    fault = bad.front.add(bad.front.swallow, "PUT")
    found = await one.all_at_once()
    for name in MAKING:
        assert isinstance(found[name], errors.Unavailable), (name, found[name])
    assert fault.struck
    shown = {asset.asset_id for asset in (await bad.world.listed(one.account)).assets}
    assert shown == {one.kept.asset_id}
    await well_again(bad, one)


async def test_an_object_that_is_cut_short_is_never_whole(bad: Bad, tmp_path: Path) -> None:
    """Less than was stored ends in an error, not in an answer, for readers and for what is made of it."""
    one = await laid(bad.world, tmp_path)
    assert one.kept.size_bytes > 700
    bad.front.add(bad.front.halve, "GET", path="/framewire-inputs/")
    found = await one.all_at_once()
    for name in ("get", "fit", "complete"):
        assert isinstance(found[name], errors.Unavailable), (name, found[name])
    await well_again(bad, one)


async def test_slow_bytes_come_through_and_hold_nobody_up(bad: Bad, tmp_path: Path) -> None:
    one = await laid(bad.world, tmp_path)
    bad.front.add(bad.front.drip(8, 0.05), "GET")
    calling = asyncio.create_task(one.all_at_once())
    assert await others_answer(bad.world, one, calling) < OTHERS_SECONDS
    found = await calling
    assert [(name, each) for name, each in found.items() if isinstance(each, Exception)] == []
    assert hashlib.sha256(found["get"]).hexdigest() == one.kept.sha256
    await well_again(bad, one)


async def test_an_upload_that_s3_gives_back_too_slowly_is_not_the_callers_fault(
    bad: Bad, tmp_path: Path
) -> None:
    """No answer takes as long as S3 may take; all of them together take longer than a sender may pause."""
    one = await laid(bad.world, tmp_path)
    slow = bad.front.drip(8, S3_SECONDS * 0.8)
    bad.front.add(slow, "GET", path="/framewire-inputs/incoming/")
    with worlds.refused(errors.Unavailable, AWAY):
        await one.calls["complete"]()
    await well_again(bad, one)


async def test_more_stalled_reads_than_threads_hold_up_only_those_who_read(
    bad: Bad, tmp_path: Path
) -> None:
    world, one = bad.world, await laid(bad.world, tmp_path)
    bad.front.add(bad.front.stall, "GET", path="/framewire-inputs/.+/")
    reading = [asyncio.create_task(world.get(one.kept)) for _ in range(40)]
    all_of_them = asyncio.gather(*reading, return_exceptions=True)
    slowest = 0.0
    for _ in range(10):
        began = time.monotonic()
        assert (await world.stat(one.kept)).asset_id == one.kept.asset_id
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < OTHERS_SECONDS
    assert await bad.says(up=True), "the look at S3 does not wait for them"
    bad.front.heal()
    bodies = await all_of_them
    assert len(bodies) == 40
    for body in bodies:
        if not isinstance(body, bytes):
            assert isinstance(body, errors.Unavailable), body
    await well_again(bad, one)


async def test_storage_starts_while_s3_is_away(bad: Bad, tmp_path: Path) -> None:
    """What needs no S3 is answered, the rest is told that it is away; nobody has to start it again."""
    world, one = bad.world, await laid(bad.world, tmp_path)
    bad.front.add(bad.front.cut)
    await world.stack.supervisor.restart("storage")

    async def answers() -> bool:
        try:
            return (await world.stat(one.kept)).asset_id == one.kept.asset_id
        except errors.Unavailable:  # the channel has not connected again
            return False

    await eventually(answers)
    await eventually(lambda: bad.says(up=False))
    with worlds.refused(errors.Unavailable, AWAY):
        await world.get(one.kept)
    await well_again(bad, one)


async def test_what_was_deleted_while_s3_was_away_goes_by_itself(bad: Bad, tmp_path: Path) -> None:
    world, one = bad.world, await laid(bad.world, tmp_path)
    bad.front.add(bad.front.cut)
    with worlds.refused(errors.Unavailable, AWAY):
        await world.delete(one.doomed)
    with worlds.refused(errors.NotFound, "ASSET_NOT_FOUND"):
        await world.stat(one.doomed)
    assert len(world.objects(one.account)) == 2
    bad.front.heal()
    await eventually(lambda: len(world.objects(one.account)) == 1, what="the sweeper to remove it")
    assert (await world.delete(one.doomed)).state == pb.ASSET_STATE_DELETED


async def test_objects_that_cannot_be_removed_do_not_keep_the_others(bad: Bad) -> None:
    world, account = bad.world, ids.new_id()
    made = [await world.put(account, BODY, owner=f"{index}") for index in range(6)]
    ordered = sorted(made, key=lambda asset: asset.asset_id)
    held, others = ordered[:3], ordered[3:]
    fault = bad.front.add(
        bad.front.answer(403, "AccessDenied"), "DELETE", "|".join(one.asset_id for one in held)
    )
    erase = pb.EraseAccountRequest(account_id=account)
    assert (await world.stub.EraseAccount(erase, timeout=5)).still_needed == 0
    await eventually(lambda: len(world.objects(account)) == len(held))
    kept = {key for key in world.objects(account) if any(one.asset_id in key for one in held)}
    assert len(kept) == len(held) == len(others) == 3
    await eventually(lambda: fault.struck)
    bad.front.heal()
    await eventually(lambda: world.objects(account) == set())


async def test_a_lost_bucket_is_not_taken_for_lost_objects(bad: Bad, tmp_path: Path) -> None:
    """A wrong name or another server behind it: the scrub must not put every asset out of sight."""
    world, one = bad.world, await laid(bad.world, tmp_path)
    fault = bad.front.add(bad.front.answer(404, "NoSuchBucket"))
    await world.pool.execute(
        "UPDATE assets SET scrubbed_at = '-infinity' WHERE asset_id = $1", one.kept.asset_id
    )
    path = f"/framewire-inputs/{one.account}/{one.kept.asset_id}"
    await eventually(lambda: any(path in seen for _, seen in bad.front.seen), what="the scrub")
    await eventually(lambda: fault.struck > 20)
    assert (await world.stat(one.kept)).state == pb.ASSET_STATE_READY
    await well_again(bad, one)


async def test_a_bucket_that_comes_back_has_kept_what_was_to_be_removed(bad: Bad) -> None:
    """It is away for the removal and for the look after it: the object is not taken for removed."""
    world, account = bad.world, ids.new_id()
    asset = await world.put(account, BODY)
    for methods in ("DELETE", "HEAD"):
        bad.front.add(bad.front.answer(404, "NoSuchBucket"), methods, asset.asset_id, times=1)
    erase = pb.EraseAccountRequest(account_id=account)
    assert (await world.stub.EraseAccount(erase, timeout=5)).still_needed == 0
    await eventually(lambda: world.objects(account) == set())


async def test_the_clock_that_counts_is_the_databases(bad: Bad, tmp_path: Path) -> None:
    """S3's clock is a day ahead of ours and says so in each answer: nothing ends for it, and operators see it."""
    world, one = bad.world, await laid(bad.world, tmp_path)
    kinds = [pb.KindRetention(kind=pb.ASSET_KIND_INPUT_IMAGE, keep_seconds=3600)]
    asked = pb.SetRetentionRequest(account_id=one.account, kinds=kinds)
    await world.stub.SetRetention(asked, timeout=5)
    short = await world.put(one.account, BODY, owner="an hour")
    over = await world.put(one.account, BODY, owner="over")
    now = await world.pool.fetchval("SELECT clock_timestamp()")
    left = short.expires_at.ToDatetime(now.tzinfo) - now
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    ahead = timedelta(days=1)
    bad.front.add(bad.front.answer(403, "RequestTimeTooSkewed", date=ahead), "HEAD")

    async def shown() -> bool:
        skew = await bad.metric("framewire_storage_clock_skew_seconds")
        return abs(skew - ahead.total_seconds()) < 60

    await eventually(shown)
    query = "UPDATE assets SET expires_at = clock_timestamp() WHERE asset_id = $1"
    await world.pool.execute(query, over.asset_id)

    async def hidden() -> bool:
        state = "SELECT state FROM assets WHERE asset_id = $1"
        return await world.pool.fetchval(state, over.asset_id) != "READY"

    await eventually(hidden, what="a pass of the retention loop")
    assert (await world.stat(short)).state == pb.ASSET_STATE_READY
    bad.front.heal()
    await world.delete(short)
    await well_again(bad, one)


def test_no_clock_of_this_host_decides_how_long_anything_is_kept() -> None:
    """It signs requests with it, compares it with S3's, and sees at its start whether a certificate has ended."""
    reads = re.compile(r"time\.time\(|datetime\.now\(|utcnow|\.today\(")
    found = {path.name for path in STORAGE.rglob("*.py") if reads.search(path.read_text())}
    assert found == {"blobs.py", "troubles.py", "signer.py"}


async def test_a_full_disk_here_is_told_and_leaves_nothing(bad: Bad, tmp_path: Path) -> None:
    """The bound of a process stands for the end of the disk: what is received does not fit."""
    world, account = bad.world, ids.new_id()
    padding = 6_000_000
    large = padded(film(tmp_path / "film.mp4"), padding)
    process = psutil.Process(world.stack.supervisor.get("storage").pid)
    _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (4_000_000, hard))
    try:
        with worlds.refused(errors.Unavailable, AWAY) as refusal:
            await world.put(account, large, VIDEO)
        assert "disk" in refusal.value.message
        await world.nothing(account)
        assert world.scratch() == []
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    made = await world.put(account, large, VIDEO)
    assert hashlib.sha256(await world.get(made)).hexdigest() == made.sha256
    assert made.size_bytes > padding
