"""What the dialects have in common: one key at one server, spoken to by HTTP, and how its answers are read."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from services.generator import catalogue
from services.generator.providers import contract

READ_TIMEOUT = httpx.Timeout(20, connect=5)
NOT_DELIVERED = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
)
CONTENT_CHUNK_BYTES = 256 * 1024
PAGE_LIMIT = 100
_MAX_RETRY_AFTER_SECONDS = 3600.0


class Server:
    """One key at one server: creates over connections of their own, everything else over a pool."""

    def __init__(
        self,
        account: catalogue.ProviderAccount,
        base_url: str,
        headers: Mapping[str, str],
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        self._account = account
        self._base_url = base_url.rstrip("/")
        self._headers = dict(headers)
        self._parameters = dict(parameters or {})
        self._reader = httpx.AsyncClient(
            timeout=READ_TIMEOUT,
            trust_env=False,
            follow_redirects=True,
            headers=self._headers,
            event_hooks={"request": [self._keep_the_key]},
        )

    async def aclose(self) -> None:
        """Closes its connections."""
        await self._reader.aclose()

    async def _keep_the_key(self, request: httpx.Request) -> None:
        """Films may come by a redirect from elsewhere; httpx takes only `Authorization` off for another host."""
        if not _same_server(httpx.URL(self._base_url), request.url):
            for name in self._headers:
                request.headers.pop(name, None)

    async def create(
        self, path: str, body: contract.Body, idempotency_key: str | None
    ) -> contract.CreateOutcome:
        """Sends once, on a fresh HTTP/1.1 connection: no reuse, redirects, retries, nor proxy of the environment."""
        headers = {**self._headers, "Content-Type": body.content_type, "Connection": "close"}
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        transport = httpx.AsyncHTTPTransport(retries=0, http1=True, http2=False)
        timeout = httpx.Timeout(self._account.post_timeout_seconds, connect=5)
        try:
            # httpx bounds each read and write; what others conclude from silence needs a bound of the whole.
            async with (
                asyncio.timeout(self._account.post_timeout_seconds),
                httpx.AsyncClient(
                    transport=transport, timeout=timeout, follow_redirects=False, trust_env=False
                ) as client,
            ):
                response = await client.post(
                    f"{self._base_url}{path}",
                    content=body.data,
                    headers=headers,
                    params=self._parameters,
                )
            return self._outcome(response)
        except NOT_DELIVERED as error:
            return contract.NotAccepted(f"not reached: {error!r}", None)
        except Exception as error:
            return contract.Ambiguous(f"no answer: {error!r}")

    def _outcome(self, response: httpx.Response) -> contract.CreateOutcome:
        text = response.text[:4000]
        if response.status_code in (200, 201, 202):
            job_id = body_object(response).get("id")
            if isinstance(job_id, str) and 0 < len(job_id) <= 2048 and job_id.isprintable():
                return contract.Accepted(job_id)
            return contract.Ambiguous(f"{response.status_code} without an id")
        rule = catalogue.outcome_rule(self._account, response.status_code, text)
        message = error_message(response) or f"HTTP {response.status_code}"
        if rule is None:
            return contract.Ambiguous(f"HTTP {response.status_code}: {message}")
        if rule.outcome == "refused_request":
            return contract.RefusedRequest(rule.cause, message)
        if rule.outcome == "refused_us":
            return contract.RefusedUs(f"HTTP {response.status_code}: {message}")
        return contract.NotAccepted(message, retry_after(response.headers))

    async def page(
        self, path: str, parameters: Mapping[str, str]
    ) -> tuple[list[Mapping[str, Any]], str | None]:
        """One page of a list: the jobs that have an id, and the cursor of the next page. Raises ProviderTrouble."""
        response = await self._request(path, parameters)
        if response.status_code != 200:
            raise trouble(response)
        page = body_object(response)
        data = page.get("data")
        if not isinstance(data, list):
            raise contract.ProviderTrouble("the list is not a list")
        jobs: list[Mapping[str, Any]] = [
            item for item in data if isinstance(item, dict) and item.get("id")
        ]
        more = bool(page.get("has_more"))
        if more and not jobs:
            raise contract.ProviderTrouble("the list says that there is more, and shows nothing")
        return jobs, str(page.get("last_id") or jobs[-1]["id"]) if more else None

    async def job(self, path: str, failed_words: Collection[str]) -> Mapping[str, Any] | None:
        """One job, None for a definite 404; a failed one may come with an HTTP error around it."""
        response = await self._request(path, {})
        body = body_object(response)
        word = body.get("status")
        # Around an error only a failed job is one: `status` and `id` stand in other bodies of errors as well.
        failed = isinstance(word, str) and word.lower() in failed_words
        if body.get("id") and word and (response.status_code == 200 or failed):
            return body
        if response.status_code == 404:
            return None
        raise trouble(response)

    @asynccontextmanager
    async def content(self, path: str) -> AsyncIterator[tuple[int | None, AsyncIterator[bytes]]]:
        """A film, streamed in bounded memory."""
        try:
            async with self._reader.stream(
                "GET", f"{self._base_url}{path}", params=self._parameters
            ) as response:
                if response.status_code in (404, 409, 410, 425):
                    raise contract.ContentGone(f"HTTP {response.status_code}")
                if response.status_code != 200:
                    await response.aread()
                    raise trouble(response)
                length = response.headers.get("content-length", "")
                yield (
                    int(length) if length.isdigit() else None,
                    response.aiter_bytes(CONTENT_CHUNK_BYTES),
                )
        except httpx.HTTPError as error:
            raise contract.ProviderTrouble(repr(error)) from error

    async def _request(self, path: str, parameters: Mapping[str, str]) -> httpx.Response:
        try:
            return await self._reader.get(
                f"{self._base_url}{path}", params={**self._parameters, **parameters}
            )
        except httpx.HTTPError as error:
            raise contract.ProviderTrouble(repr(error)) from error


def _same_server(ours: httpx.URL, other: httpx.URL) -> bool:
    """The same origin, or the same host with TLS where ours is without."""
    if ours.host != other.host:
        return False
    upgraded = (ours.scheme, other.scheme) == ("http", "https") and ours.port == other.port is None
    return upgraded or (ours.scheme, ours.port) == (other.scheme, other.port)


def multipart(
    marker: str, fields: Mapping[str, str], files: Iterable[tuple[str, str, bytes]]
) -> contract.Body:
    """A form; files as name, filename, JPEG. The boundary comes from the marker, so the bytes are the same each
    time."""
    # 128 bits from the marker: cannot stand in an image or prompt by chance, nor by a caller's wish.
    boundary = "framewire-" + hashlib.sha256(marker.encode()).hexdigest()[:32]
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for name, filename, content in files:
        head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"'
        parts.append(f"--{boundary}\r\n{head}\r\nContent-Type: image/jpeg\r\n\r\n".encode())
        parts += [content, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return contract.Body(f"multipart/form-data; boundary={boundary}", b"".join(parts))


def option(value: object) -> str:
    """As the field of a form."""
    value = whole(value)
    return value if isinstance(value, str) else json.dumps(value)


def whole(value: object) -> object:
    """As the servers read it: whole numbers without a fraction, which protobuf's Value cannot tell from others."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def percent(value: object) -> int:
    """A percentage, whatever it is written as."""
    return max(0, min(100, int(number(value) or 0)))


