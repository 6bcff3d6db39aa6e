"""The SDK for programs without asyncio: the same calls, answers and errors as `framewire.client`, one at a time.

    with sync.Client("gateway:7700", api_key) as client:
        video = client.generate("The camera rises", image="rocket.jpg", out="rocket.mp4")

A loop in a thread of its own does the work; calls may come from any thread but one that runs an event loop. What
operators do with attempts and the ledger is in `framewire.client` and the CLI only.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from datetime import datetime
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from framewire import client, events

P = ParamSpec("P")
T = TypeVar("T")
_END = object()


class _Loop:
    """An event loop in a daemon thread: a program that forgets to close it can still end."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="framewire", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of some work; Ctrl-C here ends it there."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            work.close()
            raise RuntimeError("this thread runs an event loop: use framewire.client there")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of a stream; it is closed when the iterator is."""
        try:
            while (item := self.run(_next(stream))) is not _END:
                yield item  # pyright: ignore[reportReturnType]
        finally:
            self.run(_close(stream))

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _close(stream: AsyncGenerator[T, None]) -> None:
    await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> object:
    return await anext(stream, _END)


def _call(
    method: Callable[Concatenate[client.Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(method)
    def called(self: Client, /, *arguments: P.args, **named: P.kwargs) -> T:
        return self.loop.run(method(self.behind, *arguments, **named))

    return called


def _iterate(
    method: Callable[Concatenate[client.Client, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @functools.wraps(method)
    def called(self: Client, /, *arguments: P.args, **named: P.kwargs) -> Iterator[T]:
        return self.loop.iterate(method(self.behind, *arguments, **named))

    return called


class Client:
    """One caller of one gateway, as `framewire.client.Client`; its methods are documented there."""

    def __init__(
        self, address: str, api_key: str, *, account_id: str = "", retry_seconds: float = 60.0
    ) -> None:
        self.behind = client.Client(
            address, api_key, account_id=account_id, retry_seconds=retry_seconds
        )
        self.loop = _Loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way."""
        self.loop.run(self.behind.aclose())
        self.loop.close()

    generate = _call(client.Client.generate)
    create_video = _call(client.Client.create_video)
    create_videos = _call(client.Client.create_videos)
    retry_video = _call(client.Client.retry_video)
    get_video = _call(client.Client.get_video)
    list_videos = _iterate(client.Client.list_videos)
    watch_video = _iterate(client.Client.watch_video)
    watch_videos = _iterate(client.Client.watch_videos)
    cancel_video = _call(client.Client.cancel_video)
    delete_video = _call(client.Client.delete_video)
    quote_video = _call(client.Client.quote_video)
    get_download_url = _call(client.Client.get_download_url)
    download = _call(client.Client.download)
    download_all = _call(client.Client.download_all)
    preview_inputs = _call(client.Client.preview_inputs)
    upload_image = _call(client.Client.upload_image)
    upload_video = _call(client.Client.upload_video)
    upload_inputs = _call(client.Client.upload_inputs)
    complete_video_upload = _call(client.Client.complete_video_upload)
    import_image = _call(client.Client.import_image)
    create_upload = _call(client.Client.create_upload)
    complete_upload = _call(client.Client.complete_upload)
    balance = _call(client.Client.balance)
    entries = _iterate(client.Client.entries)
    usage = _call(client.Client.usage)
    models = _call(client.Client.models)
    create_api_key = _call(client.Client.create_api_key)
    create_template = _call(client.Client.create_template)
    get_template = _call(client.Client.get_template)
    list_templates = _iterate(client.Client.list_templates)
    archive_template = _call(client.Client.archive_template)
    create_account = _call(client.Client.create_account)
    grant = _call(client.Client.grant)


def subscribe(
    nats_url: str,
    account_id: str = "*",
    kinds: Iterable[str] = (),
    durable: str | None = None,
    since: datetime | None = None,
) -> Iterator[events.Event]:
    """`framewire.events.subscribe` for a plain `for`: an event is acknowledged when the next one is asked for."""
    loop = _Loop()
    try:
        yield from loop.iterate(events.subscribe(nats_url, account_id, kinds, durable, since))
    finally:
        loop.close()
