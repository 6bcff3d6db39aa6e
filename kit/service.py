"""The life of a service's process: start in order, serve, drain, stop.

    async def main(settings: Settings) -> None:
        async with service.Process("credits", settings) as process:
            pool = await process.enter(postgres.pool(...))
            ...
            process.serve(add_to_server, servicer)
            process.loop(settlement)
            await process.run(authenticate)

Drain: health says NOT_SERVING, loops stop pulling, running calls and steps get `drain_seconds`, then everything
closes in reverse order of its opening.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from pydantic import SecretStr

from kit import config, loops, migrate, rpc, telemetry, tls

log = telemetry.logger(__name__)

T = TypeVar("T")
S = TypeVar("S", bound=config.ServiceSettings)
MAX_CONCURRENT_CALLS = 4096
WAIT_SECONDS = 2.0
STREAM_WINDOW_BYTES = 1024 * 1024
CONNECTION_AGE_MS = 120_000
"""A client's connection is closed after so long, softly, so that it looks the name up again and finds new replicas."""


class Loop(Protocol):
    """Something that runs until told to stop."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until `stopping` is set."""
        ...


def start(
    name: str,
    settings_class: type[S],
    main: Callable[[S], Coroutine[Any, Any, None]],
    migrations: Path,
    prepare: Callable[[S], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """The body of every `__main__`: `python -m services.X` runs it, `... migrate` brings its database up.

    `... wait` ends when the database has every migration that this version knows: what a roll-out waits for.
    """
    settings = config.load(settings_class)
    dsn = settings.sentry_dsn.get_secret_value()
    try:
        telemetry.configure(name, settings.log_level, settings.otlp_endpoint, dsn)
    except ValueError as error:
        raise SystemExit(f"settings are not usable:\n  {error}") from None
    try:
        _start(name, settings, main, migrations, prepare)
    except Exception as error:
        log.error("service_failed", error=repr(error), exc_info=error)
        raise
    finally:
        telemetry.TRACKER.close()


def _start(
    name: str,
    settings: S,
    main: Callable[[S], Coroutine[Any, Any, None]],
    migrations: Path,
    prepare: Callable[[S], Coroutine[Any, Any, None]] | None,
) -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "run"
    if command == "migrate":
        uvloop.run(_migrate(settings.database_url, migrations, settings, prepare))
    elif command == "wait":
        uvloop.run(_wait(settings.database_url.get_secret_value(), migrations))
    elif command == "run":
        uvloop.run(main(settings))
    else:
        raise SystemExit(f"usage: python -m services.{name} [run|migrate|wait]")


async def _wait(url: str, migrations: Path) -> None:
    while missing := await migrate.missing(url, migrations):
        log.info("waiting_for_migrations", missing=missing)
        await asyncio.sleep(WAIT_SECONDS)


async def _migrate(
    url: SecretStr,
    migrations: Path,
    settings: S,
    prepare: Callable[[S], Coroutine[Any, Any, None]] | None,
) -> None:
    applied = await migrate.migrate(url.get_secret_value(), migrations)
    if prepare is not None:
        await prepare(settings)
    log.info("migrated", applied=applied)


class Process:
    """One service's process: what it opened, serves and runs."""

    def __init__(self, name: str, settings: config.ServiceSettings) -> None:
        self.name = name
        self._settings = settings
        self._stack = AsyncExitStack()
        self._registrations: list[tuple[Callable[[Any, grpc.aio.Server], None], Any]] = []
        self._loops: list[Loop] = []
        self._checker = HealthServicer()
        self.stopping = asyncio.Event()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        host, port = self._settings.metrics_listen.rsplit(":", 1)
        telemetry.serve_metrics(host, int(port))
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()
        log.info("stopped")

    async def enter(self, opened: AbstractAsyncContextManager[T]) -> T:
        """Opens something that is closed, in reverse order, at the end."""
        return await self._stack.enter_async_context(opened)

    def serve(
        self, add_to_server: Callable[[Any, grpc.aio.Server], None], servicer: object
    ) -> None:
        """Adds a gRPC service."""
        self._registrations.append((add_to_server, servicer))

    def loop(self, loop: Loop) -> None:
        """Adds a loop."""
        self._loops.append(loop)

    async def tell(self, name: str, serving: bool) -> None:
        """Says by the health service how something is that the process needs; the empty name is the process itself."""
        states = health_pb2.HealthCheckResponse
        await self._checker.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def run(self, authenticate: rpc.Authenticate) -> None:
        """Serves until SIGTERM or until a loop dies, then drains. A dead loop ends the process with its error."""
        server, checker = self._server(authenticate), self._checker
        tls.check(self._settings)
        # What is there by now stays to the end: else each full collection looks through it, and all calls wait.
        gc.collect()
        gc.freeze()
        shown, listen = tls.server(self._settings), self._settings.listen
        port = server.add_secure_port(listen, shown) if shown else server.add_insecure_port(listen)
        await server.start()
        probes = await self._probes(checker)
        loops_ = [*self._loops, loops.Lag()]
        tasks = [asyncio.create_task(loop.run(self.stopping)) for loop in loops_]
        await checker.set("", health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", port=port, pid=os.getpid())
        stop = asyncio.create_task(self.stopping.wait())
        done, _ = await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        self.stopping.set()
        log.info("draining")
        await checker.enter_graceful_shutdown()
        await server.stop(self._settings.drain_seconds)
        await self._end(tasks)
        if probes is not None:
            await probes.stop(None)
        for task in done - {stop}:
            task.result()

    async def _probes(self, checker: HealthServicer) -> grpc.aio.Server | None:
        """Health alone, in plain text, where a kubelet asks: it speaks no TLS."""
        if not self._settings.health_listen:
            return None
        probes = grpc.aio.server(maximum_concurrent_rpcs=16)
        health_pb2_grpc.add_HealthServicer_to_server(checker, probes)
        probes.add_insecure_port(self._settings.health_listen)
        await probes.start()
        return probes

    def _server(self, authenticate: rpc.Authenticate) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[rpc.ServerInterceptor(authenticate)],
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
            options=[
                ("grpc.max_receive_message_length", rpc.MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                # Callers that are gone without a word: their streams end within a minute and a half.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                # A fixed window for each stream, not one that grows: what senders may send ahead is memory of ours.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
                ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._checker, server)
        served = _Names()
        for add_to_server, servicer in self._registrations:
            add_to_server(servicer, server)
            add_to_server(servicer, cast("grpc.aio.Server", served))
        if self._settings.reflection:
            names = [health.SERVICE_NAME, reflection.SERVICE_NAME, *served.names]
            reflection.enable_server_reflection(names, server)
        return server

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._settings.drain_seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Names:
    """Takes the place of a server to learn the full names of what is added to it, for reflection."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Part of the generated code's own protocol; says nothing here."""

    def add_registered_method_handlers(self, name: str, handlers: Any) -> None:  # noqa: ARG002
        """Part of the generated code's own protocol."""
        self.names.append(name)
