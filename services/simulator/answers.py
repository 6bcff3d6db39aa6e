"""Answers that go wrong on the wire, and the server protocol that makes them possible."""

import asyncio
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


async def _gone(receive: types.Receive) -> None:
    """Waits until the connection is closed, by either side: only then may the server be told that
    the call is over without it sending an answer of its own.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
