"""Videos per minute within a provider's limits, against the ceiling of those limits.

The ceiling, in videos a minute of the provider's clock:

    min(R / (submits + downloads), 60 * S / T)      R requests a minute, S jobs at once, T seconds a render

Submits, polls and downloads share the requests. A video costs one submit and one download; a poll of the list costs one
for a hundred videos, and is counted as nothing: what we spend on polls, at the start and at the end is our loss.
The pace is N divided by the time from the first job on the bus to the last event.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from bench import generator_loops, generator_stack


@dataclass(frozen=True, slots=True)
class Limits:
    """A provider account's limits and the work."""

    name: str
    requests_per_minute: int
    at_once: int
    render_seconds: float
    videos: int
    poll_interval_seconds: float
    time_factor: float
    has_list: bool = True

    @property
    def ceiling(self) -> float:
        """Videos a minute."""
        return min(self.requests_per_minute / 2, 60 * self.at_once / self.render_seconds)

    @property
    def account(self) -> dict[str, object]:
        """As the catalogue has it."""
        return {
            "requests_per_minute": self.requests_per_minute,
            "max_jobs_in_flight": self.at_once,
            "poll_interval_seconds": self.poll_interval_seconds,
            # Of the living servers, the one that has no list; such a one cannot be searched.
            **({} if self.has_list else {"variant": "litellm", "evidence": "blind"}),
        }

    @property
    def simulator(self) -> dict[str, object]:
        """As the provider has them."""
        return {
            "requests_per_minute": self.requests_per_minute,
            "max_concurrent_jobs": self.at_once,
            "render_seconds_base": self.render_seconds,
            "render_seconds_per_second": 0,
            "quirks": "" if self.has_list else "no_list",
        }


@dataclass(frozen=True, slots=True)
class Pace:
    """What one side made of the limits."""

    videos_per_minute: float
    finished: int
    billed_but_lost: int
    too_many_requests: int
    requests: dict[str, int]


async def measure(limits: Limits, loops: tuple[str, ...]) -> dict[str, Pace]:
    """Ours, and the loops beside it: at one simulator at the same time, each with a key and so a quota of its own."""
    # The pause of our loops is real time, 0.25 s: scaled like the provider's, it weighs as much as in earnest.
    generator = {"loop_seconds": 0.25 / limits.time_factor}
    async with generator_stack.running(
        limits.time_factor, account=limits.account, simulator=limits.simulator, generator=generator
    ) as bench:
        paces = await asyncio.gather(
            _ours(bench, limits), *(_loop(bench, limits, name) for name in loops)
        )
    return dict(zip(("ours", *loops), paces, strict=True))


async def _ours(bench: generator_stack.Bench, limits: Limits) -> Pace:
    started = time.time()
    await bench.publish(limits.videos)
    least_seconds = 60 * limits.videos / limits.ceiling / limits.time_factor
    await bench.all_ended(limits.videos, within_seconds=60 + 8 * least_seconds)
    seconds = max(ended.at for ended in bench.ended.values()) - started
    finished = sum(ended.kind == "completed" for ended in bench.ended.values())
    return await _pace(bench, limits, "ours", finished, seconds)


async def _loop(bench: generator_stack.Bench, limits: Limits, name: str) -> Pace:
    loop = generator_loops.Loop(
        bench.stack.addresses.provider_base_url,
        generator_stack.KEYS[name],
        limits.time_factor,
        polite=name == "polite",
    )
    tally = await loop.make(limits.videos, limits.at_once)
    return await _pace(bench, limits, name, tally.finished, tally.seconds)


async def _pace(
    bench: generator_stack.Bench, limits: Limits, name: str, finished: int, seconds: float
) -> Pace:
    billed = len(await bench.logged("accepted", name))
    return Pace(
        videos_per_minute=finished / (seconds * limits.time_factor) * 60,
        finished=finished,
        billed_but_lost=billed - finished,
        too_many_requests=await bench.too_many(name),
        requests=await bench.requests(name),
    )
