"""Rows as the domain sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from services.storage import assets

COLUMNS = """asset_id, account_id, kind, state, object_key, sha256, size_bytes, source_sha256, media_type,
    width, height, duration_ms, fps, codec, has_audio, poster_asset_id, created_at, expires_at"""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Objects that nothing refers to."""

    nonce: str
    bucket: assets.Bucket
    object_keys: Sequence[str]


@dataclass(frozen=True, slots=True)
class Pin:
    """An asset that is kept for somebody."""

    asset_id: str
    owner: str
    account_id: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that lie in S3, waiting to be chosen."""

    object_key: str
    facts: assets.Facts
    keep: timedelta | None


@dataclass(frozen=True, slots=True)
class Poster:
    """A poster that becomes READY with its video."""

    identity: assets.Identity
    stored: Stored


def leftover(row: asyncpg.Record) -> Leftover:
    """From a row of a put."""
    return Leftover(row["nonce"], assets.Bucket(row["bucket"]), list(row["object_keys"]))


def asset(row: asyncpg.Record) -> assets.Asset:
    """From a row of COLUMNS."""
    facts = None
    if row["sha256"] is not None:
        facts = assets.Facts(
            sha256=row["sha256"],
            size_bytes=row["size_bytes"],
            source_sha256=row["source_sha256"],
            media_type=row["media_type"],
            width=row["width"] or 0,  # of what is kept aside nothing is known
            height=row["height"] or 0,
            duration_ms=row["duration_ms"],
            fps=row["fps"],
            codec=row["codec"],
            has_audio=row["has_audio"],
        )
    return assets.Asset(
        asset_id=row["asset_id"],
        account_id=row["account_id"],
        kind=assets.Kind(row["kind"]),
        state=assets.State(row["state"]),
        object_key=row["object_key"],
        facts=facts,
        poster_asset_id=row["poster_asset_id"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
    )
