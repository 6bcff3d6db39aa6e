"""Templates as callers meet them: versions, owners, videos made from them; the services behind are stand-ins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from google.protobuf import struct_pb2

from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import account_pb2, template_pb2, video_pb2
from tests import gateway_world
from tests.gateway_world import Caller, World, new_id
from tests.waiting import eventually

STRING, INTEGER = template_pb2.VARIABLE_TYPE_STRING, template_pb2.VARIABLE_TYPE_INTEGER


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with gateway_world.running(tmp_path_factory.mktemp("templates")) as running:
        yield running


def value(given: Any) -> struct_pb2.Value:
    if isinstance(given, str):
        return struct_pb2.Value(string_value=given)
    return struct_pb2.Value(number_value=given)


def variable(name: str, default: Any = None, **fields: Any) -> template_pb2.TemplateVariable:
    fields = {"type": STRING, "max_length": 40} | fields
    made = template_pb2.TemplateVariable(name=name, **fields)
    if default is not None:
        made.default_value.CopyFrom(value(default))
    return made


def template(
    prompt: str = "a {animal} {count} times",
    *variables: template_pb2.TemplateVariable,
    name: str = "cat",
    request_id: str = "",
    spec: Any = None,
    **fields: Any,
) -> template_pb2.CreateTemplateRequest:
    usual = (
        variable("animal"),
        variable("count", 1, type=INTEGER, max_length=0, min=1, max=9),
    )
    return template_pb2.CreateTemplateRequest(
        request_id=request_id or new_id(),
        name=name,
        spec=vocabulary_pb2.VideoSpec(prompt=prompt, **(spec or {})),
        variables=variables or usual,
        **fields,
    )


def use(name: str = "cat", version: int = 0, **values: Any) -> template_pb2.TemplateUse:
    return template_pb2.TemplateUse(
        name=name, version=version, variables={key: value(one) for key, one in values.items()}
    )


def asked(used: template_pb2.TemplateUse, request_id: str = "", **fields: Any) -> Any:
    return video_pb2.CreateVideoRequest(request_id=request_id or new_id(), template=used, **fields)


def get(name: str = "cat", version: int = 0, account_id: str = "") -> Any:
    return template_pb2.GetTemplateRequest(name=name, version=version, account_id=account_id)


def archive(name: str = "cat", version: int = 0) -> Any:
    return template_pb2.ArchiveTemplateRequest(name=name, version=version)


async def listed(caller: Caller, **fields: Any) -> list[tuple[str, int]]:
    request = template_pb2.ListTemplatesRequest(**fields)
    found: list[tuple[str, int]] = []
    while True:
        page = await caller.call("ListTemplates", request)
        found += [(each.name, each.version) for each in page.templates]
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def own(found: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [one for one in found if not one[0].startswith("shared/")]


async def test_a_video_is_made_from_the_latest_version_and_keeps_what_it_was_made_from(
    world: World,
) -> None:
    member, request_id = await world.member(), new_id()
    first = await member.call("CreateTemplate", template(spec={"seconds": 4}))
    assert (first.name, first.version, first.account_id) == ("cat", 1, member.account_id)
    request = asked(use(animal="cat {count}"), request_id)
    made = await member.call("CreateVideo", request)
    assert made.spec.prompt == "a cat {count} 1 times"
    assert (made.spec.seconds, made.spec.width) == (4, 1280)
    assert (made.template.name, made.template.version) == ("cat", 1)
    job, *_ = await world.jobs(made.video_id)
    assert (job.spec.prompt, job.admission.template_name) == (made.spec.prompt, "cat")
    assert job.admission.template_version == 1

    second = await member.call("CreateTemplate", template("the {animal}, {count} times"))
    assert second.version == 2
    again = await member.call("CreateVideo", request)
    assert (again.video_id, again.template.version) == (made.video_id, 1)
    newer = await member.call("CreateVideo", asked(use(animal="dog", count=2)))
    assert (newer.spec.prompt, newer.template.version) == ("the dog, 2 times", 2)
    older = await member.call("CreateVideo", asked(use(version=1, animal="dog")))
    assert (older.spec.prompt, older.spec.seconds) == ("a dog 1 times", 4)
    other = asked(use(animal="cow"), request_id)
    assert (await member.refused("CreateVideo", other)).reason == "REQUEST_ID_REUSED"

    async def ids(**fields: Any) -> set[str]:
        page = await member.call("ListVideos", video_pb2.ListVideosRequest(**fields))
        return {video.video_id for video in page.videos}

    plain = await member.create()
    assert not plain.HasField("template")
    assert await ids(template="cat") == {made.video_id, newer.video_id, older.video_id}
    assert await ids(template="cat", template_version=2) == {newer.video_id}
    assert await ids(template="dog") == set()
    assert len(await ids()) == 4


async def test_a_request_says_what_is_otherwise_than_the_template(world: World) -> None:
    member = await world.member()
    options = {"seed": value(7)}
    spec = {"model": "sora-2-pro", "seconds": 4, "width": 1280, "height": 720}
    await member.call("CreateTemplate", template(spec=spec))
    otherwise = vocabulary_pb2.VideoSpec(width=720, height=1280, seconds=8, variants=1)
    made = await member.call("CreateVideo", asked(use(animal="x"), spec=otherwise))
    assert (made.spec.model, made.spec.seconds) == ("sora-2-pro", 8)
    assert (made.spec.width, made.spec.height) == (720, 1280)
    said = vocabulary_pb2.VideoSpec(prompt="mine", options=options)
    refused = await member.refused("CreateVideo", asked(use(animal="x"), spec=said))
    assert (refused.reason, refused.violations[0][0]) == ("INVALID_FIELD", "spec.prompt")
    nothing = video_pb2.CreateVideoRequest(request_id=new_id())
    refused = await member.refused("CreateVideo", nothing)
    assert (refused.reason, refused.violations[0][0]) == ("INVALID_FIELD", "spec")


async def test_quotes_batches_checks_and_retries(world: World) -> None:
    member = await world.member()
    await member.call("CreateTemplate", template())
    quote = await member.call("QuoteVideo", video_pb2.QuoteVideoRequest(template=use(animal="x")))
    assert quote.spec.prompt == "a x 1 times"
    checked = await member.call("CreateVideo", asked(use(animal="x"), validate_only=True))
    assert (checked.spec.prompt, checked.template.version) == ("a x 1 times", 1)
    batch = video_pb2.BatchCreateVideosRequest(
        request_id=new_id(), requests=[asked(use(animal="one")), asked(use(count=10))]
    )
    good, bad = (await member.call("BatchCreateVideos", batch)).results
    assert good.video.spec.prompt == "a one 1 times"
    assert bad.reason == "VARIABLES_INVALID"
    assert "animal" in bad.message
    assert "count (integer, 1 to 9)" in bad.message

    await world.tell(good.video, "failed", 1, cause=vocabulary_pb2.CAUSE_PROVIDER_ERROR)

    async def failed() -> bool:
        video = await member.video(good.video.video_id)
        return video.state == vocabulary_pb2.VIDEO_STATE_FAILED

    await eventually(failed)
    await member.call("ArchiveTemplate", archive())  # a retry is made from what was stored
    again = video_pb2.RetryVideoRequest(request_id=new_id(), video_id=good.video.video_id)
    retried = await member.call("RetryVideo", again)
    assert retried.spec.prompt == "a one 1 times"
    assert (retried.template.name, retried.template.version) == ("cat", 1)


async def test_each_wrong_variable_is_named_and_nothing_is_made(world: World) -> None:
    member = await world.member()
    await member.call("CreateTemplate", template())
    refused = await member.refused("CreateVideo", asked(use(count="two", colour="red")))
    assert (refused.code.name, refused.reason) == ("INVALID_ARGUMENT", "VARIABLES_INVALID")
    assert dict(refused.violations) == {
        "template.variables.animal": "must be given: animal (string, 0 to 40 characters)",
        "template.variables.colour": "is no variable of the template; there are: animal, count",
        "template.variables.count": "must be count (integer, 1 to 9)",
    }
    assert refused.metadata["template"] == "cat"
    assert world.behind.holds(member.account_id) == []


async def test_each_fault_of_a_template_is_named_and_nothing_is_kept(world: World) -> None:
    member = await world.member()
    strange = template(
        "{a} {b} }",
        variable("a", min=1),
        variable("b", type=INTEGER, max_length=3, min=1, max=2),
        variable("c"),
        spec={"input_image_id": "i" * 26},
    )
    strange.variables[0].default_value.null_value = struct_pb2.NULL_VALUE
    refused = await member.refused("CreateTemplate", strange)
    assert (refused.code.name, refused.reason) == ("INVALID_ARGUMENT", "TEMPLATE_INVALID")
    assert {field for field, _ in refused.violations} == {
        "spec.prompt", "variables[0].default_value", "variables[0].min", "variables[1].max_length",
        "variables[2].name", "spec.input_image_id",
    }  # fmt: skip
    for spec, reason in (
        ({"model": "sora-9"}, "MODEL_UNKNOWN"),
        ({"model": "sora-2", "seconds": 7}, "SECONDS_NOT_SUPPORTED"),
        ({"model": "sora-2", "width": 1, "height": 1}, "SIZE_NOT_SUPPORTED"),
    ):
        assert (await member.refused("CreateTemplate", template(spec=spec))).reason == reason
    assert own(await listed(member)) == []
    assert (await member.call("CreateTemplate", template())).version == 1


async def test_another_accounts_template_is_not_there(world: World) -> None:
    owner, other = await world.member(), await world.member()
    await owner.call("CreateTemplate", template())
    for method, request in (
        ("GetTemplate", get()),
        ("GetTemplate", get(version=1)),
        ("ArchiveTemplate", archive()),
        ("CreateVideo", asked(use(animal="x"))),
        ("QuoteVideo", video_pb2.QuoteVideoRequest(template=use(animal="x"))),
    ):
        refused = await other.refused(method, request)
        assert (refused.code.name, refused.reason) == ("NOT_FOUND", "TEMPLATE_NOT_FOUND")
    named = get(account_id=owner.account_id)
    assert (await other.refused("GetTemplate", named)).reason == "ACCOUNT_NOT_FOUND"
    assert own(await listed(other)) == []
    assert (await owner.refused("GetTemplate", get(version=2))).reason == "TEMPLATE_NOT_FOUND"
    assert (await other.call("CreateTemplate", template())).version == 1
    assert (await world.operator.call("GetTemplate", named)).version == 1


async def test_templates_for_everyone_are_made_by_operators(world: World) -> None:
    member, name = await world.member(), "shared/everyones"
    mine = template(name=name)
    refused = await member.refused("CreateTemplate", mine)
    assert (refused.code.name, refused.reason) == ("PERMISSION_DENIED", "ROLE_NOT_ALLOWED")
    of_somebody = template(name=name, account_id=member.account_id)
    assert (await world.operator.refused("CreateTemplate", of_somebody)).reason == "INVALID_FIELD"
    made = await world.operator.call("CreateTemplate", mine)
    assert (made.account_id, made.version) == ("", 1)
    await member.call("CreateTemplate", template("mine {animal} {count}", name="everyones"))
    video = await member.call("CreateVideo", asked(use(name, animal="x")))
    assert (video.template.name, video.spec.prompt) == (name, "a x 1 times")
    assert await listed(member) == [("everyones", 1), (name, 1)]
    assert (name, 1) in await listed(world.operator)
    assert await listed(member, name=name) == [(name, 1)]
    assert (await member.refused("ArchiveTemplate", archive(name))).reason == "ROLE_NOT_ALLOWED"
    await world.operator.call("ArchiveTemplate", archive(name))
    gone = await member.refused("CreateVideo", asked(use(name, animal="x")))
    assert gone.reason == "TEMPLATE_ARCHIVED"
    audited = await world.pool.fetch(
        "SELECT method, outcome FROM audit WHERE detail->>'name' = $1 ORDER BY created_at", name
    )
    assert [tuple(row) for row in audited] == [
        ("CreateTemplate", "OK"), ("ArchiveTemplate", "OK"),
    ]  # fmt: skip


async def test_what_is_archived_makes_no_more_videos_and_stays_to_be_seen(world: World) -> None:
    member, request_id = await world.member(), new_id()
    request = asked(use(version=2, animal="x"), request_id)
    for _ in range(3):
        await member.call("CreateTemplate", template())
    made = await member.call("CreateVideo", request)
    gone = await member.call("ArchiveTemplate", archive(version=3))
    assert gone.HasField("archived_at")
    assert await member.call("ArchiveTemplate", archive(version=3)) == gone
    latest = await member.call("CreateVideo", asked(use(animal="x")))
    assert latest.template.version == 2
    assert (await member.call("GetTemplate", get())).version == 2
    await member.call("ArchiveTemplate", archive())
    refused = await member.refused("CreateVideo", asked(use(animal="x")))
    assert (refused.code.name, refused.reason) == ("FAILED_PRECONDITION", "TEMPLATE_ARCHIVED")
    refused = await member.refused("CreateVideo", asked(use(version=1, animal="x")))
    assert refused.reason == "TEMPLATE_ARCHIVED"
    assert (await member.call("CreateVideo", request)).video_id == made.video_id
    assert (await member.call("GetTemplate", get(version=3))) == gone
    assert own(await listed(member)) == []
    assert own(await listed(member, archived=True)) == [("cat", 3)]
    versions = [("cat", 3), ("cat", 2), ("cat", 1)]
    assert await listed(member, name="cat", archived=True, page_size=1) == versions
    assert (await member.call("CreateTemplate", template())).version == 4
    assert (await member.call("CreateVideo", asked(use(animal="x")))).template.version == 4
    for version in (9, 1):
        with_version = archive("none" if version == 1 else "cat", version)
        refused = await member.refused("ArchiveTemplate", with_version)
        assert refused.reason == "TEMPLATE_NOT_FOUND"


async def test_one_request_id_makes_one_version(world: World) -> None:
    member, request_id = await world.member(), new_id()
    request = template(request_id=request_id)
    made = await asyncio.gather(*(member.call("CreateTemplate", request) for _ in range(8)))
    assert {each.version for each in made} == {1}
    several = [template() for _ in range(8)]
    made = await asyncio.gather(*(member.call("CreateTemplate", each) for each in several))
    assert sorted(each.version for each in made) == list(range(2, 10))
    assert (await member.call("CreateTemplate", request)).version == 1
    other = template("other {animal} {count}", request_id=request_id)
    assert (await member.refused("CreateTemplate", other)).reason == "REQUEST_ID_REUSED"


async def test_listings_go_page_by_page(world: World) -> None:
    member = await world.member()
    names = ["a", "b", "b-1", "c", "d"]
    for name in (*reversed(names), "b"):
        await member.call("CreateTemplate", template(name=name))
    expected = [(name, 2 if name == "b" else 1) for name in names]
    assert own(await listed(member, page_size=2)) == expected
    page = await member.call("ListTemplates", template_pb2.ListTemplatesRequest(page_size=1))
    elsewhere = template_pb2.ListTemplatesRequest(name="b", page_token=page.next_page_token)
    assert (await member.refused("ListTemplates", elsewhere)).reason == "PAGE_TOKEN_INVALID"


async def test_a_version_never_changes(world: World) -> None:
    member = await world.member()
    await member.call("CreateTemplate", template())
    await member.call("ArchiveTemplate", archive())
    for change in ("definition = 'x'", "version = 2", "archived_at = NULL", "name = 'dog'"):
        with pytest.raises(asyncpg.PostgresError, match="never changes"):
            await world.pool.execute(
                f"UPDATE templates SET {change} WHERE account_id = $1",
                member.account_id,
            )


async def test_as_many_versions_as_an_account_may_have(world: World) -> None:
    member = await world.member()
    await world.pool.execute(
        "INSERT INTO templates SELECT $1, 'many', n, '' FROM generate_series(1, 1000) n",
        member.account_id,
    )
    request = template()
    refused = await member.refused("CreateTemplate", request)
    assert (refused.code.name, refused.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_TEMPLATES")
    await member.call("ArchiveTemplate", archive("many", 7))
    assert (await member.call("CreateTemplate", request)).version == 1


async def test_a_service_names_the_account(world: World) -> None:
    member = await world.member()
    made = await world.operator.call(
        "CreateApiKey",
        account_pb2.CreateApiKeyRequest(request_id=new_id(), role=account_pb2.ROLE_SERVICE),
    )
    service = Caller(world.channel, made.secret)
    assert (await service.refused("CreateTemplate", template())).reason == "ACCOUNT_REQUIRED"
    named = template(account_id=member.account_id)
    assert (await service.call("CreateTemplate", named)).account_id == member.account_id
    assert (await member.call("GetTemplate", get())).version == 1
