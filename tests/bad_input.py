"""Bad input: each row of docs/errors.md that a caller can cause, as a call that is refused."""

from __future__ import annotations

import io
import re
import struct
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import struct_pb2
from PIL import Image

from framewire import client, errors, types
from framewire.events.v1 import vocabulary_pb2
from framewire.gateway.v1 import (
    account_pb2,
    account_pb2_grpc,
    upload_pb2,
    upload_pb2_grpc,
    video_pb2,
    video_pb2_grpc,
)
from tests import pictures
from tests import system as systems

TABLE = Path(__file__).parents[1] / "docs" / "errors.md"
HERE = "tests/integration/test_bad_input.py"
TINY: dict[str, Any] = {"model": "sora-2", "width": 320, "height": 180, "seconds": 1}
NOBODY = "a" * 26
MEGABYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """A row of docs/errors.md."""

    what: str
    code: str
    reason: str
    to_do: str
    tested: str


def table() -> list[Row]:
    """The one table of docs/errors.md."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    return [
        Row(*(cell.strip().strip("`") for cell in line.strip("|").split("|"))) for line in lines[2:]
    ]


@dataclass(frozen=True, slots=True)
class World:
    """Two accounts: one with credits, an image and a finished video, and one that has nothing."""

    system: systems.System
    channel: grpc.aio.Channel
    key: str
    revoked_key: str
    rich: client.Client
    poor: client.Client
    image: types.Image
    image_request_id: str
    done: types.Video
    done_request_id: str
    balance: types.Balance

    async def call(
        self, method: str, request: Any, key: str | None = "", timeout: float = 10.0
    ) -> Any:
        """A call as any gRPC client makes it. `key`: empty for the rich account's, None for none."""
        name, _, verb = method.partition("/")
        stubs: Mapping[str, Any] = {
            "Video": video_pb2_grpc.VideoServiceStub,
            "Upload": upload_pb2_grpc.UploadServiceStub,
            "Account": account_pb2_grpc.AccountServiceStub,
        }
        metadata = () if key is None else (("authorization", f"Bearer {key or self.key}"),)
        send = getattr(stubs[name](self.channel), verb)
        try:
            answer = send(request, metadata=metadata, timeout=timeout)
            if verb == "WatchVideo":
                return [part async for part in answer]
            return await answer
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from None

    async def create(self, spec: Mapping[str, Any] | None = None, **fields: Any) -> Any:
        """CreateVideo, of a tiny video unless told."""
        asked = vocabulary_pb2.VideoSpec(**{"prompt": "bad input", **TINY, **(spec or {})})
        request = video_pb2.CreateVideoRequest(
            **{"request_id": str(uuid.uuid4()), "spec": asked, **fields}
        )
        return await self.call("Video/CreateVideo", request)

    async def upload(self, *parts: bytes, **header: Any) -> Any:
        """UploadImage of these chunks."""

        async def requests() -> AsyncIterator[upload_pb2.UploadImageRequest]:
            named = upload_pb2.UploadImageHeader(**{"request_id": str(uuid.uuid4()), **header})
            yield upload_pb2.UploadImageRequest(header=named)
            for part in parts:
                yield upload_pb2.UploadImageRequest(chunk=part)

        return await self.call("Upload/UploadImage", requests())

    async def upload_video(self, part: bytes, **header: Any) -> Any:
        """UploadVideo of one chunk."""

        async def requests() -> AsyncIterator[upload_pb2.UploadVideoRequest]:
            named = upload_pb2.UploadVideoHeader(**{"request_id": str(uuid.uuid4()), **header})
            yield upload_pb2.UploadVideoRequest(header=named)
            yield upload_pb2.UploadVideoRequest(chunk=part)

        return await self.call("Upload/UploadVideo", requests())


