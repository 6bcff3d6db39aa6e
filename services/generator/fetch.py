"""Downloads finished renders into storage, those first whose content expires first, and ends their videos."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta

from framewire.storage.v1 import storage_pb2
from kit import errors, loops, telemetry
from kit.failpoints import failpoint
from services.generator import assets, attempts, catalogue, config, pools, progress, quota
from services.generator.providers import contract
from services.generator.store import Store, rows, videos

log = telemetry.logger(__name__)

GONE_RETRY_SECONDS = 1.0
CUT_RETRY_SECONDS = 1.0
STORAGE_RETRY_SECONDS = 2.0
SLOWEST_RETRY_SECONDS = 30.0
GONE_COUNT = 5
TRIES_FIRST = 3
UNUSABLE_REASONS = ("NOT_A_VIDEO", "TOO_LARGE")


class Fetcher:
    """The loop over finished renders."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        pools_: pools.Pools,
        assets_: assets.Assets,
        teller: progress.Teller,
    ) -> None:
        self._settings = settings
        self._store = store
        self._pools = pools_
        self._assets = assets_
        self._teller = teller
        self._quota = quota.Quota(store.accounts, pools_)
        self._running: set[asyncio.Task[None]] = set()
        self._lease = timedelta(seconds=settings.fetch_lease_seconds)
        self.wake = loops.Wake()

    async def run(self, stopping: asyncio.Event) -> None:
        """Fetches until told to stop."""
        await loops.every(
            "fetcher", self._settings.loop_seconds, self.run_once, stopping, self.wake
        )
        if self._running:
            await asyncio.wait(self._running)

    async def run_once(self) -> None:
        """Begins to fetch what is due, as far as there is room; a slow one holds nobody else up."""
        room = self._settings.concurrent_fetches - len(self._running)
        if room <= 0:
            return
        for attempt in await self._store.renders.claim_fetch(self._lease, room):
            task = asyncio.create_task(self._guarded(attempt))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.wake.ring()

    async def _guarded(self, attempt: rows.Attempt) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                renewing = group.create_task(self._renew(attempt))
                await self._fetch(attempt)
                renewing.cancel()
        except* Exception as group_error:
            error = repr(group_error.exceptions)
            log.error("fetch_failed", attempt_id=attempt.attempt_id, error=error, exc_info=True)

    async def _renew(self, attempt: rows.Attempt) -> None:
        while True:
            await asyncio.sleep(self._lease.total_seconds() / 3)
            await self._store.renders.renew_fetch(attempt, self._lease)

    async def _fetch(self, attempt: rows.Attempt) -> None:
        assert attempt.provider_account is not None
        account = self._pools.accounts[attempt.provider_account]
        provider = self._pools.providers[account.name]
        # One that fails again and again draws from what others leave over.
        use = quota.Use.DOWNLOAD if attempt.fetch_tries < TRIES_FIRST else quota.Use.RETRY
        digest = Digest()
        await failpoint("generator.fetch.before_put")
        try:
            # A fetch that died after its Puts left nothing to download again.
            stored = [
                await self._assets.stored_output(attempt, variant)
                for variant in range(max(1, attempt.job.spec.variants))
            ]
            if None in stored:
                outputs = await self._outputs(attempt, account, provider, use)
                # Fewer may have come out than were asked for.
                stored = stored[: len(outputs)]
                for variant, output_id in enumerate(outputs[: len(stored)]):
                    if stored[variant] is None:
                        digest = Digest()
                        await self._quota.take(account, use)
                        stored[variant] = await self._stream(
                            attempt, provider, variant, output_id, digest
                        )
        except contract.ContentGone as gone:
            await self._gone(attempt, account, str(gone))
        except contract.ProviderTrouble as trouble:
            await self._quota.hear(account, refused=trouble.too_early)
            seconds = trouble.retry_after_seconds or _slower(CUT_RETRY_SECONDS, attempt.fetch_tries)
            await self._again(attempt, seconds, str(trouble))
        except errors.ServiceError as error:
            if error.reason in UNUSABLE_REASONS:
                await self._unusable(attempt, digest.of(error.reason), error.message)
            else:
                seconds = _slower(STORAGE_RETRY_SECONDS, attempt.fetch_tries)
                await self._again(attempt, seconds, f"storage: {error.message}")
        else:
            await failpoint("generator.fetch.after_put")
            if await self._store.videos.complete(attempt, [s for s in stored if s]):
                log.info("video_completed", video_id=attempt.video_id)

    async def _outputs(
        self,
        attempt: rows.Attempt,
        account: catalogue.ProviderAccount,
        provider: contract.Provider,
        use: quota.Use,
    ) -> tuple[str, ...]:
        """What there is to download, at least one; raises as the download itself does."""
        assert attempt.provider_job_id is not None
        if not provider.outputs_are_listed:
            return (attempt.provider_job_id,)
        await self._quota.take(account, use)
        job = await provider.get(attempt.provider_job_id)
        if job is None or not job.outputs:
            raise contract.ContentGone("the job shows no videos")
        return job.outputs

    async def _stream(
        self,
        attempt: rows.Attempt,
        provider: contract.Provider,
        variant: int,
        output_id: str,
        digest: Digest,
    ) -> storage_pb2.Asset:
        cut: list[contract.ProviderTrouble] = []
        async with provider.content(output_id) as (size, chunks):
            await self._teller.stage(attempt, attempts.State.FETCHING)

            async def hashed() -> AsyncIterator[bytes]:
                try:
                    async for chunk in chunks:
                        digest.add(chunk)
                        yield chunk
                    digest.whole = True
                except Exception as error:
                    # What the client of storage raises would hide it.
                    cut.append(contract.ProviderTrouble(f"the download was cut: {error!r}"))
                    raise

            try:
                return await self._assets.store_output(
                    attempt, variant, size, hashed(), attempt.job.spec
                )
            except (errors.ServiceError, asyncio.CancelledError) as error:
                if cut:
                    raise cut[0] from error
                raise

    async def _gone(
        self, attempt: rows.Attempt, account: catalogue.ProviderAccount, message: str
    ) -> None:
        """Content may be missing for a moment after completion; gone is what was missing all along for a long while."""
        count = attempt.not_found_count
        spent = sum(_slower(GONE_RETRY_SECONDS, number) for number in range(count))
        if count >= GONE_COUNT and spent >= account.lost_after_seconds:
            verdict = videos.Verdict(
                "PROVIDER_LOST", "the provider lost the finished video", True, billed=True
            )
            await self._store.videos.fail(attempt, verdict, another_try=False)
        else:
            seconds = _slower(GONE_RETRY_SECONDS, count)
            await self._again(attempt, seconds, f"content not there: {message}", gone=True)

    async def _unusable(self, attempt: rows.Attempt, sha256: str, message: str) -> None:
        """The same bad bytes twice are the provider's fault; other bytes may have been cut on the way."""
        if attempt.bad_sha256 == sha256:
            verdict = videos.Verdict(
                "OUTPUT_UNUSABLE", f"what came is no video: {message}", True, billed=True
            )
            await self._store.videos.fail(attempt, verdict, another_try=False)
        else:
            await self._again(attempt, CUT_RETRY_SECONDS, message, bad_sha256=sha256)

    async def _again(
        self,
        attempt: rows.Attempt,
        seconds: float,
        message: str,
        *,
        bad_sha256: str | None = None,
        gone: bool = False,
    ) -> None:
        log.warning("fetch_again", attempt_id=attempt.attempt_id, message=message)
        await self._store.renders.fetch_again(
            attempt, timedelta(seconds=seconds), message[:300], bad_sha256=bad_sha256, gone=gone
        )


class Digest:
    """What was downloaded, as one value; storage may refuse it before it was read to its end."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.whole = False

    def add(self, chunk: bytes) -> None:
        """The next bytes."""
        self._sha256.update(chunk)

    def of(self, reason: str) -> str:
        """The hash of the whole; of a part, which is another each time, why it was refused."""
        return self._sha256.hexdigest() if self.whole else reason


def _slower(seconds: float, tries: int) -> float:
    return min(SLOWEST_RETRY_SECONDS, seconds * 2 ** min(tries, 10))
