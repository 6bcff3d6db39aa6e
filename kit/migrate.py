"""Forward-only SQL migrations: `migrations/NNNN_verb_noun.sql`, each in one transaction, in order, once."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import asyncpg

_NAME = re.compile(r"^\d{4}_[a-z0-9_]+\.sql$")
_LOCK = 0x6672616D65  # one number for all: migrations of one database never run side by side


class MigrationError(Exception):
    """The database and the files do not belong together."""


async def migrate(database_url: str, directory: Path) -> list[str]:
    """Applies what is missing and returns its names. Refuses a file that was changed after it had been applied."""
    files = sorted(directory.glob("*.sql"))
    for file in files:
        if not _NAME.match(file.name):
            raise MigrationError(f"{file.name}: a migration is named NNNN_verb_noun.sql")
    connection = await asyncpg.connect(database_url, timeout=10)
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS migrations (name text PRIMARY KEY, checksum text NOT NULL,"
            " applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
        )
        rows = await connection.fetch("SELECT name, checksum FROM migrations")
        known = {row["name"]: row["checksum"] for row in rows}
        return await _apply(connection, files, known)
    finally:
        await connection.close()


async def missing(database_url: str, directory: Path) -> list[str]:
    """Migrations that we know and the database does not have. A database that cannot be asked has none."""
    names = {file.name for file in directory.glob("*.sql")}
    try:
        connection = await asyncpg.connect(database_url, timeout=10)
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return sorted(names)
    try:
        rows = await connection.fetch("SELECT name FROM migrations", timeout=10)
    except asyncpg.PostgresError:
        return sorted(names)
    finally:
        await connection.close()
    return sorted(names - {row["name"] for row in rows})


async def _apply(
    connection: asyncpg.Connection, files: list[Path], known: dict[str, str]
) -> list[str]:
    applied: list[str] = []
    for file in files:
        text = file.read_text()
        checksum = hashlib.sha256(text.encode()).hexdigest()
        if file.name in known:
            if known[file.name] != checksum:
                raise MigrationError(
                    f"{file.name} was changed after it had been applied: add a new file instead"
                )
            continue
        async with connection.transaction():
            await connection.execute(text)
            await connection.execute(
                "INSERT INTO migrations (name, checksum) VALUES ($1, $2)", file.name, checksum
            )
        applied.append(file.name)
    return applied
