"""Files that are worked on: one directory per process, emptied when the process is gone."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

_LOCK = "lock"


class Scratch:
    """A directory of this process alone. What processes left that died is removed on the way in."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock: IO[str] | None = None
        self.path = root

    async def __aenter__(self) -> Self:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Nobody may take a new directory for a left one before it is locked.
        with (self._root / _LOCK).open("a") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            for left in self._root.glob("process-*"):
                if _left_alone(left):
                    shutil.rmtree(left, ignore_errors=True)
            self.path = Path(tempfile.mkdtemp(prefix="process-", dir=self._root)).resolve()
            self._lock = (self.path / _LOCK).open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    async def __aexit__(self, *exception: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    @contextlib.contextmanager
    def work(self) -> Iterator[Path]:
        """A directory for one piece of work, removed with all that is in it."""
        place = Path(tempfile.mkdtemp(dir=self.path))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _left_alone(directory: Path) -> bool:
    """Whether the process that this directory belongs to is gone."""
    try:
        with (directory / _LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or on its way out
        return False
    return True
