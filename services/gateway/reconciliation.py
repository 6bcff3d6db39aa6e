"""What the services say of one video, compared. Pure: no I/O, no clock.

Each side was read at a moment of its own, so a difference may be only the time between: it counts when two passes, an
interval apart, show the same (`Finding.evidence`). Repairs are operations that exist anyway, each idempotent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from kit import ids

SETTLED = ("CAPTURED", "RELEASED")
NEVER_HELD = ("REFUSED", "VOID")
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")
LIVE = ("PENDING", "PROCESSING")
NOT_ADMITTED = ("REJECTED", "ABANDONED")


class Kind(StrEnum):
    """Kinds of differences; the names of the contract, which says what each means."""

    HOLD_WITHOUT_VIDEO = "HOLD_WITHOUT_VIDEO"
    HOLD_OPEN_AFTER_END = "HOLD_OPEN_AFTER_END"
    HOLD_ENDED_EARLY = "HOLD_ENDED_EARLY"
    HOLD_AGAINST_POLICY = "HOLD_AGAINST_POLICY"
    VIDEO_WITHOUT_HOLD = "VIDEO_WITHOUT_HOLD"
    SETTLEMENT_NOT_SHOWN = "SETTLEMENT_NOT_SHOWN"
    AMOUNT_DIFFERS = "AMOUNT_DIFFERS"
    VIDEO_UNKNOWN_TO_GENERATOR = "VIDEO_UNKNOWN_TO_GENERATOR"
    VIDEO_UNKNOWN_TO_GATEWAY = "VIDEO_UNKNOWN_TO_GATEWAY"
    VIDEO_BEHIND = "VIDEO_BEHIND"
    END_DIFFERS = "END_DIFFERS"
    ATTEMPT_STRANDED = "ATTEMPT_STRANDED"
    ACCOUNT_DIFFERS = "ACCOUNT_DIFFERS"
    OUTPUT_MISSING = "OUTPUT_MISSING"
    OUTPUT_OBJECT_MISSING = "OUTPUT_OBJECT_MISSING"
    OUTPUT_DIFFERS = "OUTPUT_DIFFERS"
    PIN_AFTER_END = "PIN_AFTER_END"
    PROVIDER_JOB_UNKNOWN = "PROVIDER_JOB_UNKNOWN"
    PROVIDER_JOB_SUPERSEDED = "PROVIDER_JOB_SUPERSEDED"
    PROVIDER_JOB_LOST = "PROVIDER_JOB_LOST"


class Repair(StrEnum):
    """What puts a difference right; the names of the contract."""

    NONE = "NONE"
    SETTLE_HOLD = "SETTLE_HOLD"
    RELEASE_HOLD = "RELEASE_HOLD"
    PROJECT_VIDEO = "PROJECT_VIDEO"
    PROJECT_SETTLEMENT = "PROJECT_SETTLEMENT"
    RING_JOB = "RING_JOB"
    UNPIN = "UNPIN"


@dataclass(frozen=True, slots=True)
class Statement:
    """What one side says, at its watermark."""

    side: str
    as_of: datetime
    says: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference. The same difference always has the same id."""

    kind: Kind
    video_id: str
    account_id: str
    statements: tuple[Statement, ...]
    repair: Repair = Repair.NONE
    advice: str = ""
    subject: str = ""
    """Asset, or "account/job" of a provider, where that is what differs."""
    subject_at: datetime | None = None
    """When the provider made the job: how far back its list must be read to see it again."""

    @property
    def finding_id(self) -> str:
        return ids.derived_id("finding", self.kind, self.video_id, self.subject)

    @property
    def evidence(self) -> str:
        """What the sides say, whenever they said it: the same in two passes, or it is not the same difference."""
        said = [f"{statement.side}: {statement.says}" for statement in self.statements]
        return ids.derived_id(self.repair, *said)


