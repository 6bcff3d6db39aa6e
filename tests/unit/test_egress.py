"""What strangers' URLs may lead to, and what a signed URL to PUT to looks like."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from kit import egress, errors
from services.storage import presign


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "198.18.0.1",
        "192.88.99.1",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "fe80::1%lo",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "2001:db8::1",
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    for found in ([address], ["93.184.216.34", address]):
        with pytest.raises(errors.InvalidArgument) as refused:
            egress.check(found, 443, ())
        assert refused.value.reason == "URL_NOT_ALLOWED"
        assert address not in refused.value.message


def test_public_addresses_are_used_at_the_usual_port_only() -> None:
    assert egress.check(["93.184.216.34"], 443, ()) == "93.184.216.34"
    assert egress.check(["2606:2800:220:1::1"], 443, ()) == "2606:2800:220:1::1"
    assert egress.check(["::ffff:93.184.216.34"], 443, ()) == "93.184.216.34"
    with pytest.raises(errors.InvalidArgument):
        egress.check(["93.184.216.34"], 22, ())
    trusted = egress.networks("10.0.0.0/8, fd00::/8")
    assert egress.check(["10.1.2.3"], 8443, trusted) == "10.1.2.3"
    with pytest.raises(errors.InvalidArgument):
        egress.check(["10.1.2.3", "127.0.0.1"], 8443, trusted)
    with pytest.raises(errors.InvalidArgument):
        egress.check([], 443, trusted)


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "017700000001", "localhost"])
async def test_odd_notations_are_resolved_before_they_are_judged(host: str) -> None:
    target = egress.target(f"https://{host}/a.png")
    found = await egress.resolve(target)
    with pytest.raises(errors.InvalidArgument):
        egress.check(found, target.port, ())


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png",
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "https://user:word@example.com/a.png",
        "https://",
        "https:///a.png",
        "https://example.com:99999/",
        "https://[::1/",
        "https://example.com/a b",
        "https://example.com/a\r\nhost: other",
        "//example.com/a.png",
        "https://" + "a" * 70 + ".com/",
        "",
    ],
)
def test_what_is_no_plain_https_url_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        egress.target(url)
    assert refused.value.reason == "URL_NOT_ALLOWED"


def test_plain_http_is_for_trusted_networks_only() -> None:
    local = egress.target("http://127.0.0.1:8080/in", plain=True)
    assert local == egress.Target("127.0.0.1", 8080, "/in", tls=False)
    trusted = egress.networks("127.0.0.0/8")
    assert egress.check(["127.0.0.1"], 8080, trusted, tls=False) == "127.0.0.1"
    with pytest.raises(errors.InvalidArgument):
        egress.check(["93.184.216.34"], 443, trusted, tls=False)
    with pytest.raises(errors.InvalidArgument):
        egress.target("ftp://127.0.0.1/in", plain=True)


def test_a_url_is_taken_apart() -> None:
    assert egress.target("https://EXAMPLE.com./a%20b.png?x=1#y") == egress.Target(
        "example.com", 443, "/a%20b.png?x=1"
    )
    assert egress.target("https://bücher.example:8443") == egress.Target(
        "xn--bcher-kva.example", 8443, "/"
    )


def test_the_signature_is_that_of_the_published_example() -> None:
    # The example of the page that services/storage/presign.py names: GET /test.txt of examplebucket, one day.
    signer = presign.Signer(
        "AKIAIOSFODNN7EXAMPLE",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "us-east-1",
        "examplebucket.s3.amazonaws.com",
        True,
    )
    now = datetime(2013, 5, 24, tzinfo=UTC)
    url = signer.url("GET", "/test.txt", {}, 86400, now)
    assert url.endswith("aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404")
    sized = signer.url("PUT", "/test.txt", {"content-length": "5"}, 86400, now)
    assert "X-Amz-SignedHeaders=content-length%3Bhost" in sized
