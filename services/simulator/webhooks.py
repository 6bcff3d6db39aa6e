"""Tells what became of jobs of the openai_videos dialect, signed as Standard Webhooks says."""

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import json
import secrets
import urllib.error
import urllib.request

from services.simulator import jobs, provider

_TRIES = 10
_FIRST_RETRY_SECONDS = 5.0  # provider time; doubled each time
_LOOK_SECONDS = 0.02
_TIMEOUT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One webhook; its id stays the same over all its deliveries."""

    id: str
    job_id: str
    body: bytes
    forged: bool


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """`v1,` and the HMAC of id, time and body; a secret that begins with `whsec_` is base64."""
    prefix, found, encoded = secret.partition("whsec_")
    key = base64.b64decode(encoded) if found and not prefix else secret.encode()
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


class Webhooks:
    """The loop over jobs that have ended and are not told yet."""

    def __init__(self, service: provider.Provider) -> None:
        self._service = service
        self._settings = service.settings

    async def run(self) -> None:
        """Tells until it is cancelled; without an address it does nothing."""
        if not self._settings.webhook_url:
            return
        async with asyncio.TaskGroup() as group:
            while True:
                for job, message in self._due():
                    group.create_task(self._deliver(job, message))
                await asyncio.sleep(_LOOK_SECONDS)

    def _due(self) -> list[tuple[jobs.Job, Message]]:
        due: list[tuple[jobs.Job, Message]] = []
        alive = {job.id: job for job in self._service.all_jobs() if job.id in self._service.untold}
        for job_id, job in alive.items():
            state = self._service.state_of(job)
            if not state.ended:
                continue
            # Before it is sent: a simulator that dies now has lost the message, as a real one may.
            self._service.untold.pop(job_id, None)
            self._service.note("told", {"job": job_id, "key_name": job.key_name})
            kind = "video.completed" if state.status == jobs.COMPLETED else "video.failed"
            if "webhook_lost" in job.faults:
                continue
            due.append((job, self._message(kind, job_id, "webhook_forged" in job.faults)))
            if "webhook_twice" in job.faults:
                due.append(due[-1])
            if "webhook_foreign" in job.faults:
                due.append((job, self._message(kind, f"video_{secrets.token_hex(16)}", False)))
        return due

    def _message(self, kind: str, job_id: str, forged: bool) -> Message:
        body = {
            "id": f"evt_{secrets.token_hex(16)}",
            "object": "event",
            "created_at": int(self._service.now()),
            "type": kind,
            "data": {"id": job_id},
        }
        message_id = f"wh_{secrets.token_hex(16)}"
        return Message(message_id, job_id, json.dumps(body).encode(), forged)

    async def _deliver(self, job: jobs.Job, message: Message) -> None:
        await asyncio.sleep(self._settings.real(job.faults.get("webhook_late", 0.0)))
        for number in range(_TRIES):
            status = await asyncio.to_thread(self._post, message)
            entry = {"webhook_id": message.id, "job": message.job_id, "status": status}
            self._service.note("webhook", {**entry, "forged": message.forged, "try": number + 1})
            if 200 <= status < 300 or message.forged:
                return
            await asyncio.sleep(self._settings.real(_FIRST_RETRY_SECONDS * 2**number))

    def _post(self, message: Message) -> int:
        secret = self._settings.webhook_secret.get_secret_value()
        timestamp = str(int(self._service.now()))
        signed_with = "forged" if message.forged else secret
        headers = {
            "content-type": "application/json",
            "webhook-id": message.id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(signed_with, message.id, timestamp, message.body),
        }
        request = urllib.request.Request(  # noqa: S310 - the setting is checked
            self._settings.webhook_url, message.body, headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0
