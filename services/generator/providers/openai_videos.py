"""The OpenAI Videos protocol: `POST /v1/videos` and what belongs to it, as its living servers speak it.

Wire facts: ids may be long and hold `/` and `=` (percent-encoded in paths); statuses differ by server; `seconds` is
text; an image goes as one multipart file `input_reference`, exactly the requested size; a failed job may come as an
HTTP error with the job as its body. A job makes one video. What a server wants otherwise is its account's `variant`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from google.protobuf import json_format

from framewire.events.v1 import vocabulary_pb2
from services.generator import attempts, catalogue
from services.generator.providers import contract, http

_DONE = {"completed", "succeeded", "success"}
_OUR_FIELDS = {"size", "width", "height", "input_reference", "input_reference[image_url]"}
_FAILED = {"failed", "error", "cancelled", "canceled", "expired", "deleted"}


class OpenAIVideos:
    """One key at one server of this dialect."""

    outputs_are_listed = False

    def __init__(self, account: catalogue.ProviderAccount, base_url: str, api_key: str) -> None:
        self._account = account
        self._variant = account.variant
        headers = {
            "authorization": {"Authorization": f"Bearer {api_key}"},
            "api-key": {"Api-Key": api_key},
            "none": {},
        }[self._variant.key_header]
        version = self._variant.api_version
        parameters = {"api-version": version} if version else {}
        self._server = http.Server(account, base_url, headers, parameters)
        self.has_list = self._variant.has_list

    async def close(self) -> None:
        """Closes its connections."""
        await self._server.aclose()

    def build(
        self, spec: vocabulary_pb2.VideoSpec, inputs: Sequence[contract.Input], marker: str
    ) -> contract.Body:
        """Multipart, as the official SDK sends, or JSON where the server wants that."""
        variant = self._variant
        first = contract.first_frame(inputs, or_video=variant.input_video)
        as_json = variant.body == "json" or (variant.body == "json_for_text" and first is None)
        fields: dict[str, object] = {
            "model": self._account.models[spec.model].upstream,
            "prompt": spec.prompt,
        }
        if variant.size == "sides":
            fields |= {"width": spec.width, "height": spec.height}
        else:
            fields["size"] = f"{spec.width}x{spec.height}"
        fields["seconds"] = spec.seconds if variant.seconds == "integer" else str(spec.seconds)
        for name in sorted(set(spec.options) - _OUR_FIELDS):
            # An option never stands in for what was priced and fingerprinted.
            fields.setdefault(name, http.whole(json_format.MessageToDict(spec.options[name])))
        files: list[http.File] = []
        if first is not None and not first.is_video and (as_json or variant.image == "object"):
            address = http.data_url(first.content)
            if as_json:
                fields["input_reference"] = {"image_url": address}
            else:
                fields["input_reference[image_url]"] = address
        elif first is not None:
            name = "input.mp4" if first.is_video else "input.jpg"
            files.append(http.File("input_reference", name, first.media_type, first.content))
        if as_json:
            return contract.Body("application/json", json.dumps(fields).encode())
        texts = {name: http.option(value) for name, value in fields.items()}
        return http.multipart(marker, texts, files)

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
        if not self.has_list:
            raise contract.ProviderTrouble("the server has no list")
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