def moment(value: object) -> datetime | None:
    """A moment in Unix seconds; None where it is none."""
    seconds = number(value)
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def body_object(response: httpx.Response) -> Mapping[str, Any]:
    """The answer's JSON object; an empty one for anything else."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def error_of(error: object) -> tuple[str, str]:
    """Code and message of an error object, or of a text."""
    if isinstance(error, dict):
        code, message = error.get("code") or error.get("type"), error.get("message")
        return storable(code), storable(message)
    return "", storable(error)


def storable(text: object) -> str:
    """Postgres takes no NUL and half a surrogate pair has no encoding: a provider's words must not stop a verdict."""
    return str(text or "").replace("\x00", "").encode(errors="replace").decode()


def error_message(response: httpx.Response) -> str:
    """Why, in the provider's words: wrapped in `error`, flat, or as `detail`."""
    body = body_object(response)
    return error_of(body.get("error") or body.get("detail") or body.get("message"))[1][:300]


def trouble(response: httpx.Response) -> contract.ProviderTrouble:
    """An answer that is none, as what is raised."""
    message = f"HTTP {response.status_code}: {error_message(response)}"
    return contract.ProviderTrouble(message, retry_after(response.headers))


def retry_after(headers: httpx.Headers) -> float | None:
    """How long a provider asks to wait: `retry-after-ms`, seconds or an HTTP date, an hour at most; None: not said."""
    value = headers.get("retry-after", "").strip()
    seconds = _parsed(headers.get("retry-after-ms", ""), 1000)
    if seconds is None:
        seconds = _parsed(value, 1)
    if seconds is None and value:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError, OverflowError):
            return None
    return None if seconds is None else max(0.0, min(_MAX_RETRY_AFTER_SECONDS, seconds))


def _parsed(text: str, divisor: float) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number / divisor
