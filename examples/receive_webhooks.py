"""Receives webhooks: prints a line for every event that is signed with the secret, once.

    FRAMEWIRE_WEBHOOK_SECRET=whsec_... python examples/receive_webhooks.py --port 8080

The secret is what `framewire webhook create` or `rotate` showed. TLS ends before this, at a proxy. A receiver that does
something with an event keeps `event_id` in its database, beside what it did; here a set in memory stands for that.
"""

from __future__ import annotations

import argparse
import os
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from framewire import webhooks

MAX_BODY_BYTES = 1024 * 1024


class Receiver(BaseHTTPRequestHandler):
    """Answers 204 to what is right, seen before or not, and 400 to what is not to be believed."""

    secret = ""
    seen: set[str] = set()  # noqa: RUF012 (one for all connections)
    timeout = 10

    def do_POST(self) -> None:
        """Takes one event."""
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        body = self.rfile.read(int(length))
        try:
            event = webhooks.verify(dict(self.headers.items()), body, self.secret)
        except webhooks.InvalidWebhook:
            self._answer(HTTPStatus.BAD_REQUEST)
            return
        if event.event_id not in self.seen:
            print(f"{event.kind} {event.video_id or event.account_id} {event.event_id}", flush=True)
            self.seen.add(event.event_id)
        self._answer(HTTPStatus.NO_CONTENT)

    def _answer(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Nothing: events are what is printed."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8080, help="0: one that is free")
    given = parser.parse_args()
    Receiver.secret = os.environ["FRAMEWIRE_WEBHOOK_SECRET"]
    with ThreadingHTTPServer(("127.0.0.1", given.port), Receiver) as server:
        print(f"listening on port {server.server_port}", flush=True)
        server.serve_forever()
