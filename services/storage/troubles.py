"""What may be wrong with S3 or with the disk here, as callers and operators are told."""

from __future__ import annotations

import errno
import http
import time
from email.utils import parsedate_to_datetime
from typing import Any
from xml.etree import ElementTree

import urllib3
from minio import error as minio_error
from prometheus_client import Counter, Gauge

from kit import errors, telemetry

log = telemetry.logger(__name__)

FAILURES = Counter(
    "framewire_storage_s3_failures",
    "Calls that S3 did not do: full, skewed (it does not believe our clock), refused, failing, away; here: our disk.",
    ["why"],
)
CLOCK_SKEW = Gauge(
    "framewire_storage_clock_skew_seconds",
    "How far S3's clock is ahead of this host's, by its last answer; it refuses what is 900 away.",
)
RAISED = (
    minio_error.MinioException,
    urllib3.exceptions.HTTPError,
    OSError,
    ElementTree.ParseError,  # the client believes that whatever S3 answers is XML, in UTF-8
    UnicodeDecodeError,
)
"""What a call of the client may raise."""
SKEWED_SECONDS = 600.0
"""So far apart, a refusal without a word (the answer to a HEAD has none) is put down to the clock."""
_FULL = frozenset({"XMinioStorageFull", "InsufficientStorage", "XMinioAdminBucketQuotaExceeded"})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Pool(urllib3.PoolManager):
    """Connections to S3; notes of each answer what S3's clock says."""

    def urlopen(self, method: str, url: str, redirect: bool = True, **kw: Any) -> Any:
        """As the base class does it."""
        response = super().urlopen(method, url, redirect, **kw)
        skew_seconds = _skew_seconds(response)
        if skew_seconds is not None:
            CLOCK_SKEW.set(skew_seconds)
        return response


def told(error: Exception) -> errors.Unavailable:
    """The error that callers see; counts and logs why."""
    why = _why(error)
    FAILURES.labels(why).inc()
    log.warning("s3_failed", why=why, error=repr(error)[:500])
    if why == "full":
        return errors.Unavailable(
            "STORE_FULL",
            "the object store has no room; nothing was stored, try again later",
            retry_after_seconds=30,
        )
    if why == "skewed":
        return errors.Unavailable(
            "STORE_CLOCK_SKEWED",
            "the object store does not believe this host's clock; try again when it was set right",
            retry_after_seconds=30,
        )
    if is_disk_full(error):
        return disk_full()
    return errors.Unavailable(
        "DEPENDENCY_UNAVAILABLE",
        "the object store does not answer; try again",
        retry_after_seconds=1,
    )


def disk_full() -> errors.Unavailable:
    """There is no room for what is worked on."""
    return errors.Unavailable(
        "DEPENDENCY_UNAVAILABLE",
        "the disk that files are worked on has no room; nothing was stored, try again later",
        retry_after_seconds=5,
    )


def is_disk_full(error: Exception) -> bool:
    """Whether writing failed for want of room here."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def _skew_seconds(response: Any) -> float | None:
    try:
        return parsedate_to_datetime(response.headers.get("date", "")).timestamp() - time.time()
    except ValueError:
        return None


def _why(error: Exception) -> str:
    if isinstance(error, minio_error.S3Error):
        status = error.response.status
        if error.code in _FULL or status == http.HTTPStatus.INSUFFICIENT_STORAGE:
            return "full"
        if error.code == "RequestTimeTooSkewed":
            return "skewed"
        skew_seconds = _skew_seconds(error.response)
        if status == http.HTTPStatus.FORBIDDEN and abs(skew_seconds or 0) > SKEWED_SECONDS:
            return "skewed"
        return "refused" if status < 500 else "failing"
    if isinstance(error, minio_error.MinioException | ElementTree.ParseError | UnicodeDecodeError):
        return "failing"
    return "here" if is_disk_full(error) else "away"
