"""The OpenAI Videos protocol: `POST /v1/videos` and what belongs to it, as its living servers speak it.

Wire facts: ids may be long and hold `/` and `=` (percent-encoded in paths); statuses differ by server; `seconds` is
text; an image goes as one multipart file `input_reference`, exactly the requested size; a failed job may come as an
HTTP error with the job as its body.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import httpx
from google.protobuf import json_format

from framewire.events.v1 import vocabulary_pb2
from services.generator import attempts, catalogue
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
_RUNNING = {"queued", "submitted", "pending", "created", "in_progress", "processing", "running"}
_DONE = {"completed", "succeeded", "success"}
_FAILED = {"failed", "error", "cancelled", "canceled", "expired", "deleted"}
_MAX_RETRY_AFTER_SECONDS = 3600.0


class OpenAIVideos:
    """One key at one server of this dialect."""

    def __init__(self, account: catalogue.ProviderAccount, base_url: str, api_key: str) -> None:
        self._account = account
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._reader = httpx.AsyncClient(
            headers=self._headers, timeout=READ_TIMEOUT, trust_env=False, follow_redirects=True
        )

    async def close(self) -> None:
        """Closes its connections."""
        await self._reader.aclose()

    def build(
        self, spec: vocabulary_pb2.VideoSpec, image: bytes | None, marker: str
    ) -> contract.Body:
        """Multipart, always: what the official SDK sends. The boundary comes from the marker, so the bytes are the same
        each time."""
        fields = {
            "model": self._account.models[spec.model].upstream,
            "prompt": spec.prompt,
            "size": f"{spec.width}x{spec.height}",
            "seconds": str(spec.seconds),
        }
        for name in sorted(spec.options):
            # An option never stands in for what was priced and fingerprinted.
            fields.setdefault(name, _option(json_format.MessageToDict(spec.options[name])))
        # 128 bits from the marker: cannot stand in an image or prompt by chance, nor by a caller's wish.
        boundary = "framewire-" + hashlib.sha256(marker.encode()).hexdigest()[:32]
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in fields.items()
        ]
        if image is not None:
            head = 'Content-Disposition: form-data; name="input_reference"; filename="input.jpg"'
            parts.append(f"--{boundary}\r\n{head}\r\nContent-Type: image/jpeg\r\n\r\n".encode())
            parts += [image, b"\r\n"]
        parts.append(f"--{boundary}--\r\n".encode())
        return contract.Body(f"multipart/form-data; boundary={boundary}", b"".join(parts))

    def shown(self, spec: vocabulary_pb2.VideoSpec) -> str:
        """Prompt, model, size and seconds."""
        upstream = self._account.models[spec.model].upstream
        return attempts.visible_fingerprint(
            spec.prompt, upstream, spec.width, spec.height, spec.seconds
        )

    async def create(
        self, body: contract.Body, idempotency_key: str | None
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
                    f"{self._base_url}/videos", content=body.data, headers=headers
                )
            return self._outcome(response)
        except NOT_DELIVERED as error:
            return contract.NotAccepted(f"not reached: {error!r}", None)
        except Exception as error:
            return contract.Ambiguous(f"no answer: {error!r}")

    def _outcome(self, response: httpx.Response) -> contract.CreateOutcome:
        text = response.text[:4000]
        if response.status_code in (200, 201, 202):
            job_id = _object(response).get("id")
            if isinstance(job_id, str) and 0 < len(job_id) <= 2048 and job_id.isprintable():
                return contract.Accepted(job_id)
            return contract.Ambiguous(f"{response.status_code} without an id")
        rule = catalogue.outcome_rule(self._account, response.status_code, text)
        message = _error_message(response) or f"HTTP {response.status_code}"
        if rule is None:
            return contract.Ambiguous(f"HTTP {response.status_code}: {message}")
        if rule.outcome == "refused_request":
            return contract.RefusedRequest(rule.cause, message)
        if rule.outcome == "refused_us":
            return contract.RefusedUs(f"HTTP {response.status_code}: {message}")
        return contract.NotAccepted(message, retry_after(response.headers))

    async def list_page(self, after: str | None) -> tuple[tuple[contract.Job, ...], str | None]:
        """One page, newest first."""
        parameters = {"limit": str(PAGE_LIMIT), "order": "desc"}
        if after:
            parameters["after"] = after
        response = await self._read("/videos", parameters)
        page = _object(response)
        data = page.get("data")
        if not isinstance(data, list):
            raise contract.ProviderTrouble("the list is not a list")
        jobs = tuple(self._job(item) for item in data if isinstance(item, dict) and item.get("id"))
        more = bool(page.get("has_more"))
        if more and not jobs:
            raise contract.ProviderTrouble("the list says that there is more, and shows nothing")
        return jobs, (page.get("last_id") or jobs[-1].provider_job_id) if more else None

    async def get(self, provider_job_id: str) -> contract.Job | None:
        """One job; a failed one may come with an HTTP error around it."""
        path = f"/videos/{quote(provider_job_id, safe='')}"
        response = await self._request(path, {})
        body = _object(response)
        word = body.get("status")
        # Around an error only a failed job is one: `status` and `id` stand in other bodies of errors as well.
        failed = isinstance(word, str) and word.lower() in _FAILED
        if body.get("id") and word and (response.status_code == 200 or failed):
            return self._job(body)
        if response.status_code == 404:
            return None
        raise _trouble(response)

    @asynccontextmanager
    async def content(
        self, provider_job_id: str, variant: int
    ) -> AsyncIterator[tuple[int | None, AsyncIterator[bytes]]]:
        """The MP4, streamed in bounded memory. The dialect makes one video a job: `variant` is 0."""
        assert variant == 0
        url = f"{self._base_url}/videos/{quote(provider_job_id, safe='')}/content"
        try:
            async with self._reader.stream("GET", url) as response:
                if response.status_code in (404, 409, 425):
                    raise contract.ContentGone(f"HTTP {response.status_code}")
                if response.status_code != 200:
                    await response.aread()
                    raise _trouble(response)
                length = response.headers.get("content-length", "")
                yield (
                    int(length) if length.isdigit() else None,
                    response.aiter_bytes(CONTENT_CHUNK_BYTES),
                )
        except httpx.HTTPError as error:
            raise contract.ProviderTrouble(repr(error)) from error

    async def _read(self, path: str, parameters: Mapping[str, str]) -> httpx.Response:
        response = await self._request(path, parameters)
        if response.status_code != 200:
            raise _trouble(response)
        return response

    async def _request(self, path: str, parameters: Mapping[str, str]) -> httpx.Response:
        try:
            return await self._reader.get(f"{self._base_url}{path}", params=dict(parameters))
        except httpx.HTTPError as error:
            raise contract.ProviderTrouble(repr(error)) from error

    def _job(self, item: Mapping[str, Any]) -> contract.Job:
        word = str(item.get("status", "")).lower()
        status = contract.Status.RUNNING
        if word in _DONE:
            status = contract.Status.DONE
        elif word in _FAILED:
            status = contract.Status.FAILED
        elif word not in _RUNNING:
            status = contract.Status.RUNNING  # an unknown word is no verdict: keep asking
        code, message = _error(item.get("error"))
        return contract.Job(
            provider_job_id=str(item["id"]),
            status=status,
            progress_percent=_percent(item.get("progress")),
            created_at=_moment(item.get("created_at")) or datetime.now(UTC),
            expires_at=_moment(item.get("expires_at")),
            fingerprint=_fingerprint(item),
            error_code=code,
            error_message=message,
        )


def _fingerprint(item: Mapping[str, Any]) -> str | None:
    prompt, model = item.get("prompt"), item.get("model")
    size, seconds = str(item.get("size") or ""), item.get("seconds") or item.get("duration")
    width, _, height = size.partition("x")
    length = str(seconds or "").split(".", maxsplit=1)[0]
    if not prompt or not model or _moment(item.get("created_at")) is None:
        return None
    if not all(part.isdecimal() for part in (width, height, length)):
        return None
    return attempts.visible_fingerprint(
        str(prompt), str(model), int(width), int(height), int(length)
    )


def _option(value: object) -> str:
    """As the servers read it: whole numbers without a fraction, which protobuf's Value cannot tell from others."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _percent(value: object) -> int:
    return max(0, min(100, int(_number(value) or 0)))


def _moment(value: object) -> datetime | None:
    number = _number(value)
    try:
        return None if number is None else datetime.fromtimestamp(number, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _object(response: httpx.Response) -> Mapping[str, Any]:
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _error(error: object) -> tuple[str, str]:
    if isinstance(error, dict):
        code, message = error.get("code") or error.get("type"), error.get("message")
        return _storable(code), _storable(message)
    return "", _storable(error)


def _storable(text: object) -> str:
    """Postgres takes no NUL and half a surrogate pair has no encoding: a provider's words must not stop a verdict."""
    return str(text or "").replace("\x00", "").encode(errors="replace").decode()


def _error_message(response: httpx.Response) -> str:
    body = _object(response)
    return _error(body.get("error") or body.get("detail") or body.get("message"))[1][:300]


def _trouble(response: httpx.Response) -> contract.ProviderTrouble:
    message = f"HTTP {response.status_code}: {_error_message(response)}"
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
