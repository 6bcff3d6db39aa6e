"""What the dialects have in common: one key at one server, spoken to by HTTP, and how its answers are read."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import math
import ssl
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from kit import telemetry
from services.generator import catalogue
from services.generator.providers import contract, limits

READ_TIMEOUT = httpx.Timeout(20, connect=5)
NOT_DELIVERED = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
)
CONTENT_CHUNK_BYTES = 256 * 1024
PAGE_LIMIT = 100
READ_SECONDS = 60.0
MAX_CREATE_ANSWER_BYTES = 1024 * 1024
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # a page of 100 jobs, each with a prompt of a stranger's length
SLOWEST_BYTES_PER_SECOND = 1024.0
PATIENCE_SECONDS = 30.0
_GIVEN = "framewire.given"


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all clients: to read the authorities takes longer than a request on loopback."""
    return httpx.create_ssl_context(trust_env=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read as far as it may be long. What was cut off is no answer but has a status."""

    status: int
    headers: httpx.Headers
    body: bytes
    whole: bool

    @property
    def text(self) -> str:
        """Its beginning, as far as rules and people look at it."""
        return self.body[:4000].decode(errors="replace")


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
        self._dependency = f"provider {account.name}"
        self._base_url = base_url.rstrip("/")
        # No compression: a few bytes of it can be a gigabyte.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._secrets = tuple(headers)
        self._parameters = dict(parameters or {})
        self._heard = limits.Heard()
        self._reader = httpx.AsyncClient(
            timeout=READ_TIMEOUT,
            trust_env=False,
            verify=_tls(),
            follow_redirects=True,
            headers=self._headers,
            event_hooks={"request": [self._keep_the_key]},
        )

    async def aclose(self) -> None:
        """Closes its connections."""
        await self._reader.aclose()

    async def _keep_the_key(self, request: httpx.Request) -> None:
        """Films may come by a redirect from elsewhere; httpx takes only `Authorization` off for another host.

        An address that the server gave holds what lets us in, and no key is to be shown there.
        """
        given = request.extensions.get(_GIVEN, False)
        if given or not _same_server(httpx.URL(self._base_url), request.url):
            for name in self._secrets:
                request.headers.pop(name, None)

    def heard(self) -> contract.Limits:
        """What was said of the quota since this was last asked."""
        return self._heard.take(time.monotonic())

    async def create(
        self, path: str, body: contract.Body, idempotency_key: str | None
    ) -> contract.CreateOutcome:
        """Sends once, on a fresh HTTP/1.1 connection: no reuse, redirects, retries, nor proxy of the environment."""
        with telemetry.dependency(self._dependency, "create") as passed:
            outcome = await self._create(path, body, idempotency_key)
            passed.failed = isinstance(outcome, contract.Ambiguous | contract.NotAccepted)
        return outcome

    async def _create(
        self, path: str, body: contract.Body, idempotency_key: str | None
    ) -> contract.CreateOutcome:
        headers = {**self._headers, "Content-Type": body.content_type, "Connection": "close"}
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        transport = httpx.AsyncHTTPTransport(verify=_tls(), retries=0, http1=True, http2=False)
        timeout = httpx.Timeout(self._account.post_timeout_seconds, connect=5)
        try:
            # httpx bounds each read and write; what others conclude from silence needs a bound of the whole.
            async with (
                asyncio.timeout(self._account.post_timeout_seconds),
                httpx.AsyncClient(
                    transport=transport,
                    verify=_tls(),
                    timeout=timeout,
                    follow_redirects=False,
                    trust_env=False,
                ) as client,
            ):
                request = client.stream(
                    "POST",
                    f"{self._base_url}{path}",
                    content=body.data,
                    headers=headers,
                    params=self._parameters,
                )
                async with request as response:
                    answer = await self._read(response, MAX_CREATE_ANSWER_BYTES)
            return self._outcome(answer)
        except NOT_DELIVERED as error:
            return contract.NotAccepted(f"not reached: {error!r}", None, limit="")
        except Exception as error:
            return contract.Ambiguous(f"no answer: {error!r}")

    def _outcome(self, answer: Answer) -> contract.CreateOutcome:
        if answer.status in (200, 201, 202):
            job_id = body_object(answer).get("id")
            if isinstance(job_id, str) and 0 < len(job_id) <= 2048 and job_id.isprintable():
                return contract.Accepted(job_id)
            return contract.Ambiguous(f"{answer.status} without an id")
        rule = catalogue.outcome_rule(self._account, answer.status, answer.text)
        message = error_message(answer) or f"HTTP {answer.status}"
        if rule is None:
            return contract.Ambiguous(f"HTTP {answer.status}: {message}")
        if rule.outcome == "refused_request":
            return contract.RefusedRequest(rule.cause, message)
        if rule.outcome == "refused_us":
            return contract.RefusedUs(f"HTTP {answer.status}: {message}")
        return contract.NotAccepted(message, limits.retry_after(answer.headers), rule.limit)

    async def page(
        self, path: str, parameters: Mapping[str, str]
    ) -> tuple[list[Mapping[str, Any]], str | None]:
        """One page of a list: the jobs that have an id, and the cursor of the next page. Raises ProviderTrouble."""
        answer = await self._request("GET", path, parameters, "list")
        if answer.status != 200:
            raise trouble(answer)
        page = body_object(answer)
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
        answer = await self._request("GET", path, {}, "job")
        body = body_object(answer)
        word = body.get("status")
        # Around an error only a failed job is one: `status` and `id` stand in other bodies of errors as well.
        failed = isinstance(word, str) and word.lower() in failed_words
        if body.get("id") and word and (answer.status == 200 or failed):
            return body
        if answer.status == 404:
            return None
        raise trouble(answer)

    async def cancel(self, path: str, job: contract.Job | None) -> bool:
        """Deletes a job that runs, where the account's `cancel` says that this stops it."""
        running = job is not None and job.status is contract.Status.RUNNING
        if self._account.cancel != "delete_aborts" or not running:
            return False
        answer = await self._request("DELETE", path, {}, "cancel")
        if answer.status in (200, 202, 204):
            return True
        if answer.status == 404:
            return False
        raise trouble(answer)

    @asynccontextmanager
    async def content(
        self, address: str, start: int = 0
    ) -> AsyncIterator[tuple[int | None, AsyncIterator[bytes]]]:
        """A film, streamed in bounded memory; of a path, or from an address that the server gave."""
        path = address.startswith("/")
        url = httpx.URL(f"{self._base_url}{address}" if path else address)
        schemes = ("https",) if self._base_url.startswith("https:") else ("https", "http")
        if url.scheme not in schemes or not url.host:
            raise contract.ProviderTrouble("the address of the film is not one to fetch from")
        headers = {"Range": f"bytes={start}-"} if start else {}
        parameters = self._parameters if path else None
        try:
            async with self._reader.stream(
                "GET", url, params=parameters, headers=headers, extensions={_GIVEN: not path}
            ) as response:
                self._hear(response)
                if response.status_code in self._account.variant.not_ready_statuses:
                    raise contract.ContentGone(f"HTTP {response.status_code}")
                if response.status_code not in (200, 206):
                    raise trouble(await self._read(response, MAX_CREATE_ANSWER_BYTES))
                size, first = _extent(response, start)
                yield size, _from(response, start - first)
        except httpx.HTTPError as error:
            raise contract.ProviderTrouble(repr(error)) from error

    async def _request(
        self, method: str, path: str, parameters: Mapping[str, str], operation: str
    ) -> Answer:
        with telemetry.dependency(self._dependency, operation) as passed:
            answer = await self._answer(method, path, parameters)
            passed.failed = answer.status == 429 or answer.status >= 500
        return answer

    async def _answer(self, method: str, path: str, parameters: Mapping[str, str]) -> Answer:
        try:
            async with (
                asyncio.timeout(READ_SECONDS),
                self._reader.stream(
                    method, f"{self._base_url}{path}", params={**self._parameters, **parameters}
                ) as response,
            ):
                return await self._read(response, MAX_ANSWER_BYTES)
        except (httpx.HTTPError, TimeoutError) as error:
            raise contract.ProviderTrouble(repr(error)) from error

    async def _read(self, response: httpx.Response, most_bytes: int) -> Answer:
        self._hear(response)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > most_bytes:
                return Answer(response.status_code, response.headers, bytes(body[:4000]), False)
        return Answer(response.status_code, response.headers, bytes(body), True)

    def _hear(self, response: httpx.Response) -> None:
        self._heard.add(limits.said(response.headers, response.status_code), time.monotonic())


def _extent(response: httpx.Response, start: int) -> tuple[int | None, int]:
    """The size of the whole film, where said, and where in it this answer begins."""
    if response.status_code == 200:
        length = response.headers.get("content-length", "")
        return (int(length) if length.isdecimal() else None), 0
    unit, _, extent = response.headers.get("content-range", "").partition(" ")
    span, _, whole = extent.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdecimal() or int(first) > start:
        raise contract.ProviderTrouble(
            "the server sent another part of the film than was asked for"
        )
    return (int(whole) if whole.isdecimal() else None), int(first)


async def _from(response: httpx.Response, skip: int) -> AsyncIterator[bytes]:
    """The film without its first `skip` bytes. A drip is cut: it would hold its place for hours."""
    waited, count, held = 0.0, 0, bytearray()
    raw = response.aiter_raw()
    while True:
        began = time.monotonic()
        chunk = await anext(raw, None)
        waited += time.monotonic() - began
        if chunk is None:
            break
        count += len(chunk)
        if waited > PATIENCE_SECONDS and count < waited * SLOWEST_BYTES_PER_SECOND:
            raise contract.ProviderTrouble(f"the film drips: {count} bytes in {waited:.0f} s")
        dropped = min(skip, len(chunk))
        skip -= dropped
        held += chunk[dropped:]
        if len(held) >= CONTENT_CHUNK_BYTES:
            yield bytes(held)
            held.clear()
    if skip:
        raise contract.ProviderTrouble("the film is shorter than the part that is there")
    if held:
        yield bytes(held)


def _same_server(ours: httpx.URL, other: httpx.URL) -> bool:
    """The same origin, or the same host with TLS where ours is without."""
    if ours.host != other.host:
        return False
    upgraded = (ours.scheme, other.scheme) == ("http", "https") and ours.port == other.port is None
    return upgraded or (ours.scheme, ours.port) == (other.scheme, other.port)


@dataclass(frozen=True, slots=True)
class File:
    """A file of a form."""

    field: str
    name: str
    media_type: str
    content: bytes


def multipart(marker: str, fields: Mapping[str, str], files: Iterable[File]) -> contract.Body:
    """A form. The boundary comes from the marker, so the bytes are the same each time."""
    # 128 bits from the marker: cannot stand in an image or prompt by chance, nor by a caller's wish.
    boundary = "framewire-" + hashlib.sha256(marker.encode()).hexdigest()[:32]
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for file in files:
        head = f'Content-Disposition: form-data; name="{file.field}"; filename="{file.name}"'
        kind = f"Content-Type: {file.media_type}"
        parts.append(f"--{boundary}\r\n{head}\r\n{kind}\r\n\r\n".encode())
        parts += [file.content, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return contract.Body(f"multipart/form-data; boundary={boundary}", b"".join(parts))


def data_url(image: bytes) -> str:
    """A JPEG as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(image).decode()


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


def body_object(answer: Answer) -> Mapping[str, Any]:
    """The answer's JSON object; an empty one for anything else, also for what is too long."""
    try:
        body = json.loads(answer.body) if answer.whole else None
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


def error_message(answer: Answer) -> str:
    """Why, in the provider's words: wrapped in `error`, flat, or as `detail`."""
    body = body_object(answer)
    return error_of(body.get("error") or body.get("detail") or body.get("message"))[1][:300]


def trouble(answer: Answer) -> contract.ProviderTrouble:
    """An answer that is none, as what is raised."""
    message = f"HTTP {answer.status}: {error_message(answer)}"
    return contract.ProviderTrouble(
        message, limits.retry_after(answer.headers), too_early=answer.status == 429
    )
