"""Postgres: one pool per process, and what its errors mean to callers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg

from kit import errors, telemetry

Pool = asyncpg.Pool
Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy

COMMAND_TIMEOUT_SECONDS = 30.0
ACQUIRE_TIMEOUT_SECONDS = 5.0


async def prepare(connection: asyncpg.Connection) -> None:
    """Teaches a connection our types: jsonb as Python values."""
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads
    )


async def _as_it_is(_: asyncpg.Connection) -> None:
    """Nothing is to be undone when a connection goes back: no statement of ours changes its session.

    Without this, each use of the pool would cost another round trip. What lasts as long as a session (a worker's
    advisory lock) has a connection of its own; a transaction that was left open is rolled back all the same.
    """


@asynccontextmanager
async def pool(url: str, name: str, size: int) -> AsyncIterator[Pool]:
    """A pool whose connections commit durably whatever the server's default is."""
    opened = await asyncpg.create_pool(
        url,
        min_size=1,
        max_size=size,
        command_timeout=COMMAND_TIMEOUT_SECONDS,
        timeout=ACQUIRE_TIMEOUT_SECONDS,
        init=prepare,
        reset=_as_it_is,
        server_settings={"application_name": name, "synchronous_commit": "on", "jit": "off"},
    )
    _show(opened)
    try:
        yield opened
    finally:
        opened.terminate()


def array(column: Sequence[Any]) -> str:
    """A column as Postgres writes arrays, to be passed as `$1::text::bigint[]`: for statements with many values.

    The driver's own encoder asks of each value whether it is a sequence, which costs more than all else about it.
    """
    if not column:
        return "{}"
    if type(column[0]) is int:
        return f"{{{str(list(column))[1:-1].replace('None', 'NULL')}}}"
    try:
        text = '","'.join(column)
        if "\\" not in text and text.count('"') == 2 * (len(column) - 1):
            return f'{{"{text}"}}'
    except TypeError:
        pass  # not only strings
    written = {value: _element(value) for value in set(column)}
    return f"{{{','.join([written[value] for value in column])}}}"


def _element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, timedelta):
        value = f"{value.days} days {value.seconds * 1_000_000 + value.microseconds} microseconds"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _show(opened: Pool) -> None:
    """How full it is: a pool whose connections are all busy is what calls wait for."""
    connections = telemetry.POOL_CONNECTIONS
    connections.labels("busy").set_function(lambda: opened.get_size() - opened.get_idle_size())
    connections.labels("open").set_function(opened.get_size)
    connections.labels("allowed").set(opened.get_max_size())


def translate(error: Exception) -> errors.ServiceError | None:
    """What a driver's error means to a caller, or None when it is a mistake of ours."""
    if isinstance(error, asyncpg.SerializationError | asyncpg.DeadlockDetectedError):
        return errors.Aborted("CONFLICT", "two writers met; try again", retry_after_seconds=0.1)
    if isinstance(
        error, asyncpg.CharacterNotInRepertoireError | asyncpg.UntranslatableCharacterError
    ):
        rule = "a text must not contain the character U+0000"
        return errors.InvalidArgument("INVALID_FIELD", rule, violations=[("request", rule)])
    if isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError):
        return None  # a value that its column cannot hold: waiting would not help
    if isinstance(
        error,
        asyncpg.PostgresConnectionError
        | asyncpg.InterfaceError
        | asyncpg.TooManyConnectionsError
        | asyncpg.AdminShutdownError
        | asyncpg.CannotConnectNowError
        | ConnectionError
        | OSError
        | TimeoutError,
    ):
        return errors.Unavailable(
            "DEPENDENCY_UNAVAILABLE",
            "the service cannot reach what it needs; try again",
            retry_after_seconds=1,
        )
    return None
