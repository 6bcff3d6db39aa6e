"""Starts the gateway: `python -m services.gateway [run|migrate]`."""

from __future__ import annotations

from pathlib import Path

from framewire import subjects
from framewire.credits.v1 import ledger_pb2_grpc
from framewire.gateway.v1 import (
    account_pb2_grpc,
    operator_pb2_grpc,
    template_pb2_grpc,
    upload_pb2_grpc,
    video_pb2_grpc,
    webhook_pb2_grpc,
)
from framewire.generator.v1 import attempt_pb2_grpc
from framewire.storage.v1 import storage_pb2_grpc
from kit import auth as service_auth
from kit import bus, incarnation, outbox, pages, postgres, rpc, service, tls
from services.gateway import (
    admission,
    auth,
    catalogue,
    config,
    deliverer,
    erasure,
    limits,
    measures,
    oidc,
    peers,
    posting,
    projector,
    publisher,
    reconciler,
    recoverer,
    store,
    sweeper,
    tasks,
    watch,
)
from services.gateway.api import accounts, creating, operators, templates, uploads, videos, webhooks


async def main(settings: config.Settings) -> None:
    """The start list."""
    models = catalogue.parse(settings.models_file.read_text(), settings.models)
    async with service.Process("gateway", settings) as process:
        url = settings.database_url.get_secret_value()
        pool = await process.enter(postgres.pool(url, "gateway", settings.database_pool_size))
        nats = await process.enter(bus.connect(settings.nats_url, "gateway"))
        life = incarnation.Incarnation("gateway", pool, nats, settings.incarnation_seconds)
        await life.begin()
        behind = peers.Peers(await _stubs(process, settings), models)
        kept = store.Store(pool)
        limiter = limits.Limiter(kept.limits)
        callers = auth.Authenticator(kept, oidc.Verifier(settings.oidc_issuers), limiter)
        if bootstrap := settings.bootstrap_key.get_secret_value():
            await callers.ensure_bootstrap(bootstrap)

        hub = watch.Hub(kept.videos, nats, settings.watch_floor_seconds)
        ringing = publisher.Publisher(nats, settings.publish_seconds)
        shielded = await process.enter(tasks.Shielded(settings.admit_seconds))
        timing = admission.Timing(settings.admit_seconds, settings.sweep_unaccepted_seconds)
        projecting = projector.Projector(kept.videos, hub, settings.sweep_overdue_seconds)
        relay = outbox.Relay(pool, nats, subjects.EVENTS_STREAM)
        for loop in (relay, outbox.Retention(pool), hub, life, projecting.loop(nats)):
            process.loop(loop)
        process.loop(watch.Nudges(nats, hub))
        process.loop(projector.ProgressListener(kept.videos, nats, hub))
        process.loop(life.gate(sweeper.Sweeper(kept, behind, ringing, hub, _ages(settings))))
        process.loop(life.gate(sweeper.Purge(kept)))
        process.loop(measures.Measures(kept.measures))
        _deliver(process, settings, kept, nats, life)

        parts = creating.Parts(
            store=kept,
            admission=admission.Admission(kept, behind, ringing, shielded, timing),
            peers=behind,
            models=models,
            hub=hub,
            limiter=limiter,
            pages=pages.Pages(settings.page_secret()),
            check_after_seconds=settings.sweep_overdue_seconds,
            life=life,
        )
        reconciling = reconciler.Reconciler(kept, behind, ringing, hub, settings)
        routine = reconciler.Routine(reconciling, kept.findings, settings.reconcile_seconds)
        process.loop(life.gate(routine))
        _serve(process, parts)
        recovering = recoverer.Recoverer(kept, behind, life)
        erasing = erasure.Erasure(
            kept, behind, settings.sweep_retry_seconds, settings.erase_settle_seconds
        )
        process.loop(life.gate(erasing))
        operating = operators.OperatorApi(
            parts, _defaults(settings), reconciling, callers.issuers, recovering, erasing
        )
        process.serve(operator_pb2_grpc.add_OperatorServiceServicer_to_server, operating)
        await process.run(callers)


def _deliver(
    process: service.Process,
    settings: config.Settings,
    kept: store.Store,
    nats: bus.Bus,
    life: incarnation.Incarnation,
) -> None:
    """Webhooks. A restored database has forgotten what it sent: until that is made good it sends nothing."""
    poster = posting.Poster(
        settings.webhook_networks, settings.webhook_ca_file, settings.webhook_timeout_seconds
    )
    delivering = deliverer.Deliverer(kept.deliveries, poster, settings)
    give_up = settings.webhook_give_up_seconds
    recorder = deliverer.Recorder(kept.deliveries, delivering, give_up)
    process.loop(recorder.loop(nats))
    process.loop(life.gate(delivering))
    process.loop(life.gate(deliverer.Keeping(kept.deliveries)))
    process.serve(
        webhook_pb2_grpc.add_WebhookServiceServicer_to_server,
        webhooks.WebhookApi(kept, poster, pages.Pages(settings.page_secret()), give_up),
    )


def _serve(process: service.Process, parts: creating.Parts) -> None:
    """What is not for operators."""
    kept, behind = parts.store, parts.peers
    process.serve(video_pb2_grpc.add_VideoServiceServicer_to_server, videos.VideoApi(parts))
    process.serve(
        template_pb2_grpc.add_TemplateServiceServicer_to_server, templates.TemplateApi(parts)
    )
    process.serve(
        upload_pb2_grpc.add_UploadServiceServicer_to_server,
        uploads.UploadApi(kept.accounts, behind, limits.Uploads(kept.limits)),
    )
    process.serve(
        account_pb2_grpc.add_AccountServiceServicer_to_server,
        accounts.AccountApi(kept.accounts, behind, parts.models),
    )


def _ages(settings: config.Settings) -> sweeper.Ages:
    return sweeper.Ages(
        every=settings.sweep_seconds,
        grace=settings.sweep_grace_seconds,
        unaccepted=settings.sweep_unaccepted_seconds,
        overdue=settings.sweep_overdue_seconds,
        retry=settings.sweep_retry_seconds,
    )


def _defaults(settings: config.Settings) -> operators.Defaults:
    return operators.Defaults(
        settings.default_max_in_flight,
        settings.default_requests_per_minute,
        settings.default_videos_per_hour,
    )


async def _stubs(process: service.Process, settings: config.Settings) -> peers.Stubs:
    secret = settings.service_token_secret.get_secret_value()
    tokens = service_auth.ServiceTokens("gateway", secret)
    credits_, storage, generator = [
        await process.enter(rpc.channel(address, tokens, peers.RETRIED[name], tls.client(settings)))
        for name, address in (
            ("credits", settings.credits_address),
            ("storage", settings.storage_address),
            ("generator", settings.generator_address),
        )
    ]
    return peers.Stubs(
        credits=ledger_pb2_grpc.LedgerServiceStub(credits_),
        storage=storage_pb2_grpc.StorageServiceStub(storage),
        generator=attempt_pb2_grpc.AttemptServiceStub(generator),
    )


if __name__ == "__main__":
    service.start("gateway", config.Settings, main, Path(__file__).parent / "migrations")
