"""Outputs of a finished render: what becomes of each, and what their video ends with. Pure.

Each output is decided by itself: one that is lost takes no other with it. A video is COMPLETED with those that are
there (credits takes by what was delivered) and FAILED when there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

GONE_COUNT = 5
"""Definite answers in a row, over the account's lost_after_seconds, that make an output LOST."""
MOST_BAD = 3
"""Downloads that are no video, at most; the same bytes twice are enough."""


class State(StrEnum):
    """State of an output."""

    WAITING = "WAITING"
    SPOOLED = "SPOOLED"
    STORED = "STORED"
    LOST = "LOST"
    UNUSABLE = "UNUSABLE"
    UNSTORED = "UNSTORED"


OPEN = frozenset({State.WAITING, State.SPOOLED})


@dataclass(frozen=True, slots=True)
class Output:
    """One video of a render; the migration says what each column means."""

    variant: int
    output_id: str
    state: State = State.WAITING
    gone_count: int = 0
    gone_seconds: float = 0.0
    """Since the first of the definite answers in a row."""
    bad_count: int = 0
    bad_sha256: str | None = None
    storage_refused: bool = False
    spooled_seconds: float = 0.0
    """Since it was spooled."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a video ends for what became of its outputs; no cause: it is COMPLETED with `variants`."""

    variants: tuple[int, ...]
    cause: str = ""
    message: str = ""


ALL_REMOVED = Ended((), "INTERNAL", "it was stored, and removed before the video had ended")


def planned(known: Sequence[Output], listed: Sequence[str], asked: int) -> list[Output]:
    """The outputs with what is to be asked for each.

    Ids of links that expire are other ones at each listing; a list that got shorter must not move one video to
    another's place. What a provider did not make in the first place is LOST.
    """
    if not known:
        return [
            Output(variant, listed[variant])
            if variant < len(listed)
            else Output(variant, "", State.LOST, message="it did not come out")
            for variant in range(asked)
        ]
    came_out = [output for output in known if output.output_id]
    if len(listed) < len(came_out):
        return list(known)
    return [
        replace(output, output_id=listed[output.variant]) if output.output_id else output
        for output in known
    ]


def after_gone(output: Output, lost_after_seconds: float, *, expired: bool) -> Output:
    """The provider says that it is not there. Just after completion that is usual; for long, or after expiry, final.

    `output` counts this answer already.
    """
    for_long = output.gone_count >= GONE_COUNT and output.gone_seconds >= lost_after_seconds
    if output.state is State.WAITING and (for_long or expired):
        return given_up(output)
    return output


def after_bad(output: Output) -> Output:
    """What came is no video. `output` counts it already; its hash is replaced by the caller after this."""
    return output if output.bad_count < MOST_BAD else replace(output, state=State.UNUSABLE)


def after_trouble(output: Output, *, expired: bool, spool_keep_seconds: float) -> Output:
    """It could not be fetched or stored this time. Ends what the provider keeps no longer, or what a lost disk held."""
    if output.state is State.SPOOLED:
        lost = output.spooled_seconds > spool_keep_seconds
        return replace(output, state=State.UNSTORED) if lost else output
    return given_up(output) if expired else output


def given_up(output: Output) -> Output:
    """The end of an output that was not stored, by whose fault it is."""
    if output.bad_count:
        return replace(output, state=State.UNUSABLE)
    return replace(output, state=State.UNSTORED if output.storage_refused else State.LOST)


def ended(found: Sequence[Output]) -> Ended | None:
    """How the video ends; None while anything is open."""
    if not found or any(output.state in OPEN for output in found):
        return None
    stored = tuple(output.variant for output in found if output.state is State.STORED)
    if stored:
        return Ended(stored)
    states = {output.state for output in found}
    if State.UNSTORED in states:
        return Ended((), "INTERNAL", "it was made, and could not be stored before it expired")
    if State.UNUSABLE in states:
        why = next((o.message for o in found if o.state is State.UNUSABLE and o.message), "")
        return Ended((), "OUTPUT_UNUSABLE", f"what came is no video: {why}".rstrip(": "))
    return Ended((), "PROVIDER_LOST", "the provider lost the finished video")
