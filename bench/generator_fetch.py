"""How a finished render gets out: a large download's memory, and the time from the provider's end to the event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench import generator_stack


@dataclass(frozen=True, slots=True)
class Download:
    """One large film through the generator into storage."""

    film_mb: float
    resident_before_mb: float
    resident_peak_mb: float
    seconds: float
    """From the first byte asked for to storage's answer."""

    @property
    def added_mb(self) -> float:
        """To what was resident before."""
        return self.resident_peak_mb - self.resident_before_mb


async def download(film_bytes: int) -> Download:
    """Fetches a film of that size, after a small one that made the process warm."""
    simulator = {"render_seconds_base": 2, "render_seconds_per_second": 0, "film_bytes": film_bytes}
    account = {"poll_interval_seconds": 0.5}
    async with generator_stack.running(account=account, simulator=simulator) as bench:
        await bench.publish(1)
        await bench.all_ended(1, within_seconds=120)
        memory = generator_stack.Memory(bench.process("generator"))
        before_mb = memory.begin()
        (made,) = await bench.publish(1)
        await bench.all_ended(2, within_seconds=120)
        peak_mb = memory.peak()
        ended = bench.ended[made.video_id]
        assert ended.kind == "completed", ended
        line = next(one for one in bench.told("video_completed") if made.video_id in one.values())
        seconds = line["download_seconds"] + line["store_seconds"]
    return Download(film_bytes / 1e6, before_mb, peak_mb, seconds)


@dataclass(frozen=True, slots=True)
class Telling:
    """From the provider's end to the event at a subscriber, of every video, ascending; and its parts. Seconds."""

    whole: tuple[float, ...]
    token_wait: tuple[float, ...]
    download: tuple[float, ...]
    store: tuple[float, ...]
    """From the last byte to storage's answer: inspection, poster, mark, Put."""
    rest: tuple[float, ...]
    """What is left of the whole: to notice it, to claim it, to commit, to publish, to arrive."""

    def parts(self) -> dict[str, tuple[float, ...]]:
        """By what they are called."""
        return {
            "whole": self.whole,
            "waiting for a request of the quota": self.token_wait,
            "download": self.download,
            "inspection and Put after the last byte": self.store,
            "all but these": self.rest,
        }


async def telling(videos: int, poll_interval_seconds: float) -> Telling:
    """Videos whose renders end one after the other, at a provider that holds nothing back."""
    # A jitter of render times spreads the ends over the poll interval.
    simulator = {
        "render_seconds_base": 8,
        "render_seconds_per_second": 0,
        "render_jitter_sigma": 0.5,
    }
    account = {
        "poll_interval_seconds": poll_interval_seconds,
        "requests_per_minute": 3000,
        "max_jobs_in_flight": 10,
    }
    async with generator_stack.running(account=account, simulator=simulator) as bench:
        made = await bench.publish(videos)
        await bench.all_ended(videos, within_seconds=60 + 8 * videos)
        ends = {
            entry["prompt"]: entry["due_at"] for entry in await bench.logged("accepted", "ours")
        }
        lines = {line["video_id"]: line for line in bench.told("video_completed")}
        parts = [
            _parts(bench.ended[one.video_id], ends[one.spec.prompt], lines[one.video_id])
            for one in made
        ]
    columns = [tuple(sorted(column)) for column in zip(*parts, strict=True)]
    return Telling(*columns)


def _parts(
    ended: generator_stack.Ended, end: float, line: dict[str, Any]
) -> tuple[float, float, float, float, float]:
    assert ended.kind == "completed", ended
    whole = ended.at - end
    names = ("token_wait_seconds", "download_seconds", "store_seconds")
    token_wait, download_, store = (line[name] for name in names)
    return whole, token_wait, download_, store, whole - token_wait - download_ - store
