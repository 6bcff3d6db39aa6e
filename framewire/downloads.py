"""Fetches a signed URL into a file: whole and verified, or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from framewire import errors, transport

_CHUNK_BYTES = 256 * 1024
_SOCKET_SECONDS = 30.0


async def fetch(url: str, path: Path, size_bytes: int, sha256: str) -> None:
    """Streams into a temporary file beside `path`, verifies it and renames it.

    Raises FramewireError: UNAVAILABLE when it broke off or the URL has expired (get a fresh one), DATA_LOSS when the
    bytes are not those promised; OSError when the file cannot be written. Nothing is left behind then.
    """
    stopping = threading.Event()
    try:
        await asyncio.to_thread(_fetch, url, path, size_bytes, sha256, stopping)
    finally:
        stopping.set()  # when cancelled: the thread ends at its next chunk and removes its file


def _fetch(url: str, path: Path, size_bytes: int, sha256: str, stopping: threading.Event) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with draft.open("xb") as file:
            digest = hashlib.sha256()
            received = 0
            for chunk in _chunks(url):
                if stopping.is_set():
                    return
                received += len(chunk)
                if size_bytes and received > size_bytes:
                    break  # no more is read or kept than was promised
                digest.update(chunk)
                file.write(chunk)
            _require(received, size_bytes, digest.hexdigest(), sha256)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _chunks(url: str) -> Iterator[bytes]:
    address = urlsplit(url)
    if address.scheme not in ("http", "https"):
        raise _unavailable(f"the signed URL has the scheme {address.scheme!r}")
    local = transport.is_loopback(address.hostname or "")
    # A company proxy cannot reach our own machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None))
    try:
        with opener.open(url, timeout=_SOCKET_SECONDS) as response:
            while chunk := response.read(_CHUNK_BYTES):
                yield chunk
    except urllib.error.HTTPError as error:
        error.close()
        raise _unavailable(f"the storage answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error
        raise _unavailable(f"no download from {address.netloc}: {why}") from None


def _require(received: int, size_bytes: int, found_sha256: str, sha256: str) -> None:
    if size_bytes and received < size_bytes:
        raise _unavailable(f"the download broke off after {received} of {size_bytes} bytes")
    if (size_bytes and received != size_bytes) or (sha256 and found_sha256 != sha256):
        raise transport.failure(
            grpc.StatusCode.DATA_LOSS,
            "CHECKSUM_MISMATCH",
            "the downloaded bytes are not those that were stored",
            expected_sha256=sha256,
            found_sha256=found_sha256,
        )


def _unavailable(message: str) -> errors.FramewireError:
    return transport.failure(grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE", message)
