"""What a job is and how it looks at a given time. Pure: time and randomness are arguments.

Nothing ticks: a job's status follows from its stored instants and the clock, so a killed
simulator comes back with every job exactly where it would have been.
"""

import dataclasses
import hashlib
import math
import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OPENAI_VIDEOS, AZURE_JOBS, RUNWAY = "openai_videos", "azure_jobs", "runway"

QUEUED, IN_PROGRESS, COMPLETED = "queued", "in_progress", "completed"
FAILED, CANCELLED = "failed", "cancelled"

# How a job ends badly, by the fault that decides it. `reason` is the word of the azure_jobs dialect, `failure` the code
# of the runway dialect, which may be left out.
ENDINGS: Mapping[str, Mapping[str, str]] = {
    "moderated_later": {
        "code": "moderation_blocked",
        "message": "Your request was blocked by our moderation system.",
        "reason": "output_moderation",
        "failure": "SAFETY.OUTPUT.VIDEO",
    },
    "input_moderated_later": {
        "code": "moderation_blocked",
        "message": "Your request was blocked by our moderation system when checking inputs."
        " Possible reasons: people-in-user-uploads.",
        "reason": "input_moderation",
        "failure": "SAFETY.INPUT.IMAGE",
    },
    "fails_later": {
        "code": "internal_error",
        "message": "The server had an error while generating the video.",
        "reason": "internal_error",
        "failure": "INTERNAL.BAD_OUTPUT.CODE01",
    },
    "fails_unknown": {
        "code": "solar_flare",
        "message": "No client has seen this one before.",
        "reason": "solar_flare",
    },
    "prompt_moderated_later": {
        "code": "moderation_blocked",
        "message": "Your request was blocked by our moderation system when checking inputs.",
        "reason": "input_moderation",
        "failure": "INPUT_PREPROCESSING.SAFETY.TEXT",
    },
    "input_breaks_later": {
        "code": "internal_error",
        "message": "The inputs could not be read just now.",
        "reason": "internal_error",
        "failure": "INPUT_PREPROCESSING.INTERNAL",
    },
    "input_invalid_later": {
        "code": "invalid_input",
        "message": "The given asset cannot be used.",
        "reason": "invalid_input",
        "failure": "ASSET.INVALID",
    },
    "third_party_later": {
        "code": "server_error",
        "message": "A third party that the model needs is not there.",
        "reason": "server_error",
        "failure": "THIRD_PARTY.UNAVAILABLE",
    },
}
INTERNAL_ERROR = ENDINGS["fails_later"]

_ULID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_FIRST_STATES = ((10, "preprocessing"), (90, "running"), (101, "processing"))


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One image or video that goes into the film, kept under its hash."""

    sha256: str
    type: str = "image"
    frame_index: int = 0  # the first frame of the film that it is for
    file_name: str = ""
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One accepted creation, as the log keeps it. Times are real Unix seconds."""

    id: str
    key_name: str
    model: str
    size: str
    seconds: str
    prompt: str
    metadata: Mapping[str, str]
    created_at: float
    starts_at: float
    due_at: float
    retained_seconds: float
    error: Mapping[str, str] | None  # how it ends, if it is to fail
    faults: Mapping[str, float]  # those that stay with the job
    billed_micros: int
    foreign: bool = False  # made by a fault, as if another tool used the same key
    dialect: str = OPENAI_VIDEOS
    n_variants: int = 1
    generation_ids: tuple[str, ...] = ()  # azure_jobs: one a variant, known from the start
    inputs: tuple[Input, ...] = ()
    throttled_until: float = 0.0  # runway: it waits for one of the places at once

    @property
    def stuck(self) -> bool:
        """Whether it never ends."""
        return "stuck" in self.faults or "stuck_queued" in self.faults

    @property
    def renders(self) -> bool:
        """Whether films come of it."""
        return self.error is None and not self.stuck and "cancelled_later" not in self.faults

    @property
    def film_ids(self) -> tuple[str, ...]:
        """One for each film that comes of it, and in that film's bytes."""
        if self.dialect != AZURE_JOBS:
            # A wrapped id is too long for a film, and no file's name.
            wrapped = len(self.id) > 64
            return (hashlib.sha256(self.id.encode()).hexdigest()[:48] if wrapped else self.id,)
        return self.generation_ids[: surviving(self.n_variants, self.faults)]

    @property
    def vanishes_at(self) -> float:
        """When the service forgets the job itself. The other dialects' jobs stay."""
        if self.dialect != AZURE_JOBS:
            return math.inf
        return self.created_at + self.retained_seconds

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.size.split("x")[0])

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.size.split("x")[1])


def as_entry(job: Job) -> dict[str, object]:
    """The job as the log has it, the hash of its first input in a field of its own."""
    first = job.inputs[0].sha256 if job.inputs else None
    return {**dataclasses.asdict(job), "reference_sha256": first}


