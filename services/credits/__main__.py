"""`python -m services.credits` serves the ledger; `... migrate` brings its database up."""

from __future__ import annotations

from pathlib import Path

from framewire import subjects
from framewire.credits.v1 import ledger_pb2_grpc
from framewire.generator.v1 import attempt_pb2_grpc
from kit import auth, bus, incarnation, outbox, pages, postgres, rpc, service, tls
from services.credits import api, checking, config, documents, floor, settlement, store

MIGRATIONS = Path(__file__).parent / "migrations"


async def main(settings: config.Settings) -> None:
    """Runs the service until it is told to stop."""
    async with service.Process("credits", settings) as process:
        url = settings.database_url.get_secret_value()
        pool = await process.enter(postgres.pool(url, "credits", settings.database_pool_size))
        nats = await process.enter(bus.connect(settings.nats_url, "credits"))
        tokens = auth.ServiceTokens("credits", settings.service_token_secret.get_secret_value())
        generator = await process.enter(
            rpc.channel(settings.generator_address, tokens, credentials=tls.client(settings))
        )

        life = incarnation.Incarnation("credits", pool, nats, settings.incarnation_seconds)
        await life.begin()
        relay = outbox.Relay(pool, nats, subjects.EVENTS_STREAM)
        books = store.Store(
            pool,
            ring=relay.ring,
            quote_seconds=settings.quote_seconds,
            balance_low_credits=settings.balance_low_credits,
            posting_shards=settings.posting_shards,
        )
        await documents.load(books, settings.prices_file, settings.refund_policy_file)
        settling = settlement.Settlement(
            books,
            unsettled_after_seconds=settings.unsettled_after_seconds,
            unsettled_retry_seconds=settings.unsettled_retry_seconds,
        )
        asking = floor.Floor(
            settling,
            books,
            attempt_pb2_grpc.AttemptServiceStub(generator),
            overdue_seconds=settings.hold_overdue_seconds,
            seconds=settings.floor_seconds,
        )
        process.serve(
            ledger_pb2_grpc.add_LedgerServiceServicer_to_server,
            api.LedgerService(books, pages.Pages(settings.page_secret()), asking, life),
        )
        process.loop(relay)
        process.loop(life)
        process.loop(life.gate(settlement.Consumer(nats, settling)))
        process.loop(life.gate(asking))
        process.loop(life.gate(floor.Expiry(books, settings.expiry_seconds)))
        process.loop(outbox.Retention(pool))
        process.loop(checking.BooksCheck(books, settings.check_books_seconds))
        await process.run(api.authenticate(tokens))


if __name__ == "__main__":
    service.start("credits", config.Settings, main, MIGRATIONS)
