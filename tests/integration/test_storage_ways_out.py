"""Where clients read: signed URLs, or a base URL; and what the buckets do by themselves."""

from __future__ import annotations

import asyncio
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from minio import commonconfig, error, lifecycleconfig
from pydantic import SecretStr, ValidationError

from framewire.storage.v1 import storage_pb2 as pb
from kit import ids
from services.storage import assets, backstop, blobs, config
from tests import pictures
from tests.storage_world import VIDEO, World, film, running

BASE = "https://cdn.example.com/films"
OUTPUTS = "framewire-outputs"
INPUTS = "framewire-inputs"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def public(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    settings = {"STORAGE_OUTPUT_BASE_URL": f"{BASE}/", "STORAGE_OUTPUT_CACHE_SECONDS": "600"}
    async with running(tmp_path_factory.mktemp("public"), **settings) as world:
        yield world


def settings_(**more: Any) -> config.Settings:
    return config.Settings(
        database_url=SecretStr("postgresql://x"),
        service_token_secret=SecretStr("x" * 32),
        **{"endpoint": "minio:9000", "access_key": "a", "secret_key": SecretStr("s")} | more,
    )


def headers(url: str) -> dict[str, str]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return {name.lower(): value for name, value in answer.headers.items()}


async def signed(world: World, asset: pb.Asset, **more: Any) -> pb.SignUrlResponse:
    request = pb.SignUrlRequest(account_id=asset.account_id, asset_id=asset.asset_id, **more)
    return await world.stub.SignUrl(request, timeout=10)


async def key(world: World, asset: pb.Asset) -> str:
    query = "SELECT object_key FROM assets WHERE asset_id = $1"
    return await world.pool.fetchval(query, asset.asset_id)


async def test_what_was_made_is_read_at_the_base_url(public: World, tmp_path: Path) -> None:
    account, body = ids.new_id(), film(tmp_path / "film.mp4")
    video = await public.put(account, body, VIDEO)
    poster = pb.Asset(account_id=account, asset_id=video.poster_asset_id)
    for asset in (video, poster):
        link = await signed(public, asset, file_name="mine.mp4")
        assert link.url == f"{BASE}/{await key(public, asset)}"
        assert not link.HasField("expires_at")


async def test_what_callers_sent_and_what_is_kept_aside_is_signed_for_all_the_same(
    public: World,
) -> None:
    account = ids.new_id()
    image = await public.put(account, pictures.plain((1, 2, 3)))
    link = await signed(public, image)
    assert "X-Amz-Signature=" in link.url
    assert link.HasField("expires_at")
    aside = assets.Asset(
        account_id=account, asset_id=ids.new_id(), kind=assets.Kind.OUTPUT_VIDEO,
        state=assets.State.QUARANTINED, object_key="a/b.bin", facts=None, poster_asset_id=None,
        created_at=image.created_at.ToDatetime(), expires_at=None,
    )  # fmt: skip
    async with blobs.Blobs(settings_(output_base_url=BASE)) as opened:
        url, until = opened.link(aside, "aside.bin", 60)
    assert url.startswith("http://minio:9000/framewire-outputs/a/b.bin?")
    assert until is not None


async def test_objects_behind_a_base_url_say_how_long_they_may_be_cached(
    public: World, tmp_path: Path
) -> None:
    """Both those that went there in one piece and those that went in parts."""
    account, body = ids.new_id(), film(tmp_path / "film.mp4")
    padding = 6_000_000
    large = body + padding.to_bytes(4, "big") + b"free" + bytes(padding - 8)
    for number, each in enumerate((body, large)):
        video = await public.put(account, each, VIDEO, f"owner {number}")
        found = await asyncio.to_thread(public.s3.stat_object, OUTPUTS, await key(public, video))
        assert found.content_type == "video/mp4"
        assert found.metadata is not None
        assert found.metadata.get("cache-control") == "public, max-age=600"


async def test_a_signed_answer_has_the_files_name_and_stays_private(public: World) -> None:
    image = await public.put(ids.new_id(), pictures.plain((9, 9, 9)))
    link = await signed(public, image, file_name="my image.jpg", expires_in_seconds=120)
    asked = urllib.parse.parse_qs(urllib.parse.urlsplit(link.url).query)
    assert asked["response-content-disposition"] == ['attachment; filename="my image.jpg"']
    assert asked["response-cache-control"] == ["private, max-age=120"]
    answered = await asyncio.to_thread(headers, link.url)
    assert answered["content-disposition"] == 'attachment; filename="my image.jpg"'
    assert answered["cache-control"] == "private, max-age=120"


@pytest.mark.parametrize(
    "value",
    [
        "cdn.example.com",
        "http://cdn.example.com",
        "ftp://cdn.example.com",
        "https://",
        "https://user@cdn.example.com",
        "https://cdn.example.com/?a=b",
        "https://cdn.example.com/#top",
        "https://cdn.example.com/a b\n",
    ],
)
def test_a_base_url_that_no_client_could_use_is_refused_at_the_start(value: str) -> None:
    with pytest.raises(ValidationError, match="output_base_url"):
        settings_(output_base_url=value)


def test_a_base_url_may_have_a_path_and_end_in_a_slash() -> None:
    assert settings_(output_base_url=f"{BASE}/").output_base_url == BASE
    assert settings_(output_base_url="http://127.0.0.1:8080").output_base_url


@pytest.mark.parametrize("value", ["https://s3.example.com", "s3.example.com/", "s3:port", "a b"])
def test_an_endpoint_is_a_host_and_a_port(value: str) -> None:
    for name in ("endpoint", "public_endpoint"):
        with pytest.raises(ValidationError, match=name):
            settings_(**{name: value})
    with pytest.raises(ValidationError, match="must not be the same"):
        settings_(input_bucket="one", output_bucket="one")


async def test_buckets_do_by_themselves_what_they_can(public: World) -> None:
    """MinIO takes the rule for what is incoming; rclone has no rules, which is no mistake. An operator's rule stays."""
    own = lifecycleconfig.Rule(
        commonconfig.ENABLED,
        commonconfig.Filter(prefix="theirs/"),
        "operator",
        expiration=lifecycleconfig.Expiration(days=7),
    )
    try:
        await asyncio.to_thread(
            public.s3.set_bucket_lifecycle, INPUTS, lifecycleconfig.LifecycleConfig([own])
        )
        takes = True
    except error.MinioException:
        takes = False
    where = public.stack.addresses
    mine = settings_(
        endpoint=where.s3_endpoint,
        access_key=where.s3_access_key,
        secret_key=SecretStr(where.s3_secret_key),
        region=where.s3_region,
    )
    async with blobs.Blobs(mine) as opened:
        for _ in range(2):
            taken = await opened.ensure_rules(mine)
            assert ("INPUT framewire-incoming" in taken) == takes
    found = await asyncio.to_thread(public.s3.get_bucket_lifecycle, INPUTS)
    there = {rule.rule_id: rule for rule in found.rules} if found else {}
    assert there.keys() == ({"operator", "framewire-incoming"} if takes else set())
    if takes:
        expiration = there["framewire-incoming"].expiration
        assert expiration is not None
        assert expiration.days == 2


def test_the_rules_come_after_every_sweeper() -> None:
    mine = settings_(upload_keep_seconds=86_401, put_leftover_seconds=7200)
    incoming, unfinished = backstop.rules(assets.Bucket.INPUT, mine)
    assert incoming.expiration is not None
    assert incoming.expiration.days == 3
    assert incoming.rule_filter is not None
    assert incoming.rule_filter.prefix == "incoming/"
    assert unfinished.abort_incomplete_multipart_upload is not None
    assert unfinished.abort_incomplete_multipart_upload.days_after_initiation == 2
    (only,) = backstop.rules(assets.Bucket.OUTPUT, mine)
    assert only.rule_id == "framewire-unfinished"
