"""Who calls, and what they may: API keys, tokens of issuers, and the one table of methods and roles.

What is not in the table, nobody may.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kit import errors
from services.gateway import limits, oidc, store, videos

SECRET_PREFIX = "fw_"  # noqa: S105 - what every key begins with, no secret
_SECRET_LENGTH = 40
_SHOWN_LENGTH = 9
_ALPHABET = string.ascii_letters + string.digits
_SECRET = re.compile(r"fw_[A-Za-z0-9]{32,128}")


REMEMBERED_SECONDS = 2.0
"""How long a replica goes on by what it read of a key or principal."""
_REMEMBERED = 10_000


class Role(StrEnum):
    """What a caller is."""

    MEMBER = "MEMBER"
    SERVICE = "SERVICE"
    OPERATOR = "OPERATOR"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call: a key, or a principal that came with a token. Members have accounts; the others name one."""

    key_id: str
    role: Role
    account_ids: tuple[str, ...] | None
    limits: tuple[limits.Limit, ...] = ()

    @property
    def scope(self) -> str:
        """Whose request_ids these are, beside the account's: a service's own, since it acts for many."""
        return self.key_id if self.role is Role.SERVICE else ""

    def account(self, named: str) -> str:
        """The account that a request is about. Raises InvalidArgument/ACCOUNT_REQUIRED or NotFound."""
        mine = self.account_ids
        if named:
            if mine is not None and named not in mine:
                raise account_not_found()
            return named
        if mine is not None and len(mine) == 1:
            return mine[0]
        raise errors.InvalidArgument(
            "ACCOUNT_REQUIRED", "set account_id: the caller acts for more than one account"
        )

    def sees(self, video: videos.Video) -> bool:
        """Whether a video is the caller's to see."""
        return self.account_ids is None or video.account_id in self.account_ids


_ANY = frozenset(Role)
_OPERATORS = frozenset({Role.OPERATOR})
_OWNERS = frozenset({Role.MEMBER, Role.OPERATOR})

