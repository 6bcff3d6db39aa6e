"""Every call of storage with the id of another account's: as if there were no such thing, and nothing happens.

The calls are walked as the contract lists them, so that a new one cannot be forgotten.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from framewire.storage.v1 import storage_pb2 as pb
from kit import errors, ids
from tests import picture_server, pictures
from tests.storage_world import BODY, VIDEO, World, create, film, refused, send, world

__all__ = ["world"]

METHODS = {
    method.name: method for method in pb.DESCRIPTOR.services_by_name["StorageService"].methods
}
NAMING = ("asset_id", "upload_id")
BY_ID = [
    name for name, method in METHODS.items()
    if any(field in method.input_type.fields_by_name for field in NAMING)
]  # fmt: skip
ALSO = {
    "width": 10,
    "height": 10,
    "owner": "v",
    "pin_owner": "v",
    "keep_seconds": 10,
}
"""What is filled in beside the ids, wherever a request has it."""


async def belongings(world: World, account: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of an account, and its objects."""
    found: dict[str, list[tuple[Any, ...]]] = {
        "objects": [(key,) for key in world.objects(account)]
    }
    for table in ("assets", "pins", "uploads", "retention"):
        rows = await world.pool.fetch(f"SELECT * FROM {table} WHERE account_id = $1", account)
        found[table] = sorted(tuple(map(str, row.values())) for row in rows)
    found["objects"].sort()
    return found


async def ask(stub: Any, name: str, account: str, named: str) -> None:
    """The call `name`, by whoever `stub` is, about a thing that the account is said to have."""
    kind = METHODS[name].input_type
    fields = {field: value for field, value in ALSO.items() if field in kind.fields_by_name}
    fields |= {field: named for field in NAMING if field in kind.fields_by_name}
    request = getattr(pb, kind.name)(account_id=account, **fields)
    answer = getattr(stub, name)(request, timeout=10)
    if METHODS[name].server_streaming:
        async for _ in answer:
            pass
    else:
        await answer


async def owned(world: World, account: str, tmp_path: Path) -> dict[str, str]:
    """An id of the account's for each state and kind of an asset, and of an upload."""
    video = await world.put(account, film(tmp_path / "a.mp4"), VIDEO, owner="made")
    made = {
        "READY": await world.put(account, BODY),
        "QUARANTINED": await world.put(account, BODY, owner="aside"),
        "DELETED": await world.put(account, BODY, owner="deleted"),
        "video": video,
        "poster": pb.Asset(asset_id=video.poster_asset_id),
        "UPLOADING": pb.Asset(asset_id=ids.new_id()),
    }
    await world.delete(made["DELETED"])
    await world.pool.execute(
        "UPDATE assets SET state = 'QUARANTINED' WHERE asset_id = $1", made["QUARANTINED"].asset_id
    )
    await world.pool.execute(
        """
        INSERT INTO assets (asset_id, account_id, owner, kind, variant, state)
        VALUES ($1, $2, 'under way', 'INPUT_IMAGE', 0, 'UPLOADING')
        """,
        made["UPLOADING"].asset_id,
        account,
    )
    upload = await create(world, account, owner="announced")
    assert await send(upload.url, upload.headers) == 200
    return {name: one.asset_id for name, one in made.items()} | {"upload": upload.upload_id}


async def test_what_another_account_has_is_not_found(world: World, tmp_path: Path) -> None:
    account, other = ids.new_id(), ids.new_id()
    mine = await owned(world, account, tmp_path)
    before = await belongings(world, account)
    assert len(BY_ID) >= 9
    for name in BY_ID:
        answered = 0
        for stub in (world.stub, world.generator):
            for who, named in [(other, one) for one in mine.values()] + [(account, ids.new_id())]:
                try:
                    with refused(errors.NotFound, "ASSET_NOT_FOUND", "UPLOAD_NOT_FOUND"):
                        await ask(stub, name, who, named)
                    answered += 1
                except errors.PermissionDenied:
                    break  # of a caller who may not call this at all
        assert answered, f"{name}: nobody may call it, or it is asked wrongly"
    assert await belongings(world, account) == before
    assert await world.nothing(other)


async def put(world: World, other: str) -> None:
    """The same owner in another account is another asset."""
    assert (await world.put(other, BODY)).account_id == other


async def create_upload(world: World, other: str) -> None:
    assert (await create(world, other, owner="announced")).upload_id


async def import_(world: World, other: str) -> None:
    with picture_server.serving(world.data_dir) as address:
        request = pb.ImportRequest(account_id=other, owner="one", url=f"{address}/image.jpg")
        await world.stub.Import(request, timeout=10)


async def unpin(world: World, other: str) -> None:
    assert await world.unpin(other, "video") == 0


async def list_(world: World, other: str) -> None:
    for state in (pb.ASSET_STATE_READY, pb.ASSET_STATE_QUARANTINED):
        assert not (await world.listed(other, state=state)).assets


async def set_retention(world: World, other: str) -> None:
    kinds = [pb.KindRetention(kind=pb.ASSET_KIND_INPUT_IMAGE, keep_seconds=1)]
    request = pb.SetRetentionRequest(account_id=other, kinds=kinds)
    assert (await world.stub.SetRetention(request, timeout=5)).account_id == other


async def get_usage(world: World, other: str) -> None:
    assert not (await world.stub.GetUsage(pb.GetUsageRequest(account_id=other), timeout=5)).kinds


async def erase_account(world: World, other: str) -> None:
    request = pb.EraseAccountRequest(account_id=other)
    assert (await world.stub.EraseAccount(request, timeout=5)).still_needed == 0


async def survey_assets(world: World, other: str) -> None:
    """Of all accounts by design: for the gateway's reconciliation, and for nobody else."""
    request = pb.SurveyAssetsRequest(asset_ids=[ids.new_id()])
    with refused(errors.PermissionDenied, "ROLE_NOT_ALLOWED"):
        await world.generator.SurveyAssets(request, timeout=5)
    assert not (await world.stub.SurveyAssets(request, timeout=5)).assets


async def survey_pins(world: World, other: str) -> None:
    """As SurveyAssets."""
    with refused(errors.PermissionDenied, "ROLE_NOT_ALLOWED"):
        await world.generator.SurveyPins(pb.SurveyPinsRequest(), timeout=5)


OTHERS: dict[str, Callable[[World, str], Awaitable[None]]] = {
    "Put": put,
    "CreateUpload": create_upload,
    "Import": import_,
    "Unpin": unpin,
    "List": list_,
    "SetRetention": set_retention,
    "GetUsage": get_usage,
    "EraseAccount": erase_account,
    "SurveyAssets": survey_assets,
    "SurveyPins": survey_pins,
}
"""The calls that name no single thing: what each does in another account than the one that has everything."""


def test_every_call_is_asked() -> None:
    assert {*BY_ID, *OTHERS} == METHODS.keys()
    assert not set(BY_ID) & OTHERS.keys()


@pytest.mark.parametrize("name", OTHERS)
async def test_a_call_in_one_account_leaves_the_other_as_it_was(
    world: World, name: str, tmp_path: Path
) -> None:
    account, other = ids.new_id(), ids.new_id()
    asset = await world.put(account, pictures.plain((3, 3, 3)))
    await create(world, account, owner="announced")
    pin = pb.PinRequest(account_id=account, asset_id=asset.asset_id, owner="video")
    await world.stub.Pin(pin, timeout=5)
    before = await belongings(world, account)
    await OTHERS[name](world, other)
    assert await belongings(world, account) == before
