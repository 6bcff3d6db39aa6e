"""The users of deploy/nats/nats.conf on a real server: each may do what its service does, and not what others do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from nats import errors as nats_errors

from framewire import subjects
from kit import bus
from services.credits import settlement
from services.gateway import deliverer, projector, watch
from services.local import nats as local_nats
from services.local import places, process
from tests import containers
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(containers.IN_DOCKER, reason="starts a server of its own")

ROOT = Path(__file__).parents[2]
USERS = ("operator", "gateway", "credits", "generator", "storage", "subscriber")
CONSUMERS = {
    ("gateway", subjects.EVENTS_STREAM, projector.DURABLE),
    ("gateway", subjects.EVENTS_STREAM, deliverer.DURABLE),
    ("credits", subjects.EVENTS_STREAM, settlement.DURABLE),
    ("generator", subjects.JOBS_STREAM, "generator"),
}
TOLD = {
    "gateway": ("deleted", "webhook_disabled"),
    "credits": ("settled", "balance_low"),
    "generator": ("queued", "started", "completed", "failed", "cancelled"),
    "storage": ("expired",),
}
"""Kinds of events, by who tells them."""


class Server(local_nats.Nats):
    """NATS as deploy/ has it, on ports of this machine."""

    async def prepare(self) -> process.Child:
        child = await super().prepare()
        home = self.data_dir / "nats"
        text = (ROOT / "deploy" / "nats" / "nats.conf").read_text()
        for there, here in (
            ("0.0.0.0:4222", f"{places.HOST}:{self.port}"),
            ("0.0.0.0:8222", self.monitor_url.removeprefix("http://")),
            ('"/data"', f'"{home / "store"}"'),
        ):
            assert text.count(there) == 1
            text = text.replace(there, here)
        (home / "nats.conf").write_text(text)
        (home / "passwords.conf").write_text(
            "".join(f'{user}_password: "of-{user}"\n' for user in USERS)
        )
        return child

    @property
    def url(self) -> str:
        return self.url_of("operator")

    def url_of(self, user: str) -> str:
        return f"nats://{user}:of-{user}@{self.host}:{self.port}"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    running = Server(tmp_path_factory.mktemp("users"))
    await running.start()
    try:
        async with bus.connect(running.url, "operator") as connected:
            await connected.opened.wait()
            await connected.ensure_streams()
        yield running
    finally:
        await running.stop()


def test_every_consumer_and_event_of_the_code_is_named_here() -> None:
    durables = {
        name
        for file in (ROOT / "services").rglob("*.py")
        for name in re.findall(r'^DURABLE = "(.+)"$', file.read_text(), re.MULTILINE)
    }
    assert durables <= {name for _, _, name in CONSUMERS}
    for service, kinds in TOLD.items():
        if service != "generator":  # which tells whatever its videos' states are
            file = next((ROOT / "services" / service).glob("announcements.py"), None)
            text = (file or ROOT / "services" / service / "telling.py").read_text()
            assert set(re.findall(r'_row\(\s*event, "(\w+)"', text)) <= set(kinds)


@pytest.mark.parametrize(("user", "stream", "durable"), sorted(CONSUMERS))
async def test_a_service_has_its_consumer_and_no_subscriber_takes_from_it(
    server: Server, user: str, stream: str, durable: str
) -> None:
    seen: list[bytes] = []
    subject = subjects.JOBS_SUBJECT if stream == subjects.JOBS_STREAM else _event("a", "failed")

    async def handle(message: bus.Msg) -> None:
        seen.append(message.data)

    async with (
        bus.connect(server.url_of(user), user) as own,
        bus.connect(server.url, "operator") as operator,
        bus.connect(server.url_of("subscriber"), "subscriber") as other,
    ):
        stopping = asyncio.Event()
        loop = bus.PullLoop(own, stream, durable, [subject], handle, workers=1)
        pulling = asyncio.create_task(loop.run(stopping))
        await operator.opened.wait()
        await other.opened.wait()
        await operator.publish(subject, durable.encode(), {}, durable)
        await eventually(lambda: durable.encode() in seen)
        taken = await other.jetstream.pull_subscribe_bind(durable, stream)
        with pytest.raises((nats_errors.Error, TimeoutError)):
            await taken.fetch(1, 1)

        async def acknowledged() -> bool:
            info = await operator.jetstream.consumer_info(stream, durable)
            return info.num_ack_pending == 0

        await eventually(acknowledged)
        stopping.set()
        await pulling


@pytest.mark.parametrize("user", TOLD)
async def test_a_service_tells_its_own_kinds_of_events_and_no_others(
    server: Server, user: str
) -> None:
    async with bus.connect(server.url_of(user), user) as own:
        await own.opened.wait()
        for kind in TOLD[user]:
            await own.publish(_event("b", kind), b"{}", {}, f"{user} {kind}")
        if user != "generator":
            with pytest.raises(bus.BusError):
                await own.publish(_event("b", "completed"), b"{}", {}, f"{user} x", 0.5)


async def test_progress_and_nudges_are_heard_and_a_subscriber_tells_nothing(
    server: Server,
) -> None:
    heard: list[tuple[str, str]] = []
    progress = subjects.progress_subject("a" * 26)
    async with (
        bus.connect(server.url_of("gateway"), "gateway") as gateway,
        bus.connect(server.url_of("generator"), "generator") as generator,
        bus.connect(server.url_of("subscriber"), "subscriber") as subscriber,
    ):
        for user in (gateway, generator, subscriber):
            await user.opened.wait()

        def hearing(who: str) -> Callable[[bus.Msg], Awaitable[None]]:
            async def hear(message: bus.Msg) -> None:
                heard.append((who, message.subject))

            return hear

        for who, user in (("gateway", gateway), ("subscriber", subscriber)):
            await user.client.subscribe(subjects.progress_subject("*"), cb=hearing(who))
        await gateway.client.subscribe(watch.NUDGE_SUBJECT, cb=hearing("gateway"))
        for user in (gateway, subscriber):
            await user.client.flush()
        await gateway.tell(watch.NUDGE_SUBJECT, b"")
        await generator.tell(progress, b"")
        await eventually(lambda: len(heard) == 3)
        assert set(heard) == {
            ("gateway", watch.NUDGE_SUBJECT), ("gateway", progress), ("subscriber", progress)
        }  # fmt: skip
        await gateway.publish(subjects.JOBS_SUBJECT, b"", {}, "a job")
        for subject in (subjects.JOBS_SUBJECT, _event("c", "completed")):
            with pytest.raises(bus.BusError):
                await subscriber.publish(subject, b"", {}, "no job", 0.5)


def _event(account: str, kind: str) -> str:
    return subjects.event_subject(account * 26, kind)
