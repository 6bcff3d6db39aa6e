"""Settings of storage (STORAGE_...)."""

from __future__ import annotations

import re
import tempfile
import urllib.parse
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from kit import config

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Settings(config.ServiceSettings):
    """What storage is told."""

    model_config = SettingsConfigDict(env_prefix="STORAGE_", frozen=True, extra="ignore")

    endpoint: str
    """host:port of S3, as we reach it."""
    public_endpoint: str = ""
    """host:port of S3 in signed URLs, as clients reach it; empty: the same as `endpoint`."""
    access_key: str
    """Access key of S3."""
    secret_key: SecretStr
    """Secret key of S3."""
    secure: bool = False
    """Whether S3 at `endpoint` speaks TLS."""
    public_secure: bool | None = None
    """Whether S3 at `public_endpoint` speaks TLS; not set: as `secure`."""
    region: str = "us-east-1"
    """Region of the buckets; never looked up."""
    s3_timeout_seconds: float = Field(default=30, gt=0)
    """S3 that says nothing for so long has failed; then it is asked up to three times more."""
    s3_watch_seconds: float = Field(default=5, gt=0)
    """Pause between two looks at whether S3 answers."""
    input_bucket: str = "framewire-inputs"
    """Bucket of what clients sent."""
    output_bucket: str = "framewire-outputs"
    """Bucket of what was made."""
    output_base_url: str = ""
    """Where clients read what was made without a signature: a CDN's or a public bucket's https:// address, to which the
    key is added. Empty: by signed URLs of `public_endpoint`. Inputs are always signed for."""
    output_cache_seconds: int = Field(default=3600, ge=0, le=31_536_000)
    """How long caches behind `output_base_url` may serve what they have, also when it was deleted meanwhile."""
    scratch_dir: Path = Path(tempfile.gettempdir()) / "framewire-storage"
    """Where files lie while they are worked on; `concurrent_puts` times twice the largest video must fit (three
    times where they are signed)."""
    c2pa_certificate_file: Path | None = None
    """Chain of certificates (PEM), the signer's first, by which outputs are signed (C2PA); not set: only marked."""
    c2pa_key_file: Path | None = None
    """Its private key (PEM, without a password): EC P-256, P-384 or P-521, Ed25519 or RSA."""
    media_workers: int = Field(default=2, ge=1, le=64)
    """Sandboxed processes that work on media."""
    media_timeout_seconds: float = Field(default=120, gt=0)
    """Longest that one piece of media work may take; its CPU time is bounded too."""
    concurrent_puts: int = Field(default=16, ge=1)
    """Uploads at a time, and of what is made at most 6; the rest wait, and their senders with them."""
    concurrent_gets: int = Field(default=64, ge=1)
    """Downloads at a time; the rest wait."""
    stall_seconds: float = Field(default=30, gt=0)
    """A sender that sends nothing for so long is cut off."""
    max_image_bytes: int = Field(default=10_000_000, gt=0)
    """Largest image on arrival."""
    max_video_bytes: int = Field(default=2_000_000_000, gt=0)
    """Largest video on arrival, of those that were made."""
    max_input_video_bytes: int = Field(default=104_857_600, gt=0)
    """Largest video on arrival, of those that clients send; as the two that follow."""
    max_input_video_seconds: int = Field(default=30, ge=1)
    """Its length; fitting it must be done within a worker's CPU time."""
    max_input_video_pixels: int = Field(default=1920 * 1088, gt=0)
    """Its pixels per frame."""
    upload_url_seconds: int = Field(default=900, ge=1, le=3600)
    """How long a URL to PUT to is good for."""
    upload_keep_seconds: float = Field(default=3600, gt=0)
    """How long what was PUT waits for its completion; then it is removed."""
    import_seconds: float = Field(default=30, gt=0)
    """Longest that fetching an image may take, redirects and all."""
    import_keep_seconds: float = Field(default=30 * 86_400, gt=0)
    """How long a request_id stands for the URL that was imported under it."""
    import_networks: str = ""
    """Networks (CIDR, separated by commas) that images may be fetched from though they are not public."""
    import_ca_file: Path | None = None
    """Certificates (PEM) that images' servers are trusted by; not set: those that browsers trust."""
    put_leftover_seconds: float = Field(default=7200, gt=0)
    """A put that is older has died, and what it left is removed. A living one is cut off at half of that."""
    sweep_seconds: float = Field(default=30, gt=0)
    """Pause of the sweeper."""
    input_keep_seconds: int = Field(default=0, ge=0)
    """How long inputs are kept; 0: for ever."""
    output_keep_seconds: int = Field(default=0, ge=0)
    """How long outputs and posters are kept; 0: for ever."""
    rendition_keep_seconds: int = Field(default=0, ge=0)
    """How long renditions are kept; 0: for ever."""
    quarantine_keep_seconds: int = Field(default=30 * 86_400, ge=1)
    """How long bytes that are no video are kept aside."""
    max_keep_seconds: int = Field(default=365 * 86_400, gt=0)
    """How long from now ExtendRetention may keep an asset at most."""
    retention_seconds: float = Field(default=30, gt=0)
    """Pause of the loop that ends what was kept for long enough."""
    scrub_seconds: float = Field(default=60, gt=0)
    """Pause of the scrub, which reads 8 assets again at a time."""
    scrub_every_seconds: float = Field(default=30 * 86_400, gt=0)
    """How long after its last reading an asset is read again."""
    orphan_seconds: float = Field(default=3600, gt=0)
    """Pause between two walks through the buckets for objects that nobody knows."""
    orphan_age_seconds: float = Field(default=86_400, ge=0)
    """Such an object is removed when it is older; must be well above `put_leftover_seconds`."""

    @field_validator("endpoint", "public_endpoint")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if value and not _ADDRESS.fullmatch(value):
            raise ValueError("must be host or host:port, without https:// and path")
        return value

    @field_validator("output_base_url")
    @classmethod
    def _is_a_base(cls, value: str) -> str:
        if not value:
            return value
        parts = urllib.parse.urlsplit(value)
        plain = not (parts.query or parts.fragment or "@" in parts.netloc)
        secure = parts.scheme == "https" or (
            parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
        )
        if not (plain and secure and parts.hostname and value.isascii() and value.isprintable()):
            raise ValueError(
                "must be https://host[:port][/path] without user, query and fragment"
                " (http:// on this machine alone)"
            )
        return value.rstrip("/")

    @field_validator("c2pa_certificate_file", "c2pa_key_file", mode="before")
    @classmethod
    def _may_be_empty(cls, value: object) -> object:
        return value or None

    @model_validator(mode="after")
    def _key_has_a_certificate(self) -> Self:
        if (self.c2pa_certificate_file is None) != (self.c2pa_key_file is None):
            raise ValueError(
                "c2pa_certificate_file and c2pa_key_file are set together, or not at all"
            )
        return self

    @model_validator(mode="after")
    def _buckets_differ(self) -> Self:
        if self.input_bucket == self.output_bucket:
            raise ValueError("input_bucket and output_bucket must not be the same")
        return self
