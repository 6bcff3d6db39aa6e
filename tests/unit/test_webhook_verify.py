"""`framewire.webhooks.verify` beside the gateway's signatures, and the pauses between tries."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from framewire import webhooks as public
from services.gateway import webhooks

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
KEYS = (b"k" * 32, b"o" * 32)
BODY = b'{"videoId": "v", "seq": "3", "kind": "EVENT_KIND_FAILED", "failed": {"message": "broke"}}'


def sent(**changes: Any) -> dict[str, str]:
    taken = webhooks.Taken(
        delivery_id="d",
        epoch=1,
        attempts=1,
        endpoint_id="e",
        url="https://example.com",
        secrets=KEYS,
        event_id="v:3",
        headers={"ce-type": "framewire.events.v1.failed", "traceparent": "00-1-2-00"},
        body=BODY,
        now=NOW,
    )
    made = {**webhooks.headers(taken), **changes}
    return {name.title(): value for name, value in made.items()}


@pytest.mark.parametrize("key", KEYS)
def test_what_the_gateway_signs_is_believed(key: bytes) -> None:
    event = public.verify(sent(), BODY, webhooks.shown(key), now=NOW.timestamp() + 299)
    assert (event.event_id, event.kind, event.video_id, event.seq) == ("v:3", "failed", "v", 3)
    assert "Traceparent" not in sent()
    assert (
        public.verify(
            sent(**{"ce-type": "x.completed"}), BODY, webhooks.shown(key), now=NOW.timestamp()
        )
        == event
    )


@pytest.mark.parametrize(
    ("changes", "body"),
    [
        ({}, BODY + b" "),
        ({"webhook-id": "v:4"}, BODY),
        ({"webhook-id": ""}, BODY),
        ({"webhook-timestamp": str(int(NOW.timestamp()) - 1)}, BODY),
        ({"webhook-timestamp": "soon"}, BODY),
        ({"webhook-signature": "v1,AAAA"}, BODY),
        ({"webhook-signature": ""}, BODY),
    ],
)
def test_what_was_changed_is_not(changes: dict[str, str], body: bytes) -> None:
    secret = webhooks.shown(KEYS[0])
    with pytest.raises(public.InvalidWebhook):
        public.verify(sent(**changes), body, secret, now=NOW.timestamp())


@pytest.mark.parametrize("seconds", [-301, 301])
def test_nor_what_is_of_another_time(seconds: int) -> None:
    with pytest.raises(public.InvalidWebhook, match="too long ago"):
        public.verify(sent(), BODY, webhooks.shown(KEYS[0]), now=NOW.timestamp() + seconds)


def test_nor_under_another_secret_and_a_secret_that_is_none_is_said() -> None:
    with pytest.raises(public.InvalidWebhook):
        public.verify(sent(), BODY, webhooks.shown(b"x" * 32), now=NOW.timestamp())
    for secret in ("", "whsec_", "whsec_?", "a2tr"):
        with pytest.raises(ValueError, match="whsec_"):
            public.verify(sent(), BODY, secret, now=NOW.timestamp())


def test_pauses_grow_and_are_what_the_endpoint_asks_for_within_a_bound() -> None:
    failed = webhooks.Answer(500, 1)
    pauses = [webhooks.pause(5, attempts, failed, 0.5) for attempts in range(1, 11)]
    assert pauses == [5, 30, 120, 600, 1800, 3600, 7200, 14400, 14400, 14400]
    assert [webhooks.pause(5, 1, failed, luck) for luck in (0, 1)] == pytest.approx([4, 6])
    asked = [webhooks.Answer(503, 1, retry_after_seconds=seconds) for seconds in (1, 60, 10**6)]
    assert [webhooks.pause(5, 1, each, 0.5) for each in asked] == [5, 60, 21600]
