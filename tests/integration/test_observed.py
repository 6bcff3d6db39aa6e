"""What operators see of a running system: its metrics, and one trace from the request to the event."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import nats
import pytest
import pytest_asyncio

from framewire import errors, subjects
from tests import monitoring, observed, promql
from tests import system as systems
from tests.waiting import eventually

SERVICES = ("gateway", "credits", "generator", "storage")
TARGETS = {"job", "provider_account"}
"""Second arguments of label_values."""
TINY = {"width": 320, "height": 180, "seconds": 1}


@dataclass
class Seen:
    """A system that made one video and refused another, and what was collected of it."""

    system: systems.System
    collector: observed.Collector
    account_id: str
    video_id: str

    async def scrape(self, service: str) -> observed.Scraped:
        return await observed.scrape(self.system.stack.addresses.metrics_listen[service])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def seen(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Seen]:
    async with observed.collecting() as collector:
        overrides = {
            name: {
                f"{name.upper()}_OTLP_ENDPOINT": collector.endpoint,
                "OTEL_BSP_SCHEDULE_DELAY": "100",
            }
            for name in SERVICES
        }
        place = tmp_path_factory.mktemp("observed")
        async with systems.running(place, overrides) as system, await system.account(100) as client:
            video = await client.generate(f"seen {uuid.uuid4().hex}", **TINY)
            with pytest.raises(errors.FramewireError):
                await client.create_video("x", model="nobody-has-it")
            yield Seen(system, collector, client.account_id, video.video_id)


async def event_of(seen: Seen, kind: str) -> dict[str, str]:
    """The headers of the video's event as a subscriber gets it."""
    connection = await nats.connect(seen.system.stack.addresses.nats_url)
    try:
        subscription = await connection.jetstream().subscribe(
            subjects.event_subject(seen.account_id, kind), ordered_consumer=True
        )
        message = await subscription.next_msg(timeout=10)
        return dict(message.headers or {})
    finally:
        await connection.close()


async def test_one_trace_leads_from_the_request_to_the_event(seen: Seen) -> None:
    """Gateway, credits, JOBS, generator, provider, storage, EVENTS and back: a single trace id."""
    completed = await event_of(seen, "completed")
    trace_id = completed["traceparent"].split("-")[1]
    wanted = {
        ("framewire-gateway", "/framewire.gateway.v1.VideoService/CreateVideo"),
        ("framewire-credits", "/framewire.credits.v1.LedgerService/Reserve"),
        ("framewire-generator", "generator handle"),
        ("framewire-generator", "submit"),
        ("framewire-generator", "provider main create"),
        ("framewire-generator", "fetch"),
        ("framewire-storage", "/framewire.storage.v1.StorageService/Put"),
        ("framewire-storage", "s3 put"),
        ("framewire-storage", "media inspect_video"),
        ("framewire-credits", "credits-settlement handle"),
        ("framewire-gateway", "gateway-projector handle"),
    }

    def joined() -> bool:
        missing = wanted - seen.collector.of(trace_id)
        assert not missing, f"{missing} are not in it; it has {seen.collector.of(trace_id)}"
        return True

    await eventually(joined, within_seconds=15)
    for kind in ("queued", "started", "settled"):
        headers = await event_of(seen, kind)
        assert headers["traceparent"].split("-")[1] == trace_id, kind


async def test_the_gauges_tell_what_the_databases_hold(seen: Seen) -> None:
    async def told() -> bool:
        gateway, generator = await seen.scrape("gateway"), await seen.scrape("generator")
        credits_ = await seen.scrape("credits")
        assert gateway.value("framewire_videos_ended_total", state="COMPLETED", cause="NONE") == 1
        captured = gateway.value("framewire_video_credits_total", outcome="captured", cause="NONE")
        assert captured > 0
        assert gateway.value("framewire_video_seconds_count", phase="whole", lane="STANDARD") == 1
        create = "/framewire.gateway.v1.VideoService/CreateVideo"
        refused = {"method": create, "reason": "MODEL_UNKNOWN"}
        assert gateway.value("framewire_rpc_refusals_total", **refused) == 1
        assert gateway.value("framewire_rpc_in_flight") == 0
        assert gateway.value("framewire_videos_oldest_seconds", state="PENDING") == 0
        server = seen.system.stack.nats.monitor_url
        assert generator.value("framewire_bus_sync_always", server=server) == 1
        stored = generator.value("framewire_bus_stored_bytes", server=server)
        assert 0 < stored < generator.value("framewire_bus_may_store_bytes", server=server)
        assert gateway.value("framewire_webhook_endpoints", condition="well") == 0
        storage = await seen.scrape("storage")
        assert storage.value("framewire_storage_retention_overdue_seconds") == 0
        account = {"provider_account": "main"}
        assert generator.value("framewire_provider_account_open", **account) == 1
        assert generator.value("framewire_provider_requests_allowed_per_minute", **account) > 0
        committed = generator.value(
            "framewire_provider_committed_micros_total", model="sora-2", **account
        )
        assert committed > 0
        for service in (gateway, credits_, generator):
            assert service.value("framewire_bus_connected") == 1
            assert service.value("framewire_database_connections", use="allowed") >= 1
        assert credits_.value("framewire_outbox_waiting") == 0
        pending = credits_.value("framewire_consumer_pending", consumer="credits-settlement")
        assert pending == 0
        return True

    await eventually(told, within_seconds=20, every_seconds=0.5)


async def test_a_bus_that_is_away_is_shown(seen: Seen) -> None:
    await seen.system.bus.kill()
    try:

        async def away() -> bool:
            return (await seen.scrape("gateway")).value("framewire_bus_connected") == 0

        await eventually(away)
    finally:
        await seen.system.bus.start()

    async def back() -> bool:
        return (await seen.scrape("gateway")).value("framewire_bus_connected") == 1

    await eventually(back)


async def test_alerts_and_dashboards_read_only_what_is_exposed(seen: Seen) -> None:
    scraped = [await seen.scrape(service) for service in SERVICES]
    exposed = {name for one in scraped for name in one.series} | monitoring.RECORDED | {"up"}
    labels: dict[str, set[str]] = {}
    for one in scraped:
        for name, found in one.labels.items():
            labels.setdefault(name, set()).update(found)
    for where, query in monitoring.queries():
        names = promql.series(query) - TARGETS
        assert names, f"{where} reads nothing: {query}"
        assert names <= exposed, f"{where} reads what nobody exposes: {names - exposed}"
        for name, matched in promql.matched(query).items():
            if name in labels:
                assert matched <= labels[name], (
                    f"{where}: {name} has no label {matched - labels[name]}"
                )