ROLES: Mapping[str, frozenset[Role]] = {
    "framewire.gateway.v1.VideoService/CreateVideo": _ANY,
    "framewire.gateway.v1.VideoService/BatchCreateVideos": _ANY,
    "framewire.gateway.v1.VideoService/GetVideo": _ANY,
    "framewire.gateway.v1.VideoService/ListVideos": _ANY,
    "framewire.gateway.v1.VideoService/CancelVideo": _ANY,
    "framewire.gateway.v1.VideoService/DeleteVideo": _ANY,
    "framewire.gateway.v1.VideoService/RetryVideo": _ANY,
    "framewire.gateway.v1.VideoService/WatchVideo": _ANY,
    "framewire.gateway.v1.VideoService/WatchVideos": _ANY,
    "framewire.gateway.v1.VideoService/QuoteVideo": _ANY,
    "framewire.gateway.v1.VideoService/PreviewInputs": _ANY,
    "framewire.gateway.v1.VideoService/GetDownloadUrl": _ANY,
    "framewire.gateway.v1.TemplateService/CreateTemplate": _ANY,
    "framewire.gateway.v1.TemplateService/GetTemplate": _ANY,
    "framewire.gateway.v1.TemplateService/ListTemplates": _ANY,
    "framewire.gateway.v1.TemplateService/ArchiveTemplate": _ANY,
    "framewire.gateway.v1.UploadService/UploadImage": _ANY,
    "framewire.gateway.v1.UploadService/UploadVideo": _ANY,
    "framewire.gateway.v1.UploadService/CreateUpload": _ANY,
    "framewire.gateway.v1.UploadService/CompleteUpload": _ANY,
    "framewire.gateway.v1.UploadService/CompleteVideoUpload": _ANY,
    "framewire.gateway.v1.UploadService/ImportImage": _ANY,
    "framewire.gateway.v1.AccountService/GetBalance": _ANY,
    "framewire.gateway.v1.AccountService/ListEntries": _ANY,
    "framewire.gateway.v1.AccountService/ListModels": _ANY,
    "framewire.gateway.v1.AccountService/GetUsage": _ANY,
    "framewire.gateway.v1.AccountService/CreateApiKey": _OWNERS,
    "framewire.gateway.v1.AccountService/ListApiKeys": _OWNERS,
    "framewire.gateway.v1.AccountService/RevokeApiKey": _OWNERS,
    "framewire.gateway.v1.AccountService/RotateApiKey": _OWNERS,
    "framewire.gateway.v1.AccountService/GetStorageUsage": _ANY,
    "framewire.gateway.v1.AccountService/ExtendRetention": _ANY,
    "framewire.gateway.v1.WebhookService/CreateEndpoint": _OWNERS,
    "framewire.gateway.v1.WebhookService/GetEndpoint": _OWNERS,
    "framewire.gateway.v1.WebhookService/ListEndpoints": _OWNERS,
    "framewire.gateway.v1.WebhookService/UpdateEndpoint": _OWNERS,
    "framewire.gateway.v1.WebhookService/DeleteEndpoint": _OWNERS,
    "framewire.gateway.v1.WebhookService/RotateSecret": _OWNERS,
    "framewire.gateway.v1.WebhookService/ListDeliveries": _OWNERS,
    "framewire.gateway.v1.WebhookService/RedeliverDelivery": _OWNERS,
    "framewire.gateway.v1.WebhookService/Replay": _OWNERS,
    "framewire.gateway.v1.WebhookService/SendTest": _OWNERS,
    "framewire.gateway.v1.OperatorService/CreateAccount": _OPERATORS,
    "framewire.gateway.v1.OperatorService/Grant": _OPERATORS,
    "framewire.gateway.v1.OperatorService/Refund": _OPERATORS,
    "framewire.gateway.v1.OperatorService/SetAdmission": _OPERATORS,
    "framewire.gateway.v1.OperatorService/CheckBooks": _OPERATORS,
    "framewire.gateway.v1.OperatorService/SetFrozen": _OPERATORS,
    "framewire.gateway.v1.OperatorService/SetDailyCap": _OPERATORS,
    "framewire.gateway.v1.OperatorService/AddRulebook": _OPERATORS,
    "framewire.gateway.v1.OperatorService/ListRulebooks": _OPERATORS,
    "framewire.gateway.v1.OperatorService/ActivateRulebook": _OPERATORS,
    "framewire.gateway.v1.OperatorService/ListAttempts": _OPERATORS,
    "framewire.gateway.v1.OperatorService/Reconcile": _OPERATORS,
    "framewire.gateway.v1.OperatorService/Repair": _OPERATORS,
    "framewire.gateway.v1.OperatorService/Recover": _OPERATORS,
    "framewire.gateway.v1.OperatorService/GetAttempt": _OPERATORS,
    "framewire.gateway.v1.OperatorService/ResolveAttempt": _OPERATORS,
    "framewire.gateway.v1.OperatorService/RetryAttempt": _OPERATORS,
    "framewire.gateway.v1.OperatorService/CancelAttempt": _OPERATORS,
    "framewire.gateway.v1.OperatorService/ListProviderAccounts": _OPERATORS,
    "framewire.gateway.v1.OperatorService/PauseProviderAccount": _OPERATORS,
    "framewire.gateway.v1.OperatorService/ListQuarantined": _OPERATORS,
    "framewire.gateway.v1.OperatorService/SetRetention": _OPERATORS,
    "framewire.gateway.v1.OperatorService/AddMember": _OPERATORS,
    "framewire.gateway.v1.OperatorService/RemoveMember": _OPERATORS,
    "framewire.gateway.v1.OperatorService/ListMembers": _OPERATORS,
    "framewire.gateway.v1.OperatorService/SetLimits": _OPERATORS,
    "framewire.gateway.v1.OperatorService/SetAccount": _OPERATORS,
    "framewire.gateway.v1.OperatorService/EraseAccount": _OPERATORS,
}

REPLAYED = frozenset(
    f"framewire.gateway.v1.VideoService/{method}"
    for method in ("CreateVideo", "BatchCreateVideos", "RetryVideo")
)
"""Methods whose requests, of a batch each item, are counted once they are known not to be replays."""


def account_not_found() -> errors.NotFound:
    """No such account, or not the caller's: not to be told apart."""
    return errors.NotFound("ACCOUNT_NOT_FOUND", "there is no such account, or it is not yours")