@dataclass(frozen=True, slots=True)
class Output:
    """An output as it was told, with its sha256; its poster (without a size) and smaller versions without."""

    asset_id: str
    size_bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Video:
    """What the gateway says."""

    account_id: str
    state: str
    accepted: bool
    settlement: str
    captured: int
    released: int
    cause: str = ""
    outputs: tuple[str, ...] = ()
    """Asset ids, without posters."""
    deleted: bool = False

    def __str__(self) -> str:
        shown = f"{self.state}, settlement {self.settlement}"
        if self.settlement == "DONE":
            shown += f", captured {self.captured}, released {self.released}"
        return f"{shown}, {self.cause}" if self.cause else shown


@dataclass(frozen=True, slots=True)
class Hold:
    """What credits says. `expected`: what the policy on the hold takes for the generator's end; None: not asked."""

    account_id: str
    state: str
    reserved: int
    captured: int
    released: int
    refunded: int = 0
    by_operator: bool = False
    expected: int | None = None

    def __str__(self) -> str:
        shown = f"{self.state}, reserved {self.reserved}, captured {self.captured}, released {self.released}"
        return f"{shown}, refunded {self.refunded}" if self.refunded else shown


@dataclass(frozen=True, slots=True)
class Attempt:
    """A try, as the generator says."""

    number: int
    state: str
    provider_account: str = ""
    provider_job_id: str = ""
    created_at: datetime | None = None

    @property
    def live(self) -> bool:
        return self.state not in TERMINAL

    def __str__(self) -> str:
        job = (
            f" as {self.provider_job_id} at {self.provider_account}" if self.provider_job_id else ""
        )
        return f"attempt {self.number} {self.state}{job}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the generator says."""

    account_id: str
    state: str
    cause: str = ""
    outputs: tuple[Output, ...] = ()
    """With posters."""
    attempts: tuple[Attempt, ...] = ()

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL

    def __str__(self) -> str:
        tries = ", ".join(str(attempt) for attempt in self.attempts) or "no attempt"
        return f"{self.state}{f', {self.cause}' if self.cause else ''}; {tries}"


