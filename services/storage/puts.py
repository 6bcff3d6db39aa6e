"""How an asset comes to be: a row, a file in scratch, a look at it in the sandbox, objects, one update to READY.

A video that was made goes to S3 while it arrives; what is looked at is a file beside it, and its mark follows then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from kit import errors, ids, telemetry
from kit.failpoints import failpoint
from services.storage import (
    arriving,
    assets,
    blobs,
    config,
    parts,
    scratch,
    signer,
    store,
    troubles,
)
from services.storage.media import facts, sandbox
from services.storage.store import rows

log = telemetry.logger(__name__)

WRITE_BYTES = 1024 * 1024
FILE_THREADS = 4
CLEAN_UP_SECONDS = 30
DROP_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Header:
    """What a put is about; a size of 0 and an empty sha256 are not known."""

    identity: assets.Identity
    size_bytes: int = 0
    sha256: str = ""
    model: str = ""
    video_id: str = ""
    refused_sha256: str = ""
    """Of bytes that were no video before: the same again are kept aside."""


@dataclass(frozen=True, slots=True)
class Made:
    """A finished file, to be stored."""

    path: Path
    facts: assets.Facts
    sent: parts.Growing | None = None
    """The object that it is already, but for the tail."""
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class Work:
    """What making an asset's files gave: its own, and that of a video's poster."""

    main: Made
    poster: Made | None = None
    kept_as: assets.Kind | None = None
    """For as long as this kind is kept, where not as its own."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Bytes to be kept aside, and why."""

    path: Path
    sha256: str
    why: errors.ServiceError


Make = Callable[[arriving.Place], Awaitable[Work | Refused]]