def new_secret() -> str:
    """A fresh key: 40 characters, 238 bits."""
    return SECRET_PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_LENGTH))


def digest(secret: str) -> bytes:
    """What is kept of a key. Keys are random and long, so that a plain hash is enough."""
    return hashlib.sha256(secret.encode()).digest()


def shown(secret: str) -> str:
    """The first characters, for logs and lists."""
    return secret[:_SHOWN_LENGTH]


class Authenticator:
    """Finds the caller of each call. What it read is good for two seconds: so long a revoked key may still work."""

    def __init__(self, kept: store.Store, verifier: oidc.Verifier, limiter: limits.Limiter) -> None:
        self._accounts = kept.accounts
        self._principals = kept.principals
        self._verifier = verifier
        self._limiter = limiter
        self._known: dict[bytes, tuple[Caller, float]] = {}
        self.issuers = verifier.issuers()

    async def __call__(self, method: str, metadata: Mapping[str, str]) -> Caller:
        """Raises Unauthenticated, PermissionDenied where the role may not call the method, or ResourceExhausted."""
        caller = await self._caller(metadata.get("authorization", ""))
        name = method.removeprefix("/")
        if caller.role not in ROLES.get(name, frozenset()):
            raise errors.PermissionDenied(
                "ROLE_NOT_ALLOWED", f"a caller with the role {caller.role} may not call this"
            )
        if name not in REPLAYED:
            await self._limiter.take(caller.limits)
        return caller

    async def _caller(self, authorization: str) -> Caller:
        scheme, _, secret = authorization.partition(" ")
        a_key = _SECRET.fullmatch(secret)
        if scheme.lower() != "bearer" or not (a_key or secret.count(".") == 2):
            raise errors.Unauthenticated(
                "CREDENTIALS_INVALID",
                'send an API key: "authorization: Bearer fw_...", or a token of an issuer that is configured',
            )
        remembered = digest(secret)
        caller, until = self._known.get(remembered, (None, 0.0))
        now = time.monotonic()
        if caller is not None and now < until:
            return caller
        until = now + REMEMBERED_SECONDS
        if a_key:
            caller = await self._by_key(remembered)
        else:
            claims = await self._verifier.verify(secret)
            caller = await self._by_token(claims)
            until = min(until, now + claims.expires_at - time.time())
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[remembered] = (caller, until)
        return caller

    async def _by_key(self, sha256: bytes) -> Caller:
        found = await self._accounts.key_by_hash(sha256)
        if found is None:
            raise errors.Unauthenticated(
                "CREDENTIALS_INVALID",
                "the API key is not known, has expired or was revoked; use another one",
            )
        key, of_account = found
        counted = []
        if key.account_id and of_account:
            counted.append(limits.Limit("account", key.account_id, of_account))
        if key.requests_per_minute:
            counted.append(limits.Limit("key", key.key_id, key.requests_per_minute))
        accounts = (key.account_id,) if key.account_id else None
        return Caller(key.key_id, Role(key.role), accounts, tuple(counted))

    async def _by_token(self, claims: oidc.Claims) -> Caller:
        found = await self._principals.known(claims.issuer, claims.subject, claims.email)
        role = Role(found[1]) if found else Role.MEMBER
        if found is None or (role is Role.MEMBER and not found[2]):
            raise errors.PermissionDenied(
                "NOT_A_MEMBER",
                "the token is good, but who it names is no member of an account; ask an operator",
                subject=claims.subject,
            )
        principal_id, _, accounts = found
        if role is not Role.MEMBER:
            return Caller(principal_id, role, None)
        if len(accounts) == 1:
            counted = [limits.Limit("account", *each) for each in accounts.items()]
        else:  # which account a call is about is not known yet: the principal has the largest limit of them
            counted = [limits.Limit("principal", principal_id, max(accounts.values()))]
        return Caller(principal_id, role, tuple(accounts), tuple(counted))

    async def ensure_bootstrap(self, secret: str) -> None:
        """Makes the operator key that everything begins with. Idempotent. ValueError: it is not a key."""
        if not _SECRET.fullmatch(secret):
            raise ValueError("GATEWAY_BOOTSTRAP_KEY must be fw_ and 32 to 128 letters and digits")
        await self._accounts.ensure_operator_key(digest(secret), shown(secret))
