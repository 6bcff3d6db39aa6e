"""The SDK against a scripted gateway: retries, watch, downloads, and what becomes of messages."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import http.server
import itertools
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from framewire import client as clients
from framewire import errors, transport, types, uploads
from framewire.credits.v1 import ledger_pb2
from framewire.decode import decode
from framewire.events import types as event_types
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import (
    account_pb2,
    operator_pb2,
    upload_pb2,
    video_pb2,
    video_pb2_grpc,
)
from tests.unit import gateway as gateways
from tests.unit.gateway import HANG, UNAVAILABLE, VIDEO, Gateway, Refusal, told, video

CODE = grpc.StatusCode


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with gateways.running() as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[clients.Client]:
    async with clients.Client(gateway.address, "fw_key") as opened:
        yield opened


def limited(seconds: float | None) -> Refusal:
    return Refusal(CODE.RESOURCE_EXHAUSTED, "RATE_LIMITED", retry_after_seconds=seconds)


async def taken(items: Any) -> list[Any]:
    return [item async for item in items]


# Retries


@pytest.mark.parametrize(
    "trouble",
    [UNAVAILABLE, Refusal(CODE.CANCELLED), Refusal(CODE.ABORTED, "CONFLICT"), limited(0.01)],
    ids=lambda trouble: trouble.code.name,
)
async def test_trouble_that_passes_is_retried_under_one_request_id(
    gateway: Gateway, client: clients.Client, trouble: Refusal
) -> None:
    gateway.on("CreateVideo", trouble, trouble, video())
    made = await client.create_video("a rocket", lane="vip", max_credits=9, options={"seed": 3})
    sent = gateway.requests("CreateVideo")
    assert len(sent) == 3
    assert len({request.request_id for request in sent}) == 1
    assert uuid.UUID(sent[0].request_id).version == 4
    assert sent[0] == sent[2]
    assert sent[0].lane == vocabulary_pb2.LANE_VIP
    assert sent[0].max_credits == 9
    assert sent[0].spec.options["seed"].number_value == 3
    assert made.video_id == VIDEO
    assert gateway.metadata["authorization"] == "Bearer fw_key"


async def test_each_logical_call_has_its_own_request_id(
    gateway: Gateway, client: clients.Client
) -> None:
    gateway.on("CreateVideo", video())
    await client.create_video("a")
    await client.create_video("a")
    first, second = gateway.requests("CreateVideo")
    assert first.request_id != second.request_id
    assert not first.HasField("max_credits")


@pytest.mark.parametrize(
    "refusal",
    [
        limited(None),
        limited(3600),
        Refusal(CODE.INVALID_ARGUMENT, "MODEL_UNKNOWN"),
        Refusal(CODE.INTERNAL, "INTERNAL"),
    ],
)
async def test_a_refusal_is_raised_at_once(
    gateway: Gateway, client: clients.Client, refusal: Refusal
) -> None:
    gateway.on("CreateVideo", refusal)
    with pytest.raises(errors.FramewireError) as raised:
        await client.create_video("a")
    assert len(gateway.requests("CreateVideo")) == 1
    assert (raised.value.code, raised.value.reason) == (refusal.code, refusal.reason)


async def test_retries_end_with_the_deadline(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.on("GetBalance", UNAVAILABLE)
    gateway.keep_time(monkeypatch, "GetBalance", 100)
    async with clients.Client(gateway.address, "k", retry_seconds=250) as client:
        with pytest.raises(errors.FramewireError) as raised:
            await client.balance()
    assert raised.value.code is CODE.UNAVAILABLE
    assert len(gateway.requests("GetBalance")) == 3


async def test_nobody_listening_is_a_framewire_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each look at the clock is a minute after the one before: the first failure is the last.
    minutes = itertools.count(0, 60)
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: next(minutes)))
    async with clients.Client("127.0.0.1:1", "k", retry_seconds=119) as client:
        with pytest.raises(errors.FramewireError) as raised:
            await client.balance()
    assert raised.value.reason == "DEPENDENCY_UNAVAILABLE"


async def test_bad_words_are_refused_before_anything_is_sent(
    gateway: Gateway, client: clients.Client
) -> None:
    with pytest.raises(errors.FramewireError, match="VIP, STANDARD, BATCH"):
        await client.create_video("a", lane="fast")
    with pytest.raises(errors.FramewireError, match="ftp"):
        await clients.Client("ftp://x", "k").balance()
    assert not gateway.calls


# Watch


async def test_watch_goes_on_after_the_last_revision_until_settled(
    gateway: Gateway, client: clients.Client
) -> None:
    gateway.on(
        "WatchVideo",
        told(video(1), Refusal(CODE.CANCELLED)),
        told(video(1), video(3, progress=10), video(3, progress=40), video(2), UNAVAILABLE),
        UNAVAILABLE,
        told(video(5, "COMPLETED")),
        told(video(6, "COMPLETED", settled=True), HANG),
    )
    gateway.on("GetVideo", video(5, "COMPLETED"))
    seen = await taken(client.watch_video(VIDEO))
    states = [(one.revision, one.progress_percent) for one in seen]
    assert states == [(1, 0), (3, 10), (3, 40), (5, 0), (6, 0)]
    assert seen[-1].is_settled
    asked = [request.after_revision for request in gateway.requests("WatchVideo")]
    assert asked == [0, 1, 3, 3, 5]


async def test_watch_of_a_settled_video_ends_without_waiting(
    gateway: Gateway, client: clients.Client
) -> None:
    gateway.on("WatchVideo", [])
    gateway.on("GetVideo", video(7, "COMPLETED", settled=True))
    assert await taken(client.watch_video(VIDEO, after_revision=7)) == []
    assert [one.revision for one in await taken(client.watch_video(VIDEO))] == [7]


async def test_watch_raises_what_waiting_does_not_mend(
    gateway: Gateway, client: clients.Client
) -> None:
    gateway.on("WatchVideo", told(video(1), Refusal(CODE.NOT_FOUND, "VIDEO_NOT_FOUND")))
    with pytest.raises(errors.FramewireError, match="no") as raised:
        await taken(client.watch_video(VIDEO))
    assert raised.value.reason == "VIDEO_NOT_FOUND"


async def test_watch_gives_up_when_nothing_comes_back(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.on("WatchVideo", UNAVAILABLE)
    gateway.keep_time(monkeypatch, "WatchVideo", 4)
    async with clients.Client(gateway.address, "k", retry_seconds=10) as client:
        with pytest.raises(errors.FramewireError):
            await taken(client.watch_video(VIDEO))
    assert len(gateway.requests("WatchVideo")) == 3


class Watched(video_pb2_grpc.VideoServiceServicer):
    """Tells one state and then nothing, as the real gateway's asyncio server would."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def WatchVideo(self, request, context):
        try:
            yield told(video(1))[0]
            await asyncio.Event().wait()
        finally:
            self.left.set()