@dataclass(frozen=True, slots=True)
class Stored:
    """An asset, and what the object store says of its object; `object_bytes` None: it is not there."""

    account_id: str
    state: str
    size_bytes: int
    sha256: str
    expired: bool
    object_bytes: int | None

    def __str__(self) -> str:
        there = "no object" if self.object_bytes is None else f"object of {self.object_bytes} bytes"
        return (
            f"{self.state}, {self.size_bytes} bytes, sha256 {self.sha256[:12] or 'none'}, {there}"
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """An asset that is kept for a video."""

    asset_id: str
    account_id: str


@dataclass(frozen=True, slots=True)
class Watermarks:
    """When each side was read, by its own clock."""

    gateway: datetime
    credits: datetime
    generator: datetime
    storage: datetime


@dataclass(frozen=True, slots=True)
class Subject:
    """One video as all sides have it; None: that side does not know it."""

    video_id: str
    marks: Watermarks
    video: Video | None = None
    hold: Hold | None = None
    outcome: Outcome | None = None
    stored: Mapping[str, Stored] = field(default_factory=dict[str, Stored])
    """Assets of its outputs and posters, by id."""
    pins: tuple[Pin, ...] = ()

    @property
    def account_id(self) -> str:
        known = self.video or self.hold or self.outcome or (self.pins[0] if self.pins else None)
        return known.account_id if known else ""

    def finding(self, kind: Kind, repair: Repair = Repair.NONE, advice: str = "") -> Finding:
        """A finding with what gateway, credits and generator say."""
        said = (
            self.gateway_says(),
            Statement("credits", self.marks.credits, str(self.hold or "no hold")),
            Statement("generator", self.marks.generator, str(self.outcome or "unknown")),
        )
        return Finding(kind, self.video_id, self.account_id, said, repair, advice)

    def gateway_says(self) -> Statement:
        """The gateway's side."""
        return Statement("gateway", self.marks.gateway, str(self.video or "no video"))


def compare(subject: Subject) -> list[Finding]:
    """Every difference between what is said of a video. While it is being admitted, nothing is to be said of it."""
    if subject.video is not None and subject.video.state == "ADMITTING":
        return []
    checks = (_accounts, _holds, _amounts, _states, _attempts, _outputs, _pins)
    return [finding for check in checks for finding in check(subject)]


def _accounts(subject: Subject) -> Iterator[Finding]:
    said = {side.account_id for side in (subject.video, subject.hold, subject.outcome) if side}
    said |= {stored.account_id for stored in subject.stored.values()}
    if len(said) > 1:
        yield subject.finding(
            Kind.ACCOUNT_DIFFERS, advice=f"stop its delivery; accounts: {', '.join(sorted(said))}"
        )


def _holds(subject: Subject) -> Iterator[Finding]:
    """Whether a hold is there and open exactly as long as its video lives."""
    video, hold, outcome = subject.video, subject.hold, subject.outcome
    ended = bool(outcome and outcome.ended)
    if video is None:
        if hold is not None and hold.state in ("HELD", "CAPTURED"):
            yield _hold_without_video(subject, hold)
        return
    if video.state in NOT_ADMITTED:
        if hold is not None and hold.state == "HELD":
            repair = Repair.RELEASE_HOLD if outcome is None else Repair.NONE
            advice = "" if outcome is None else "it was never admitted and is made all the same"
            yield subject.finding(Kind.HOLD_OPEN_AFTER_END, repair, advice)
        elif hold is not None and hold.captured > hold.refunded:
            advice = "it was never admitted, nothing may be taken for it: refund it"
            yield subject.finding(Kind.HOLD_AGAINST_POLICY, advice=advice)
        return
    if hold is None or hold.state in NEVER_HELD:
        advice = "the ledger may have been restored: its holds must be reserved anew"
        yield subject.finding(Kind.VIDEO_WITHOUT_HOLD, advice=advice)
    elif hold.state == "HELD" and (ended or video.state in TERMINAL):
        repair = Repair.SETTLE_HOLD if ended else Repair.NONE
        advice = "" if ended else "the generator does not say how it ended"
        yield subject.finding(Kind.HOLD_OPEN_AFTER_END, repair, advice)
    elif hold.state in SETTLED and video.state in LIVE and not ended:
        advice = "its render will not be paid for: settle by hand when it ends"
        yield subject.finding(Kind.HOLD_ENDED_EARLY, advice=advice)


def _hold_without_video(subject: Subject, hold: Hold) -> Finding:
    outcome, kind = subject.outcome, Kind.HOLD_WITHOUT_VIDEO
    if hold.state == "CAPTURED":
        return subject.finding(
            kind, advice="the gateway lost it: look for a restore of its database"
        )
    if outcome is None:
        return subject.finding(kind, Repair.RELEASE_HOLD)
    if outcome.ended:
        return subject.finding(kind, Repair.SETTLE_HOLD)
    return subject.finding(kind, advice="the generator is at it: it settles when that ends")


def _amounts(subject: Subject) -> Iterator[Finding]:
    """Whether the video says what its hold says, and the hold what its policy says."""
    video, hold = subject.video, subject.hold
    if hold is None or hold.state not in SETTLED:
        return
    if video is not None and video.state in TERMINAL:
        if video.settlement != "DONE":
            yield subject.finding(Kind.SETTLEMENT_NOT_SHOWN, Repair.PROJECT_SETTLEMENT)
        elif (video.captured, video.released) != (hold.captured, hold.released):
            yield subject.finding(Kind.AMOUNT_DIFFERS, advice="the ledger is right; tell the owner")
    if hold.expected is None:
        return
    # What an operator gave up or gave back is theirs to decide; that too much was taken is not.
    too_much = hold.captured - hold.refunded > hold.expected
    too_little = hold.captured < hold.expected and not hold.by_operator
    if too_much or too_little:
        advice = f"the policy takes {hold.expected} credits"
        advice += ": refund the difference" if too_much else ""
        yield subject.finding(Kind.HOLD_AGAINST_POLICY, advice=advice)


def _states(subject: Subject) -> Iterator[Finding]:
    """Whether gateway and generator tell the same story."""
    video, outcome = subject.video, subject.outcome
    if video is None:
        # A tombstone, or a failure, without a video is what a repair or an abandoned admission leaves.
        if outcome is not None and outcome.state not in ("CANCELLED", "FAILED"):
            advice = "look for a restore of the gateway's database"
            yield subject.finding(Kind.VIDEO_UNKNOWN_TO_GATEWAY, advice=advice)
    elif video.state in NOT_ADMITTED:
        if outcome is not None and outcome.state not in ("CANCELLED", "FAILED"):
            advice = "it was never admitted and is made all the same"
            yield subject.finding(Kind.END_DIFFERS, advice=advice)
    elif outcome is None:
        waiting = video.state == "PENDING" and not video.accepted
        advice = (
            ""
            if waiting
            else "it knew it once: look for a restore; sent again, it may be paid twice"
        )
        repair = Repair.RING_JOB if waiting else Repair.NONE
        yield subject.finding(Kind.VIDEO_UNKNOWN_TO_GENERATOR, repair, advice)
    elif video.state in LIVE:
        if outcome.ended or (video.state, outcome.state) == ("PENDING", "PROCESSING"):
            yield subject.finding(Kind.VIDEO_BEHIND, Repair.PROJECT_VIDEO)
    elif _end(video) != _told_end(outcome):
        yield subject.finding(Kind.END_DIFFERS, advice="ends never change: see which one was told")


def _end(video: Video) -> tuple[str, str, frozenset[str]]:
    return video.state, video.cause, frozenset(video.outputs)


def _told_end(outcome: Outcome) -> tuple[str, str, frozenset[str]]:
    outputs = frozenset(output.asset_id for output in outcome.outputs if output.sha256)
    return outcome.state, outcome.cause, outputs


def _attempts(subject: Subject) -> Iterator[Finding]:
    """Whether a live video has exactly one live attempt, and one that ended none."""
    outcome = subject.outcome
    if outcome is None:
        return
    live = sum(attempt.live for attempt in outcome.attempts)
    if live != (0 if outcome.ended else 1):
        yield subject.finding(
            Kind.ATTEMPT_STRANDED, advice="nobody owns it: a fault of the generator"
        )


def _outputs(subject: Subject) -> Iterator[Finding]:
    """Whether every output that was told is there, as it was told."""
    video, outcome = subject.video, subject.outcome
    if outcome is None or outcome.state != "COMPLETED" or (video and video.deleted):
        return
    for output in outcome.outputs:
        stored = subject.stored.get(output.asset_id)
        if stored is not None and stored.expired:
            continue
        kind, advice = _output_kind(output, stored)
        if kind is None:
            continue
        told = f"{output.asset_id}: {output.size_bytes} bytes, sha256 {output.sha256[:12]}"
        said = (
            subject.gateway_says(),
            Statement("generator", subject.marks.generator, told),
            Statement("storage", subject.marks.storage, str(stored or "no asset")),
        )
        yield Finding(
            kind, subject.video_id, subject.account_id, said, advice=advice, subject=output.asset_id
        )


def _output_kind(output: Output, stored: Stored | None) -> tuple[Kind | None, str]:
    if stored is None or stored.state != "READY":
        return Kind.OUTPUT_MISSING, "restore storage's database, or refund"
    if stored.object_bytes is None:
        return Kind.OUTPUT_OBJECT_MISSING, "restore the object from the bucket's backup, or refund"
    told_otherwise = output.sha256 and (output.size_bytes, output.sha256) != (
        stored.size_bytes,
        stored.sha256,
    )
    if told_otherwise or stored.object_bytes != stored.size_bytes:
        return Kind.OUTPUT_DIFFERS, "restore the object from the bucket's backup, or refund"
    return None, ""


def _pins(subject: Subject) -> Iterator[Finding]:
    """Whether nothing is kept for a video that has ended, as far as anybody says."""
    video, outcome = subject.video, subject.outcome
    if not subject.pins or (outcome is not None and not outcome.ended):
        return
    if video is not None and video.state in LIVE:
        return
    pins = f"pinned: {', '.join(sorted(pin.asset_id for pin in subject.pins))}"
    said = (subject.gateway_says(), Statement("storage", subject.marks.storage, pins))
    yield Finding(Kind.PIN_AFTER_END, subject.video_id, subject.account_id, said, Repair.UNPIN)
