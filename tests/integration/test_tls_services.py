"""Mutual TLS between whole services: every one a process of its own, a video made through all of them."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.local import places
from tests import observed
from tests import system as systems
from tests.certificates import HOST, Authority, Files, answers
from tests.waiting import eventually

pytestmark = pytest.mark.long

SERVICES = ("gateway", "credits", "generator", "storage")
BEHIND = SERVICES[1:]
CALLED = {
    "gateway": BEHIND,
    "credits": ("generator",),
    "generator": ("storage",),
    "storage": (),
}
ENDS_AT = "framewire_certificate_expires_timestamp_seconds"


@dataclass(frozen=True)
class World:
    """The system, and where each service listens for others. The stack's own addresses have health alone."""

    system: systems.System
    authority: Authority
    listen: dict[str, str]
    account: str

    async def framewire(self, *arguments: str, roots: Path | None = None) -> tuple[int, Any, str]:
        """Exit code, JSON and errors of a command that trusts the authority."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "framewire.cli", *arguments, "--json"),
            env={
                **os.environ,
                "FRAMEWIRE_ADDRESS": f"https://{self.listen['gateway']}",
                "FRAMEWIRE_API_KEY": self.system.stack.operator_key,
                "FRAMEWIRE_ACCOUNT": self.account,
                "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(roots or self.authority.file),
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, wrong = await process.communicate()
        assert process.returncode is not None
        return process.returncode, json.loads(said or b"null"), wrong.decode()

    async def makes_a_video(self, out: Path) -> None:
        code, video, wrong = await self.framewire(
            *("generate", "-", "a sea", "--model", "sora-2", "--seconds", "4", "--out", str(out))
        )
        assert code == 0, wrong
        assert (video["state"], video["credits"]["settlement"]) == ("COMPLETED", "DONE")
        assert out.stat().st_size == video["outputs"][0]["size_bytes"]

    async def shown_by(self, name: str) -> bytes:
        """The certificate that a service shows, to one of the others."""
        context = ssl.create_default_context(cafile=self.authority.file)
        mine = self.authority.pair("tester")
        assert mine.tls_certificate_file is not None
        context.load_cert_chain(mine.tls_certificate_file, mine.tls_key_file)
        context.set_alpn_protocols(["h2"])
        host, _, port = self.listen[name].rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            return writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        finally:
            writer.close()

    async def ends_at(self, name: str, side: str) -> float:
        scraped = await observed.scrape(self.system.stack.addresses.metrics_listen[name])
        return scraped.value(ENDS_AT, side=side)


def settings(data_dir: Path, authority: Authority, listen: dict[str, str]) -> dict[str, Any]:
    """TLS where services speak to each other, plain health where the stack asks whether they are up."""
    places.prepare(data_dir)
    made: dict[str, dict[str, str]] = {}
    for name in SERVICES:
        probed = places.choose_port(data_dir, name)
        files = authority.pair(name)
        values = {
            "LISTEN": listen[name],
            "HEALTH_LISTEN": f"{HOST}:{probed}",
            "TLS_CERTIFICATE_FILE": str(files.tls_certificate_file),
            "TLS_KEY_FILE": str(files.tls_key_file),
            "TLS_CA_FILE": str(authority.file),
            **{f"{other.upper()}_ADDRESS": listen[other] for other in CALLED[name]},
        }
        if name != "gateway":  # who calls it shows a key or a token instead
            values["TLS_CLIENT_CA_FILE"] = str(authority.file)
        made[name] = {f"{name.upper()}_{key}": value for key, value in values.items()}
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("mutual")
    authority = Authority(folder, "ours")
    listen = {name: f"{HOST}:{places.free_port(f'{name} with TLS')}" for name in SERVICES}
    data_dir = folder / "data"
    async with systems.running(data_dir, settings(data_dir, authority, listen)) as system:
        made = World(system, authority, listen, "")
        code, account, wrong = await made.framewire("account", "create", "mutual")
        assert code == 0, wrong
        made = replace(made, account=account["account_id"])
        code, _, wrong = await made.framewire("grant", "1000")
        assert code == 0, wrong
        yield made


async def test_a_video_goes_through_all_of_them(world: World, tmp_path: Path) -> None:
    await world.makes_a_video(tmp_path / "a.mp4")


async def test_who_shows_no_certificate_of_ours_is_not_let_in(world: World, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "theirs")
    trusting = Files(tls_ca_file=world.authority.file)
    ours = replace(world.authority.pair("tester"), tls_ca_file=world.authority.file)
    theirs = replace(stranger.pair("tester"), tls_ca_file=world.authority.file)
    for name in BEHIND:
        address = world.listen[name]
        let_in = [await answers(address, files) for files in (ours, trusting, theirs, Files())]
        assert let_in == [True, False, False, False], name
    assert await answers(world.listen["gateway"], trusting), "callers have keys, not certificates"
    assert not await answers(world.listen["gateway"], Files()), "plain text"


async def test_a_service_with_anothers_certificate_is_refused(world: World, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "theirs")
    wrong, right = stranger.pair("gateway"), world.authority.pair("gateway")
    quote = ("quote", "--model", "sora-2", "--seconds", "4")
    await world.system.supervisor.restart("gateway", shown("GATEWAY", wrong))
    code, _, said = await world.framewire(*quote, roots=stranger.file)
    assert (code, "DEPENDENCY_UNAVAILABLE" in said) == (3, True), said
    await world.system.supervisor.restart("gateway", shown("GATEWAY", right))
    code, found, said = await world.framewire(*quote)
    assert (code, found["credits"] > 0) == (0, True), said


async def test_a_renewed_certificate_is_shown_without_a_restart(
    world: World, tmp_path: Path
) -> None:
    pids = {one.name: one.pid for one in world.system.supervisor.status()}
    before = {name: await world.shown_by(name) for name in BEHIND}
    ends = {name: await world.ends_at(name, "server") for name in SERVICES}
    as_client = await world.ends_at("generator", "channel")
    for name in SERVICES:
        world.authority.pair(name, hours=3)

    async def renewed() -> bool:
        return all([await world.shown_by(name) != before[name] for name in BEHIND])

    await eventually(renewed)
    await world.makes_a_video(tmp_path / "b.mp4")
    for name in SERVICES:
        assert await world.ends_at(name, "server") > ends[name] + 3600, name
    assert await world.ends_at("generator", "channel") == as_client, "read at the start alone"
    assert {one.name: one.pid for one in world.system.supervisor.status()} == pids


def shown(prefix: str, files: Files) -> dict[str, str]:
    return {
        f"{prefix}_TLS_CERTIFICATE_FILE": str(files.tls_certificate_file),
        f"{prefix}_TLS_KEY_FILE": str(files.tls_key_file),
    }
