"""The generator's SQL on a real Postgres: what was given up, and operators' verdicts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from services.generator.store import videos
from tests import generator_world as worlds
from tests.generator_world import HOUR, LEASE, World, server, world

__all__ = ["server", "world"]

NOW = timedelta(0)


async def test_a_twin_that_was_given_up_is_a_claimant_as_long_as_it_is_looked_for(
    world: World,
) -> None:
    """Else the one job that the list shows, which may be the first one's, would be delivered to the second."""
    first = await world.unknown(prompt="the same")
    await world.store.submissions.wait(first, NOW, absent=False, unresolved=True)
    lost = videos.Verdict("UNRESOLVED", "", True, billed=None, look_back=HOUR)
    assert await world.store.videos.fail(first, lost, another_try=False)
    second = await world.unknown(prompt="the same")
    assert (await world.store.submissions.surroundings(second, [])).claimants == 2
    (late,) = await world.store.late.claim("LOOKING", LEASE, 10)
    assert (await world.store.submissions.surroundings(late.attempt, [])).claimants == 2
    assert not await world.store.late.adopt(late, await _known_job(world))
    assert await world.store.late.adopt(late, "video_first")
    assert (await world.store.submissions.surroundings(second, [])).claimants == 1
    await world.store.late.again(late, NOW, "its claim is over")
    (late,) = await world.store.late.claim("LOOKING", LEASE, 10)
    assert late.provider_job_id == "video_first"
    assert await world.store.late.finished(late, datetime.now(UTC) + HOUR)
    (kept,) = await world.store.late.claim("FETCHING", LEASE, 10)
    assert not await world.store.videos.recovered(late, {0: worlds.asset()})
    assert await world.store.videos.recovered(kept, {0: worlds.asset()})
    assert not await world.store.videos.recovered(kept, {0: worlds.asset()})
    assert (await world.events(first.video_id))[-2:] == ["failed", "recovered"]


async def _known_job(world: World) -> str:
    """A job of another attempt."""
    rendering = await world.rendering("video_other")
    assert rendering.provider_job_id
    return rendering.provider_job_id


async def test_how_near_a_finished_film_is_to_its_end_at_the_provider(world: World) -> None:
    assert (await world.store.measures.read()).expiry_share == 0
    far, near = await world.fetching(), await world.fetching()
    for attempt, kept_seconds in ((far, 6000), (near, 100)):
        await world.pool.execute(
            """
            UPDATE attempts SET rendered_at = clock_timestamp() - interval '60 s',
                content_expires_at = clock_timestamp() - interval '60 s' + make_interval(secs => $2)
            WHERE attempt_id = $1
            """,
            attempt.attempt_id,
            kept_seconds,
        )
    assert 0.6 <= (await world.store.measures.read()).expiry_share < 0.9
    await world.pool.execute("UPDATE attempts SET rendered_at = NULL")
    assert (await world.store.measures.read()).expiry_share == 0
