"""What the headers of answers say of a server's quota. Pure: headers in, numbers out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from services.generator.providers import contract

MAX_SECONDS = 3600.0
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """How long a provider asks to wait: `retry-after-ms`, seconds or an HTTP date, an hour at most; None: not said."""
    value = headers.get("retry-after", "").strip()
    seconds = _number(headers.get("retry-after-ms", ""), 1000)
    if seconds is None:
        seconds = _number(value, 1)
    if seconds is None and value:
        try:
            seconds = (parsedate_to_datetime(value) - (now or datetime.now(UTC))).total_seconds()
        except (TypeError, ValueError, OverflowError):
            return None
    return None if seconds is None else _bounded(seconds)


def duration(text: str) -> float | None:
    """`1s`, `6m0s`, `250ms`, or plain seconds; None for anything else."""
    text = text.strip().lower()
    found = _DURATION.findall(text)
    if found and "".join(number + unit for number, unit in found) == text:
        return _bounded(sum(float(number) * _UNITS[unit] for number, unit in found))
    seconds = _number(text, 1)
    return None if seconds is None else _bounded(seconds)


def said(headers: Mapping[str, str], status: int, now: datetime | None = None) -> contract.Limits:
    """Of one answer, the seconds counted from it. Retry-After of a good answer asks for nothing."""
    return contract.Limits(
        requests_limit=_count(headers.get("x-ratelimit-limit-requests", "")),
        requests_remaining=_count(headers.get("x-ratelimit-remaining-requests", "")),
        reset_seconds=duration(headers.get("x-ratelimit-reset-requests", "")),
        wait_seconds=retry_after(headers, now) if status in (429, 503) else None,
        poll_after_seconds=_poll_after(headers),
    )


@dataclass(slots=True)
class Heard:
    """Collects what answers say until it is asked for: of each number the newest, of a wait the one that ends last."""

    _counts: dict[str, int] = field(default_factory=dict[str, int])
    _ends: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, limits: contract.Limits, at: float) -> None:
        """One answer's, that came at `at` of the monotonic clock."""
        for name in ("requests_limit", "requests_remaining"):
            if (count := getattr(limits, name)) is not None:
                self._counts[name] = count
        for name in ("reset_seconds", "poll_after_seconds"):
            if (seconds := getattr(limits, name)) is not None:
                self._ends[name] = at + seconds
        if limits.wait_seconds is not None:
            end = at + limits.wait_seconds
            self._ends["wait_seconds"] = max(self._ends.get("wait_seconds", end), end)

    def take(self, at: float) -> contract.Limits:
        """All of it as seen from `at`, and forgets it."""
        left = {name: max(0.0, end - at) for name, end in self._ends.items()}
        taken = contract.Limits(
            self._counts.get("requests_limit"),
            self._counts.get("requests_remaining"),
            left.get("reset_seconds"),
            left.get("wait_seconds"),
            left.get("poll_after_seconds"),
        )
        self._counts.clear()
        self._ends.clear()
        return taken


def _poll_after(headers: Mapping[str, str]) -> float | None:
    seconds = _number(headers.get("openai-poll-after-ms", ""), 1000)
    return None if seconds is None else _bounded(seconds)


def _bounded(seconds: float) -> float:
    return max(0.0, min(MAX_SECONDS, seconds))


def _count(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _number(text: str, divisor: float) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number / divisor
