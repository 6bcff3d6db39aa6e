"""What a job is and how it looks at a given time. Pure: time and randomness are arguments.

Nothing ticks: a job's status follows from its stored instants and the clock, so a killed
simulator comes back with every job exactly where it would have been.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"

MODERATION_ERROR = {
    "code": "moderation_blocked",
    "message": "Your request was blocked by our moderation system.",
}
INTERNAL_ERROR = {
    "code": "internal_error",
    "message": "The server had an error while generating the video.",
}

# A video of the service's own making is told apart by its id alone, so ids have one length:
# the film of a job carries its id in place of an equally long placeholder.
ID_LENGTH = len("video_") + 8 + 40


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One accepted creation, as the log keeps it. Times are real Unix seconds."""

    id: str
    key_name: str
    model: str
    size: str
    seconds: str
    prompt: str
    reference_sha256: str | None
    metadata: Mapping[str, str]
    created_at: float
    starts_at: float
    due_at: float
    retained_seconds: float
    error: Mapping[str, str] | None  # how it ends, if it is to fail
    faults: Mapping[str, float]  # those that stay with the job
    billed_micros: int
    foreign: bool = False  # made by a fault, as if another tool used the same key

    @property
    def stuck(self) -> bool:
        """Whether it never ends."""
        return "stuck" in self.faults

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.size.split("x")[0])

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.size.split("x")[1])


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A job's state at one instant."""

    status: str
    progress: int
    completed_at: float | None = None
    expires_at: float | None = None
    error: Mapping[str, str] | None = None

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.status in (COMPLETED, FAILED)


def new_id(now: float, random_hex: str) -> str:
    """`video_`, the second of creation in hex, then randomness, as the real ids are built."""
    identifier = f"video_{int(now):08x}{random_hex}"
    assert len(identifier) == ID_LENGTH
    return identifier


def snapshot(job: Job, now: float, film_at: float | None, film_failed: bool = False) -> Snapshot:
    """The job's state at `now`; `film_at` is when its film was written, None if it is not yet.

    Completed needs both the time to be over and the film to be there.
    """
    if now < job.starts_at:
        return Snapshot(QUEUED, 0)
    span = max(job.due_at - job.starts_at, 1e-9)
    progress = min(99, max(0, math.floor(100 * (now - job.starts_at) / span)))
    if job.stuck or now < job.due_at:
        return Snapshot(IN_PROGRESS, progress)
    if job.error is not None or film_failed:
        return Snapshot(FAILED, progress, error=job.error or INTERNAL_ERROR)
    if film_at is None:
        return Snapshot(IN_PROGRESS, 99)
    completed_at = max(job.due_at, film_at)
    return Snapshot(COMPLETED, 100, completed_at, completed_at + job.retained_seconds)


def render_seconds(base: float, per_second: float, seconds: int, sigma: float, seed: str) -> float:
    """How long the pretended model takes; the same seed draws the same jitter."""
    jitter = random.Random(seed).lognormvariate(0.0, sigma) if sigma else 1.0
    return (base + per_second * seconds) * jitter


def as_object(
    job: Job, state: Snapshot, *, echo_prompt: bool, echo_marker: bool
) -> dict[str, object]:
    """The protocol's Video object, nulls present."""
    shown: dict[str, object] = {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": state.status,
        "progress": state.progress,
        "created_at": int(job.created_at),
        "completed_at": None if state.completed_at is None else int(state.completed_at),
        "expires_at": None if state.expires_at is None else int(state.expires_at),
        "size": job.size,
        "seconds": job.seconds,
        "remixed_from_video_id": None,
        "error": None if state.error is None else dict(state.error),
    }
    if echo_prompt:
        shown["prompt"] = job.prompt
    if echo_marker:
        shown["metadata"] = dict(job.metadata)
    return shown


def page(
    ids: Sequence[str],
    shown: Callable[[str], bool],
    *,
    after: str | None,
    limit: int,
    descending: bool,
) -> tuple[list[str], bool]:
    """One page of those of `ids` (oldest first) that are `shown`, and whether more follow.

    The cursor may be an id that is no longer shown, so a deletion between two pages loses nothing.
    Raises KeyError for a cursor that never was.
    """
    step = -1 if descending else 1
    start = len(ids) - 1 if descending else 0
    if after is not None:
        try:
            start = ids.index(after) + step
        except ValueError:
            raise KeyError(after) from None
    found: list[str] = []
    position = start
    while 0 <= position < len(ids):
        if shown(ids[position]):
            if len(found) == limit:
                return found, True
            found.append(ids[position])
        position += step
    return found, False
