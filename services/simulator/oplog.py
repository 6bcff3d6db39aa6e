"""The append-only log: what the simulator was asked and what it did, one JSON object a line.

It is the oracle of crash tests and the store of the jobs, so it may never lie: an accepted job is
in it once, on disk, before anyone is told of it. Writing is done on the event loop on purpose.
A durable append costs well under a millisecond on a local disk, and because nothing else runs
between the decision and the line, no second request can slip in between.
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator

Entry = dict[str, object]


class OpLog:
    """One open log file. A second simulator on the same directory is refused."""

    def __init__(self, path: pathlib.Path) -> None:
        """Opens or creates `path`, and cuts off a last line that a crash left half-written."""
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise RuntimeError(f"{path} is in use by another simulator") from None
        self._cut_torn_line()
        # The file's own name must survive a power cut too.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._count = sum(1 for _ in self.read())

    def append(self, kind: str, entry: Entry, *, durable: bool) -> None:
        """Adds one entry; `durable` returns only when it is on disk."""
        numbered: Entry = {"n": self._count + 1, "kind": kind, **entry}
        line = json.dumps(numbered, separators=(",", ":")).encode() + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            # A half line would be joined with the next one; undo it before anyone can be told.
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError("the simulator's log could not be written in full")
        self._count += 1
        if durable:
            os.fsync(self._file)

    def read(self, wanted: Callable[[Entry], bool] | None = None) -> Iterator[Entry]:
        """Every entry in order, or those that are `wanted`."""
        with self._path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    return  # being written by an append that has not returned yet
                entry: Entry = json.loads(line)
                if wanted is None or wanted(entry):
                    yield entry

    def close(self) -> None:
        """Makes all of it durable and gives the file free."""
        os.fsync(self._file)
        os.close(self._file)

    def _cut_torn_line(self) -> None:
        content_bytes = os.fstat(self._file).st_size
        with self._path.open("rb") as lines:
            whole_bytes = sum(len(line) for line in lines if line.endswith(b"\n"))
        if whole_bytes != content_bytes:
            os.ftruncate(self._file, whole_bytes)
            os.fsync(self._file)
