"""kill -9 of the generator at every crash point of a video's life: one billed job, one charge, nothing adrift."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests import system as systems
from tests.fault import kills

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

CASES = kills.cases("generator")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    async with kills.fragile(tmp_path_factory.mktemp("generator")) as running:
        yield running


@pytest.mark.parametrize(("service", "point"), CASES, ids=[point for _, point in CASES])
async def test_kill(fragile: systems.System, service: str, point: str, tmp_path: Path) -> None:
    await kills.kill_and_check(fragile, service, point, tmp_path / "film.mp4")


async def test_every_invariant_holds_after_all_kills(fragile: systems.System) -> None:
    await kills.check_all(fragile)
