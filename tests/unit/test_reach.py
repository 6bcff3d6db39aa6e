"""Every RPC of the gateway can be called from the command line and by the SDK."""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.core
import typer.main
import typer.testing

from framewire import client, errors, types
from framewire.cli import app
from tests.unit import gateway as gateways
from tests.unit.gateway import ACCOUNT, VIDEO, Gateway, Refusal

ROOT = Path(__file__).parents[2]
KEY, ENDPOINT, DELIVERY, ASSET, IMAGE = "k" * 26, "e" * 26, "d" * 26, "o" * 26, "i" * 26
THEN = datetime(2026, 11, 1, tzinfo=UTC)
BROWSERS = (
    "for who has the bytes elsewhere, a browser say; the command line has them, and uploads them"
)
NOT_ON_THE_COMMAND_LINE = {
    "UploadService/CreateUpload": BROWSERS,
    "UploadService/CompleteUpload": BROWSERS,
    "UploadService/CompleteVideoUpload": BROWSERS,
}
COMMANDS = {
    "VideoService/CreateVideo": "create p",
    "VideoService/BatchCreateVideos": "batch batch.jsonl",
    "VideoService/GetVideo": f"get {VIDEO}",
    "VideoService/ListVideos": "list",
    "VideoService/CancelVideo": f"cancel {VIDEO}",
    "VideoService/DeleteVideo": f"delete {VIDEO}",
    "VideoService/RetryVideo": f"retry {VIDEO}",
    "VideoService/WatchVideo": f"watch {VIDEO}",
    "VideoService/WatchVideos": "watch",
    "VideoService/QuoteVideo": "quote",
    "VideoService/PreviewInputs": "preview --image a.jpg",
    "VideoService/GetDownloadUrl": f"download {VIDEO}",
    "UploadService/UploadImage": "generate a.jpg p",
    "UploadService/UploadVideo": "generate --video a.mp4 p",
    "UploadService/ImportImage": "generate https://pictures.example/a.jpg p",
    "AccountService/GetBalance": "balance",
    "AccountService/ListEntries": "entries",
    "AccountService/ListModels": "models",
    "AccountService/GetUsage": "usage",
    "AccountService/CreateApiKey": "keys create",
    "AccountService/ListApiKeys": "keys list",
    "AccountService/RevokeApiKey": f"keys revoke {KEY}",
    "AccountService/RotateApiKey": f"keys rotate {KEY}",
    "AccountService/GetStorageUsage": "storage usage",
    "AccountService/ExtendRetention": f"storage keep {ASSET} 30d",
    "TemplateService/CreateTemplate": "template create cat template.json",
    "TemplateService/GetTemplate": "template show cat",
    "TemplateService/ListTemplates": "template list",
    "TemplateService/ArchiveTemplate": "template archive cat",
    "WebhookService/CreateEndpoint": "webhook create https://there.example/hook",
    "WebhookService/GetEndpoint": f"webhook show {ENDPOINT}",
    "WebhookService/ListEndpoints": "webhook list",
    "WebhookService/UpdateEndpoint": f"webhook update {ENDPOINT} --kind completed",
    "WebhookService/DeleteEndpoint": f"webhook delete {ENDPOINT}",
    "WebhookService/RotateSecret": f"webhook rotate {ENDPOINT}",
    "WebhookService/ListDeliveries": f"webhook deliveries {ENDPOINT}",
    "WebhookService/RedeliverDelivery": f"webhook redeliver {DELIVERY}",
    "WebhookService/Replay": f"webhook replay {ENDPOINT} 2026-11-27T12:00:00",
    "WebhookService/SendTest": f"webhook test {ENDPOINT}",
    "OperatorService/CreateAccount": "account create name",
    "OperatorService/Grant": "grant 5",
    "OperatorService/Refund": f"operator refund {VIDEO} 5",
    "OperatorService/SetAdmission": "admission pause",
    "OperatorService/CheckBooks": "operator check-books",
    "OperatorService/SetFrozen": "operator freeze",
    "OperatorService/SetDailyCap": "operator cap 5",
    "OperatorService/AddRulebook": "operator add-rulebook prices batch.jsonl",
    "OperatorService/ListRulebooks": "operator rulebooks prices",
    "OperatorService/ActivateRulebook": "operator activate-rulebook prices 1 abc",
    "OperatorService/ListAttempts": "attempts list",
    "OperatorService/Reconcile": "reconcile",
    "OperatorService/Repair": "reconcile --apply f",
    "OperatorService/GetAttempt": f"attempts show {VIDEO}",
    "OperatorService/ResolveAttempt": f"attempts resolve {VIDEO} --give-up",
    "OperatorService/RetryAttempt": f"attempts retry {VIDEO} --number 1",
    "OperatorService/CancelAttempt": f"attempts cancel {VIDEO}",
    "OperatorService/ListProviderAccounts": "providers list",
    "OperatorService/PauseProviderAccount": "providers pause main",
    "OperatorService/ListQuarantined": f"operator quarantined {ACCOUNT}",
    "OperatorService/SetRetention": "storage retention poster=30d",
    "OperatorService/EraseAccount": f"account erase {ACCOUNT} --why asked --yes",
    "OperatorService/AddMember": "members add https://issuer.example --email a@b.example",
    "OperatorService/RemoveMember": "members remove p",
    "OperatorService/ListMembers": "members list",
    "OperatorService/SetLimits": "operator limits",
    "OperatorService/SetAccount": "operator account",
    "OperatorService/Recover": "recover",
}
INPUT = types.VideoInput(image_id=IMAGE)
LIMITS = types.Limits(max_in_flight=3)
Call = Callable[[client.Client], Awaitable[object] | AsyncIterable[object]]
METHODS: dict[str, Call] = {
    "VideoService/CreateVideo": lambda c: c.create_video("p"),
    "VideoService/BatchCreateVideos": lambda c: c.create_videos([("p", {})]),
    "VideoService/GetVideo": lambda c: c.get_video(VIDEO),
    "VideoService/ListVideos": lambda c: c.list_videos(),
    "VideoService/CancelVideo": lambda c: c.cancel_video(VIDEO),
    "VideoService/DeleteVideo": lambda c: c.delete_video(VIDEO),
    "VideoService/RetryVideo": lambda c: c.retry_video(VIDEO),
    "VideoService/WatchVideo": lambda c: c.watch_video(VIDEO),
    "VideoService/WatchVideos": lambda c: c.watch_videos([VIDEO]),
    "VideoService/QuoteVideo": lambda c: c.quote_video("p"),
    "VideoService/PreviewInputs": lambda c: c.preview_inputs([INPUT]),
    "VideoService/GetDownloadUrl": lambda c: c.get_download_url(VIDEO),
    "UploadService/UploadImage": lambda c: c.upload_image(b"image"),
    "UploadService/UploadVideo": lambda c: c.upload_video(b"video"),
    "UploadService/CreateUpload": lambda c: c.create_upload(5, "image/png"),
    "UploadService/CompleteUpload": lambda c: c.complete_upload("u"),
    "UploadService/CompleteVideoUpload": lambda c: c.complete_video_upload("u"),
    "UploadService/ImportImage": lambda c: c.import_image("https://pictures.example/a.jpg"),
    "AccountService/GetBalance": lambda c: c.balance(),
    "AccountService/ListEntries": lambda c: c.entries(),
    "AccountService/ListModels": lambda c: c.models(),
    "AccountService/GetUsage": lambda c: c.usage(),
    "AccountService/CreateApiKey": lambda c: c.create_api_key(),
    "AccountService/ListApiKeys": lambda c: c.access.keys(),
    "AccountService/RevokeApiKey": lambda c: c.access.revoke_key(KEY),
    "AccountService/RotateApiKey": lambda c: c.access.rotate_key(KEY),
    "AccountService/GetStorageUsage": lambda c: c.assets.usage(),
    "AccountService/ExtendRetention": lambda c: c.assets.keep(ASSET, timedelta(days=1)),
    "TemplateService/CreateTemplate": lambda c: c.create_template("cat", "a cat"),
    "TemplateService/GetTemplate": lambda c: c.get_template("cat"),
    "TemplateService/ListTemplates": lambda c: c.list_templates(),
    "TemplateService/ArchiveTemplate": lambda c: c.archive_template("cat"),
    "WebhookService/CreateEndpoint": lambda c: c.webhooks.create("https://there.example/hook"),
    "WebhookService/GetEndpoint": lambda c: c.webhooks.get(ENDPOINT),
    "WebhookService/ListEndpoints": lambda c: c.webhooks.endpoints(),
    "WebhookService/UpdateEndpoint": lambda c: c.webhooks.update(ENDPOINT, enabled=True),
    "WebhookService/DeleteEndpoint": lambda c: c.webhooks.delete(ENDPOINT),
    "WebhookService/RotateSecret": lambda c: c.webhooks.rotate(ENDPOINT),
    "WebhookService/ListDeliveries": lambda c: c.webhooks.deliveries(ENDPOINT),
    "WebhookService/RedeliverDelivery": lambda c: c.webhooks.redeliver(DELIVERY),
    "WebhookService/Replay": lambda c: c.webhooks.replay(ENDPOINT, THEN),
    "WebhookService/SendTest": lambda c: c.webhooks.test(ENDPOINT),
    "OperatorService/CreateAccount": lambda c: c.create_account("name"),
    "OperatorService/Grant": lambda c: c.grant(ACCOUNT, 5),
    "OperatorService/Refund": lambda c: c.operations.refund(VIDEO, 5),
    "OperatorService/SetAdmission": lambda c: c.operations.set_admission(True),
    "OperatorService/CheckBooks": lambda c: c.operations.check_books(),
    "OperatorService/SetFrozen": lambda c: c.operations.set_frozen(ACCOUNT, True),
    "OperatorService/SetDailyCap": lambda c: c.operations.set_daily_cap(ACCOUNT, 5),
    "OperatorService/AddRulebook": lambda c: c.operations.add_rulebook("PRICE_BOOK", "a: 1"),
    "OperatorService/ListRulebooks": lambda c: c.operations.rulebooks("PRICE_BOOK"),
    "OperatorService/ActivateRulebook": lambda c: c.operations.activate_rulebook(
        "PRICE_BOOK", "1", "abc"
    ),
    "OperatorService/ListAttempts": lambda c: c.attempts.all(),
    "OperatorService/Reconcile": lambda c: c.operations.reconcile(),
    "OperatorService/Repair": lambda c: c.operations.repair("f"),
    "OperatorService/GetAttempt": lambda c: c.attempts.one(VIDEO),
    "OperatorService/ResolveAttempt": lambda c: c.attempts.resolve(VIDEO, "GIVE_UP"),
    "OperatorService/RetryAttempt": lambda c: c.attempts.retry(VIDEO, number=1),
    "OperatorService/CancelAttempt": lambda c: c.attempts.cancel(VIDEO),
    "OperatorService/ListProviderAccounts": lambda c: c.attempts.provider_accounts(),
    "OperatorService/PauseProviderAccount": lambda c: c.attempts.pause("main"),
    "OperatorService/ListQuarantined": lambda c: c.operations.quarantined(ACCOUNT),
    "OperatorService/SetRetention": lambda c: c.operations.set_retention(ACCOUNT, {"POSTER": None}),
    "OperatorService/EraseAccount": lambda c: c.operations.erase_account(ACCOUNT, why="asked"),
    "OperatorService/AddMember": lambda c: c.access.add_member("i", email="a@b.example"),
    "OperatorService/RemoveMember": lambda c: c.access.remove_member("p"),
    "OperatorService/ListMembers": lambda c: c.access.members(),
    "OperatorService/SetLimits": lambda c: c.access.set_limits(LIMITS),
    "OperatorService/SetAccount": lambda c: c.access.set_account(weight=2),
    "OperatorService/Recover": lambda c: c.operations.recover(),
}
RPCS = {
    f"{service.name}/{method.name}": method
    for service in gateways.services()
    for method in service.methods
}


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gateway]:
    """Answers every call with an empty message, and refuses streams."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"image")
    (tmp_path / "a.mp4").write_bytes(b"video")
    (tmp_path / "batch.jsonl").write_text('{"prompt": "p"}')
    (tmp_path / "template.json").write_text('{"prompt": "a cat"}')
    with gateways.for_the_cli(monkeypatch) as running:
        monkeypatch.setenv("FRAMEWIRE_ACCOUNT", ACCOUNT)
        refused = Refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED")
        for method in RPCS.values():
            empty = method.output_type._concrete_class()
            running.on(method.name, refused if method.server_streaming else empty)
        yield running


def test_every_rpc_is_in_the_lists() -> None:
    contracts = (ROOT / "proto" / "framewire" / "gateway").rglob("*.proto")
    rpcs = [re.findall(r"^  rpc \w+", path.read_text(), re.MULTILINE) for path in contracts]
    assert len(RPCS) == sum(map(len, rpcs)) > 0, "the descriptors are not all that there are"
    assert COMMANDS.keys() | NOT_ON_THE_COMMAND_LINE.keys() == RPCS.keys()
    assert COMMANDS.keys() & NOT_ON_THE_COMMAND_LINE.keys() == set()
    assert METHODS.keys() == RPCS.keys()


def test_commands_call_what_the_list_says(gateway: Gateway) -> None:
    runner = typer.testing.CliRunner()
    wrong: list[str] = []
    for rpc, command in COMMANDS.items():
        gateway.calls.clear()
        result = runner.invoke(app.app, command.split())
        if not gateway.requests(RPCS[rpc].name):
            wrong.append(f"{rpc}: framewire {command}: {result.output}")
    assert wrong == []


async def test_methods_call_what_the_list_says(gateway: Gateway) -> None:
    wrong: list[str] = []
    async with client.Client(gateway.address, "fw_key", account_id=ACCOUNT) as opened:
        for rpc, call in METHODS.items():
            gateway.calls.clear()
            try:
                answer = call(opened)
                if inspect.isawaitable(answer):
                    await answer
                else:
                    _ = [item async for item in answer]
            except errors.FramewireError as error:
                if not RPCS[rpc].server_streaming or error.reason != "ROLE_NOT_ALLOWED":
                    wrong.append(f"{rpc}: {error!r}")
            if not gateway.requests(RPCS[rpc].name):
                wrong.append(rpc)
    assert wrong == []


def commands(command: Any, name: str = "framewire") -> Iterator[tuple[str, Any]]:
    """(name, command) of each that does something."""
    if isinstance(command, typer.core.TyperGroup):
        for part, inner in command.commands.items():
            yield from commands(inner, f"{name} {part}")
    else:
        yield name, command


def test_every_command_says_json() -> None:
    found = dict(commands(typer.main.get_command(app.app)))
    lacking = {
        name
        for name, command in found.items()
        if "--json" not in {option for each in command.params for option in each.opts}
    }
    assert lacking == {"framewire local up", "framewire local status"}, "those pass words on"
    assert len(found) > 60