def from_entry(entry: Mapping[str, Any]) -> Job:
    """The job of a log entry; of an older simulator's too, which had one dialect."""
    fields = {name: entry[name] for name in _JOB_FIELDS if name in entry}
    inputs: list[dict[str, Any]] = fields.get("inputs", [])
    if "inputs" not in fields and entry["reference_sha256"] is not None:
        inputs = [{"sha256": entry["reference_sha256"]}]
    fields["inputs"] = tuple(
        Input(**{**given, "crop": tuple(given.get("crop", (0.0, 0.0, 1.0, 1.0)))})
        for given in inputs
    )
    fields["generation_ids"] = tuple(fields.get("generation_ids", ()))
    return Job(**fields)


_JOB_FIELDS = tuple(field.name for field in dataclasses.fields(Job))


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A job's state at one instant."""

    status: str
    progress: int
    ended_at: float | None = None
    expires_at: float | None = None
    error: Mapping[str, str] | None = None

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.status in (COMPLETED, FAILED, CANCELLED)

    @property
    def completed_at(self) -> float | None:
        """When it ended well."""
        return self.ended_at if self.status == COMPLETED else None

    @property
    def azure_status(self) -> str:
        """The word of the azure_jobs dialect, which has no progress but more states."""
        if self.status == IN_PROGRESS:
            return next(word for below, word in _FIRST_STATES if self.progress < below)
        return "succeeded" if self.status == COMPLETED else self.status


def new_id(dialect: str, now: float, random_hex: str) -> str:
    """The dialect's prefix, then the time of creation and randomness, as the real ids are built."""
    if dialect == AZURE_JOBS:
        return f"task_{_ulid(now, random_hex)}"
    if dialect == RUNWAY:
        return str(uuid.UUID(hex=random_hex[:32], version=4))
    return f"video_{int(now):08x}{random_hex}"


def billed_though_failed(dialect: str, ending: Mapping[str, str] | None) -> bool:
    """Whether a job that ends so is charged like a good one: what runway's moderation stopped is."""
    return (
        dialect == RUNWAY and ending is not None and ending.get("failure", "").startswith("SAFETY.")
    )


def new_generation_id(now: float, random_hex: str) -> str:
    """Of one film of an azure_jobs job."""
    return f"gen_{_ulid(now, random_hex)}"


def _ulid(now: float, random_hex: str) -> str:
    """26 characters in lower case: 48 bits of milliseconds, then 80 of randomness."""
    number = (int(now * 1000) << 80) | int(random_hex[:20], 16)
    return "".join(_ULID_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def surviving(n_variants: int, faults: Mapping[str, float]) -> int:
    """How many of the variants come out."""
    return min(n_variants, int(faults.get("fewer_generations", n_variants)))


def snapshot(job: Job, now: float, films_at: float | None, film_failed: bool = False) -> Snapshot:
    """The job's state at `now`; `films_at` is when its last film was written, None if it is not yet.

    Completed needs both the time to be over and the films to be there.
    """
    if now < job.starts_at or "stuck_queued" in job.faults:
        return Snapshot(QUEUED, 0)
    span = max(job.due_at - job.starts_at, 1e-9)
    progress = min(99, max(0, math.floor(100 * (now - job.starts_at) / span)))
    if "regresses" in job.faults and 50 <= progress < 70:
        return Snapshot(QUEUED, 0)
    if job.stuck or now < job.due_at:
        return Snapshot(IN_PROGRESS, progress)
    vanishes_at = job.vanishes_at if job.dialect == AZURE_JOBS else None
    if "cancelled_later" in job.faults:
        return Snapshot(CANCELLED, progress, job.due_at, vanishes_at)
    if job.error is not None or film_failed:
        return Snapshot(FAILED, progress, job.due_at, vanishes_at, job.error or INTERNAL_ERROR)
    if films_at is None:
        return Snapshot(IN_PROGRESS, 99)
    ended_at = max(job.due_at, films_at)
    return Snapshot(COMPLETED, 100, ended_at, vanishes_at or ended_at + job.retained_seconds)


def render_seconds(base: float, per_second: float, seconds: int, sigma: float, seed: str) -> float:
    """How long the pretended model takes; the same seed draws the same jitter."""
    jitter = random.Random(seed).lognormvariate(0.0, sigma) if sigma else 1.0
    return (base + per_second * seconds) * jitter


def page(
    ids: Sequence[str],
    shown: Callable[[str], bool],
    *,
    after: str | None,
    before: str | None = None,
    limit: int,
    descending: bool,
) -> tuple[list[str], bool]:
    """One page of those of `ids` (oldest first) that are `shown`, and whether more follow.

    `after` goes on behind a cursor; `before` alone shows what leads up to one, and with `after` ends
    there. A cursor may be an id that is no longer shown, so a deletion between two pages loses
    nothing. Raises KeyError for a cursor that never was.
    """
    ordered = ids[::-1] if descending else ids
    first, last = 0, len(ordered)
    try:
        if after is not None:
            first = ordered.index(after) + 1
        if before is not None:
            last = ordered.index(before)
    except ValueError:
        raise KeyError(after, before) from None
    backwards = before is not None and after is None
    positions = range(last - 1, first - 1, -1) if backwards else range(first, last)
    found: list[str] = []
    for position in positions:
        if shown(ordered[position]):
            if len(found) == limit:
                return (found[::-1] if backwards else found), True
            found.append(ordered[position])
    return (found[::-1] if backwards else found), False
