"""An upstream that costs nothing: answers every create with one canned job. `python -m bench.canned HOST:PORT`.

Both sides of `make bench-gateway` stand before it, so that neither is measured by its provider.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from typing import cast

import uvloop

_PLACE = "0" * 16
_JOB = json.dumps(
    {
        "id": f"video_{_PLACE}",
        "object": "video",
        "status": "queued",
        "model": "sora-2",
        "progress": 0,
        "created_at": int(time.time()),
        "seconds": "4",
        "size": "1280x720",
    }
).encode()
_LIST = b'{"object":"list","data":[],"has_more":false,"first_id":null,"last_id":null}'


def _answer(body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


_LISTED = _answer(_LIST)
_BEFORE, _AFTER = _answer(_JOB).split(_PLACE.encode())
_numbers = itertools.count(1)


def _created() -> bytes:
    return b"%b%016d%b" % (_BEFORE, next(_numbers), _AFTER)


class Canned(asyncio.Protocol):
    """One connection, kept alive; requests one after the other."""

    def __init__(self) -> None:
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A caller is there."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answers each request that has come whole."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:end]).lower()
            body_at = end + 4
            if b"transfer-encoding: chunked" in head:
                last = self._received.find(b"0\r\n\r\n", body_at)
                if last < 0:
                    return
                whole = last + 5
            else:
                found = head.find(b"content-length:")
                length = int(head[found + 15 :].split(b"\r\n", 1)[0]) if found >= 0 else 0
                whole = body_at + length
            if len(self._received) < whole:
                return
            created = self._received.startswith(b"POST")
            del self._received[:whole]
            self._transport.write(_created() if created else _LISTED)


async def main(address: str) -> None:
    """Serves until it is killed."""
    host, port = address.rsplit(":", 1)
    server = await asyncio.get_running_loop().create_server(Canned, host, int(port))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
