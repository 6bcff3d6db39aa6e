"""Brings the outputs of a finished render into storage: from the provider, or from our own disk where they had to wait.

One pass tries each open output once. What it finds out is written down per output, so any worker can go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from framewire.storage.v1 import storage_pb2
from kit import errors, telemetry
from kit.failpoints import failpoint
from services.generator import assets, catalogue, config, films, outputs, pools, quota
from services.generator.providers import contract
from services.generator.store import Store, rows

log = telemetry.logger(__name__)

UNUSABLE_REASONS = ("NOT_A_VIDEO", "TOO_LARGE")
SHA256_DIGITS = 64
RENDITION_TRIES = 5
"""So often a smaller version is tried while storage does not make it; then the video goes without it."""
TRIES_FIRST = 3
RETRY_SECONDS = 1.0
SLOWEST_RETRY_SECONDS = 30.0
SPOOL_BEFORE_EXPIRY_SECONDS = 1200.0
"""Of provider time: how long before expiry the bytes go to our own disk, where storage is still away."""


@dataclass(frozen=True, slots=True)
class Render:
    """A finished render: of which attempt, where, until when, and how often it was tried."""

    attempt: rows.Attempt
    account: catalogue.ProviderAccount
    provider_job_id: str
    expires_at: datetime
    tries: int
    unlisted_count: int
    """How often in a row the provider did not show what there is to fetch, and since how long."""
    unlisted_seconds: float


@dataclass(slots=True)
class Spent:
    """Where the time of a pass went, over all outputs; of none that an earlier pass had stored."""

    token_wait_seconds: float = 0.0
    download_seconds: float = 0.0
    """To the last byte. Storage receives while we do."""
    store_seconds: float = 0.0
    """From there to storage's answer."""

    def add(self, asked: float, started: float, whole_at: float | None) -> None:
        """One output, which is stored now. Moments of the monotonic clock."""
        now = time.monotonic()
        self.token_wait_seconds += started - asked
        self.download_seconds += (whole_at or now) - started
        self.store_seconds += now - (whole_at or now)


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass came to: the end, with what storage has; or when to go on."""

    ended: outputs.Ended | None
    stored: dict[int, storage_pb2.Asset]
    again_seconds: float
    message: str
    unlisted: bool = False
    """The provider did not show what there is to fetch."""
    spent: Spent = field(default_factory=Spent)


@dataclass(slots=True)
class _Pass:
    render: Render
    begun: Callable[[], Awaitable[None]]
    left_seconds: float
    stored: dict[int, storage_pb2.Asset] = field(default_factory=dict[int, storage_pb2.Asset])
    storage_trouble: str = ""
    waits: list[float] = field(default_factory=list[float])
    message: str = ""
    spent: Spent = field(default_factory=Spent)

    @property
    def attempt_id(self) -> str:
        return self.render.attempt.attempt_id

    @property
    def expired(self) -> bool:
        return self.left_seconds <= 0

    def again(self, seconds: float, message: str) -> None:
        """To be tried again, this soon at the most."""
        self.waits.append(seconds)
        self.message = message


class Downloads:
    """Passes over finished renders, those in time and those that turned up late."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        pools_: pools.Pools,
        assets_: assets.Assets,
        quota_: quota.Quota,
    ) -> None:
        self._outputs = store.outputs
        self._pools = pools_
        self._assets = assets_
        self._quota = quota_
        self._films = films.Films(settings.spool_dir / "films", settings.film_spool_bytes)
        self._spool_seconds = SPOOL_BEFORE_EXPIRY_SECONDS / settings.time_factor
        self._keep_seconds = settings.film_keep_seconds

    async def drop_unneeded(self) -> None:
        """Removes films from our disk that storage has by now, or that nobody waits for."""
        kept = self._films.kept()
        for attempt_id, variant in await self._outputs.unneeded(kept) if kept else ():
            self._films.remove(attempt_id, variant)

    async def once(self, render: Render, begun: Callable[[], Awaitable[None]]) -> Passed:
        """One pass. `begun` is called when bytes begin to come."""
        left_seconds = await self._outputs.seconds_until(render.expires_at)
        made = _Pass(render, begun, left_seconds)
        known = await self._outputs.of(made.attempt_id)
        await self._find_stored(made, known)
        try:
            known = await self._planned(made, known)
        except contract.ProviderTrouble as trouble:
            gone = isinstance(trouble, contract.ContentGone)
            if not known:
                return self._unlisted(made, trouble, gone)
            for output in known:
                await (self._gone if gone else self._trouble)(made, output, trouble)
        else:
            for output in known:
                if output.state in outputs.OPEN and output.variant not in made.stored:
                    await self._try(made, output)
        return await self._result(made)

    async def renditions(
        self, render: Render, stored: Mapping[int, storage_pb2.Asset]
    ) -> dict[int, list[storage_pb2.Asset]]:
        """The smaller versions that were asked for, by variant. One that cannot be made is left out: the video counts.

        Raises ServiceError when storage should be asked again.
        """
        made: dict[int, list[storage_pb2.Asset]] = {variant: [] for variant in stored}
        for variant, output in stored.items():
            for height in render.attempt.job.spec.rendition_heights:
                if height >= output.height:
                    continue  # it came out smaller than it was to be
                try:
                    smaller = await self._assets.rendition(render.attempt, output, height)
                except errors.ServiceError as error:
                    final = isinstance(error, errors.InvalidArgument | errors.NotFound)
                    if not final and render.tries < RENDITION_TRIES:
                        raise
                    log.error(
                        "rendition_left_out",
                        attempt_id=render.attempt.attempt_id,
                        height=height,
                        reason=error.reason,
                    )
                else:
                    made[variant].append(smaller)
        return made

    async def _find_stored(self, made: _Pass, known: list[outputs.Output]) -> None:
        """A pass that died after its Puts left nothing to download again."""
        ended = {o.variant for o in known if o.state not in {*outputs.OPEN, outputs.State.STORED}}
        try:
            for variant in range(max(1, made.render.attempt.job.spec.variants)):
                if variant in ended:
                    continue
                asset = await self._assets.stored_output(made.render.attempt, variant)
                if asset is not None:
                    made.stored[variant] = asset
        except errors.ServiceError as error:
            made.storage_trouble = error.message

    async def _planned(self, made: _Pass, known: list[outputs.Output]) -> list[outputs.Output]:
        """The outputs, written down. Raises as a download does where the provider does not show what there is."""
        asked = max(1, made.render.attempt.job.spec.variants)
        waiting = [o.variant for o in known if o.state in outputs.OPEN] if known else range(asked)
        if any(
            variant not in made.stored and not self._films.has(made.attempt_id, variant)
            for variant in waiting
        ):
            planned = outputs.planned(known, await self._listed(made.render, asked), asked)
            await self._outputs.plan(made.attempt_id, planned)
        for variant in made.stored:
            await self._outputs.stored(made.attempt_id, variant)
        return await self._outputs.of(made.attempt_id)

    async def _listed(self, render: Render, asked: int) -> tuple[str, ...]:
        provider = self._pools.providers[render.account.name]
        if not provider.outputs_are_listed:
            return (render.provider_job_id,)
        await self._quota.take(render.account, _use(render))
        job = await provider.get(render.provider_job_id)
        if job is None or not job.outputs:
            raise contract.ContentGone("the job shows no videos")
        return job.outputs[:asked]

    def _unlisted(self, made: _Pass, trouble: contract.ProviderTrouble, gone: bool) -> Passed:
        render = made.render
        long = gone and render.unlisted_count >= outputs.GONE_COUNT
        if made.expired or (long and render.unlisted_seconds >= render.account.lost_after_seconds):
            nothing = outputs.Output(0, "?", storage_refused=bool(made.storage_trouble))
            ended = outputs.ended([outputs.given_up(nothing)])
            return Passed(ended, {}, 0, str(trouble))
        return Passed(None, {}, self._wait(made, trouble, gone), str(trouble), unlisted=gone)

    async def _try(self, made: _Pass, output: outputs.Output) -> None:
        digest = Digest()
        try:
            if self._films.has(made.attempt_id, output.variant):
                asset = await self._from_film(made, output, digest)
            elif made.storage_trouble:
                await self._refused(made, output, made.storage_trouble)
                return
            else:
                asset = await self._from_provider(made, output, digest)
        except FileNotFoundError:
            made.again(RETRY_SECONDS, "another process is storing it")
        except contract.ContentGone as gone:
            await self._gone(made, output, gone)
        except contract.ProviderTrouble as trouble:
            await self._trouble(made, output, trouble)
        except errors.ServiceError as error:
            if error.reason in UNUSABLE_REASONS:
                # Of what storage keeps aside it says the hash, also when it did not read it again.
                sha256 = error.metadata.get("sha256") or digest.of(error.reason)
                await self._bad(made, output, sha256, error.message)
            else:
                await self._refused(made, output, error.message)
        else:
            made.stored[output.variant] = asset
            await self._outputs.stored(made.attempt_id, output.variant)
            self._films.remove(made.attempt_id, output.variant)

    async def _from_film(
        self, made: _Pass, output: outputs.Output, digest: Digest
    ) -> storage_pb2.Asset:
        attempt, variant = made.render.attempt, output.variant
        chunks = digest.fed(self._films.read(attempt.attempt_id, variant))
        size = self._films.size(attempt.attempt_id, variant)
        return await self._assets.store_output(attempt, variant, size, chunks, _refused(output))

    async def _from_provider(
        self, made: _Pass, output: outputs.Output, digest: Digest
    ) -> storage_pb2.Asset:
        attempt, asked = made.render.attempt, time.monotonic()
        await self._quota.take(made.render.account, _use(made.render))
        started = time.monotonic()
        provider = self._pools.providers[made.render.account.name]
        async with provider.content(output.output_id) as (size, chunks):
            await made.begun()
            try:
                asset = await self._assets.store_output(
                    attempt, output.variant, size, digest.fed(chunks), _refused(output)
                )
                made.spent.add(asked, started, digest.whole_at)
                return asset
            except (errors.ServiceError, asyncio.CancelledError) as error:
                if digest.cut:
                    # What the client of storage raises would hide it.
                    raise digest.cut from error
                raise

    async def _refused(self, made: _Pass, output: outputs.Output, message: str) -> None:
        """Storage is away. The provider waits until expiry; shortly before, our own disk takes over."""
        made.storage_trouble = message
        now = await self._outputs.trouble(
            made.attempt_id, output.variant, f"storage: {message}"[:300], storage=True
        )
        if now is None:
            return
        made.again(_slower(2 * RETRY_SECONDS, made.render.tries), f"storage: {message}")
        here = self._films.has(made.attempt_id, now.variant)
        if not here and made.left_seconds < self._spool_seconds:
            try:
                await self._spool(made, now)
                return
            except contract.ContentGone as gone:
                await self._gone(made, now, gone)
                return
            except (contract.ProviderTrouble, films.SpoolFull) as trouble:
                log.error("film_not_spooled", attempt_id=made.attempt_id, error=str(trouble))
        await self._end_if_over(made, now)

    async def _spool(self, made: _Pass, output: outputs.Output) -> None:
        await self._quota.take(made.render.account, _use(made.render))
        provider = self._pools.providers[made.render.account.name]
        digest = Digest()
        async with provider.content(output.output_id) as (size, chunks):
            await made.begun()
            await self._films.keep(
                made.attempt_id, output.variant, digest.fed(chunks, at_least=size or 1)
            )
        await failpoint("generator.fetch.after_spool")
        await self._outputs.spooled(made.attempt_id, output.variant)

    async def _gone(
        self, made: _Pass, output: outputs.Output, trouble: contract.ProviderTrouble
    ) -> None:
        now = await self._outputs.gone(made.attempt_id, output.variant, str(trouble)[:300])
        if now is not None:
            lost_after = made.render.account.lost_after_seconds
            await self._ended(made, now, outputs.after_gone(now, lost_after, expired=made.expired))
            made.again(self._wait(made, trouble, gone=True), f"content not there: {trouble}")

    async def _trouble(
        self, made: _Pass, output: outputs.Output, trouble: contract.ProviderTrouble
    ) -> None:
        await self._quota.hear(made.render.account, refused=trouble.too_early)
        now = await self._outputs.trouble(
            made.attempt_id, output.variant, str(trouble)[:300], storage=False
        )
        if now is not None:
            made.again(self._wait(made, trouble, gone=False), str(trouble))
            await self._end_if_over(made, now)

    async def _bad(self, made: _Pass, output: outputs.Output, sha256: str, message: str) -> None:
        """The same bad bytes twice are the provider's fault; other bytes may have been cut on the way."""
        log.error("output_no_video", attempt_id=made.attempt_id, variant=output.variant)
        now = await self._outputs.bad(made.attempt_id, output.variant, sha256, message[:300])
        self._films.remove(made.attempt_id, output.variant)
        if now is not None:
            made.again(RETRY_SECONDS, message)
            await self._ended(made, now, outputs.after_bad(now))
            await self._end_if_over(made, now)

    async def _end_if_over(self, made: _Pass, output: outputs.Output) -> None:
        after = outputs.after_trouble(
            output, expired=made.expired, spool_keep_seconds=self._keep_seconds
        )
        await self._ended(made, output, after)

    async def _ended(self, made: _Pass, before: outputs.Output, after: outputs.Output) -> None:
        if after.state is not before.state:
            log.error(
                "output_given_up",
                attempt_id=made.attempt_id,
                variant=after.variant,
                state=str(after.state),
                message=after.message,
            )
            await self._outputs.end(made.attempt_id, after)

    async def _result(self, made: _Pass) -> Passed:
        found = await self._outputs.of(made.attempt_id)
        ended = outputs.ended(found)
        if ended is not None and not made.stored.keys() >= set(ended.variants):
            if made.storage_trouble:
                ended = None  # what storage has, it cannot say now
                made.again(RETRY_SECONDS, made.storage_trouble)
            else:
                # Its owner, or its retention, has removed it meanwhile.
                there = tuple(variant for variant in ended.variants if variant in made.stored)
                ended = replace(ended, variants=there) if there else outputs.ALL_REMOVED
        seconds = min(made.waits, default=RETRY_SECONDS)
        return Passed(ended, made.stored, seconds, made.message, spent=made.spent)

    def _wait(self, made: _Pass, trouble: contract.ProviderTrouble, gone: bool) -> float:
        if trouble.retry_after_seconds:
            return trouble.retry_after_seconds
        if not gone:
            return _slower(RETRY_SECONDS, made.render.tries)
        # Of the provider's time: content may be missing for a moment after completion.
        lost_after = made.render.account.lost_after_seconds
        return min(lost_after / 20, lost_after / 600 * 2 ** min(made.render.tries, 10))


