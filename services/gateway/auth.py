"""Who calls, and what they may: API keys, and the one table of methods and roles. What is not in it, nobody may."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kit import errors
from services.gateway import store, videos

SECRET_PREFIX = "fw_"  # noqa: S105 - what every key begins with, no secret
_SECRET_LENGTH = 40
_SHOWN_LENGTH = 9
_ALPHABET = string.ascii_letters + string.digits
_SECRET = re.compile(r"fw_[A-Za-z0-9]{32,128}")


class Role(StrEnum):
    """What a caller is."""

    MEMBER = "MEMBER"
    SERVICE = "SERVICE"
    OPERATOR = "OPERATOR"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call. A member has one account; the others name one in each request."""

    key_id: str
    role: Role
    account_id: str | None

    @property
    def scope(self) -> str:
        """Whose request_ids these are, beside the account's: a service's own, since it acts for many."""
        return self.key_id if self.role is Role.SERVICE else ""

    def account(self, named: str) -> str:
        """The account that a request is about. Raises InvalidArgument/ACCOUNT_REQUIRED or NotFound."""
        if self.account_id is None:
            if not named:
                raise errors.InvalidArgument(
                    "ACCOUNT_REQUIRED", "set account_id: this key acts for more than one account"
                )
            return named
        if named not in ("", self.account_id):
            raise account_not_found()
        return self.account_id

    def sees(self, video: videos.Video) -> bool:
        """Whether a video is the caller's to see."""
        return self.account_id is None or video.account_id == self.account_id


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
    "framewire.gateway.v1.AccountService/GetStorageUsage": _ANY,
    "framewire.gateway.v1.AccountService/ExtendRetention": _ANY,
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
}


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
    """Finds the caller of each call."""

    def __init__(self, accounts: store.AccountStore) -> None:
        self._accounts = accounts

    async def __call__(self, method: str, metadata: Mapping[str, str]) -> Caller:
        """Raises Unauthenticated, or PermissionDenied where the role may not call the method."""
        scheme, _, secret = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not _SECRET.fullmatch(secret):
            raise errors.Unauthenticated(
                "CREDENTIALS_INVALID", 'send an API key: "authorization: Bearer fw_..."'
            )
        key = await self._accounts.key_by_hash(digest(secret))
        if key is None:
            raise errors.Unauthenticated(
                "CREDENTIALS_INVALID", "the API key is not known or was revoked; use another one"
            )
        role = Role(key.role)
        if role not in ROLES.get(method.removeprefix("/"), frozenset()):
            raise errors.PermissionDenied(
                "ROLE_NOT_ALLOWED", f"a key with the role {role} may not call this"
            )
        return Caller(key.key_id, role, key.account_id)

    async def ensure_bootstrap(self, secret: str) -> None:
        """Makes the operator key that everything begins with. Idempotent. ValueError: it is not a key."""
        if not _SECRET.fullmatch(secret):
            raise ValueError("GATEWAY_BOOTSTRAP_KEY must be fw_ and 32 to 128 letters and digits")
        await self._accounts.ensure_operator_key(digest(secret), shown(secret))