Call = Callable[[World], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """A bad call. `what` is its row's, `says` what its message must say."""

    what: str
    says: str
    call: Call


async def refused(call: Awaitable[Any]) -> errors.FramewireError:
    """The error of a call that must fail."""
    try:
        answer = await call
    except errors.FramewireError as error:
        return error
    raise AssertionError(f"it was taken: {answer!r}")


def is_sentence(message: str) -> bool:
    """Words for a person: no traceback, no repr of an exception, no field of ours by accident."""
    return len(message.split()) >= 4 and not re.search(
        r"Traceback|Error\(|Exception|<[a-z_]+\.", message
    )


# What is sent


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few hundred kilobytes that unpacks to 900 million pixels."""

    def part(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", body) + part(b"IEND", b"")


def animation() -> bytes:
    """A WebP with two frames."""
    buffer = io.BytesIO()
    one, two = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    one.save(buffer, "WEBP", save_all=True, append_images=[two])
    return buffer.getvalue()


def truncated() -> bytes:
    photo = pictures.ROCKET.read_bytes()
    return photo[: len(photo) // 2]


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


async def header_missing(world: World) -> Any:
    async def requests() -> AsyncIterator[upload_pb2.UploadImageRequest]:
        yield upload_pb2.UploadImageRequest(chunk=b"bytes")

    return await world.call("Upload/UploadImage", requests())


async def no_spec(world: World) -> Any:
    request_id = str(uuid.uuid4())
    request = video_pb2.CreateVideoRequest(request_id=request_id)
    return await world.call("Video/CreateVideo", request)


async def deadline_over(world: World) -> Any:
    spec = vocabulary_pb2.VideoSpec(prompt="too late", **TINY)
    request = video_pb2.CreateVideoRequest(request_id=str(uuid.uuid4()), spec=spec)
    return await world.call("Video/CreateVideo", request, timeout=0.0)


async def of_another_account(world: World, use: str) -> Any:
    """The poor account asks for what is the rich one's."""
    video_id = world.done.video_id
    if use == "watch":
        return [video async for video in world.poor.watch_video(video_id)]
    if use == "image":
        return await world.poor.create_video("x", image_id=world.image.image_id, **TINY)
    if use == "list":
        other = client.Client(world.system.stack.gateway_address, world.key, account_id=NOBODY)
        async with other:
            return [video async for video in other.list_videos()]
    return await getattr(world.poor, use)(video_id)


async def ask_models(world: World, key: str | None) -> Any:
    return await world.call("Account/ListModels", account_pb2.ListModelsRequest(), key=key)


def get(video_id: str) -> Call:
    return lambda world: world.call("Video/GetVideo", video_pb2.GetVideoRequest(video_id=video_id))


def starting(*inputs: Mapping[str, Any], **fields: Any) -> Call:
    """CreateVideo that starts from these."""
    return spec(inputs=[vocabulary_pb2.VideoInput(**each) for each in inputs], **fields)


def spec(**fields: Any) -> Call:
    """A video of which one thing is wrong."""
    return lambda world: world.create(fields)


def request(**fields: Any) -> Call:
    """A request of which one thing is wrong."""
    return lambda world: world.create(**fields)


def image(*parts: bytes, **header: Any) -> Call:
    return lambda world: world.upload(*parts, **header)


def fetched(url: str) -> Call:
    return lambda world: world.rich.import_image(url)


def completed(upload_id: str) -> Call:
    return lambda world: world.rich.complete_upload(upload_id)


async def completed_too_early(world: World) -> Any:
    upload = await world.rich.create_upload(999, "image/png")
    return await world.rich.complete_upload(upload.upload_id)


def option(name: str, **value: Any) -> Call:
    return spec(options={name: struct_pb2.Value(**value)})


_SOON = datetime.now(UTC)
_PROMPT = "spec.prompt"

CASES = [
    Case("prompt empty", rf"{_PROMPT}: .*1", spec(prompt="")),
    Case("prompt of white space only", rf"{_PROMPT}: must say", spec(prompt=" \n\t ")),
    Case("prompt over 500 characters", rf"{_PROMPT}: .*500", spec(prompt="é" * 501)),
    Case("no spec at all", "spec: .*required", no_spec),
    Case("request_id is not a UUID", "request_id: .*UUID", request(request_id="again")),
    Case("text with the character U+0000", r"labels.*U\+0000", request(labels={"a": "x\0y"})),
    Case("text with the character U+0000", r"client_ref.*U\+0000", request(client_reference="\0")),
    Case("text with the character U+0000", r"spec.*U\+0000", spec(prompt="a\0b")),
    Case("label or reference against its rule", "labels", request(labels={"No Such Key": "x"})),
    Case("label or reference against its rule", "63", request(labels={"a": "x" * 64})),
    Case("label or reference against its rule", "128", request(client_reference="x" * 129)),
    Case("unknown model", "there are: sora-2, sora-2-pro", spec(model="sora-9")),
    Case("size that the model does not make", "it makes: 1280x720", spec(width=64, height=64)),
    Case("size that the model does not make", "it makes: 1280x720", spec(height=0)),
    Case("size beyond every model", "8192", spec(width=10_000)),
    Case("seconds that the model does not make", "it makes .*: 1, 4, 6, 8, 12", spec(seconds=5)),
    Case("seconds beyond every model", "600", spec(seconds=601)),
    Case("seconds beyond every model", "0", spec(seconds=-1)),
    Case("variants above the model's", "at most 1 variant", spec(variants=2)),
    Case("variants beyond every model", "8", spec(variants=9)),
    Case(
        "option that the model does not have", "its options: seed", option("speed", number_value=1)
    ),
    Case(
        "option out of range or of another type", "0 to 2147483647", option("seed", number_value=-1)
    ),
    Case("option out of range or of another type", "integer", option("seed", number_value=1.5)),
    Case("option out of range or of another type", "integer", option("seed", string_value="one")),
    Case("option out of range or of another type", "integer", option("seed", null_value=0)),
    Case("a number that JSON cannot carry", "NaN", option("seed", number_value=float("nan"))),
    Case("lane that the account lacks", "may use: STANDARD, BATCH", request(lane=1)),
    Case("lane that there is not", "lane", request(lane=77)),
    Case("start_by already over", "later time", request(start_by=_SOON - timedelta(hours=1))),
    Case("start_by too far away", "30 days", request(start_by=_SOON + timedelta(days=60))),
    Case("price above max_credits", "max_credits 0", request(max_credits=0)),
    Case("price above max_credits", "max_credits 0", request(max_credits=0, validate_only=True)),
    Case("quote that is not one, or of another video", "ask for a new", request(quote_id="mine")),
    Case("too few credits", "add credits", lambda world: world.poor.create_video("x", **TINY)),
    Case(
        "request_id used with another request",
        "make a new one",
        lambda world: world.rich.create_video("other", request_id=world.done_request_id, **TINY),
    ),
    Case(
        "request_id used with another request",
        "make a new one",
        lambda world: world.rich.upload_image(
            pictures.plain((1, 2, 3)), request_id=world.image_request_id
        ),
    ),
    # Ids
    Case("id that is none", "video_id: .*", get("no-such-video")),
    Case("unknown video", "not yours", get(NOBODY)),
    *(
        Case(
            "another account's video",
            "not yours",
            lambda world, use=use: of_another_account(world, use),
        )
        for use in ("get_video", "watch", "cancel_video", "get_download_url")
    ),
    Case("unknown image", "upload", spec(input_image_id=NOBODY)),
    Case(
        "images or a video that the model does not start from",
        "sora-2 does not start from a video; it starts from: text alone, 1 image as the first frame",
        starting({"input_video_id": NOBODY}),
    ),
    Case(
        "input at a frame that the video does not have",
        "has 24 frames",
        starting({"image_id": NOBODY, "frame_index": 24}, model="sora-1"),
    ),
    Case(
        "two inputs for one frame",
        "two are for one frame",
        starting({"image_id": NOBODY}, {"image_id": NOBODY}, model="sora-1"),
    ),
    Case(
        "crop bounds that hold nothing",
        "left_fraction must be below",
        starting({"image_id": NOBODY, "crop": {"left_fraction": 0.5, "bottom_fraction": 1.0}}),
    ),
    Case(
        "input_image_id beside inputs",
        "short for one",
        spec(input_image_id=NOBODY, inputs=[{"image_id": NOBODY}]),
    ),
    Case("input that is neither image nor video", "inputs", starting({"frame_index": 0})),
    Case("unknown input video", "upload", starting({"input_video_id": NOBODY}, model="sora-1")),
    Case(
        "asset that is not a video",
        "not a video",
        lambda world: world.create(
            {"model": "sora-1", "inputs": [{"input_video_id": world.image.image_id}]}
        ),
    ),
    Case("smaller version that is odd, or not smaller", "180", spec(rendition_heights=[180])),
    Case(
        "smaller version that was not asked for",
        "no such output",
        lambda world: world.call(
            "Video/GetDownloadUrl",
            video_pb2.GetDownloadUrlRequest(video_id=world.done.video_id, rendition_height=90),
        ),
    ),
    Case(
        "smaller version of a poster",
        "no smaller versions",
        lambda world: world.call(
            "Video/GetDownloadUrl",
            video_pb2.GetDownloadUrlRequest(
                video_id=world.done.video_id, rendition_height=90, poster=True
            ),
        ),
    ),
    Case(
        "video upload that is no video, or damaged",
        "MP4 or WebM",
        lambda world: world.upload_video(b"<html>no video at all</html>"),
    ),
    Case(
        "video over 100 MB",
        "104,857,600 bytes",
        lambda world: world.upload_video(b"x", size_bytes=104_857_601),
    ),
    Case("another account's image", "upload", lambda world: of_another_account(world, "image")),
    Case("another account", "not yours", lambda world: of_another_account(world, "list")),
    Case(
        "asset that is not an image",
        "not an image",
        lambda world: world.create({"input_image_id": world.done.outputs[0].asset_id}),
    ),
    Case(
        "output that the video does not have",
        "COMPLETED",
        lambda world: world.rich.get_download_url(world.done.video_id, variant=3),
    ),
    Case(
        "unknown or another account's API key",
        "not yours",
        lambda world: world.call(
            "Account/RevokeApiKey", account_pb2.RevokeApiKeyRequest(key_id=NOBODY)
        ),
    ),
    Case(
        "page token of another listing",
        "start without it",
        lambda world: world.call("Video/ListVideos", video_pb2.ListVideosRequest(page_token="abc")),
    ),
    Case(
        "operator who names no account",
        "set account_id",
        lambda world: world.system.operator.balance(),
    ),
    # Uploads that do not come through us
    *(
        Case("URL that is not https, or not public", says, fetched(url))
        for url, says in (
            ("http://example.com/a.png", "only https"),
            ("https://127.0.0.1/a.png", "not public"),
            ("https://2130706433/a.png", "not public"),
            ("https://[::ffff:10.0.0.1]/a.png", "not public"),
            ("https://169.254.169.254/latest/meta-data", "not public"),
        )
    ),
    Case("URL whose server does not give the image", "not known", fetched("https://no.invalid/")),
    Case("upload that there is not, or is over", "create a new one", completed(NOBODY)),
    Case("upload completed before its bytes came", "PUT the bytes", completed_too_early),
    # Images
    Case("not an image", "Send a JPEG, PNG, WebP or AVIF", image(b"hello, I am a text")),
    Case("not an image", "Send a JPEG, PNG, WebP or AVIF", image()),
    Case("SVG, GIF, PDF or another format", "SVG files are not accepted. Send a", image(SVG)),
    Case("SVG, GIF, PDF or another format", "GIF files are not", image(b"GIF89a" + bytes(99))),
    Case("animated image", "Send a single still image", image(animation())),
    Case("truncated or damaged image", "Upload the complete file", image(truncated())),
    Case("decompression bomb", "50 megapixels.*Scale it down", image(bomb())),
    Case("image over 10 MB", "10,485,760 bytes", image(b"x", size_bytes=10 * MEGABYTE + 1)),
    Case("image over 10 MB", "10,485,760 bytes", image(*[bytes(MEGABYTE)] * 11)),
    Case("bytes that are not those announced", "again", image(SVG, sha256="0" * 64)),
    Case("bytes that are not those announced", "again", image(SVG, size_bytes=7)),
    Case("upload without its header", "first message is the header", header_missing),
    # Who calls
    Case("missing key", "send an API key", lambda world: ask_models(world, None)),
    Case("missing key", "send an API key", lambda world: ask_models(world, "secret")),
    Case("wrong or revoked key", "use another", lambda world: ask_models(world, "fw_" + "a" * 40)),
    Case("wrong or revoked key", "use another", lambda world: ask_models(world, world.revoked_key)),
    Case(
        "role that may not call this",
        "operator|may not",
        lambda world: world.rich.grant(world.rich.account_id, 1_000),
    ),
    Case("deadline already over", "try again", deadline_over),
]
