"""Answers that go wrong on the wire, and the server protocol that makes them possible."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette import responses, types
from uvicorn.protocols.http import h11_impl

TRANSPORT = "simulator.transport"


class Protocol(h11_impl.H11Protocol):
    """Uvicorn's HTTP/1.1, with the connection's transport within the application's reach."""

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        inner = self.app

        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope[TRANSPORT] = self.transport
            await inner(scope, receive, send)

        self.app = app


class NoAnswer(responses.Response):
    """Closes the connection without a byte."""

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        del send
        scope[TRANSPORT].abort()
        await _gone(receive)


class Hang(responses.Response):
    """Never answers: holds on until the client gives up."""

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        del scope, send
        await _gone(receive)


class CutBody(responses.Response):
    """Promises the whole body, sends half of it and closes the connection."""

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        content = bytes(self.body)
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        half = content[: len(content) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})
        transport: asyncio.Transport = scope[TRANSPORT]
        transport.close()  # sends what is buffered first
        await _gone(receive)


class Stall(responses.Response):
    """The headers of an answer, and nothing more."""

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        del scope
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b" ", "more_body": True})
        await _gone(receive)


class CutChunks(responses.Response):
    """Sends half of the body in chunks and closes the connection without the last one."""

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        content = bytes(self.body)
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        half = content[: len(content) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})
        transport: asyncio.Transport = scope[TRANSPORT]
        transport.close()
        await _gone(receive)


def flood(megabytes: float) -> responses.Response:
    """That much JSON, made as it goes out."""

    async def parts() -> AsyncIterator[bytes]:
        yield b'{"id": "a", "status": "completed", "data": ["'
        for _ in range(int(megabytes) * 16):
            yield b"a" * 65536
        yield b'"]}'

    return responses.StreamingResponse(parts(), media_type="application/json")


def drip(content: bytes) -> responses.Response:
    """A byte a second."""

    async def parts() -> AsyncIterator[bytes]:
        for position in range(len(content)):
            yield content[position : position + 1]
            await asyncio.sleep(1)

    headers = {"content-length": str(len(content))}
    return responses.StreamingResponse(parts(), media_type="video/mp4", headers=headers)


async def _gone(receive: types.Receive) -> None:
    """Waits until the connection is closed, by either side: only then may the server be told that
    the call is over without it sending an answer of its own.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
