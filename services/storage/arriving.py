"""Bytes on their way in: into a file that is looked at, and of videos that were made into their object as well."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from services.storage import parts, threads
from services.storage.media import facts, sniff


class Place:
    """Where an asset is made: a directory, and the object that may be written while its bytes still arrive."""

    def __init__(
        self, path: Path, created_at: datetime, begin: Callable[[str], Awaitable[parts.Growing]]
    ) -> None:
        self.path = path
        self.created_at = created_at
        """Of the asset."""
        self.growing: parts.Growing | None = None
        self._begin = begin

    async def grow(self, media_type: str) -> parts.Growing:
        """The object of the asset, to be written; once."""
        self.growing = await self._begin(media_type)
        return self.growing


class Arriving:
    """Bytes on their way into a file, and into an object as well where a place for one is given."""

    def __init__(self, file: BinaryIO, files: ThreadPoolExecutor, place: Place | None) -> None:
        self.path = Path(file.name)
        self.size_bytes = 0
        self._file = file
        self._files = files
        self._place = place
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all that came."""
        return self._digest.hexdigest()

    def with_tail(self, tail: bytes) -> tuple[str, int]:
        """sha256 and size of what came with that behind it."""
        digest = self._digest.copy()
        digest.update(tail)
        return digest.hexdigest(), self.size_bytes + len(tail)

    async def take(self, pieces: list[bytes]) -> None:
        """The next bytes, the first of them at least 1 MiB where there are as many."""
        if self._place is not None and self.size_bytes == 0:
            await self._grow(self._place, b"".join(pieces)[: sniff.HEAD_BYTES])
        self.size_bytes += sum(map(len, pieces))
        await threads.run(self._files, lambda: self._write(pieces))
        if self._place is not None and self._place.growing is not None:
            for piece in pieces:
                await self._place.growing.write(piece)

    async def _grow(self, place: Place, head: bytes) -> None:
        with contextlib.suppress(
            facts.MediaRefused
        ):  # what is no video is judged when all of it came
            container = sniff.video_container(head)
            if container in ("mp4", "mov"):
                await place.grow(sniff.VIDEO_MEDIA_TYPES[container])

    def _write(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self._digest.update(piece)
            self._file.write(piece)
