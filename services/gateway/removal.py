"""Deletion's second half: what storage keeps of a deleted video. Done again, by the sweeper, until it is done."""

from __future__ import annotations

from kit import errors, telemetry
from kit.failpoints import failpoint
from services.gateway import messages, peers, store, videos

log = telemetry.logger(__name__)


class Removal:
    """Removes the assets of deleted videos."""

    def __init__(self, store_: store.Store, peers_: peers.Peers) -> None:
        self._store = store_
        self._peers = peers_

    async def remove(self, video: videos.Video) -> None:
        """Removes outputs, late ones too, and the input image where nothing else needs it. Idempotent.

        Raises what storage answers; then nothing is noted, and it is all done again.
        """
        if video.unpin_due:
            await self._peers.unpin(video)
            await self._store.sweeping.unpinned(video.video_id)
        for output in (*messages.outputs(video), *messages.late_outputs(video)):
            await self._peers.delete_asset(video.account_id, output.asset_id)
        await failpoint("gateway.delete.after_assets")
        if video.input_image_id and not await self._store.removals.image_is_used(video):
            try:
                await self._peers.delete_asset(video.account_id, video.input_image_id)
            except errors.FailedPrecondition:  # another video has pinned it: it goes with that one
                log.info("image_kept", video_id=video.video_id, asset_id=video.input_image_id)
        await self._store.removals.removed(video, messages.wordless(video))
