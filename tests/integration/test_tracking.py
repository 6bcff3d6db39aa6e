"""Errors to Sentry: what a process sends to a receiver on loopback, and above all what it does not."""

from __future__ import annotations

import gzip
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROMPT = "a prompt that nobody else may read"
PROGRAM = f'''
import asyncpg
from kit import telemetry
telemetry.configure("credits", "info", "", @dsn@)
log = telemetry.logger("tests")
log.info("all_is_well", prompt_length=34)
log.warning("loop_failed", error="it comes again")
def insert(prompt):
    row = {{"prompt": prompt}}
    error = asyncpg.CheckViolationError("new row violates a check" + chr(10) + "DETAIL:  row contains " + prompt)
    raise error
with telemetry.span("call", telemetry.SpanKind.SERVER):
    print(telemetry.trace_id())
    try:
        insert("{PROMPT}")
    except Exception as error:
        log.error("rpc_failed", method="/Reserve", error_id="e1", error=repr(error), exc_info=error)
    log.error("books_disagree", finding="account a: available 1, entries say 2")
telemetry.TRACKER.close()
'''


@dataclass
class Receiver:
    """Takes envelopes as Sentry does."""

    dsn: str = ""
    bodies: list[bytes] = field(default_factory=list[bytes])

    def events(self) -> list[dict[str, Any]]:
        """Every item of every envelope that is an event."""
        found: list[dict[str, Any]] = []
        for body in self.bodies:
            lines = body.split(b"\n")
            for header, payload in zip(lines[1::2], lines[2::2], strict=False):
                if header and json.loads(header).get("type") == "event":
                    found.append(json.loads(payload))
        return found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A server of its own on loopback."""
    taken = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            packed = self.headers.get("content-encoding") == "gzip"
            taken.bodies.append(gzip.decompress(body) if packed else body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    taken.dsn = f"http://key@127.0.0.1:{server.server_port}/1"
    yield taken
    server.shutdown()
    thread.join()
    server.server_close()


def run(program: str, dsn: str) -> subprocess.CompletedProcess[str]:
    code = program.replace("@dsn@", repr(dsn))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_error_is_told_without_what_it_was_about(receiver: Receiver) -> None:
    done = run(PROGRAM, receiver.dsn)
    assert done.returncode == 0, done.stderr
    failed, disagree = receiver.events()
    assert PROMPT.encode() not in b"".join(receiver.bodies)
    (exception,) = failed["exception"]["values"]
    assert (exception["type"], exception["value"]) == (
        "CheckViolationError",
        "new row violates a check",
    )
    functions = [frame["function"] for frame in exception["stacktrace"]["frames"]]
    assert functions[-1] == "insert"
    tags = {"service": "credits", "event": "rpc_failed", "method": "/Reserve", "error_id": "e1"}
    assert failed["tags"] == {**tags, "trace_id": done.stdout.strip()}
    assert disagree["message"] == "books_disagree"
    assert disagree["contexts"]["log"]["finding"] == "account a: available 1, entries say 2"
    assert "error" not in failed["contexts"]["log"]
    # The log is as it was.
    told = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [line["event"] for line in told][-2:] == ["rpc_failed", "books_disagree"]


def test_without_a_dsn_nothing_is_sent_nor_imported(receiver: Receiver) -> None:
    program = PROGRAM + "\nimport sys\nprint('sentry_sdk' in sys.modules)\n"
    done = run(program, "")
    assert done.stdout.split()[-1] == "False"
    assert receiver.bodies == []


def test_a_dsn_that_is_none_ends_the_start_with_a_sentence() -> None:
    program = (
        "import os, sys\n"
        "os.environ.update(CREDITS_SENTRY_DSN=@dsn@, CREDITS_SERVICE_TOKEN_SECRET='s' * 32,"
        " CREDITS_DATABASE_URL='postgresql://u@127.0.0.1:1/d', CREDITS_GENERATOR_ADDRESS='g:1')\n"
        "sys.argv[1:] = ['wait']\n"
        "import runpy\nrunpy.run_module('services.credits', run_name='__main__')\n"
    )
    done = run(program, "not a dsn")
    assert done.returncode == 1
    assert "settings are not usable" in done.stderr
    assert "sentry_dsn" in done.stderr
    assert "Traceback" not in done.stderr
