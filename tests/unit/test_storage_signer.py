"""With what films may be signed: what is wrong about a certificate or key is said at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from services.storage import config, signer
from tests import credentials


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "es256"),
        (ec.generate_private_key(ec.SECP384R1()), "es384"),
        (ec.generate_private_key(ec.SECP521R1()), "es512"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
        (rsa.generate_private_key(65537, 2048), "ps256"),
    ],
)
def test_keys_of_each_kind(tmp_path: Path, key: object, algorithm: str) -> None:
    assert signer.credential(*credentials.credential(tmp_path, key=key)).algorithm == algorithm


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    good, other = (credentials.credential(tmp_path, name) for name in ("good", "other"))
    nothing = tmp_path / "nothing"
    nothing.write_text("no PEM")
    ended = credentials.credential(tmp_path, "ended", days=-1)
    server = credentials.credential(
        tmp_path, "server", usage=x509.ExtendedKeyUsageOID.SERVER_AUTH
    )  # fmt: skip
    curve = credentials.credential(tmp_path, "curve", key=ec.generate_private_key(ec.SECP256K1()))
    for certificate, key, words in (
        (nothing, good.key, "no chain of certificates in PEM"),
        (tmp_path / "absent", good.key, "no chain of certificates in PEM"),
        (good.certificate, nothing, "no private key in PEM"),
        (good.certificate, other.key, "is not that of the first certificate"),
        (*ended, "renew it"),
        (*server, "must be for"),
        (*curve, "a kind that C2PA does not know"),
    ):
        with pytest.raises(ValueError, match=words):
            signer.credential(certificate, key)
        with pytest.raises(SystemExit, match=words):
            signer.configured(certificate, key)
    assert signer.configured(None, None) is None


def test_both_settings_or_neither(tmp_path: Path) -> None:
    needed = {
        "endpoint": "s3",
        "access_key": "a",
        "secret_key": "b",
        "database_url": "postgres://",
        "service_token_secret": "s" * 32,
    }
    # As compose sets it where there is none.
    assert config.Settings.model_validate(needed | {"c2pa_key_file": ""}).c2pa_key_file is None
    with pytest.raises(ValueError, match="set together, or not at all"):
        config.Settings.model_validate(needed | {"c2pa_key_file": tmp_path})
