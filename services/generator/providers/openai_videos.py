"""The OpenAI Videos protocol: `POST /v1/videos` and what belongs to it, as its living servers speak it.

Wire facts: ids may be long and hold `/` and `=` (percent-encoded in paths); statuses differ by server; `seconds` is
text; an image goes as one multipart file `input_reference`, exactly the requested size; a failed job may come as an
HTTP error with the job as its body. A job makes one video.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from google.protobuf import json_format

from framewire.events.v1 import vocabulary_pb2
from services.generator import attempts, catalogue
from services.generator.providers import contract, http

_DONE = {"completed", "succeeded", "success"}
_FAILED = {"failed", "error", "cancelled", "canceled", "expired", "deleted"}


class OpenAIVideos:
    """One key at one server of this dialect."""

    has_list = True
    outputs_are_listed = False

    def __init__(self, account: catalogue.ProviderAccount, base_url: str, api_key: str) -> None:
        self._account = account
        self._server = http.Server(account, base_url, {"Authorization": f"Bearer {api_key}"})

    async def close(self) -> None:
        """Closes its connections."""
        await self._server.aclose()

    def build(
        self, spec: vocabulary_pb2.VideoSpec, image: bytes | None, marker: str
    ) -> contract.Body:
        """Multipart, always: what the official SDK sends."""
        fields = {
            "model": self._account.models[spec.model].upstream,
            "prompt": spec.prompt,
            "size": f"{spec.width}x{spec.height}",
            "seconds": str(spec.seconds),
        }
        for name in sorted(spec.options):
            # An option never stands in for what was priced and fingerprinted.
            fields.setdefault(name, http.option(json_format.MessageToDict(spec.options[name])))
        files = [] if image is None else [("input_reference", "input.jpg", image)]
        return http.multipart(marker, fields, files)

    def shown(self, spec: vocabulary_pb2.VideoSpec) -> str:
        """Prompt, model, size and seconds."""
        upstream = self._account.models[spec.model].upstream
        return attempts.visible_fingerprint(
            spec.prompt, upstream, spec.width, spec.height, spec.seconds
        )

    def shown_marker(self, _spec: vocabulary_pb2.VideoSpec, _marker: str, /) -> str:
        """None: servers of this dialect show nothing of ours again."""
        return ""

    async def create(
        self, body: contract.Body, idempotency_key: str | None
    ) -> contract.CreateOutcome:
        """Sends once."""
        return await self._server.create("/videos", body, idempotency_key)

    async def list_page(self, after: str | None) -> tuple[tuple[contract.Job, ...], str | None]:
        """One page, newest first."""
        parameters = {"limit": str(http.PAGE_LIMIT), "order": "desc"}
        if after:
            parameters["after"] = after
        items, cursor = await self._server.page("/videos", parameters)
        return tuple(_job(item) for item in items), cursor

    async def get(self, provider_job_id: str) -> contract.Job | None:
        """One job."""
        item = await self._server.job(f"/videos/{quote(provider_job_id, safe='')}", _FAILED)
        return None if item is None else _job(item)

    async def cancel(self, provider_job_id: str) -> bool:
        """Stops it where a DELETE does."""
        path = f"/videos/{quote(provider_job_id, safe='')}"
        return await self._server.cancel(path, await self.get(provider_job_id))

    def heard(self) -> contract.Limits:
        """What its answers said of the quota."""
        return self._server.heard()

    def content(
        self, output_id: str, start: int = 0
    ) -> AbstractAsyncContextManager[tuple[int | None, AsyncIterator[bytes]]]:
        """The MP4; the id is the job's."""
        return self._server.content(f"/videos/{quote(output_id, safe='')}/content", start)


def _job(item: Mapping[str, Any]) -> contract.Job:
    word = str(item.get("status", "")).lower()
    status = contract.Status.RUNNING  # an unknown word is no verdict: keep asking
    if word in _DONE:
        status = contract.Status.DONE
    elif word in _FAILED:
        status = contract.Status.FAILED
    code, message = http.error_of(item.get("error"))
    job_id = str(item["id"])
    return contract.Job(
        provider_job_id=job_id,
        status=status,
        progress_percent=http.percent(item.get("progress")),
        created_at=http.moment(item.get("created_at")) or datetime.now(UTC),
        expires_at=http.moment(item.get("expires_at")),
        fingerprint=_fingerprint(item),
        outputs=(job_id,) if status is contract.Status.DONE else (),
        error_code=code,
        error_message=message,
    )


def _fingerprint(item: Mapping[str, Any]) -> str | None:
    prompt, model = item.get("prompt"), item.get("model")
    size, seconds = str(item.get("size") or ""), item.get("seconds") or item.get("duration")
    width, _, height = size.partition("x")
    length = str(seconds or "").split(".", maxsplit=1)[0]
    if not prompt or not model or http.moment(item.get("created_at")) is None:
        return None
    if not all(part.isdecimal() for part in (width, height, length)):
        return None
    return attempts.visible_fingerprint(
        str(prompt), str(model), int(width), int(height), int(length)
    )
