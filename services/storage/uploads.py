"""What clients PUT into S3 themselves: announced, signed for, and taken from there as any other upload is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from kit import errors, ids
from kit.failpoints import failpoint
from services.storage import assets, blobs, config, puts, store
from services.storage.store import announced


@dataclass(frozen=True, slots=True)
class Signed:
    """Where to PUT, and how."""

    upload_id: str
    url: str
    headers: Mapping[str, str]
    expires_at: datetime


class Uploads:
    """Presigned uploads."""

    def __init__(
        self, settings: config.Settings, store_: store.Store, blobs_: blobs.Blobs, puts_: puts.Puts
    ) -> None:
        self._settings = settings
        self._store = store_
        self._blobs = blobs_
        self._puts = puts_

    async def create(self, account_id: str, owner: str, size_bytes: int, media_type: str) -> Signed:
        """Announces an upload and signs a URL for exactly that size and type. Idempotent by (account, owner)."""
        identity = assets.Identity(account_id, owner, assets.uploaded_kind(media_type))
        assets.check_limit(size_bytes, self._puts.limit_bytes(identity.kind))
        text = f"{size_bytes} {media_type}"
        upload = await self._store.announced.add(
            announced.Upload(
                upload_id=identity.asset_id,
                account_id=identity.account_id,
                owner=identity.owner,
                way=announced.Way.PRESIGNED,
                fingerprint=hashlib.sha256(text.encode()).hexdigest(),
                object_key=assets.incoming_key(identity, ids.new_id(), media_type),
                media_type=media_type,
                size_bytes=size_bytes,
            ),
            self._settings.upload_keep_seconds,
        )
        assert upload.object_key is not None
        await failpoint("storage.upload.after_row")
        headers = {"content-length": str(size_bytes), "content-type": media_type}
        url, expires_at = self._blobs.sign_put(
            identity.bucket, upload.object_key, headers, self._settings.upload_url_seconds
        )
        return Signed(upload.upload_id, url, headers, expires_at)

    async def complete(self, account_id: str, upload_id: str) -> assets.Asset:
        """Takes what was PUT. Idempotent. Whatever comes of it, nothing stays under the incoming key."""
        upload = await self._store.announced.find(account_id, upload_id)
        if upload is None or upload.object_key is None:
            raise errors.NotFound(
                "UPLOAD_NOT_FOUND",
                "there is no such upload in this account, or its time is over; create a new one",
            )
        assert upload.media_type is not None
        kind = assets.uploaded_kind(upload.media_type)
        identity = assets.Identity(account_id, upload.owner, kind)
        ready = await self._store.library.ready(upload_id)
        if ready is not None:
            return ready
        size_bytes = await self._blobs.size(identity.bucket, upload.object_key)
        if size_bytes is None:
            raise errors.FailedPrecondition(
                "UPLOAD_INCOMPLETE", "nothing has arrived at the upload's URL; PUT the bytes first"
            )
        assert upload.size_bytes is not None
        await failpoint("storage.complete.before_take")
        try:
            assets.check_arrived(upload.size_bytes, "", size_bytes, "")
            chunks = self._blobs.read(identity.bucket, upload.object_key, 0, size_bytes)
            taken = await self._puts.take(puts.Header(identity, size_bytes), chunks)
        except errors.InvalidArgument:
            # The URL is good for another try with the right bytes.
            await failpoint("storage.complete.after_refusal")
            await self._blobs.remove(identity.bucket, [upload.object_key])
            raise
        except errors.DeadlineExceeded:
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE",
                "the object store is slow to give what was PUT; try again",
                retry_after_seconds=5,
            ) from None
        # Stopped here, or PUT once more: the sweeper removes it when the upload's time is over.
        await failpoint("storage.complete.after_take")
        await self._blobs.remove(identity.bucket, [upload.object_key])
        await failpoint("storage.complete.after_object")
        return taken
