"""Starts the generator: `python -m services.generator [run|migrate]`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path

from framewire import subjects
from framewire.generator.v1 import attempt_pb2_grpc
from framewire.storage.v1 import storage_pb2_grpc
from kit import auth, bus, incarnation, outbox, postgres, rpc, service, tls
from services.generator import (
    api,
    assets,
    config,
    dispatch,
    download,
    fetch,
    intake,
    late,
    measures,
    poll,
    pools,
    progress,
    quota,
    receiver,
    resolve,
    store,
    sweep,
    webhooks,
    worker,
)

CALLERS = ("gateway", "credits")
RETRIED = ("framewire.storage.v1.StorageService/Fit",)


async def main(settings: config.Settings) -> None:
    """The start list."""
    async with service.Process("generator", settings) as process:
        url = settings.database_url.get_secret_value()
        tokens = auth.ServiceTokens("generator", settings.service_token_secret.get_secret_value())
        pool = await process.enter(postgres.pool(url, "generator", settings.database_pool_size))
        connected = await process.enter(bus.connect(settings.nats_url, "generator"))
        opened = pools.open_pools(settings)
        await process.enter(aclosing(opened))
        channel = await process.enter(
            rpc.channel(settings.storage_address, tokens, RETRIED, tls.client(settings))
        )
        stored = assets.Assets(storage_pb2_grpc.StorageServiceStub(channel))

        life = incarnation.Incarnation("generator", pool, connected, settings.incarnation_seconds)
        await life.begin()
        relay = outbox.Relay(pool, connected, subjects.EVENTS_STREAM)
        database = store.Store(pool, relay.ring)
        await database.accounts.ensure(list(opened.accounts))
        await database.queue.settle_in(opened.pool_of_model)
        sender = worker.Worker(url)
        await process.enter(aclosing(sender))
        shared = quota.Quota(database.accounts, opened)
        teller = progress.Teller(database.renders, connected)
        dispatcher = dispatch.Dispatcher(settings, database, opened, stored, sender, teller, shared)
        downloads = download.Downloads(settings, database, opened, stored, shared)
        fetcher = fetch.Fetcher(settings, database, opened, downloads, teller)
        jobs = intake.Intake(database.videos, opened, dispatcher.wake)

        process.loop(life)
        for gated in (
            jobs.loop(connected),
            dispatcher,
            resolve.Resolver(settings, database, opened, shared, dispatcher.wake),
            poll.Poller(settings, database, opened, teller, fetcher.wake, shared),
            fetcher,
            sweep.Sweeper(settings, database, opened),
            late.LateRenders(settings, database, opened, downloads, shared),
        ):
            process.loop(life.gate(gated))
        process.loop(progress.Estimator(settings, database, opened, teller))
        process.loop(relay)
        process.loop(outbox.Retention(pool))
        process.loop(measures.Measures(database, opened))
        if settings.nats_monitor_url:
            process.loop(bus.ServerWatch(settings.nats_monitor_url))
        keys = webhooks.secrets(settings.webhook_secrets.get_secret_value())
        if settings.webhooks_listen and keys:
            process.loop(receiver.Receiver(settings.webhooks_listen, keys, database.hints))
        process.serve(
            attempt_pb2_grpc.add_AttemptServiceServicer_to_server,
            api.AttemptApi(database, opened, shared, dispatcher.wake, life),
        )

        async def authenticate(_: str, metadata: Mapping[str, str]) -> str:
            return tokens.caller(metadata.get("authorization", ""), CALLERS)

        await process.run(authenticate)


if __name__ == "__main__":
    service.start("generator", config.Settings, main, Path(__file__).parent / "migrations")
