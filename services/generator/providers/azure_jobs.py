"""The Azure OpenAI video jobs protocol: `POST /openai/v1/video/generations/jobs` and what belongs to it.

Wire facts: JSON for text, multipart for media with `inpaint_items` as one field of JSON and the files all named
`files`; every request says `api-version`; a finished job lists its films as `generations`, fewer than asked for when
some did not survive; errors come flat or wrapped. The `file_name` of an inpaint item is shown again: our marker.
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

_ROOT = "/video/generations"
_DONE = {"succeeded"}
_FAILED = {"failed", "cancelled", "canceled"}
# The dialect shows no percentage: the least that a status stands for.
_PROGRESS = {"preprocessing": 5, "running": 10, "processing": 90, "succeeded": 100}
_OUR_FIELDS = {"inpaint_items", "files"}
_WHOLE = {
    "left_fraction": 0.0,
    "top_fraction": 0.0,
    "right_fraction": 1.0,
    "bottom_fraction": 1.0,
}


class AzureJobs:
    """One key at one server of this dialect."""

    has_list = True
    outputs_are_listed = True

    def __init__(self, account: catalogue.ProviderAccount, base_url: str, api_key: str) -> None:
        self._account = account
        self._server = http.Server(
            account, base_url, {"Api-Key": api_key}, {"api-version": "preview"}
        )

    async def close(self) -> None:
        """Closes its connections."""
        await self._server.aclose()

    def build(
        self, spec: vocabulary_pb2.VideoSpec, inputs: Sequence[contract.Input], marker: str
    ) -> contract.Body:
        """JSON for text; with inputs multipart, in which the files' names carry the marker."""
        fields: dict[str, object] = {
            "model": self._account.models[spec.model].upstream,
            "prompt": spec.prompt,
            "height": spec.height,
            "width": spec.width,
            "n_seconds": spec.seconds,
            "n_variants": max(1, spec.variants),
        }
        for name in sorted(set(spec.options) - _OUR_FIELDS):
            # An option never stands in for what was priced and fingerprinted.
            fields.setdefault(name, http.whole(json_format.MessageToDict(spec.options[name])))
        if not inputs:
            return contract.Body("application/json", json.dumps(fields).encode())
        items: list[dict[str, object]] = []
        files: list[http.File] = []
        for number, each in enumerate(inputs):
            extension = "mp4" if each.is_video else "jpg"
            name = attempts.file_name(marker, number, extension)
            # What of it is taken was cut already, where it was brought to the size.
            items.append(
                {
                    "frame_index": each.frame_index,
                    "type": "video" if each.is_video else "image",
                    "file_name": name,
                    "crop_bounds": _WHOLE,
                }
            )
            files.append(http.File("files", name, each.media_type, each.content))
        texts = {field: http.option(value) for field, value in fields.items()}
        texts["inpaint_items"] = json.dumps(items)
        return http.multipart(marker, texts, files)

    def shown(self, spec: vocabulary_pb2.VideoSpec) -> str:
        """Prompt, model, size and seconds."""
        upstream = self._account.models[spec.model].upstream
        return attempts.visible_fingerprint(
            spec.prompt, upstream, spec.width, spec.height, spec.seconds
        )

    def shown_marker(self, spec: vocabulary_pb2.VideoSpec, marker: str, /) -> str:
        """What the files are called; a text job has nothing that is shown again."""
        return attempts.marker(marker) if spec.input_image_id or spec.inputs else ""

    async def create(
        self, body: contract.Body, idempotency_key: str | None
    ) -> contract.CreateOutcome:
        """Sends once."""
        return await self._server.create(f"{_ROOT}/jobs", body, idempotency_key)

    async def list_page(self, after: str | None) -> tuple[tuple[contract.Job, ...], str | None]:
        """One page, newest first."""
        parameters = {"limit": str(http.PAGE_LIMIT)}
        if after:
            parameters["after"] = after
        items, cursor = await self._server.page(f"{_ROOT}/jobs", parameters)
        return tuple(_job(item) for item in items), cursor

    async def get(self, provider_job_id: str) -> contract.Job | None:
        """One job."""
        item = await self._server.job(f"{_ROOT}/jobs/{quote(provider_job_id, safe='')}", _FAILED)
        return None if item is None else _job(item)

    async def cancel(self, provider_job_id: str) -> bool:
        """Stops it where a DELETE does."""
        path = f"{_ROOT}/jobs/{quote(provider_job_id, safe='')}"
        return await self._server.cancel(path, await self.get(provider_job_id))

    def heard(self) -> contract.Limits:
        """What its answers said of the quota."""
        return self._server.heard()

    def content(
        self, output_id: str, start: int = 0
    ) -> AbstractAsyncContextManager[tuple[int | None, AsyncIterator[bytes]]]:
        """The MP4 of one generation, in its high quality."""
        return self._server.content(f"{_ROOT}/{quote(output_id, safe='')}/content/video", start)


def _job(item: Mapping[str, Any]) -> contract.Job:
    word = str(item.get("status", "")).lower()
    status = contract.Status.RUNNING  # an unknown word is no verdict: keep asking
    if word in _DONE:
        status = contract.Status.DONE
    elif word in _FAILED:
        status = contract.Status.FAILED
    reason = http.storable(item.get("failure_reason"))
    if word in ("cancelled", "canceled"):
        reason = reason or "cancelled"
    return contract.Job(
        provider_job_id=str(item["id"]),
        status=status,
        progress_percent=_PROGRESS.get(word, 0),
        created_at=http.moment(item.get("created_at")) or datetime.now(UTC),
        expires_at=http.moment(item.get("expires_at")),
        fingerprint=_fingerprint(item),
        # A failed job may list generations all the same: the status alone says that there are films.
        outputs=_ids(item.get("generations")) if status is contract.Status.DONE else (),
        marker=_marker(item.get("inpaint_items")),
        error_code=reason if status is contract.Status.FAILED else "",
    )


def _ids(generations: object) -> tuple[str, ...]:
    items = generations if isinstance(generations, list) else []
    return tuple(str(item["id"]) for item in items if isinstance(item, dict) and item.get("id"))


def _marker(inpaint_items: object) -> str:
    for item in inpaint_items if isinstance(inpaint_items, list) else ():
        if isinstance(item, dict) and item.get("file_name"):
            return attempts.marker_of(http.storable(item["file_name"]))
    return ""


def _fingerprint(item: Mapping[str, Any]) -> str | None:
    prompt, model = item.get("prompt"), item.get("model")
    sides = [http.number(item.get(name)) for name in ("width", "height", "n_seconds")]
    if not prompt or not model or http.moment(item.get("created_at")) is None:
        return None
    width, height, seconds = sides
    if width is None or height is None or seconds is None:
        return None
    return attempts.visible_fingerprint(
        str(prompt), str(model), int(width), int(height), int(seconds)
    )
