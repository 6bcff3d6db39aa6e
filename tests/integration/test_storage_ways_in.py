"""Images that do not come through a Put: what clients PUT into S3 themselves, and what is fetched from URLs."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from framewire.storage.v1 import storage_pb2 as pb
from kit import errors, ids
from tests import picture_server
from tests.storage_world import (
    BODY,
    World,
    complete,
    create,
    incoming,
    opened,
    refused,
    send,
    world,
)
from tests.waiting import eventually

__all__ = ["world"]  # fixture


async def fetch(world: World, account: str, url: str, owner: str = "one") -> pb.Asset:
    request = pb.ImportRequest(account_id=account, owner=owner, url=url)
    return await world.stub.Import(request, timeout=30)


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[str]:
    with picture_server.serving(world.data_dir) as address:
        yield address


async def test_what_is_put_to_the_url_becomes_an_image(world: World) -> None:
    account = ids.new_id()
    made = await create(world, account)
    again = await create(world, account)
    assert again.upload_id == made.upload_id
    with refused(errors.FailedPrecondition, "UPLOAD_INCOMPLETE"):
        await complete(world, account, made.upload_id)
    assert await send(again.url, again.headers) == 200
    image = await complete(world, account, made.upload_id)
    assert (image.asset_id, image.media_type, image.width) == (made.upload_id, "image/jpeg", 320)
    assert image.source_sha256 == hashlib.sha256(BODY).hexdigest()
    assert opened(await world.get(image)).size == (320, 180)
    assert await complete(world, account, made.upload_id) == image
    assert incoming(world, account) == []
    await world.clean(account)


async def test_s3_refuses_what_was_not_announced(world: World) -> None:
    account = ids.new_id()
    made = await create(world, account)
    larger = {**made.headers, "content-length": str(len(BODY) + 1)}
    assert await send(made.url, larger, BODY + b"x") == 403
    assert await send(made.url, {**made.headers, "content-type": "text/html"}) == 403
    moved = made.url.replace(made.upload_id, ids.new_id())
    assert await send(moved, made.headers) == 403
    assert incoming(world, account) == []


async def test_bytes_that_are_no_image_leave_nothing_and_the_url_stays_good(world: World) -> None:
    account, wrong = ids.new_id(), b"x" * len(BODY)
    made = await create(world, account)
    assert await send(made.url, made.headers, wrong) == 200
    with refused(errors.InvalidArgument, "NOT_AN_IMAGE"):
        await complete(world, account, made.upload_id)
    assert incoming(world, account) == []
    await eventually(lambda: world.nothing(account))
    assert await send(made.url, made.headers) == 200
    assert (await complete(world, account, made.upload_id)).state == pb.ASSET_STATE_READY


async def test_an_object_of_another_size_is_not_taken(world: World) -> None:
    # An S3 that does not hold clients to the signed length.
    account = ids.new_id()
    made = await create(world, account)
    key = made.url.partition("/framewire-inputs/")[2].partition("?")[0]
    path = world.data_dir / "other"
    path.write_bytes(BODY + b"x")
    await asyncio.to_thread(world.s3.fput_object, "framewire-inputs", key, str(path))
    with refused(errors.InvalidArgument, "CHECKSUM_MISMATCH"):
        await complete(world, account, made.upload_id)
    assert incoming(world, account) == []
    await eventually(lambda: world.nothing(account))


async def test_one_id_is_one_upload_of_one_account(world: World) -> None:
    account = ids.new_id()
    made = await create(world, account)
    with refused(errors.AlreadyExists, "REQUEST_ID_REUSED"):
        await create(world, account, len(BODY) + 1)
    with refused(errors.NotFound, "UPLOAD_NOT_FOUND"):
        await complete(world, ids.new_id(), made.upload_id)
    with refused(errors.NotFound, "UPLOAD_NOT_FOUND"):
        await complete(world, account, ids.new_id())
    with refused(errors.InvalidArgument, "TOO_LARGE"):
        await create(world, account, 200_001, "large")
    with refused(errors.InvalidArgument, "INVALID_FIELD"):
        await world.stub.CreateUpload(
            pb.CreateUploadRequest(
                account_id=account, owner="svg", size_bytes=9, media_type="image/svg+xml"
            )
        )


async def test_what_is_not_completed_in_time_is_removed(world: World) -> None:
    account = ids.new_id()
    made = await create(world, account)
    assert await send(made.url, made.headers) == 200
    assert len(incoming(world, account)) == 1
    await world.pool.execute(
        "UPDATE uploads SET sweep_at = clock_timestamp() WHERE upload_id = $1", made.upload_id
    )
    await eventually(lambda: not incoming(world, account), what="the sweeper to remove it")
    with refused(errors.NotFound, "UPLOAD_NOT_FOUND"):
        await complete(world, account, made.upload_id)


@pytest.mark.parametrize("name", ["picture.jpg", "once", "picture.jpg?size=large"])
async def test_an_image_is_fetched(world: World, server: str, name: str) -> None:
    account = ids.new_id()
    image = await fetch(world, account, f"{server}/{name}")
    assert image.source_sha256 == hashlib.sha256(picture_server.PICTURE).hexdigest()
    assert opened(await world.get(image)).size == (320, 180)
    assert await fetch(world, account, f"{server}/{name}") == image
    with refused(errors.AlreadyExists, "REQUEST_ID_REUSED"):
        await fetch(world, account, f"{server}/other")
    await world.clean(account)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("missing", errors.FailedPrecondition, "IMPORT_FAILED"),
        ("around", errors.FailedPrecondition, "IMPORT_FAILED"),
        ("nowhere", errors.FailedPrecondition, "IMPORT_FAILED"),
        ("cut", errors.FailedPrecondition, "IMPORT_FAILED"),
        ("silent", errors.FailedPrecondition, "IMPORT_FAILED"),
        ("slow", errors.FailedPrecondition, "IMPORT_FAILED"),
        ("inside", errors.InvalidArgument, "URL_NOT_ALLOWED"),
        ("plain", errors.InvalidArgument, "URL_NOT_ALLOWED"),
        ("page", errors.InvalidArgument, "NOT_AN_IMAGE"),
        ("huge", errors.InvalidArgument, "TOO_LARGE"),
        ("endless", errors.InvalidArgument, "TOO_LARGE"),
    ],
)
async def test_what_cannot_be_fetched_leaves_nothing(
    world: World, server: str, name: str, kind: Any, reason: str
) -> None:
    account = ids.new_id()
    with refused(kind, reason):
        await fetch(world, account, f"{server}/{name}")
    await eventually(lambda: world.nothing(account))
    # A refusal does not bind the id.
    assert (await fetch(world, account, f"{server}/picture.jpg")).state == pb.ASSET_STATE_READY


async def test_only_who_the_certificate_names_is_believed(world: World, server: str) -> None:
    account = ids.new_id()
    with refused(errors.FailedPrecondition, "IMPORT_FAILED"):
        await fetch(world, account, server.replace("127.0.0.1", "127.0.0.2") + "/picture.jpg")
    for url in ("https://10.0.0.1/a.jpg", "https://[::1]/a.jpg", "http://127.0.0.1/a.jpg"):
        with refused(errors.InvalidArgument, "URL_NOT_ALLOWED"):
            await fetch(world, account, url)
    await eventually(lambda: world.nothing(account))
