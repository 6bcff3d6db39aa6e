"""Who may hint: the signatures of Standard Webhooks, secret by secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import pytest

from services.generator import webhooks
from services.simulator import webhooks as sender

NOW = 1_763_000_000.0
BODY = json.dumps({"type": "video.completed", "data": {"id": "video_1"}}).encode()
PLAIN = "a-secret-in-plain-text"
CODED = "whsec_" + base64.b64encode(b"k" * 24).decode()
KEYS = webhooks.secrets(f"main:{PLAIN}, main:{CODED},other:{'x' * 16}")


def headers(
    secret: str = CODED, at: float = NOW, name: str = "wh_1", **changed: str
) -> dict[str, str]:
    given = {
        "webhook-id": name,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": sender.signature(secret, name, str(int(at)), BODY),
    }
    return {**given, **{key.replace("_", "-"): value for key, value in changed.items()}}


def taken(given: dict[str, str], body: bytes = BODY, account: str = "main") -> bool:
    return webhooks.signed_by_us(KEYS.get(account), given, body, NOW)


def test_the_signature_is_that_of_the_standard() -> None:
    """By the standard's own words, not by the simulator's."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    content = b"msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330." + b'{"test": 2432232314}'
    right = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    assert right == "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    given = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": f"v1,{right}",
    }
    keys = webhooks.secrets("a:whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")["a"]
    assert webhooks.signed_by_us(keys, given, b'{"test": 2432232314}', 1614265330)


def test_each_secret_of_the_account_is_good_and_no_other() -> None:
    assert taken(headers(PLAIN))
    assert taken(headers(CODED))
    assert not taken(headers("x" * 16))
    assert taken(headers("x" * 16), account="other")
    assert not taken(headers(CODED), account="unknown")


@pytest.mark.parametrize("seconds", [-300, -1, 0, 1, 300])
def test_five_minutes(seconds: int) -> None:
    assert taken(headers(at=NOW + seconds))


@pytest.mark.parametrize("seconds", [-3000, -301, 301, 86400])
def test_not_more_than_five_minutes(seconds: int) -> None:
    assert not taken(headers(at=NOW + seconds))


def test_one_of_several_signatures_suffices() -> None:
    right = headers()["webhook-signature"]
    assert taken(headers(webhook_signature=f"v1,AAAA v2,x {right}"))
    assert not taken(headers(webhook_signature=" ".join(["v1,AAAA"] * 16 + [right])))


@pytest.mark.parametrize(
    "changed",
    [
        {"webhook_signature": ""},
        {"webhook_signature": "v1,"},
        {"webhook_signature": headers()["webhook-signature"].removeprefix("v1,")},
        {"webhook_signature": headers()["webhook-signature"].replace("v1", "v2")},
        {"webhook_signature": "v1,\u00e9"},
        {"webhook_timestamp": ""},
        {"webhook_timestamp": "soon"},
        {"webhook_timestamp": "²"},
        {"webhook_timestamp": str(int(NOW) + 1)},
        {"webhook_id": ""},
        {"webhook_id": "wh_2"},
    ],
)
def test_what_is_changed_is_refused(changed: dict[str, str]) -> None:
    assert not taken(headers(**changed))
    assert not taken(headers(), BODY + b" ")


@pytest.mark.parametrize("name", ["", "a" * 257, "a\x00b"])
def test_an_id_that_no_row_could_hold_is_refused(name: str) -> None:
    assert not taken(headers(name=name))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("main", "secret 1: want ACCOUNT:SECRET"),
        ("main:" + "x" * 16 + ",:abc", "secret 2: want"),
        ("main:short", "shorter than 16 bytes"),
        ("main:whsec_***", "not base64"),
        ("main:whsec_" + base64.b64encode(b"short").decode(), "shorter"),
    ],
)
def test_a_secret_that_is_none_is_named_and_not_shown(text: str, words: str) -> None:
    with pytest.raises(webhooks.SecretsError, match=words) as caught:
        webhooks.secrets(text)
    assert "short" not in str(caught.value).replace("shorter", "")
    assert webhooks.secrets("") == {}


@pytest.mark.parametrize(
    ("body", "job_id"),
    [
        (BODY, "video_1"),
        (b'{"data": {"id": "a/b=="}}', "a/b=="),
        (b'{"data": {"id": 7}}', None),
        (b'{"data": {"id": ""}}', None),
        (b'{"data": {"id": "a\\u0000"}}', None),
        (b'{"data": []}', None),
        (b"[]", None),
        (b"\xff", None),
        (b"[" * 50_000, None),
        (json.dumps({"data": {"id": "a" * 3000}}).encode(), None),
    ],
)
def test_what_it_is_about(body: bytes, job_id: str | None) -> None:
    assert webhooks.job_of(body) == job_id