async def test_leaving_a_watch_ends_the_call() -> None:
    watched, server = Watched(), grpc.aio.server()
    video_pb2_grpc.add_VideoServiceServicer_to_server(watched, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with clients.Client(f"127.0.0.1:{port}", "fw_key") as client:
        async with contextlib.aclosing(client.watch_video(VIDEO)) as states:
            async for _ in states:
                break
        await asyncio.wait_for(watched.left.wait(), 60)
    await server.stop(0)


# Images, pages, accounts


async def test_upload_sends_the_whole_image_again(
    gateway: Gateway, client: clients.Client, tmp_path: Path
) -> None:
    body = bytes(range(256)) * 2500
    (tmp_path / "a.png").write_bytes(body)
    gateway.on("UploadImage", UNAVAILABLE, upload_pb2.Image(image_id="i" * 26, width=4))
    image = await client.upload_image(tmp_path / "a.png")
    assert image.image_id == "i" * 26
    first, second = gateway.requests("UploadImage")
    assert first == second
    assert b"".join(part.chunk for part in first[1:]) == body
    assert all(0 < len(part.chunk) <= 1_048_576 for part in first[1:])
    assert first[0].header.sha256 == hashlib.sha256(body).hexdigest()
    assert first[0].header.size_bytes == len(body)


async def test_local_trouble_is_told_before_anything_is_sent(
    gateway: Gateway, client: clients.Client, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        await client.upload_image(tmp_path / "none.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(uploads.MAX_IMAGE_BYTES + 1)
    with pytest.raises(errors.FramewireError) as raised:
        await client.upload_image(tmp_path / "huge.png")
    assert raised.value.reason == "TOO_LARGE"
    assert not gateway.calls


async def test_pages_are_followed(gateway: Gateway, client: clients.Client) -> None:
    gateway.on(
        "ListVideos",
        video_pb2.ListVideosResponse(videos=[video(1), video(2)], next_page_token="t"),
        video_pb2.ListVideosResponse(videos=[video(3)]),
    )
    found = await taken(client.list_videos(state="completed"))
    assert [one.revision for one in found] == [1, 2, 3]
    first, second = gateway.requests("ListVideos")
    assert (first.page_token, second.page_token) == ("", "t")
    assert first.state == vocabulary_pb2.VIDEO_STATE_COMPLETED


async def test_a_key_whose_secret_was_lost_is_replaced(
    gateway: Gateway, client: clients.Client
) -> None:
    lost = account_pb2.CreateApiKeyResponse(key=account_pb2.ApiKey(key_id="k" * 26))
    good = account_pb2.CreateApiKeyResponse(key=account_pb2.ApiKey(key_id="n" * 26), secret="fw_s")
    gateway.on("CreateApiKey", UNAVAILABLE, lost, good)
    gateway.on("RevokeApiKey", account_pb2.ApiKey())
    assert (await client.create_api_key()).secret == "fw_s"
    assert [one.key_id for one in gateway.requests("RevokeApiKey")] == ["k" * 26]
    ids = [one.request_id for one in gateway.requests("CreateApiKey")]
    assert ids[0] == ids[1] != ids[2]


async def test_a_rotated_key_whose_secret_was_lost_is_rotated_in_its_turn(
    gateway: Gateway, client: clients.Client
) -> None:
    lost = account_pb2.CreateApiKeyResponse(key=account_pb2.ApiKey(key_id="n" * 26))
    good = account_pb2.CreateApiKeyResponse(key=account_pb2.ApiKey(key_id="m" * 26), secret="fw_s")
    gateway.on("RotateApiKey", UNAVAILABLE, lost, good)
    assert (await client.access.rotate_key("k" * 26)).secret == "fw_s"
    sent = gateway.requests("RotateApiKey")
    assert [one.key_id for one in sent] == ["k" * 26, "k" * 26, "n" * 26]
    assert sent[0].request_id == sent[1].request_id != sent[2].request_id
    gateway.on("RotateApiKey", lost)
    replayed = await client.access.rotate_key("k" * 26, request_id=sent[0].request_id)
    assert replayed.secret == ""


async def test_grant_and_account_keep_a_given_request_id(
    gateway: Gateway, client: clients.Client
) -> None:
    request_id = str(uuid.uuid4())
    gateway.on("CreateAccount", operator_pb2.Account(account_id="a" * 26, lanes=[1, 2]))
    account = await client.create_account("x", lanes=("vip",), request_id=request_id)
    assert account.lanes == ("VIP", "STANDARD")
    gateway.on("Grant", ledger_pb2.GrantResponse(lot_id="l"))
    await client.grant(account.account_id, 5, request_id=request_id)
    assert gateway.requests("CreateAccount")[0].request_id == request_id
    sent = gateway.requests("Grant")[0].grant
    assert (sent.request_id, sent.credits, sent.account_id) == (request_id, 5, "a" * 26)
    assert sent.source == ledger_pb2.LOT_SOURCE_PROMOTION


# Downloads


class Files:
    """An HTTP server whose answers are scripted; the last is repeated."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes, int]] = []
        self.asked = 0
        files = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body, promised = files.answers[min(files.asked, len(files.answers) - 1)]
                files.asked += 1
                self.send_response(status)
                self.send_header("Content-Length", str(promised))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/x.mp4?signature=s"


@pytest.fixture
def files() -> Iterator[Files]:
    served = Files()
    thread = threading.Thread(target=served.server.serve_forever, args=(0.02,))
    thread.start()
    yield served
    served.server.shutdown()
    thread.join()
    served.server.server_close()


BODY = b"video" * 100_000
SHA256 = hashlib.sha256(BODY).hexdigest()


def offer(gateway: Gateway, files: Files, sha256: str = SHA256) -> None:
    output = gateways.output(BODY, sha256)
    gateway.on("GetDownloadUrl", video_pb2.GetDownloadUrlResponse(url=files.url, output=output))


async def test_download_gets_a_fresh_url_and_leaves_only_the_whole_file(
    gateway: Gateway,
    client: clients.Client,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients.random, "uniform", lambda low, high: 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # is not asked for our own machine
    offer(gateway, files)
    files.answers = [
        (403, b"expired", 7),
        (200, BODY[:1000], len(BODY)),
        (200, BODY, len(BODY)),
    ]
    place = tmp_path / "out.mp4"
    place.write_bytes(b"before")
    await client.download(VIDEO, place)
    assert place.read_bytes() == BODY
    assert len(gateway.requests("GetDownloadUrl")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("body", [BODY[:-1] + b"x", BODY + b"more"], ids=["other", "longer"])
async def test_other_bytes_are_never_delivered(
    gateway: Gateway, client: clients.Client, files: Files, tmp_path: Path, body: bytes
) -> None:
    offer(gateway, files)
    files.answers = [(200, body, len(body))]
    with pytest.raises(errors.FramewireError) as raised:
        await client.download(VIDEO, tmp_path / "out.mp4")
    assert raised.value.reason == "CHECKSUM_MISMATCH"
    assert list(tmp_path.iterdir()) == []
    assert files.asked == 1


# Generate


async def test_generate_uploads_creates_watches_and_downloads(
    gateway: Gateway, client: clients.Client, files: Files, tmp_path: Path
) -> None:
    done = video(4, "COMPLETED", settled=True)
    done.outputs.append(gateways.output(BODY, SHA256))
    gateway.on("UploadImage", upload_pb2.Image(image_id="i" * 26))
    gateway.on("CreateVideo", video(1))
    gateway.on("WatchVideo", told(video(2, progress=50), video(3, "COMPLETED"), done))
    offer(gateway, files)
    files.answers = [(200, BODY, len(BODY))]
    shown: list[types.Video] = []
    request_id = str(uuid.uuid4())
    for _ in range(2):  # the second time it goes on under the same ids
        made = await client.generate(
            "a rocket",
            b"image",
            out=tmp_path / "o.mp4",
            on_progress=shown.append,
            request_id=request_id,
        )
    assert made.credits.captured == 8
    assert [one.revision for one in shown] == [1, 2, 3, 4] * 2
    assert (tmp_path / "o.mp4").read_bytes() == BODY
    first, second = gateway.requests("CreateVideo")
    assert first == second
    assert first.spec.input_image_id == "i" * 26
    uploads = [parts[0].header.request_id for parts in gateway.requests("UploadImage")]
    assert uploads[0] == uploads[1] != request_id


async def test_a_video_without_an_output_raises_its_cause(
    gateway: Gateway, client: clients.Client, tmp_path: Path
) -> None:
    gateway.on("CreateVideo", video(1))
    gateway.on("WatchVideo", told(video(2, "FAILED", settled=True)))
    with pytest.raises(errors.FramewireError, match="was refused") as raised:
        await client.generate("a", out=tmp_path / "o.mp4")
    assert raised.value.reason == "INPUT_REFUSED"
    assert raised.value.metadata["video_id"] == VIDEO
    assert raised.value.metadata["captured_credits"] == "0"


# Messages


PAIRS: list[tuple[type[Any], Any]] = [
    (types.Video, video_pb2.Video),
    (types.VideoSpec, vocabulary_pb2.VideoSpec),
    (types.VideoCredits, video_pb2.VideoCredits),
    (types.VideoFailure, video_pb2.VideoFailure),
    (types.Output, event_pb2.Output),
    (types.Image, upload_pb2.Image),
    (types.Quote, video_pb2.QuoteVideoResponse),
    (types.DownloadUrl, video_pb2.GetDownloadUrlResponse),
    (types.Model, account_pb2.Model),
    (types.ModelOption, account_pb2.ModelOption),
    (types.Balance, ledger_pb2.Balance),
    (types.Entry, ledger_pb2.Entry),
    (types.Grant, ledger_pb2.GrantResponse),
    (types.Account, operator_pb2.Account),
    (types.ApiKey, account_pb2.ApiKey),
    (types.NewApiKey, account_pb2.CreateApiKeyResponse),
    (event_types.Queued, event_pb2.Queued),
    (event_types.Started, event_pb2.Started),
    (event_types.Completed, event_pb2.Completed),
    (event_types.Failed, event_pb2.Failed),
    (event_types.Cancelled, event_pb2.Cancelled),
    (event_types.Settled, event_pb2.Settled),
    (event_types.Recovered, event_pb2.Recovered),
    (event_types.Deleted, event_pb2.Deleted),
    (event_types.Expired, event_pb2.Expired),
    (event_types.BalanceLow, event_pb2.BalanceLow),
]


@pytest.mark.parametrize(("kind", "message"), PAIRS, ids=lambda one: one.__name__)
def test_every_field_of_the_contract_is_there(kind: type[Any], message: Any) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    assert names == set(message.DESCRIPTOR.fields_by_name)
    assert decode(kind, message()) == decode(kind, message())


def test_enums_are_words_and_times_are_aware() -> None:
    found = decode(types.Video, video(1, "FAILED"))
    assert (found.state, found.stage, found.lane) == ("FAILED", "RENDERING", "STANDARD")
    assert found.failure is not None
    assert found.failure.cause == "INPUT_REFUSED"
    assert found.created_at == datetime(2026, 11, 20, 10, tzinfo=UTC)
    assert found.finished_at is None
    assert found.is_terminal
    assert not found.is_settled


def test_words_of_a_newer_server_do_no_harm() -> None:
    newer = video_pb2.Video()
    newer.ParseFromString(b"\x18\x63")  # state 99
    assert decode(types.Video, newer).state == "99"
