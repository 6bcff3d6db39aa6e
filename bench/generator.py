"""`make bench-generator`: what the generator gets out of a provider's limits, and what that costs.

python -m bench.generator [--small] [--only pace,flight,download,telling]
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench import frame, generator_fetch, generator_flight, generator_pace

PACE_GOAL = 0.85
MEMORY_GOAL_MB = 250.0
CPU_GOAL = 0.20
DOWNLOAD_GOAL_MB = 32.0
TOLD_INTERVAL_SECONDS = 2.0
TELLING_GOAL_SECONDS = 0.1
MB = 1_000_000
SIDES = {"ours": "Framewire", "verbatim": "the seeds' loop", "polite": "the loop, waiting on 429"}
NOTES = """
Real processes on one machine: generator, storage, Postgres, NATS, S3, and the simulator as the provider. R: requests a
minute, S: jobs at once, T: seconds a render, all of the provider's clock, which runs {factor:g} times as fast; our
overhead does not, and so weighs {factor:g} times as much as in earnest. A video costs a submit and a download, and the
polls come out of the same R: the ceiling counts them as nothing, as it does the first render's time and the last's.
Poll interval of the account: 15 s where the quota binds, 5 s where the slots do. The loops run at the same simulator
and time as we do, each with a key of its own, with S workers. The renders in flight are written into the simulator's
log and the generator's database, not sent; at rest none begins or ends, and the progress of all is written at every
pass. Parts of "finished to event" have percentiles of their own, which do not add up.
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    videos: int
    time_factor: float
    render_seconds: float
    load: generator_flight.Load
    film_bytes: int
    told_videos: int


FULL = Sizes(
    videos=200,
    time_factor=8.0,
    render_seconds=60.0,
    load=generator_flight.Load(
        renders=10_000,
        ending=240,
        poll_interval_seconds=15.0,
        requests_per_minute=1800,
        rest_seconds=60.0,
        ending_seconds=80.0,
    ),
    film_bytes=200 * MB,
    told_videos=100,
)
SMALL = Sizes(
    videos=4,
    time_factor=20.0,
    render_seconds=4.0,
    load=generator_flight.Load(
        renders=200,
        ending=4,
        poll_interval_seconds=1.0,
        requests_per_minute=1800,
        rest_seconds=3.0,
        ending_seconds=2.0,
    ),
    film_bytes=20 * MB,
    told_videos=4,
)
"""To see that all of it runs; its figures mean nothing."""


def quota_bound(sizes: Sizes) -> generator_pace.Limits:
    """60 requests a minute, and more jobs at once than these can keep busy."""
    return generator_pace.Limits(
        name="quota-bound, 60 requests/min, 100 at once",
        requests_per_minute=60,
        at_once=100,
        render_seconds=sizes.render_seconds,
        videos=sizes.videos,
        poll_interval_seconds=15,
        time_factor=sizes.time_factor,
    )


def slot_bound(sizes: Sizes) -> generator_pace.Limits:
    """The same quota, of which ten jobs at once leave over enough to ask more often."""
    return replace(
        quota_bound(sizes),
        name="slot-bound, 60 requests/min, 10 at once",
        at_once=10,
        poll_interval_seconds=5,
    )


async def pace(sizes: Sizes) -> list[frame.Measured]:
    """Both limits, with the loops beside; and a dialect without a list under the first."""
    results: list[frame.Measured] = []
    for limits in (quota_bound(sizes), slot_bound(sizes)):
        sides = await generator_pace.measure(limits, ("verbatim", "polite"))
        results += _pace_results(limits, sides, goal=True)
    bound = quota_bound(sizes)
    listless = replace(bound, name=f"{bound.name}, no list", has_list=False)
    sides = await generator_pace.measure(listless, ())
    return results + _pace_results(listless, sides, goal=False)


def _pace_results(
    limits: generator_pace.Limits, sides: Mapping[str, generator_pace.Pace], *, goal: bool
) -> list[frame.Measured]:
    results = []
    ceiling = f"min(R/2, 60 S/T), T = {limits.render_seconds:g} s"
    for side, made in sides.items():
        name, ours = f"{limits.name}: {SIDES[side]}", goal and side == "ours"
        asked = " + ".join(f"{count} {kind}" for kind, count in sorted(made.requests.items()))
        none, one = (0, 1) if ours else (None, None)
        unmade = limits.videos - made.finished
        results += [
            frame.against(
                f"{name}: videos finished a minute ({asked})",
                [made.videos_per_minute],
                "1/min",
                ceiling,
                [limits.ceiling],
                at_least=PACE_GOAL if ours else None,
            ),
            frame.alone(f"{name}: not finished of {limits.videos}", unmade, "videos", at_most=none),
            frame.alone(f"{name}: lost, yet billed", made.billed_but_lost, "videos", at_most=none),
            frame.alone(f"{name}: answers 429", made.too_many_requests, "requests", at_most=one),
        ]
    return results


