"""An HTTPS server of pictures on loopback, with every way such a server can be wrong."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests import pictures

PICTURE = pictures.plain((30, 90, 200))


def certificate(place: Path) -> Path:
    """A certificate for 127.0.0.1, signed by itself, with its key beside it; made once per place."""
    path, key_path = place / "pictures.pem", place / "pictures.key"
    if path.exists():
        return path
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pictures")])
    now = datetime.now(UTC)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(alternative, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stopping: threading.Event

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Silence."""

    def do_GET(self) -> None:
        """Answers by the path's name."""
        name = self.path.lstrip("/").partition("?")[0]
        redirects = {
            "once": "/picture.jpg",
            "around": "/around",
            "inside": "https://10.0.0.1/picture.jpg",
            "plain": "http://127.0.0.1/picture.jpg",
            "nowhere": None,
        }
        if name in redirects:
            self._start(302, 0, redirects[name])
        elif name == "missing":
            self._start(404, 0)
        elif name == "page":
            self._send(b"<html>no picture</html>")
        elif name == "huge":
            self._start(200, 10**12)
        elif name == "cut":
            self._start(200, len(PICTURE) * 2)
            self.wfile.write(PICTURE)
            self.close_connection = True
        elif name == "silent":
            self._start(200, len(PICTURE))
            self.stopping.wait()
            self.close_connection = True
        elif name in ("endless", "slow"):
            self._start(200, None)
            self._pour(name == "slow")
        else:
            self._send(PICTURE)

    def _pour(self, slow: bool) -> None:
        try:
            while not self.stopping.wait(0.2 if slow else 0):
                self.wfile.write(b"x" if slow else b"x" * 65536)
        except OSError:
            pass
        self.close_connection = True

    def _start(self, status: int, length: int | None, location: str | None = None) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("content-length", str(length))
        if location is not None:
            self.send_header("location", location)
        self.end_headers()

    def _send(self, body: bytes) -> None:
        self._start(200, len(body))
        self.wfile.write(body)


@contextmanager
def serving(place: Path) -> Iterator[str]:
    """The address of the server, https://127.0.0.1:PORT."""
    path = certificate(place)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path, path.with_suffix(".key"))
    handler = type("Handler", (_Handler,), {"stopping": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        handler.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
