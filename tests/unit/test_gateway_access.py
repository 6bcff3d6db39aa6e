"""Who may call what, page tokens, the catalogue that is shipped, and watchers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from framewire.gateway.v1 import (
    account_pb2,
    operator_pb2,
    template_pb2,
    upload_pb2,
    video_pb2,
    webhook_pb2,
)
from kit import errors
from kit import pages as kit_pages
from services.gateway import auth, catalogue, watch
from tests.unit.test_gateway_videos import PENDING

MODELS = Path(catalogue.__file__).with_name("models.yaml")
NOW = datetime(2026, 11, 20, 12, 0, 0, 123, tzinfo=UTC)


def test_the_table_names_every_method_of_the_contract_and_no_other() -> None:
    methods = {
        f"{service.full_name}/{method.name}"
        for file in (account_pb2, operator_pb2, template_pb2, upload_pb2, video_pb2, webhook_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(auth.ROLES) == methods
    assert all(auth.ROLES.values())


def test_operators_methods_are_for_operators_only() -> None:
    for method, roles in auth.ROLES.items():
        if "OperatorService" in method:
            assert roles == {auth.Role.OPERATOR}
    assert auth.Role.SERVICE not in auth.ROLES["framewire.gateway.v1.AccountService/CreateApiKey"]


def test_a_member_has_one_account() -> None:
    member = auth.Caller("k", auth.Role.MEMBER, ("mine",))
    assert [member.account(named) for named in ("", "mine")] == ["mine", "mine"]
    with pytest.raises(errors.NotFound):
        member.account("yours")
    assert member.scope == ""
    assert member.sees(replace(PENDING, account_id="mine"))
    assert not member.sees(replace(PENDING, account_id="yours"))


@pytest.mark.parametrize("role", [auth.Role.SERVICE, auth.Role.OPERATOR])
def test_others_name_the_account(role: auth.Role) -> None:
    caller = auth.Caller("k", role, None)
    assert caller.account("yours") == "yours"
    with pytest.raises(errors.InvalidArgument) as caught:
        caller.account("")
    assert caught.value.reason == "ACCOUNT_REQUIRED"
    assert caller.scope == ("k" if role is auth.Role.SERVICE else "")


def test_secrets_are_long_and_never_the_same() -> None:
    made = {auth.new_secret() for _ in range(100)}
    assert len(made) == 100
    assert {len(secret) for secret in made} == {43}
    assert all(secret.startswith("fw_") and secret[3:].isalnum() for secret in made)


def test_page_tokens_are_bound_to_their_listing_and_signed() -> None:
    pages = kit_pages.Pages(b"secret")
    token = pages.token(("videos", "a", ""), NOW, "id")
    assert pages.place(("videos", "a", ""), token) == (NOW, "id")
    assert pages.place(("videos", "a", ""), "") is None
    assert len(token) <= 400
    forged = token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB")
    others = [(("videos", "b", ""), token), (("videos", "a", ""), forged)]
    others += [(("videos", "a", ""), text) for text in ("x", "AAAA", "é", token[:20])]
    for listing, bad in others:
        with pytest.raises(errors.InvalidArgument) as caught:
            pages.place(listing, bad)
        assert caught.value.reason == "PAGE_TOKEN_INVALID"
    with pytest.raises(errors.InvalidArgument):
        kit_pages.Pages(b"another").place(("videos", "a", ""), token)


def test_the_shipped_catalogue() -> None:
    models = catalogue.parse(MODELS.read_text())
    assert models.default.name == "sora-2"
    assert (models.default.sizes[0], models.default.seconds[0]) == ((1280, 720), 6)
    assert "sora-2-pro" in models.models


@pytest.mark.parametrize(
    "text",
    [
        "",
        "models: []",
        "models: [{name: x}]",
        "models: [{name: x, sizes: [a], seconds: [1], text_to_video: true, image_to_video: true}]",
        "models: [{name: x, sizes: [], seconds: [1], text_to_video: true, image_to_video: true}]",
        "models: [{name: x, sizes: [1x1], seconds: [1], text_to_video: true, options: {a: {type: b}}}]",
    ],
)
def test_a_broken_catalogue_is_refused(text: str) -> None:
    with pytest.raises(catalogue.CatalogueError):
        catalogue.parse(text)


async def test_a_slow_watcher_gets_the_latest_and_holds_up_nobody() -> None:
    watcher = watch.Watcher()
    for revision in range(2, 1000):
        watcher.put(replace(PENDING, revision=revision))
    taken, _ = await watcher.next()
    assert [video.revision for video in taken] == [999]
    waiting = asyncio.ensure_future(watcher.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    watcher.close()
    with pytest.raises(errors.Unavailable):
        await waiting


async def test_a_watcher_that_leaves_too_much_behind_is_sent_away() -> None:
    watcher = watch.Watcher()
    for number in range(watch.MOST_WAITING + 1):
        watcher.put(replace(PENDING, video_id=f"{number}"))
    with pytest.raises(errors.Unavailable) as told:
        await watcher.next()
    assert "was not taken" in told.value.message
