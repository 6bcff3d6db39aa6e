"""`framewire template` and `--template` against a scripted gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from google.protobuf import json_format

from framewire.cli import app
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import template_pb2, video_pb2
from tests.unit import gateway as gateways
from tests.unit.gateway import ACCOUNT, VIDEO, Gateway, video

LAUNCH = Path(__file__).parents[2] / "examples" / "launch.json"


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with gateways.for_the_cli(monkeypatch) as running:
        monkeypatch.setenv("FRAMEWIRE_ACCOUNT", ACCOUNT)
        yield running


def run(*arguments: str) -> Any:
    return typer.testing.CliRunner().invoke(app.app, arguments)


def launch(version: int = 2, **fields: Any) -> template_pb2.Template:
    given = json.loads(LAUNCH.read_text())
    spec = vocabulary_pb2.VideoSpec(prompt=given["prompt"], model="sora-2", seconds=6)
    variables = [
        json_format.ParseDict(
            {**each, "type": f"VARIABLE_TYPE_{each.get('type', 'string').upper()}"},
            template_pb2.TemplateVariable(),
        )
        for each in given["variables"]
    ]
    return template_pb2.Template(
        name="launch", version=version, account_id=ACCOUNT, spec=spec, variables=variables, **fields
    )


def test_a_template_is_made_from_a_file(gateway: Gateway) -> None:
    gateway.on("CreateTemplate", launch(1))
    result = run("template", "create", "launch", str(LAUNCH))
    assert result.exit_code == 0, result.output
    (asked,) = gateway.requests("CreateTemplate")
    expected = launch(1)
    assert (asked.name, asked.account_id) == ("launch", ACCOUNT)
    assert (asked.spec, list(asked.variables)) == (expected.spec, list(expected.variables))
    assert asked.description.startswith("A launch")
    assert "launch version 1" in result.stdout
    assert "0 to 80 characters; the rocket unless told (what is launched)" in result.stdout
    assert "one of clear sky, fog, rain; clear sky unless told" in result.stdout
    assert "integer, 1 to 20" in result.stdout


def test_everyones_names_no_account(gateway: Gateway) -> None:
    gateway.on("CreateTemplate", launch(1))
    gateway.on("ArchiveTemplate", launch(1))
    assert run("template", "create", "shared/launch", str(LAUNCH)).exit_code == 0
    assert run("template", "archive", "shared/launch").exit_code == 0
    assert gateway.requests("CreateTemplate")[0].account_id == ""
    assert gateway.requests("ArchiveTemplate")[0].account_id == ""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", 'give an object with a "prompt"'),
        ("{", "cannot read"),
        ('{"prompt": "x", "colour": 1}', "there is no 'colour'"),
        (
            '{"prompt": "x", "variables": [{"max": 1}]}',
            'variables[0]: give an object with a "name"',
        ),
        ('{"prompt": "x", "variables": [{"name": "a", "size": 1}]}', "there is no 'size'"),
    ],
)
def test_a_file_that_is_none_is_a_usage_error(
    gateway: Gateway, tmp_path: Path, content: str, says: str
) -> None:
    (tmp_path / "t.json").write_text(content)
    result = run("template", "create", "launch", str(tmp_path / "t.json"))
    assert (result.exit_code, gateway.requests("CreateTemplate")) == (2, [])
    assert says in result.stderr


def test_a_value_of_another_type_is_said_in_a_line(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"prompt": "x", "variables": [{"name": "a", "max": "1"}]}')
    result = run("template", "create", "launch", str(tmp_path / "t.json"))
    assert (result.exit_code, gateway.requests("CreateTemplate")) == (1, [])
    assert "(INVALID_FIELD)" in result.stderr


def test_templates_are_listed_shown_and_archived(gateway: Gateway) -> None:
    gateway.on(
        "ListTemplates",
        template_pb2.ListTemplatesResponse(templates=[launch()], next_page_token="more"),
        template_pb2.ListTemplatesResponse(templates=[launch(1)]),
    )
    result = run("template", "list", "--json")
    assert [json.loads(line)["version"] for line in result.stdout.splitlines()] == [2, 1]
    assert not gateway.requests("ListTemplates")[0].archived
    result = run("template", "list", "launch", "--archived")
    assert result.exit_code == 0, result.output
    assert "subject speed weather" in result.stdout
    assert (gateway.requests("ListTemplates")[-1].name, gateway.requests("ListTemplates")[-1].archived) == (
        "launch", True,
    )  # fmt: skip
    gateway.on("GetTemplate", launch())
    result = run("template", "show", "launch", "--version", "2")
    assert "The camera rises along {subject}" in result.stdout
    assert gateway.requests("GetTemplate")[0].version == 2
    gateway.on("ArchiveTemplate", launch())
    assert run("template", "archive", "launch").exit_code == 0
    assert gateway.requests("ArchiveTemplate")[0].version == 0


def test_a_video_from_a_template_sends_numbers_where_it_wants_numbers(gateway: Gateway) -> None:
    gateway.on("GetTemplate", launch())
    made = video()
    made.template.name, made.template.version = "launch", 2
    gateway.on("CreateVideo", made)
    values = ("--var", "subject=7", "--var", "speed=2", "--var", "colour=a=b", "--var", "weather=")
    result = run("create", "--template", "launch@2", *values)
    assert result.exit_code == 0, result.output
    assert "launch@2" in result.stdout
    (asked,) = gateway.requests("CreateVideo")
    assert (asked.template.name, asked.template.version, asked.spec.prompt) == ("launch", 2, "")
    assert {name: value.WhichOneof("kind") for name, value in asked.template.variables.items()} == {
        "subject": "string_value", "speed": "number_value", "colour": "string_value",
        "weather": "string_value",
    }  # fmt: skip
    assert asked.template.variables["colour"].string_value == "a=b"
    run("create", "--template", "launch", "--var", "speed=fast")
    fast = gateway.requests("CreateVideo")[-1].template.variables["speed"]
    assert fast.string_value == "fast", "the gateway says what it takes"


def test_generate_and_quote_take_templates(gateway: Gateway, tmp_path: Path) -> None:
    gateway.on("GetTemplate", launch())
    gateway.on("CreateVideo", video())
    gateway.on("QuoteVideo", video_pb2.QuoteVideoResponse(credits=3))
    run("generate", "-", "--template", "launch", "--var", "speed=1")
    (asked,) = gateway.requests("CreateVideo")
    assert (asked.template.name, asked.spec.prompt) == ("launch", "")
    result = run("quote", "--template", "launch", "--var", "speed=1")
    assert result.exit_code == 0, result.output
    (asked,) = gateway.requests("QuoteVideo")
    assert (asked.template.name, asked.spec.prompt) == ("launch", "")


@pytest.mark.parametrize(
    "command",
    [
        ("create",),
        ("create", "a prompt", "--template", "launch"),
        ("create", "a prompt", "--var", "a=b"),
        ("create", "--template", "launch@new"),
        ("create", "--template", "launch", "--var", "weather"),
        ("generate", "-", "a prompt", "--template", "launch"),
        ("generate", "-", "a prompt", "--var", "a=b"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(gateway: Gateway, command: tuple[str, ...]) -> None:
    gateway.on("GetTemplate", launch())
    result = run(*command)
    assert (result.exit_code, gateway.requests("CreateVideo")) == (2, []), result.output


def test_the_videos_of_a_template_are_listed(gateway: Gateway) -> None:
    gateway.on("ListVideos", video_pb2.ListVideosResponse(videos=[video()]))
    result = run("list", "--template", "launch")
    assert VIDEO in result.stdout
    assert gateway.requests("ListVideos")[0].template == "launch"
