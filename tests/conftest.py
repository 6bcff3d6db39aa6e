"""What all tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests import containers
from tests import system as systems


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A container cannot be killed by the supervisor: what does that is skipped, and told at the end of the run."""
    reason = "NOT RUN with FRAMEWIRE_STACK=docker: kills or wipes an embedded server"
    for item in items if containers.IN_DOCKER else ():
        if item.get_closest_marker("embedded"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    """One whole system for all tests that leave it as they found it."""
    async with systems.running(tmp_path_factory.mktemp("system")) as running:
        yield running
