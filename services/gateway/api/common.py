"""What the services share."""

from __future__ import annotations

from kit import errors, rpc
from services.gateway import auth, store, videos


def caller() -> auth.Caller:
    """Who makes the call that is being served."""
    return rpc.caller()


async def visible(videos_: store.VideoStore, video_id: str) -> videos.Video:
    """A video that the caller may see. Raises NotFound/VIDEO_NOT_FOUND for every other."""
    video = await videos_.get(video_id)
    if video is None or video.state in videos.HIDDEN or not caller().sees(video):
        raise video_not_found()
    return video


def video_not_found(video_id: str = "") -> errors.NotFound:
    """No such video, or not the caller's: not to be told apart."""
    which = f"video {video_id}" if video_id else "such video"
    return errors.NotFound("VIDEO_NOT_FOUND", f"there is no {which}, or it is not yours")


def check_reuse(earlier: bytes, now: bytes) -> None:
    """Raises AlreadyExists where a request_id stands for another request."""
    if earlier != now:
        raise errors.AlreadyExists(
            "REQUEST_ID_REUSED", "this request_id was used with another request; make a new one"
        )
