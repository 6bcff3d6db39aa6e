"""What becomes of outputs, and what their video ends with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.generator import films, outputs, spool
from services.generator.outputs import Output, State

LATE = {"gone_count": 5, "gone_seconds": 60.0}


def states(*found: State) -> list[Output]:
    return [Output(number, "id", state, bad_count=1) for number, state in enumerate(found)]


@pytest.mark.parametrize(
    ("found", "variants", "cause"),
    [
        ((State.STORED,), (0,), ""),
        ((State.STORED, State.LOST, State.STORED), (0, 2), ""),
        ((State.UNUSABLE, State.STORED), (1,), ""),
        ((State.LOST, State.LOST), (), "PROVIDER_LOST"),
        ((State.LOST, State.UNUSABLE), (), "OUTPUT_UNUSABLE"),
        ((State.UNUSABLE, State.UNSTORED), (), "INTERNAL"),
    ],
)
def test_a_video_ends_with_what_there_is(
    found: tuple[State, ...], variants: tuple[int, ...], cause: str
) -> None:
    ended = outputs.ended(states(*found))
    assert ended is not None
    assert (ended.variants, ended.cause) == (variants, cause)
    assert bool(ended.message) == bool(cause)


@pytest.mark.parametrize("open_", [State.WAITING, State.SPOOLED])
def test_it_does_not_end_while_one_is_open(open_: State) -> None:
    assert outputs.ended(states(State.STORED, open_)) is None
    assert outputs.ended([]) is None


def test_what_did_not_come_out_is_lost_from_the_start() -> None:
    planned = outputs.planned([], ("a", "b"), 3)
    assert [(o.output_id, o.state) for o in planned] == [
        ("a", State.WAITING),
        ("b", State.WAITING),
        ("", State.LOST),
    ]
    assert [o.output_id for o in outputs.planned([], ("a", "b"), 1)] == ["a"]


def test_links_are_refreshed_and_none_takes_anothers_place() -> None:
    known = outputs.planned([], ("a1", "b1"), 3)
    assert [o.output_id for o in outputs.planned(known, ("a2", "b2"), 3)] == ["a2", "b2", ""]
    assert [o.output_id for o in outputs.planned(known, ("b2",), 3)] == ["a1", "b1", ""]


@pytest.mark.parametrize(
    ("output", "expired", "state"),
    [
        (Output(0, "id", gone_count=5, gone_seconds=9.9), False, State.WAITING),
        (Output(0, "id", gone_count=4, gone_seconds=60), False, State.WAITING),
        (Output(0, "id", **LATE), False, State.LOST),
        (Output(0, "id", gone_count=1), True, State.LOST),
        (Output(0, "id", **LATE, storage_refused=True), False, State.UNSTORED),
        (Output(0, "id", **LATE, bad_count=1), False, State.UNUSABLE),
        (Output(0, "id", State.SPOOLED, **LATE), True, State.SPOOLED),
    ],
)
def test_gone_for_long_is_lost_by_whose_fault_it_is(
    output: Output, expired: bool, state: State
) -> None:
    assert outputs.after_gone(output, 10, expired=expired).state is state


def test_trouble_ends_at_expiry_and_what_is_spooled_later() -> None:
    waiting = Output(0, "id")
    spooled = Output(0, "id", State.SPOOLED, spooled_seconds=5)

    def after(output: Output, *, expired: bool) -> State:
        return outputs.after_trouble(output, expired=expired, spool_keep_seconds=10).state

    assert after(waiting, expired=False) is State.WAITING
    assert after(waiting, expired=True) is State.LOST
    assert after(replace(waiting, storage_refused=True), expired=True) is State.UNSTORED
    assert after(spooled, expired=True) is State.SPOOLED
    assert after(replace(spooled, spooled_seconds=11), expired=False) is State.UNSTORED


def test_other_bad_bytes_each_time_end_too() -> None:
    assert outputs.after_bad(Output(0, "id", bad_count=2)).state is State.WAITING
    assert outputs.after_bad(Output(0, "id", bad_count=3)).state is State.UNUSABLE


# Our own disk

ONE, OTHER = "a" * 26, "b" * 26


async def parts(*given: bytes | Exception) -> AsyncIterator[bytes]:
    for part in given:
        if isinstance(part, Exception):
            raise part
        yield part


async def test_films_are_whole_or_not_there(tmp_path: Path) -> None:
    kept = films.Films(tmp_path / "films", 10)
    assert kept.kept() == []
    await kept.keep(ONE, 0, parts(b"123", b"45"))
    with pytest.raises(ConnectionError):
        await kept.keep(ONE, 1, parts(b"1", ConnectionError()))
    with pytest.raises(films.SpoolFull):
        await kept.keep(OTHER, 0, parts(b"123456"))
    assert kept.kept() == [(ONE, 0)]
    assert len(list((tmp_path / "films").iterdir())) == 1
    assert b"".join([chunk async for chunk in kept.read(ONE, 0)]) == b"12345"
    assert (kept.has(ONE, 0), kept.has(ONE, 1), kept.size(ONE, 0)) == (True, False, 5)
    kept.remove(ONE, 0)
    kept.remove(ONE, 0)
    await kept.keep(OTHER, 0, parts(b"1234567890"))


async def test_a_disk_that_takes_nothing_is_full(tmp_path: Path) -> None:
    (tmp_path / "films").write_text("a file where the directory should be")
    with pytest.raises(films.SpoolFull):
        await films.Films(tmp_path / "films", 10).keep(ONE, 0, parts(b"1"))


def test_a_shared_spool_may_be_emptied_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = spool.Spool(tmp_path)
    for attempt_id in (ONE, OTHER):
        assert kept.keep(attempt_id, "main", f"job_{attempt_id}", 1)
    read = Path.read_text

    def emptied(path: Path) -> str:
        if ONE in path.name:
            path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_text", emptied)
    assert [job for _, _, _, job, _ in kept.kept()] == [f"job_{OTHER}"]
