"""Starts storage: `python -m services.storage [run|migrate]`; `migrate` also makes the buckets."""

from __future__ import annotations

from pathlib import Path

from framewire import subjects
from framewire.storage.v1 import storage_pb2_grpc
from kit import auth, bus, loops, outbox, postgres, service, telemetry
from services.storage import (
    api,
    blobs,
    config,
    fits,
    imports,
    measures,
    puts,
    retention,
    scratch,
    scrub,
    signer,
    store,
    sweeper,
    uploads,
)
from services.storage.media import confine, facts, sandbox

log = telemetry.logger(__name__)

MARK_BYTES = 1024 * 1024


async def main(settings: config.Settings) -> None:
    """The start list."""
    async with service.Process("storage", settings) as process:
        url = settings.database_url.get_secret_value()
        tokens = auth.ServiceTokens("storage", settings.service_token_secret.get_secret_value())
        pool = await process.enter(postgres.pool(url, "storage", settings.database_pool_size))
        nats = await process.enter(bus.connect(settings.nats_url, "storage"))
        bytes_ = await process.enter(blobs.Blobs(settings))
        place = await process.enter(scratch.Scratch(settings.scratch_dir))
        workers = await process.enter(sandbox.MediaWorkers(place.path, _sandbox(settings)))
        signing = None
        if credential := signer.configured(settings.c2pa_certificate_file, settings.c2pa_key_file):
            holders = sandbox.MediaWorkers(place.path, _sandbox(settings, credential))
            signing = signer.Signer(await process.enter(holders))

        database = store.Store(pool)
        keeper = puts.Keeper(settings, database, bytes_, place)
        taking = puts.Puts(settings, keeper, workers, signing)
        relay = outbox.Relay(pool, nats, subjects.EVENTS_STREAM)
        swept = loops.Wake()
        sweeping = sweeper.Sweeper(settings, database, bytes_, swept)
        ending = retention.Retention(database, settings.retention_seconds, relay.ring, swept)
        process.loop(sweeping)
        process.loop(ending)
        process.loop(scrub.Scrub(settings, database, bytes_, place, workers))
        process.loop(scrub.Orphans(settings, database, bytes_))
        process.loop(relay)
        process.loop(outbox.Retention(pool))
        process.loop(measures.Measures(database.measures))
        process.loop(measures.Usage(database))
        process.loop(measures.Reach(bytes_, process, settings.s3_watch_seconds))
        process.serve(
            storage_pb2_grpc.add_StorageServiceServicer_to_server,
            api.StorageApi(
                database,
                bytes_,
                taking,
                fits.Fits(database, bytes_, keeper, workers),
                fits.Renditions(database, bytes_, keeper, workers, signing),
                sweeping,
                uploads.Uploads(settings, database, bytes_, taking),
                imports.Imports(settings, database, taking),
                settings.max_keep_seconds,
            ),
        )
        await process.run(api.authenticate(tokens))


def _sandbox(settings: config.Settings, signing: sandbox.Signing | None = None) -> sandbox.Settings:
    return sandbox.Settings(
        size=1 if signing else settings.media_workers,
        signing=signing,
        timeout_seconds=settings.media_timeout_seconds,
        # A marked video is a little larger than it was on arrival.
        limits=confine.Limits(file_bytes=settings.max_video_bytes + MARK_BYTES),
        input_video_limits=facts.VideoLimits(
            max_pixels=settings.max_input_video_pixels,
            max_duration_seconds=settings.max_input_video_seconds,
        ),
    )


async def prepare(settings: config.Settings) -> None:
    """Makes the buckets, and has them do by themselves what they can. Idempotent."""
    async with blobs.Blobs(settings) as opened:
        await opened.ensure_buckets()
        log.info("bucket_rules", taken=await opened.ensure_rules(settings))


if __name__ == "__main__":
    service.start("storage", config.Settings, main, Path(__file__).parent / "migrations", prepare)