def _refused(output: outputs.Output) -> str:
    """The hash of the bytes that were no video last time; empty where only a part of them came."""
    sha256 = output.bad_sha256 or ""
    return sha256 if len(sha256) == SHA256_DIGITS else ""


class Digest:
    """What was downloaded, as one value; storage may refuse it before it was read to its end."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.whole_at: float | None = None
        self.cut: contract.ProviderTrouble | None = None

    async def fed(self, chunks: AsyncIterator[bytes], at_least: int = 0) -> AsyncIterator[bytes]:
        """The chunks as they come. Raises ProviderTrouble where they end short."""
        size = 0
        try:
            async for chunk in chunks:
                self._sha256.update(chunk)
                size += len(chunk)
                yield chunk
            if size < at_least:
                raise contract.ProviderTrouble(f"{size} of {at_least} bytes came")
        except FileNotFoundError:
            raise
        except Exception as error:
            self.cut = contract.ProviderTrouble(f"the download was cut: {error!r}")
            raise self.cut from error
        self.whole_at = time.monotonic()

    def of(self, reason: str) -> str:
        """The hash of the whole; of a part, which is another each time, why it was refused."""
        return self._sha256.hexdigest() if self.whole_at is not None else reason


def _use(render: Render) -> quota.Use:
    """One that fails again and again draws from what others leave over."""
    return quota.Use.DOWNLOAD if render.tries < TRIES_FIRST else quota.Use.RETRY


def _slower(seconds: float, tries: int) -> float:
    return min(SLOWEST_RETRY_SECONDS, seconds * 2 ** min(tries, 10))
