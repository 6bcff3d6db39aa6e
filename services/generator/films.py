"""Finished renders on our own disk: where their bytes go when storage refuses them shortly before they expire.

Bounded and fsynced. A directory may be shared by processes, and outlives each: whoever has it drains it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, TypeVar

from prometheus_client import Gauge

from kit import telemetry

log = telemetry.logger(__name__)

T = TypeVar("T")

SPOOLED = Gauge("framewire_spool_bytes", "Bytes of films on this worker's own disk.")
READ_BYTES = 256 * 1024
PART_SECONDS = 3600.0
_NAME = re.compile(r"([a-z0-9]{26})-(\d{1,2})\.film")


class SpoolFull(Exception):
    """The directory holds as much as it may, or the disk takes no more."""


class Films:
    """One file per output, complete or not there."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        SPOOLED.set_function(self._bytes)

    def has(self, attempt_id: str, variant: int) -> bool:
        """Whether this one is here."""
        return self._path(attempt_id, variant).exists()

    def kept(self) -> list[tuple[str, int]]:
        """What is here: attempt and variant. Takes away what a process that died was writing."""
        for part in _files(self._directory):
            if part.suffix == ".part" and time.time() - _changed(part) > PART_SECONDS:
                part.unlink(missing_ok=True)
        names = [_NAME.fullmatch(path.name) for path in _files(self._directory)]
        return [(name[1], int(name[2])) for name in names if name]

    async def keep(self, attempt_id: str, variant: int, chunks: AsyncIterator[bytes]) -> None:
        """Writes it down, durably. Raises SpoolFull, or what `chunks` raises; nothing is left then."""
        path = self._path(attempt_id, variant)
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        file = await _on_disk(self._open, part)
        try:
            room = self._max_bytes - self._bytes()
            async for chunk in chunks:
                room -= len(chunk)
                if room < 0:
                    raise SpoolFull(f"more than {self._max_bytes} bytes")
                await _on_disk(file.write, chunk)
            await _on_disk(_sync, file)
            await _on_disk(self._name, part, path)
        finally:
            file.close()
            part.unlink(missing_ok=True)
        log.warning("film_spooled", attempt_id=attempt_id, variant=variant)

    async def read(self, attempt_id: str, variant: int) -> AsyncIterator[bytes]:
        """Its bytes. Raises FileNotFoundError when another process was faster."""
        with self._path(attempt_id, variant).open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, READ_BYTES):
                yield chunk

    def size(self, attempt_id: str, variant: int) -> int:
        """Its size; 0 when it is not here."""
        return _size(self._path(attempt_id, variant))

    def remove(self, attempt_id: str, variant: int) -> None:
        """It is needed no more. Idempotent."""
        self._path(attempt_id, variant).unlink(missing_ok=True)

    def _bytes(self) -> int:
        return sum(_size(file) for file in _files(self._directory))

    def _path(self, attempt_id: str, variant: int) -> Path:
        return self._directory / f"{attempt_id}-{variant}.film"

    def _open(self, part: Path) -> IO[bytes]:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return part.open("wb")

    def _name(self, part: Path, path: Path) -> None:
        part.replace(path)
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


async def _on_disk(work: Callable[..., T], *values: object) -> T:
    """Does it beside the loop. Raises SpoolFull for what the disk says."""
    try:
        return await asyncio.to_thread(work, *values)
    except OSError as error:
        raise SpoolFull(repr(error)) from error


def _files(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return time.time()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
