"""The crash walk with a provider that knows idempotency keys: what is sent again under its key is the same job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests import system as systems
from tests.fault import walk

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(1600)]

SCENARIOS = walk.scenarios("openai_videos", walk.KEYED, ("perfect", "foreign and twin jobs"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    async with walk.fragile(tmp_path_factory.mktemp("walk"), keyed=True) as running:
        yield running


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[f"{s.listing}-{s.action}" for s in SCENARIOS])
async def test_walk(fragile: systems.System, scenario: walk.Scenario, tmp_path: Path) -> None:
    await walk.run(fragile, scenario, tmp_path)
