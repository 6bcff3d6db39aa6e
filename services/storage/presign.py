"""Signed URLs for PUT, with headers in the signature. Pure.

The `minio` client's own `presigned_put_object` signs the host alone: whoever has such a URL can store any number of
bytes of any kind. Here what the client announced is signed too, so that S3 refuses anything else. AWS Signature
Version 4, query form: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote

_ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signs, and for which S3."""

    access_key: str
    secret_key: str
    region: str
    endpoint: str
    """host[:port] as in the URL; part of the signature."""
    secure: bool

    def url(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        seconds: int,
        now: datetime,
    ) -> str:
        """A URL for that method and path, good for so long, only with these headers (names in lower case)."""
        stamp = now.strftime("%Y%m%dT%H%M%SZ")
        scope = f"{stamp[:8]}/{self.region}/s3/aws4_request"
        signed = dict(sorted({**headers, "host": self.endpoint}.items()))
        names = ";".join(signed)
        query = "&".join(
            f"{name}={quote(value, safe='')}"
            for name, value in (
                ("X-Amz-Algorithm", _ALGORITHM),
                ("X-Amz-Credential", f"{self.access_key}/{scope}"),
                ("X-Amz-Date", stamp),
                ("X-Amz-Expires", str(seconds)),
                ("X-Amz-SignedHeaders", names),
            )
        )
        where = quote(path, safe="/")
        lines = "".join(f"{name}:{value.strip()}\n" for name, value in signed.items())
        request = f"{method}\n{where}\n{query}\n{lines}\n{names}\nUNSIGNED-PAYLOAD"
        digest = hashlib.sha256(request.encode()).hexdigest()
        signature = self._sign(scope, f"{_ALGORITHM}\n{stamp}\n{scope}\n{digest}")
        scheme = "https" if self.secure else "http"
        return f"{scheme}://{self.endpoint}{where}?{query}&X-Amz-Signature={signature}"

    def _sign(self, scope: str, text: str) -> str:
        key = f"AWS4{self.secret_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.digest(key, text.encode(), "sha256").hex()
