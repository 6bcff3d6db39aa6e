"""The Runway API: `POST /v1/image_to_video` and `/v1/text_to_video`, tasks.

Wire facts: JSON in camelCase, the version of the interface in a header; an image goes as a data URI of 5 MB at most;
the create answers an id and nothing else; what is over the limit of tasks at once is taken and sits in THROTTLED;
there is no list; films come under signed addresses of another host, which a new GET of the task renews; what
moderation stopped (`SAFETY.`) is billed; DELETE stops a task that is not over, and destroys one that is.
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

VERSION = "2024-11-06"
_FAILED = {"failed", "cancelled", "canceled"}
_OUR_FIELDS = {"promptImage", "promptText", "ratio", "duration"}


class Runway:
    """One key at one server of this dialect."""

    has_list = False
    outputs_are_listed = True

    def __init__(self, account: catalogue.ProviderAccount, base_url: str, api_key: str) -> None:
        self._account = account
        headers = {"Authorization": f"Bearer {api_key}", "X-Runway-Version": VERSION}
        self._server = http.Server(account, base_url, headers)

    async def close(self) -> None:
        """Closes its connections."""
        await self._server.aclose()

    def build(
        self, spec: vocabulary_pb2.VideoSpec, inputs: Sequence[contract.Input], _marker: str, /
    ) -> contract.Body:
        """JSON, an image in it; nothing of ours is ever shown again, so the marker is not sent."""
        first = contract.first_frame(inputs)
        fields: dict[str, object] = {
            "model": self._account.models[spec.model].upstream,
            "promptText": spec.prompt,
            "ratio": f"{spec.width}:{spec.height}",
            "duration": spec.seconds,
        }
        if first is not None:
            fields["promptImage"] = http.data_url(first.content)
        for name in sorted(set(spec.options) - _OUR_FIELDS):
            # An option never stands in for what was priced.
            fields.setdefault(name, http.whole(json_format.MessageToDict(spec.options[name])))
        path = "/text_to_video" if first is None else "/image_to_video"
        return contract.Body("application/json", json.dumps(fields).encode(), path)

    def shown(self, spec: vocabulary_pb2.VideoSpec) -> str:
        """Prompt, model, size and seconds: nothing shows them, but twins are told apart by it."""
        upstream = self._account.models[spec.model].upstream
        return attempts.visible_fingerprint(
            spec.prompt, upstream, spec.width, spec.height, spec.seconds
        )

    def shown_marker(self, _spec: vocabulary_pb2.VideoSpec, _marker: str, /) -> str:
        """None."""
        return ""

    async def create(
        self, body: contract.Body, idempotency_key: str | None
    ) -> contract.CreateOutcome:
        """Sends once."""
        return await self._server.create(body.path, body, idempotency_key)

    async def list_page(self, after: str | None) -> tuple[tuple[contract.Job, ...], str | None]:
        """There is none."""
        del after
        raise contract.ProviderTrouble("the dialect has no list")

    async def get(self, provider_job_id: str) -> contract.Job | None:
        """One task."""
        item = await self._server.job(_path(provider_job_id), _FAILED)
        return None if item is None else _job(item)

    async def cancel(self, provider_job_id: str) -> bool:
        """Stops a task that is not over."""
        return await self._server.cancel(_path(provider_job_id), await self.get(provider_job_id))

    def heard(self) -> contract.Limits:
        """What its answers said of the quota."""
        return self._server.heard()

    def content(
        self, output_id: str, start: int = 0
    ) -> AbstractAsyncContextManager[tuple[int | None, AsyncIterator[bytes]]]:
        """The MP4 under the signed address that the task shows."""
        return self._server.content(output_id, start)


def _path(provider_job_id: str) -> str:
    return f"/tasks/{quote(provider_job_id, safe='')}"


def _job(item: Mapping[str, Any]) -> contract.Job:
    word = str(item.get("status", "")).lower()
    status = contract.Status.RUNNING  # an unknown word is no verdict: keep asking
    if word == "succeeded":
        status = contract.Status.DONE
    elif word in _FAILED:
        status = contract.Status.FAILED
    code = http.storable(item.get("failureCode")).upper()
    failure = http.storable(item.get("failure"))
    if code == "ASSET.INVALID":
        failure = f"the input asset is not usable: {failure}"
    outputs = item.get("output") if isinstance(item.get("output"), list) else []
    done = status is contract.Status.DONE
    return contract.Job(
        provider_job_id=str(item["id"]),
        status=status,
        progress_percent=100
        if done
        else http.percent((http.number(item.get("progress")) or 0) * 100),
        created_at=_moment(item.get("createdAt")) or datetime.now(UTC),
        expires_at=None,
        fingerprint=None,
        outputs=tuple(url for url in outputs or () if isinstance(url, str)) if done else (),
        error_code=code or ("cancelled" if word.startswith("cancel") else ""),
        error_message=failure,
        billed=code.startswith("SAFETY."),
    )


def _moment(text: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
