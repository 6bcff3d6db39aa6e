"""Images fetched from URLs: only from public addresses, resolved once and connected to as resolved, within bounds."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import ssl
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urljoin

import certifi

from kit import egress, errors, telemetry
from services.storage import assets, config, fetching, puts, store
from services.storage.store import announced

log = telemetry.logger(__name__)

FETCHERS = 4
MOST_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Imports:
    """Fetches images. Its threads are bounded; each fetch as a whole is too."""

    def __init__(self, settings: config.Settings, store_: store.Store, puts_: puts.Puts) -> None:
        self._settings = settings
        self._store = store_
        self._puts = puts_
        self._networks = egress.networks(settings.import_networks)
        self._trust = ssl.create_default_context(
            cafile=str(settings.import_ca_file or Path(certifi.where()))
        )
        self._threads = ThreadPoolExecutor(FETCHERS, "import")

    async def fetch(self, identity: assets.Identity, url: str) -> assets.Asset:
        """The image at that URL as an asset. Idempotent by the identity; only what was stored binds it."""
        upload = announced.Upload(
            upload_id=identity.asset_id,
            account_id=identity.account_id,
            owner=identity.owner,
            way=announced.Way.IMPORT,
            fingerprint=hashlib.sha256(url.encode()).hexdigest(),
        )
        before = await self._store.announced.find(identity.account_id, identity.asset_id)
        if before is not None:
            announced.check_same(before, upload)
            ready = await self._store.library.ready(identity.asset_id)
            if ready is not None:
                return ready
        try:
            async with asyncio.timeout(self._settings.import_seconds), self._open(url) as fetch:
                header = puts.Header(identity)
                asset = await self._puts.take(header, _pieces(fetch))
        except errors.DeadlineExceeded:
            raise _failed("its server stalls") from None
        except TimeoutError:
            raise _failed(f"it took more than {self._settings.import_seconds:g} s") from None
        except (http.client.HTTPException, OSError) as error:
            log.info("import_failed", error=repr(error)[:300])
            raise _failed("its server did not answer as it should") from error
        await self._store.announced.add(upload, self._settings.import_keep_seconds)
        return asset

    @asynccontextmanager
    async def _open(self, url: str) -> AsyncIterator[fetching.Fetch]:
        """What gives the bytes, after redirects, each of which must be allowed in itself."""
        for _ in range(MOST_REDIRECTS + 1):
            target = egress.target(url)
            address = egress.check(await resolve(target), target.port, self._networks)
            async with fetching.Fetch(self._threads, target, address, self._trust) as fetch:
                answer = await fetch.ask()
                if answer.status == http.HTTPStatus.OK:
                    assets.check_limit(answer.length or 0, self._settings.max_image_bytes)
                    yield fetch
                    return
                location = answer.getheader("location")
                if answer.status not in _REDIRECTS or not location:
                    raise _failed(f"its server answered {answer.status}")
                url = urljoin(url, location)
        raise _failed(f"it redirects more than {MOST_REDIRECTS} times")


async def resolve(target: egress.Target) -> list[str]:
    """All addresses of a host. Raises FailedPrecondition/IMPORT_FAILED."""
    try:
        return await egress.resolve(target)
    except OSError:
        raise _failed("its host is not known") from None


async def _pieces(fetch: fetching.Fetch) -> AsyncIterator[bytes]:
    while piece := await fetch.read():
        yield piece


def _failed(why: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        "IMPORT_FAILED",
        f"the image could not be fetched: {why}; check the URL, or upload the image",
    )