class Keeper:
    """Stores what was made, so that all of it is visible, or nothing."""

    def __init__(
        self,
        settings: config.Settings,
        store_: store.Store,
        blobs_: blobs.Blobs,
        scratch_: scratch.Scratch,
    ) -> None:
        self._store = store_
        self._blobs = blobs_
        self._scratch = scratch_
        # Slow uploads must not keep renders from being stored.
        self._slots = {
            assets.Bucket.INPUT: asyncio.Semaphore(settings.concurrent_puts),
            assets.Bucket.OUTPUT: asyncio.Semaphore(min(settings.concurrent_puts, blobs.WRITERS)),
        }
        self._most_seconds = settings.put_leftover_seconds / 2
        self._cleaning: set[asyncio.Task[None]] = set()
        inputs, outputs = settings.input_keep_seconds, settings.output_keep_seconds
        self._keep_seconds = {
            assets.Kind.INPUT_IMAGE: inputs,
            assets.Kind.INPUT_VIDEO: inputs,
            assets.Kind.OUTPUT_VIDEO: outputs,
            assets.Kind.POSTER: outputs,
            assets.Kind.RENDITION: settings.rendition_keep_seconds,
        }
        self._quarantine = timedelta(seconds=settings.quarantine_keep_seconds)

    async def keep(
        self, identity: assets.Identity, make: Make, source_asset_id: str | None = None
    ) -> assets.Asset:
        """The READY asset: the one that is there, or the one that is made now.

        Raises why, where its bytes are to be kept aside, once they are.
        """
        nonce = ids.new_id()
        try:
            # Who hangs up while this commits would leave a row that nobody makes READY.
            begun = await self._store.making.begin(identity, nonce, source_asset_id)
            if begun.state is assets.State.READY:
                return begun
            # A sweeper takes an older put for dead, so this one must be over by then.
            async with asyncio.timeout(self._most_seconds), self._slots[identity.bucket]:
                async with self._place(identity, nonce, begun.created_at) as place:
                    work = await make(place)
                    await self._drop_unused(identity.bucket, place, work)
                    if isinstance(work, Refused):
                        raise await self._keep_aside(identity, nonce, work)
                    stored, poster = await self._upload(identity, nonce, work)
                await failpoint("storage.put.before_ready")
                ready = await self._store.making.ready(identity, nonce, stored, poster)
                await failpoint("storage.put.after_ready")
                return ready
        except TimeoutError:
            raise errors.DeadlineExceeded(
                "DEADLINE_EXCEEDED",
                f"the put took more than {self._most_seconds:g} s; nothing was stored",
            ) from None
        except OSError as error:
            if troubles.is_disk_full(error):
                raise troubles.disk_full() from error
            raise
        finally:
            # Nothing to do for the put that made the asset READY; the rest of them leave nothing behind.
            await self._leave_nothing(nonce)

    @contextlib.asynccontextmanager
    async def _place(
        self, identity: assets.Identity, nonce: str, created_at: datetime
    ) -> AsyncIterator[arriving.Place]:
        async def begin(media_type: str) -> parts.Growing:
            key = assets.object_key(identity.account_id, identity.asset_id, nonce, media_type)
            await self._store.making.note_keys(nonce, [key])
            return self._blobs.grow(identity.bucket, key, media_type)

        with self._scratch.work() as path:
            place = arriving.Place(path, created_at, begin)
            try:
                yield place
            finally:
                if place.growing is not None:
                    await place.growing.settle()

    async def _drop_unused(
        self, bucket: assets.Bucket, place: arriving.Place, work: Work | Refused
    ) -> None:
        """What was sent and is not wanted goes before other keys take the place of its own."""
        growing = place.growing
        if growing is not None and (isinstance(work, Refused) or work.main.sent is not growing):
            await growing.settle()
            await self._blobs.discard(bucket, [growing.key])

    async def _keep_aside(
        self, identity: assets.Identity, nonce: str, refused: Refused
    ) -> errors.InvalidArgument:
        size_bytes = refused.path.stat().st_size
        what = assets.Facts(
            refused.sha256, size_bytes, refused.sha256, assets.UNKNOWN_MEDIA_TYPE, 0, 0
        )
        made = Made(refused.path, what)
        stored = self._named(identity, nonce, Work(made), made)
        await self._store.making.note_keys(nonce, [stored.object_key])
        await self._put(identity, stored, made)
        await failpoint("storage.quarantine.after_object")
        await self._store.making.quarantine(identity, nonce, stored, self._quarantine)
        log.error("put_quarantined", asset_id=identity.asset_id, why=refused.why.message)
        return assets.kept_aside(refused.sha256, refused.why.message)

    async def _upload(
        self, identity: assets.Identity, nonce: str, work: Work
    ) -> tuple[rows.Stored, rows.Poster | None]:
        stored = self._named(identity, nonce, work, work.main)
        poster = None
        if work.poster is not None:
            poster_identity = identity.poster()
            named = self._named(poster_identity, nonce, work, work.poster)
            poster = rows.Poster(poster_identity, named)
        keys = [stored.object_key, *([poster.stored.object_key] if poster else [])]
        await self._store.making.note_keys(nonce, keys)
        await failpoint("storage.put.after_keys")
        await self._put(identity, stored, work.main)
        if poster is not None and work.poster is not None:
            await failpoint("storage.put.before_poster")
            await self._put(poster.identity, poster.stored, work.poster)
        if identity.kind is assets.Kind.RENDITION:
            await failpoint("storage.fit.after_object")
        else:
            await failpoint("storage.put.after_object")
        return stored, poster

    def _named(self, identity: assets.Identity, nonce: str, work: Work, made: Made) -> rows.Stored:
        media_type = made.facts.media_type
        key = assets.object_key(identity.account_id, identity.asset_id, nonce, media_type)
        seconds = self._keep_seconds[work.kept_as or identity.kind]
        return rows.Stored(key, made.facts, timedelta(seconds=seconds) if seconds else None)

    async def _put(self, identity: assets.Identity, stored: rows.Stored, made: Made) -> None:
        if made.sent is not None:
            assert made.sent.key == stored.object_key
            await made.sent.finish(made.tail)
            return
        await self._blobs.put_file(
            identity.bucket, stored.object_key, made.path, stored.facts.media_type
        )

    async def _leave_nothing(self, nonce: str) -> None:
        """Cleans up to the end: the caller may hang up at any moment, while this runs too."""
        task = asyncio.create_task(self._clean_up(nonce))
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)
        await asyncio.shield(task)

    async def _clean_up(self, nonce: str) -> None:
        """Failing here is no loss: the sweeper finds the put."""
        try:
            async with asyncio.timeout(CLEAN_UP_SECONDS):
                left = await self._store.making.give_up(nonce)
                if left is not None:
                    await failpoint("storage.put.after_give_up")
                    await self._blobs.discard(left.bucket, left.object_keys)
                    await self._store.making.end_put(nonce)
        except Exception as error:
            log.warning("put_left_to_sweeper", nonce=nonce, error=repr(error))


