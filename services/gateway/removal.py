"""Deletion's second half: what the others keep of a deleted video. Done again, by the sweeper, until it is done."""

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
        """Removes outputs, late ones too, inputs where nothing else needs them, and the generator's copy of the prompt.

        Idempotent. Raises what the others answer; then nothing is noted, and it is all done again.
        """
        spec = messages.stored_spec(video)
        if video.unpin_due:
            await self._peers.unpin(video)
            await self._store.sweeping.unpinned(video.video_id)
        for output in (*messages.outputs(video), *messages.late_outputs(video)):
            await self._peers.delete_asset(video.account_id, output.asset_id)
        await failpoint("gateway.delete.after_assets")
        for asset_id in sorted({each.asset_id for each in messages.spec_inputs(spec)}):
            if await self._store.removals.is_used(video, asset_id):
                continue
            try:
                await self._peers.delete_upload(video.account_id, asset_id)
            except errors.FailedPrecondition:  # another video has pinned it: it goes with that one
                log.info("input_kept", video_id=video.video_id, asset_id=asset_id)
        await failpoint("gateway.delete.before_prompt")
        await self._peers.erase_prompt(video)
        await self._store.removals.removed(video, messages.wordless(video))
