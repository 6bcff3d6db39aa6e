"""What all tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests import system as systems


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[systems.System]:
    """One whole system for all tests that leave it as they found it."""
    async with systems.running(tmp_path_factory.mktemp("system")) as running:
        yield running