class Puts:
    """Takes what senders send."""

    def __init__(
        self,
        settings: config.Settings,
        keeper: Keeper,
        workers: sandbox.MediaWorkers,
        signing: signer.Signer | None = None,
    ) -> None:
        self._settings = settings
        self._keeper = keeper
        self._workers = workers
        self._signer = signing
        self._files = ThreadPoolExecutor(FILE_THREADS, "scratch")

    async def put(self, header: Header, chunks: AsyncIterator[bytes]) -> assets.Asset:
        """Stores one upload or output. Idempotent. InvalidArgument: the bytes; DeadlineExceeded: the sender stalls."""
        try:
            answer = await self.take(header, chunks)
        except errors.ServiceError:
            await self._drop(chunks)
            raise
        await self._drop(chunks)
        return answer

    async def take(self, header: Header, chunks: AsyncIterator[bytes]) -> assets.Asset:
        """Stores what we read ourselves, from where clients put it; `chunks` is left alone when nothing is wanted."""
        limit_bytes = self.limit_bytes(header.identity.kind)
        assets.check_limit(header.size_bytes, limit_bytes)

        async def make(place: arriving.Place) -> Work | Refused:
            await failpoint("storage.put.after_row")
            arrived = await self._receive(header, chunks, place, limit_bytes)
            try:
                with refusing():
                    return await self._look_into(header, arrived, place)
            except errors.InvalidArgument as why:
                if arrived.sha256 != header.refused_sha256:
                    raise
                return Refused(arrived.path, arrived.sha256, why)

        return await self._keeper.keep(header.identity, make)

    async def _drop(self, chunks: AsyncIterator[bytes]) -> None:
        """Reads what a sender still sends. A grpc.aio client that is cut off while it writes sees INTERNAL instead of
        the answer. One that pauses is not writing and is not waited for.
        """
        left_bytes = self._settings.max_video_bytes
        with contextlib.suppress(TimeoutError, errors.ServiceError):
            while left_bytes > 0:
                async with asyncio.timeout(DROP_PAUSE_SECONDS):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                left_bytes -= len(chunk)

    def limit_bytes(self, kind: assets.Kind) -> int:
        """Most bytes on arrival. Raises InvalidArgument for what is made here only."""
        if kind is assets.Kind.INPUT_IMAGE:
            return self._settings.max_image_bytes
        if kind is assets.Kind.INPUT_VIDEO:
            return self._settings.max_input_video_bytes
        if kind is assets.Kind.OUTPUT_VIDEO:
            return self._settings.max_video_bytes
        sentence = "must be INPUT_IMAGE, INPUT_VIDEO or OUTPUT_VIDEO"
        raise errors.InvalidArgument(
            "INVALID_FIELD", f"kind: {sentence}", violations=[("kind", sentence)]
        )

    async def _receive(
        self, header: Header, chunks: AsyncIterator[bytes], place: arriving.Place, limit_bytes: int
    ) -> arriving.Arriving:
        """Takes what comes. The sender goes as fast as the file and S3 do."""
        size_bytes = 0
        said_bytes = header.size_bytes or limit_bytes
        # What clients sent is written anew, and a signature stands before what it signs.
        flows = header.identity.kind is assets.Kind.OUTPUT_VIDEO and self._signer is None
        with (place.path / "arrived").open("wb") as file:
            arrived = arriving.Arriving(file, self._files, place if flows else None)
            waiting: list[bytes] = []
            waiting_bytes = 0
            while (chunk := await self._next(chunks)) is not None:
                size_bytes += len(chunk)
                assets.check_limit(size_bytes, limit_bytes)
                if size_bytes > said_bytes:
                    break
                waiting.append(chunk)
                waiting_bytes += len(chunk)
                if waiting_bytes >= WRITE_BYTES:
                    full, waiting, waiting_bytes = waiting, [], 0
                    await arrived.take(full)
            await arrived.take(waiting)
        assets.check_arrived(header.size_bytes, header.sha256, size_bytes, arrived.sha256)
        return arrived

    async def _next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
        try:
            async with asyncio.timeout(self._settings.stall_seconds):
                return await anext(chunks, None)
        except TimeoutError:
            raise errors.DeadlineExceeded(
                "DEADLINE_EXCEEDED",
                f"nothing came for {self._settings.stall_seconds:g} s; send the whole file again",
            ) from None

    async def _look_into(
        self, header: Header, arrived: arriving.Arriving, place: arriving.Place
    ) -> Work:
        path, sha256 = arrived.path, arrived.sha256
        if header.identity.kind is assets.Kind.INPUT_IMAGE:
            return await self._image(path, sha256)
        if header.identity.kind is assets.Kind.INPUT_VIDEO:
            clean = path.with_name("clean")
            video = await self._workers.clean_video(path, clean)
            return Work(Made(clean, video_facts(video, sha256)))
        mark = facts.Mark(header.model, header.video_id, sha256, place.created_at)
        return await self._video(arrived, mark, place.growing)

    async def _image(self, arrived: Path, sha256: str) -> Work:
        clean = arrived.with_name("clean")
        measured = await self._workers.sanitise_image(arrived, clean)
        return Work(Made(clean, image_facts(measured, sha256)))

    async def _video(
        self, arrived: arriving.Arriving, mark: facts.Mark, growing: parts.Growing | None
    ) -> Work:
        path, poster = arrived.path, arrived.path.with_name("poster")
        measured = await self._workers.inspect_video(path)
        first_frame = await self._workers.poster(path, poster)
        marked, tail = path.with_name("marked"), path.with_name("tail")
        added = b""
        if growing is not None and (await self._workers.mark_tail(path, tail, mark)).size_bytes:
            added = tail.read_bytes()
            sha256, size_bytes = arrived.with_tail(added)
        else:
            stored = await self._workers.mark_video(path, marked, mark)
            if self._signer is not None:
                signed = await self._signer.sign(marked, path, signer.MARKED)
                marked, stored = signed or (marked, stored)
            growing, sha256, size_bytes = None, stored.sha256, stored.size_bytes
        what = assets.Facts(
            sha256=sha256,
            size_bytes=size_bytes,
            source_sha256=arrived.sha256,
            media_type=measured.media_type,
            width=measured.width,
            height=measured.height,
            duration_ms=measured.duration_ms,
            fps=measured.fps,
            codec=measured.codec,
            has_audio=measured.has_audio,
        )
        return Work(
            Made(marked, what, growing, added),
            Made(poster, image_facts(first_frame, arrived.sha256)),
        )


