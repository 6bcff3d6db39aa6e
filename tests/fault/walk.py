"""The crash walk: the generator killed, and stopped past its lease, at every point, by each dialect and kind of list.

All scenarios of a dialect share one running system, and the videos of a scenario are under way together: while one is
struck, those before it are being recovered, so that a crash also meets recoveries.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from services.generator import attempts
from tests import invariants
from tests import system as systems
from tests.fault import kills, orders
from tests.waiting import eventually

LAG_SECONDS = 3.5
SETTLE_SECONDS = 1.0
RESOLVE_SECONDS = 60.0
"""Of our time. A list lags for longer than the create's timeout and the settle time together: the first pass that may
count sees nothing, and only the second one, a settle time later, shows the job."""
AWAY_SECONDS = orders.LONGEST_LEASE_SECONDS + 0.5
SENDER_AWAY_SECONDS = 6.5
"""Of who may still send: longer than the other one needs to prove that nothing was sent."""
LISTS = {
    "perfect": "",
    "lagging": f"[fault:list_lag={LAG_SECONDS * systems.TIME_FACTOR:g}]",
    "short pages": "",
    "foreign and twin jobs": "[fault:foreign_jobs=3][fault:twin_job]",
}
ACTIONS = ("kill", "stop")
# What must go wrong first for a point to be reached.
BEFORE = {
    "generator.resolve.after_adopt": "[fault:lost_answer]",
    "generator.resolve.before_put_back": "[fault:error_before]",
}
ANSWERED = "generator.submit.after_post"
"""The first to be struck: then no other video is under way, and what becomes of this one is certain."""
ONLY = os.environ.get("FRAMEWIRE_POINT", "")
"""Strikes only at points with this in their names, to look into one."""
STRIKE_SECONDS = 90.0


SEARCHABLE, KEYED, BLIND = (
    attempts.Evidence.SEARCHABLE,
    attempts.Evidence.KEYED,
    attempts.Evidence.BLIND,
)
AMBIGUOUS = ("generator.submit.after_commit", ANSWERED)
"""Who is killed there may have sent it, and cannot say any more: at a blind server nobody can."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """All points, one way to strike them."""

    dialect: str
    listing: str
    action: str
    evidence: attempts.Evidence = SEARCHABLE

    @property
    def unadoptable(self) -> bool:
        """Nothing in the list tells a lost job from its twin: it is never adopted, and never sent again."""
        twins = self.listing == "foreign and twin jobs"
        return self.dialect == "openai_videos" and twins and self.evidence is SEARCHABLE

    def points(self) -> list[str]:
        """The crash points that are reached."""
        every = [*kills.MATRIX["generator"], *BEFORE]
        assert len(every) >= 19, "fewer points than a life has"
        if self.unadoptable or self.evidence is not SEARCHABLE:
            every.remove("generator.resolve.after_adopt")
        if self.evidence is BLIND:  # it proves nothing, and puts nothing back
            every.remove("generator.resolve.before_put_back")
        return [point for point in every if ONLY in point]


def scenarios(
    dialect: str, evidence: attempts.Evidence = SEARCHABLE, listings: Iterable[str] = LISTS
) -> list[Scenario]:
    """Those of one dialect, at a server that can tell so much."""
    return [
        Scenario(dialect, listing, action, evidence) for listing in listings for action in ACTIONS
    ]


@asynccontextmanager
async def fragile(folder: Path, *, keyed: bool = False) -> AsyncIterator[systems.System]:
    """The system that the scenarios of a dialect share. `keyed`: its provider knows idempotency keys."""
    factor = systems.TIME_FACTOR
    changed = orders.overrides(
        folder,
        {"main": {"evidence": "keyed", "key_ttl_seconds": 86_400 * factor}} if keyed else None,
        settle_seconds=SETTLE_SECONDS * factor,
        resolve_seconds=RESOLVE_SECONDS * factor,
    )
    changed["simulator"] = {
        **changed["simulator"], "SIMULATOR_IDEMPOTENCY_KEYS": str(keyed).lower()
    }  # fmt: skip
    async with systems.running(folder / "system", changed) as running:
        yield running


async def walk(system: systems.System, scenario: Scenario, folder: Path) -> None:
    """Strikes at each point, in an order by chance, then loses an answer; checks each video."""
    dice = orders.dice(f"walk {scenario.dialect}, {scenario.listing}, {scenario.action}")
    points = scenario.points()
    dice.shuffle(points)
    points.sort(key=lambda point: point != ANSWERED)
    async with await system.account(10_000) as client:
        desk = orders.Desk(system, dice, client)
        await desk.sentinels()
        if scenario.listing == "short pages":
            await system.simulated("/_sim/faults", {"name": "list_short", "value": 2, "times": 0})
        struck = {point: await _strike(system, desk, scenario, point) for point in points}
        lost = await desk.ask(scenario.dialect, f"[fault:lost_answer]{LISTS[scenario.listing]}")
        unresolved = {video.video_id for video in await desk.check(desk.orders, folder)}
        assert system.disarm() == ""
        await system.quiet()
        await system.simulated("/_sim/faults", method="DELETE")
    if scenario.evidence is BLIND:
        ends = {order.video_id for point, order in struck.items() if _ambiguous(scenario, point)}
        assert unresolved == {lost.video_id, *ends}, "what nobody can tell fails, and nothing else"
    elif not scenario.unadoptable:
        assert unresolved == set()
    else:
        assert lost.video_id in unresolved, "a lost answer among twins must not be guessed at"
        if scenario.action == "stop":
            first = struck[points[0]]
            assert first.video_id not in unresolved, "who wakes up still says what it paid for"


def _ambiguous(scenario: Scenario, point: str) -> bool:
    """Who is only stopped wakes up, and says what it did."""
    return scenario.action == "kill" and point in AMBIGUOUS


async def _strike(
    system: systems.System, desk: orders.Desk, scenario: Scenario, point: str
) -> orders.Order:
    before = _struck(system)
    system.arm(point, scenario.action)
    order = await desk.ask(scenario.dialect, BEFORE.get(point, "") + LISTS[scenario.listing])
    if scenario.action == "kill":
        code = await system.supervisor.wait_exit("generator", STRIKE_SECONDS)
        assert code == -signal.SIGKILL, f"{point}: {code}"
        await system.supervisor.start("generator")
    else:
        names = [name for name in system.supervisor.names if name.startswith("generator")]

        async def stopped() -> list[str]:
            return [name for name in names if system.is_stopped(name)]

        what = f"a process stopped at {point}"
        asleep = await eventually(stopped, within_seconds=STRIKE_SECONDS, what=what)
        # The other replica takes over what it finds; then the sleeper wakes up and goes on where it was.
        sending = point.startswith("generator.submit.")
        await orders.database_clock(system, SENDER_AWAY_SECONDS if sending else AWAY_SECONDS)
        for name in asleep:
            system.supervisor.resume(name)
    assert f"{point}={scenario.action}" in _struck(system)[len(before) :]
    if scenario.evidence is BLIND:
        # Else the next strike would hit this one while it is being sent again, and nobody could tell that, either.
        await _at_rest(system, order, ambiguous=_ambiguous(scenario, point))
    return order


async def _at_rest(system: systems.System, order: orders.Order, *, ambiguous: bool) -> None:
    states = ("UNKNOWN", "UNRESOLVED") if ambiguous else ("COMPLETED",)
    async with system.database("generator") as database:

        async def rests() -> bool:
            state = await database.fetchval(
                "SELECT state FROM attempts WHERE video_id = $1 ORDER BY created_at DESC LIMIT 1",
                order.video_id,
            )
            return state in states

        await eventually(rests, within_seconds=STRIKE_SECONDS, what=f"{order.video_id} at rest")


def _struck(system: systems.System) -> list[str]:
    path = system.stack.data_dir / "failpoints.struck"
    return path.read_text().splitlines() if path.exists() else []


@asynccontextmanager
async def replicas(system: systems.System, scenario: Scenario) -> AsyncIterator[None]:
    """Who is killed comes back alone; who is stopped has another one beside it."""
    if scenario.action == "kill":
        yield
        return
    name = await orders.second_generator(system)
    try:
        yield
    finally:
        await system.supervisor.stop(name)


async def run(system: systems.System, scenario: Scenario, folder: Path) -> None:
    """One scenario, whole."""
    async with asyncio.timeout(1500), replicas(system, scenario):
        await walk(system, scenario, folder)
        # Only where a lost job cannot be told from its twin, or not at all, may the provider bill what nobody owns.
        blind = scenario.unadoptable or scenario.evidence is BLIND
        assert await invariants.violations(system, blind=blind) == []
