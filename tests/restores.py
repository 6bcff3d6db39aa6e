"""A database taken back to an earlier moment: what an operator's restore from backup does."""

from __future__ import annotations

import asyncpg

from framewire import errors, recovery
from services.local import postgres
from tests import system as systems
from tests.waiting import eventually


async def pause(system: systems.System, paused: bool) -> None:
    """Nothing is sent to the provider meanwhile."""
    async with system.database("generator") as database:
        await database.execute("UPDATE provider_accounts SET paused = $1", paused)


async def closed(system: systems.System, service: str) -> str:
    """Why a service is closed; empty: it is open."""

    async def looked() -> recovery.Standing | None:
        try:
            found = (await system.operator.operations.recover(dry_run=True)).done.services
        except errors.FramewireError:  # it was started a moment ago
            return None
        return next(one.standing for one in found if one.service == service)

    return (await eventually(looked)).reason


class Backup:
    """A copy of a service's database, made while the service was stopped for a moment."""

    def __init__(self, system: systems.System, service: str) -> None:
        self._system = system
        self._service = service
        self._url = system.stack.addresses.database_url(service)
        self._name = self._url.rsplit("/", 1)[-1].split("?")[0]
        self._copy = f"backup_of_{service}"

    async def take(self) -> None:
        """The service dies and comes back."""
        await self._system.supervisor.kill(self._service)
        await postgres.drop_database(self._url_of("postgres"), self._copy)
        await self._copy_to(self._copy, self._name)
        await self._system.supervisor.start(self._service)

    async def restore(self) -> None:
        """What was committed since is gone; the service comes back with it."""
        await self._system.supervisor.kill(self._service)
        await postgres.drop_database(self._url_of("postgres"), self._name)
        await self._copy_to(self._name, self._copy)
        await self._system.supervisor.start(self._service)

    async def _copy_to(self, name: str, template: str) -> None:
        connection = await asyncpg.connect(self._url_of("postgres"))
        try:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
                template,
            )
        finally:
            await connection.close()
        await postgres.create_database(self._url_of("postgres"), name, template)

    def _url_of(self, name: str) -> str:
        return postgres.with_database(self._url, name)
