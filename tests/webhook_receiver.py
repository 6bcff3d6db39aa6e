"""A receiver of webhooks on loopback: remembers what came, answers as it is told."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.waiting import eventually


@dataclass(frozen=True)
class Post:
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event_id(self) -> str:
        return self.headers["webhook-id"]


@dataclass
class Receiver:
    """What came, by path; `answers` are used up one by one, then 204."""

    url: str = ""
    posts: dict[str, list[Post]] = field(default_factory=lambda: defaultdict(list))
    answers: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    always: dict[str, str] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split(" ")
            assert method == "POST"
            headers = {
                name.lower(): value
                for name, _, value in (line.partition(": ") for line in head[1:])
            }
            body = await reader.readexactly(int(headers["content-length"]))
            self.posts[path].append(Post(path, headers, body))
            if path in self.stuck:
                await reader.read()  # until the sender hangs up
                return
            waiting = self.answers[path]
            answer = waiting.pop(0) if waiting else self.always.get(path, "204 No Content")
            status, *extra = answer.split("\n")
            lines = [f"HTTP/1.1 {status}", *extra, "connection: close", "", ""]
            writer.write("\r\n".join(lines).encode())
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def running(certificate: Path | None = None) -> AsyncIterator[Receiver]:
    """A receiver; with a certificate by TLS."""
    made, secure = Receiver(), None
    if certificate is not None:
        secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        secure.load_cert_chain(certificate, certificate.with_suffix(".key"))
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=secure)
    port = server.sockets[0].getsockname()[1]
    made.url = f"{'https' if secure else 'http'}://127.0.0.1:{port}"
    try:
        yield made
    finally:
        server.close()


async def came(receiver: Receiver, path: str, number: int = 1) -> list[Post]:
    return await eventually(
        lambda: receiver.posts[path] if len(receiver.posts[path]) >= number else None,
        what=f"{number} posts to {path}",
    )


def signed(post: Post, secret: str) -> bool:
    """Whether one of the signatures is this secret's; computed here by the standard's words."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = f"{post.headers['webhook-id']}.{post.headers['webhook-timestamp']}.".encode()
    mac = hmac.new(key, content + post.body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(mac).decode()}" in post.headers["webhook-signature"].split(" ")
