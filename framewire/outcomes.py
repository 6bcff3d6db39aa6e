"""What became of a video: where its files go, and the error that it is when there are none."""

from __future__ import annotations

from pathlib import Path

import grpc

from framewire import transport, types


def variant_path(out: Path, variant: int) -> Path:
    """Where a variant goes: video.mp4, video-1.mp4, ..."""
    return out if variant == 0 else out.with_stem(f"{out.stem}-{variant}")


def promised(output: types.Output, *, poster: bool, rendition_height: int) -> tuple[int, str]:
    """Size and sha256 of what is downloaded of an output; 0 and empty where its facts do not say."""
    if poster:
        return 0, ""
    for smaller in output.renditions:
        if smaller.height == rendition_height:
            return smaller.size_bytes, smaller.sha256
    return output.size_bytes, output.sha256


def require_completed(video: types.Video) -> None:
    """Raises FramewireError, the cause as its reason, for a video that ended without an output."""
    if video.state == "COMPLETED":
        return
    failure = video.failure or types.VideoFailure("", "", False)
    raise transport.failure(
        grpc.StatusCode.ABORTED,
        failure.cause or video.state,
        failure.message or f"the video is {video.state}",
        video_id=video.video_id,
        state=video.state,
        captured_credits=video.credits.captured,
        retryable=str(failure.retryable).lower(),
    )
