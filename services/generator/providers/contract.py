"""What a provider is to the generator: the small interface behind which every dialect stands. No I/O here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from framewire.events.v1 import vocabulary_pb2


@dataclass(frozen=True, slots=True)
class Body:
    """The whole request of a create, built before anything is decided. The same input gives the same bytes."""

    content_type: str
    data: bytes
    path: str = ""
    """Where it goes, in a dialect that has more than one place to send creates to."""


@dataclass(frozen=True, slots=True)
class Input:
    """What a video starts from, brought to its size: a JPEG, or an MP4."""

    content: bytes
    is_video: bool = False
    frame_index: int = 0

    @property
    def media_type(self) -> str:
        """Of the content."""
        return "video/mp4" if self.is_video else "image/jpeg"


class CannotSend(Exception):
    """This server takes no such inputs: the request cannot be said in its protocol."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server has said of its quota. None: not said. Seconds count from the moment of asking."""

    requests_limit: int | None = None
    """Requests that it takes in each of its windows (`x-ratelimit-limit-requests`)."""
    requests_remaining: int | None = None
    """How many of them are left in this window."""
    reset_seconds: float | None = None
    """When the window ends."""
    wait_seconds: float | None = None
    """No request of any kind before this is over: Retry-After, in any form, of an answer that was none."""
    poll_after_seconds: float | None = None
    """When a poll is worth making (`openai-poll-after-ms`)."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The provider has the job and will bill it."""

    provider_job_id: str


@dataclass(frozen=True, slots=True)
class RefusedRequest:
    """The request itself was refused: the video fails."""

    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class RefusedUs:
    """We were refused (key, money, model gone): the account closes, the attempt goes back unharmed."""

    message: str


@dataclass(frozen=True, slots=True)
class NotAccepted:
    """Nothing was made, by the provider's documented word or because it was never reached: try later."""

    message: str
    retry_after_seconds: float | None
    limit: str = "requests"
    """Which limit was met: `requests` of any kind, `jobs` at once, creates of this `day`; empty: it was not reached."""


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Anything else: the provider may have the job."""

    message: str


CreateOutcome = Accepted | RefusedRequest | RefusedUs | NotAccepted | Ambiguous


class Status(StrEnum):
    """What a provider says of a job, whatever words it uses."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Job:
    """A job as a provider shows it."""

    provider_job_id: str
    status: Status
    progress_percent: int
    created_at: datetime
    expires_at: datetime | None
    fingerprint: str | None
    """attempts.visible_fingerprint of what is shown; None when too little is shown."""
    outputs: tuple[str, ...] = ()
    """What `content` takes, of a job that is DONE: one for each video that came out, in the order of the variants."""
    marker: str = ""
    """What is shown again of a name that its sender gave; empty where there is none."""
    error_code: str = ""
    error_message: str = ""
    billed: bool = False
    """Of a job that FAILED: whether it is charged all the same."""


class ProviderTrouble(Exception):
    """A call that reads failed; it can be made again. `retry_after_seconds` where the provider said so.

    `too_early`: it was refused for the limit of requests.
    """

    def __init__(
        self, message: str, retry_after_seconds: float | None = None, *, too_early: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.too_early = too_early


class ContentGone(ProviderTrouble):
    """The content was not found."""


def first_frame(inputs: Sequence[Input], *, or_video: bool = False) -> Input | None:
    """The one image at frame 0, for servers that take no more; with `or_video` it may be a video. Raises CannotSend."""
    if not inputs:
        return None
    (first, *others) = inputs
    if others or first.frame_index or (first.is_video and not or_video):
        taken = "one image or one video" if or_video else "one image"
        raise CannotSend(f"this server starts from {taken}, as the first frame")
    return first


class Provider(Protocol):
    """One key at one server. Every method makes requests; each of them has been taken from the quota by the caller."""

    @property
    def has_list(self) -> bool:
        """Whether there is a list; without one each job is asked for singly."""
        ...

    @property
    def outputs_are_listed(self) -> bool:
        """Whether a finished job has to be asked for its outputs; otherwise it has one, under its own id."""
        ...

    def build(self, spec: vocabulary_pb2.VideoSpec, inputs: Sequence[Input], marker: str) -> Body:
        """The create's body. Deterministic: same input, same bytes. Raises CannotSend."""
        ...

    def shown(self, spec: vocabulary_pb2.VideoSpec) -> str:
        """The fingerprint that the list will show of it."""
        ...

    def shown_marker(self, spec: vocabulary_pb2.VideoSpec, marker: str, /) -> str:
        """What of `build`'s marker the list will show; empty where it shows nothing."""
        ...

    async def create(self, body: Body, idempotency_key: str | None) -> CreateOutcome:
        """Sends a paid request once, over a connection of its own, without redirects and retries. Never raises."""
        ...

    async def list_page(self, after: str | None) -> tuple[tuple[Job, ...], str | None]:
        """One page of its jobs, newest first, and the cursor of the next; raises ProviderTrouble."""
        ...

    async def get(self, provider_job_id: str) -> Job | None:
        """One job; None for a definite 404; raises ProviderTrouble."""
        ...

    def content(
        self, output_id: str, start: int = 0
    ) -> AbstractAsyncContextManager[tuple[int | None, AsyncIterator[bytes]]]:
        """A finished video: the size of the whole where said, and its bytes from `start` on as they come.

        Of a server that knows no ranges the bytes before are read and dropped. Raises ProviderTrouble or ContentGone.
        """
        ...

    async def cancel(self, provider_job_id: str) -> bool:
        """Has a job stopped that runs, where the server can (the account's `cancel`); raises ProviderTrouble.

        True: the server has stopped it. False: there is no way, or it was over. The job is read before, since to
        delete a finished one would destroy a paid render.
        """
        ...

    def heard(self) -> Limits:
        """What its answers have said of the quota since this was last asked. Makes no request."""
        ...

    async def close(self) -> None:
        """Closes its connections."""
        ...