async def flight(sizes: Sizes) -> list[frame.Measured]:
    """Renders in flight in one process."""
    load = sizes.load
    seen = await generator_flight.measure(load)
    quota = f"quota {load.requests_per_minute}/min"
    name = f"{load.renders} in flight, interval {load.poll_interval_seconds:g} s, {quota}"
    asked = f"{seen.requests_at_rest.get('list', 0)} pages = {seen.passes_at_rest:.1f} passes"
    interval = [load.poll_interval_seconds]
    p50, p99 = (percentile(seen.seen_after_seconds, share) for share in (0.5, 0.99))
    return [
        frame.alone(f"{name}: resident memory before", seen.resident_before_mb, "MB"),
        frame.alone(f"{name}: resident, peak", seen.resident_mb, "MB", at_most=MEMORY_GOAL_MB),
        frame.alone(f"{name}: CPU at rest ({asked})", seen.cpu_at_rest, "cores", at_most=CPU_GOAL),
        frame.alone(f"{name}: CPU at rest, Postgres", seen.postgres_cpu_at_rest, "cores"),
        frame.against(f"{name}: done, noticed after, p50", [p50], "s", "interval", interval),
        frame.against(
            f"{name}: done, noticed after, p99", [p99], "s", "interval", interval, at_most=1
        ),
        frame.alone(f"{name}: not delivered of {load.ending}", seen.lost, "videos", at_most=0),
    ]


async def download(sizes: Sizes) -> list[frame.Measured]:
    """One large film."""
    made = await generator_fetch.download(sizes.film_bytes)
    name = f"download of {made.film_mb:g} MB"
    rate = made.film_mb / made.seconds
    return [
        frame.alone(f"{name}: resident memory before", made.resident_before_mb, "MB"),
        frame.alone(f"{name}: added at the peak", made.added_mb, "MB", at_most=DOWNLOAD_GOAL_MB),
        frame.alone(f"{name}: from the provider into storage", rate, "MB/s"),
    ]


async def telling(sizes: Sizes) -> list[frame.Measured]:
    """Finished at the provider, until the event is at a subscriber."""
    told = await generator_fetch.telling(sizes.told_videos, TOLD_INTERVAL_SECONDS)
    name = f"finished to event, interval {TOLD_INTERVAL_SECONDS:g} s"
    results = [
        frame.alone(f"{name}: {part}, {label}", percentile(values, share), "s")
        for part, values in told.parts().items()
        for label, share in (("p50", 0.5), ("p99", 0.99))
    ]
    most = TOLD_INTERVAL_SECONDS + TELLING_GOAL_SECONDS
    rest = [percentile(told.rest, 0.99)]
    metric = f"{name}: whole - download - wait for a request - Put, p99"
    return [*results, frame.against(metric, rest, "s", "interval + 0.1 s", [most], at_most=1)]


def percentile(ordered: Sequence[float], share: float) -> float:
    """What this share of the values is at most."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


PARTS: Mapping[str, Callable[[Sizes], Awaitable[list[frame.Measured]]]] = {
    "pace": pace,
    "flight": flight,
    "download": download,
    "telling": telling,
}


async def measure(sizes: Sizes, parts: Sequence[str]) -> list[frame.Measured]:
    """These parts, one after the other."""
    results: list[frame.Measured] = []
    for part in parts:
        results += await PARTS[part](sizes)
    return results


def main() -> None:
    """Measures; all of it in full goes into the results and docs/benchmarks.md, anything less is only printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="only to see that it runs")
    parser.add_argument("--only", default=",".join(PARTS), help="some of the parts")
    chosen = parser.parse_args()
    parts = chosen.only.split(",")
    measured = asyncio.run(measure(SMALL if chosen.small else FULL, parts))
    if not chosen.small and parts == list(PARTS):
        notes = NOTES.format(factor=FULL.time_factor).strip()
        frame.publish("generator", "make bench-generator", measured, notes)
    else:
        for one in measured:
            print(one)


if __name__ == "__main__":
    main()