def image_facts(measured: facts.ImageFacts, source_sha256: str) -> assets.Facts:
    """What is kept of an image."""
    return assets.Facts(
        sha256=measured.sha256,
        size_bytes=measured.size_bytes,
        source_sha256=source_sha256,
        media_type=measured.media_type,
        width=measured.width,
        height=measured.height,
    )


def video_facts(made: facts.MadeVideo, source_sha256: str) -> assets.Facts:
    """What is kept of a video that was made here."""
    return assets.Facts(
        sha256=made.sha256,
        size_bytes=made.size_bytes,
        source_sha256=source_sha256,
        media_type=made.media_type,
        width=made.width,
        height=made.height,
        duration_ms=made.duration_ms,
        fps=made.fps,
        codec=made.codec,
        has_audio=made.has_audio,
    )


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What the sandbox says, as callers are told."""
    try:
        yield
    except facts.MediaRefused as refused:
        raise assets.refusal(refused) from refused
    except facts.MediaBusy as busy:
        raise errors.Unavailable(
            "DEPENDENCY_UNAVAILABLE", str(busy), retry_after_seconds=2
        ) from busy
    except facts.MediaWorkerFailed as failed:
        log.error("media_worker_failed", error=str(failed))
        raise errors.Unavailable(
            "DEPENDENCY_UNAVAILABLE", "media work failed here; try again", retry_after_seconds=1
        ) from failed
