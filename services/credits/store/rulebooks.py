"""Price books and refund policies in the database: loaded once each, activated by an explicit act, kept for ever."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kit import errors, failpoints, postgres
from services.credits import batches, quotes, rules

_LOAD_LOCK = 0x72756C65
_CACHED = 256
MOST_VERSIONS = 1000


class RulebookExistsError(rules.RulesError):
    """This version is known with other content."""


@dataclass(frozen=True, slots=True)
class Rulebook:
    """A version, and whether it is used."""

    kind: rules.Kind
    version: str
    content_hash: str
    loaded_at: datetime
    loaded_by: str
    in_force: bool
    effective_from: datetime | None
    activated_by: str


IN_FORCE_NOW = """
    (SELECT version FROM rulebook_activations
     WHERE kind = 'PRICE_BOOK' AND effective_from <= clock_timestamp()
     ORDER BY effective_from DESC, activation_id DESC LIMIT 1) AS price_version,
    (SELECT version FROM rulebook_activations
     WHERE kind = 'REFUND_POLICY' AND effective_from <= clock_timestamp()
     ORDER BY effective_from DESC, activation_id DESC LIMIT 1) AS policy_version"""
"""Columns of a SELECT: read with every batch, so that an activation counts from its moment on in every process."""


@dataclass(frozen=True, slots=True)
class InForce:
    """The versions that new holds are made under, and the moment at which that was read."""

    price_version: str
    policy_version: str
    now: datetime


class RulebookStore:
    """Versions never change, so each is read and checked once per process."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool
        self._books: dict[str, rules.PriceBook] = {}
        self._policies: dict[str, rules.RefundPolicy] = {}
        self._quote_key = b""

    async def load(self, kind: rules.Kind, document: Mapping[str, Any], by: str = "files") -> bool:
        """Adds a version, inactive unless it is the first of its kind; true when it is new. Idempotent.

        Raises RulesError when this version was loaded with other content: what holds were priced by never changes.
        """
        read = rules.price_book if kind is rules.Kind.PRICE_BOOK else rules.refund_policy
        version, content_hash = read(document).version, rules.content_hash(document)
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOAD_LOCK)
            known = await connection.fetchval(
                "SELECT content_hash FROM rulebooks WHERE kind = $1 AND version = $2", kind, version
            )
            if known is not None and known != content_hash:
                raise RulebookExistsError(
                    f"{kind} {version} is known with other content: give the changed one a new version"
                )
            if known is not None:
                return False
            await connection.execute(
                """
                INSERT INTO rulebooks (kind, version, content_hash, content, loaded_by)
                VALUES ($1, $2, $3, $4, $5)
                """,
                kind,
                version,
                content_hash,
                dict(document),
                by,
            )
            await connection.execute(
                """
                INSERT INTO rulebook_activations (kind, version, effective_from, activated_by)
                SELECT $1, $2, clock_timestamp(), 'first start'
                WHERE NOT EXISTS (SELECT FROM rulebook_activations WHERE kind = $1)
                """,
                kind,
                version,
            )
            await failpoints.failpoint("credits.rulebook.before_commit")
        return True

    async def versions(self, kind: rules.Kind, version: str | None = None) -> Sequence[Rulebook]:
        """Versions, or the one that is named, newest first."""
        async with self._pool.acquire() as connection:
            rows = await connection.fetch(
                f"""
                SELECT r.kind, r.version, r.content_hash, r.loaded_at, r.loaded_by,
                    r.version = (
                        SELECT version FROM rulebook_activations
                        WHERE kind = $1 AND effective_from <= clock_timestamp()
                        ORDER BY effective_from DESC, activation_id DESC LIMIT 1
                    ) IS TRUE AS in_force,
                    a.effective_from, coalesce(a.activated_by, '') AS activated_by
                FROM rulebooks r LEFT JOIN LATERAL (
                    SELECT effective_from, activated_by FROM rulebook_activations
                    WHERE kind = r.kind AND version = r.version ORDER BY activation_id DESC LIMIT 1
                ) a ON true
                WHERE r.kind = $1 AND ($2::text IS NULL OR r.version = $2)
                ORDER BY r.loaded_at DESC, r.version LIMIT {MOST_VERSIONS}
                """,
                kind,
                version,
            )
        return [Rulebook(**{**dict(row), "kind": rules.Kind(row["kind"])}) for row in rows]

    async def activate(
        self,
        kind: rules.Kind,
        version: str,
        content_hash: str,
        effective_from: datetime | None,
        by: str,
        request_id: str = "",
    ) -> None:
        """Puts a version in force, from now when no moment is given. Once, where it has a request_id.

        Raises AlreadyExists/REQUEST_ID_REUSED, NotFound/RULEBOOK_NOT_FOUND, FailedPrecondition/RULEBOOK_MISMATCH where
        its content is not what the hash says, InvalidArgument for a moment that is over: holds of then were made by
        another version.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                """
                SELECT content_hash, $3::timestamptz < clock_timestamp() - interval '1 minute' AS over
                FROM rulebooks WHERE kind = $1 AND version = $2
                """,
                kind,
                version,
                effective_from,
            )
            _check_activation(row, kind, version, content_hash)
            done = await connection.execute(
                """
                INSERT INTO rulebook_activations (kind, version, effective_from, activated_by, request_id)
                VALUES ($1, $2, greatest($3, clock_timestamp()), $4, $5) ON CONFLICT (request_id) DO NOTHING
                """,
                kind,
                version,
                effective_from,
                by,
                request_id or None,
            )
            if done == "INSERT 0 0" and not await connection.fetchval(
                "SELECT kind = $2 AND version = $3 FROM rulebook_activations WHERE request_id = $1",
                request_id,
                kind,
                version,
            ):
                raise errors.AlreadyExists(
                    "REQUEST_ID_REUSED",
                    "this request_id was used for another activation: use a new one for a new request",
                )
            await failpoints.failpoint("credits.activation.before_commit")

    async def in_force(self, connection: postgres.Connection) -> InForce:
        """The versions in force now, by the database's clock."""
        row = await connection.fetchrow(f"SELECT clock_timestamp() AS now, {IN_FORCE_NOW}")
        if row is None or row["price_version"] is None or row["policy_version"] is None:
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE", "the ledger has no price book yet", retry_after_seconds=1
            )
        return InForce(row["price_version"], row["policy_version"], row["now"])

    async def price_book(self, connection: postgres.Connection, version: str) -> rules.PriceBook:
        """A version of the price book; it is in force, or a quote that we signed names it, so it is there."""
        if version not in self._books:
            content = await self._content(connection, rules.Kind.PRICE_BOOK, version)
            _make_room(self._books)
            self._books[version] = rules.price_book(content)
        return self._books[version]

    async def refund_policy(
        self, connection: postgres.Connection, version: str
    ) -> rules.RefundPolicy:
        """A version of the refund policy; holds refer to it, so it is there."""
        if version not in self._policies:
            content = await self._content(connection, rules.Kind.REFUND_POLICY, version)
            _make_room(self._policies)
            self._policies[version] = rules.refund_policy(content)
        return self._policies[version]

    async def for_batch(
        self,
        connection: postgres.Connection,
        in_force: tuple[str, str],
        quoted: Collection[str],
        policies: Collection[str],
    ) -> batches.Rulebooks:
        """The versions in force, those that quotes are of and the policies of holds, for a batch to be judged by."""
        price_version, policy_version = in_force
        key, prices, found = b"", {}, {}
        if quoted:
            key = await self.quote_key(connection)
        for version in {price_version, *(quotes.version(key, quote_id) for quote_id in quoted)}:
            if version:
                prices[version] = await self.price_book(connection, version)
        for version in {policy_version, *policies}:
            if version:
                found[version] = await self.refund_policy(connection, version)
        return batches.Rulebooks(price_version, policy_version, prices, found, key)

    async def quote_key(self, connection: postgres.Connection) -> bytes:
        """What signs quotes; the same for all replicas."""
        if not self._quote_key:
            self._quote_key = await connection.fetchval(
                "SELECT key FROM ledger_keys WHERE name = 'quote'"
            )
        return self._quote_key

    async def _content(
        self, connection: postgres.Connection, kind: rules.Kind, version: str
    ) -> Any | None:
        return await connection.fetchval(
            "SELECT content FROM rulebooks WHERE kind = $1 AND version = $2", kind, version
        )


def _check_activation(row: Any, kind: rules.Kind, version: str, content_hash: str) -> None:
    if row is None:
        raise errors.NotFound(
            "RULEBOOK_NOT_FOUND",
            f"there is no {kind} {version}: add it first, or list those there are",
        )
    if row["content_hash"] != content_hash:
        raise errors.FailedPrecondition(
            "RULEBOOK_MISMATCH",
            f"{kind} {version} has the content {row['content_hash']}, not {content_hash}: "
            "read it again before you put it in force",
        )
    if row["over"]:
        raise errors.InvalidArgument(
            "INVALID_FIELD",
            "effective_from is already over: leave it out to begin now",
            violations=[("effective_from", "must not be in the past")],
        )


def _make_room(cache: dict[str, Any]) -> None:
    if len(cache) >= _CACHED:
        cache.clear()
