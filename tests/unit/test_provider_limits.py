"""What headers say of a server's quota, in all its forms."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from services.generator.providers import contract, limits

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, 3600),
        ({"retry-after": "9" * 400}, 3600),
        ({"retry-after": "600"}, 600),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 99 Foo"}, None),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9),
        ({"retry-after-ms": "²", "retry-after": "9"}, 9),
        ({"retry-after": format_datetime(NOW + timedelta(seconds=90))}, 90),
        ({"retry-after": format_datetime(NOW - timedelta(hours=1))}, 0),
        ({"retry-after": format_datetime(NOW + timedelta(days=2))}, 3600),
        # Without a zone it cannot be told from when.
        ({"retry-after": "Fri, 20 Nov 2026 12:01:00"}, None),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert limits.retry_after(httpx.Headers(headers, encoding="latin-1"), NOW) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("250ms", 0.25),
        ("1h2m3.5s", 3600),
        ("12", 12),
        ("0", 0),
        ("", None),
        ("1 s", None),
        ("5 minutes", None),
        ("-1s", None),
        ("nan", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert limits.duration(text) == seconds


def test_only_an_answer_that_is_none_asks_to_wait() -> None:
    headers = {"retry-after": "5", "x-ratelimit-remaining-requests": "3"}
    assert limits.said(headers, 200).wait_seconds is None
    assert limits.said(headers, 429).wait_seconds == 5
    assert limits.said(headers, 503).wait_seconds == 5
    assert limits.said(headers, 200).requests_remaining == 3
    for odd in ("-1", "1e3", "²", "9" * 40, ""):
        assert limits.said({"x-ratelimit-remaining-requests": odd}, 200) == contract.Limits()


def test_what_was_heard_is_told_once_and_counted_from_the_moment_of_asking() -> None:
    heard = limits.Heard()
    heard.add(contract.Limits(60, 9, 30, wait_seconds=20), at=100)
    heard.add(contract.Limits(requests_remaining=8, wait_seconds=5, poll_after_seconds=2), at=104)
    assert heard.take(at=110) == contract.Limits(60, 8, 20, 10, 0)
    assert heard.take(at=110) == contract.Limits()
