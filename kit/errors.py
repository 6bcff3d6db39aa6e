"""Errors as the domain raises them.

Named after the gRPC codes, each with a machine-readable reason and a sentence that a person can act on. Only the
interceptors in `kit.rpc` turn them into `google.rpc.Status` and back; this module knows nothing of grpc, so that pure
domain modules may import it.
"""

from __future__ import annotations

from collections.abc import Sequence


class ServiceError(Exception):
    """Base of all errors that a caller may see. `reason` is an ErrorReason of the contract, without its prefix."""

    code = "INTERNAL"

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        violations: Sequence[tuple[str, str]] = (),
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.violations = tuple(violations)
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidArgument(ServiceError):
    """The request itself is wrong, whatever the state of the system."""

    code = "INVALID_ARGUMENT"


class NotFound(ServiceError):
    """There is no such thing, or it is another's."""

    code = "NOT_FOUND"


class AlreadyExists(ServiceError):
    """The id was used for something else."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(ServiceError):
    """Right in itself, but not in this state; trying again does not help by itself."""

    code = "FAILED_PRECONDITION"


class PermissionDenied(ServiceError):
    """The caller is known and may not."""

    code = "PERMISSION_DENIED"


class Unauthenticated(ServiceError):
    """The caller is not known."""

    code = "UNAUTHENTICATED"


class ResourceExhausted(ServiceError):
    """A limit; `retry_after_seconds` says when to try again."""

    code = "RESOURCE_EXHAUSTED"


class Aborted(ServiceError):
    """Two writers met; the whole operation can be tried again."""

    code = "ABORTED"


class Unavailable(ServiceError):
    """Not now; the same call can be tried again."""

    code = "UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The time for it is over."""

    code = "DEADLINE_EXCEEDED"


class Unimplemented(ServiceError):
    """In the contract, not built yet."""

    code = "UNIMPLEMENTED"


class Internal(ServiceError):
    """Our fault."""

    code = "INTERNAL"


BY_CODE: dict[str, type[ServiceError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        PermissionDenied,
        Unauthenticated,
        ResourceExhausted,
        Aborted,
        Unavailable,
        DeadlineExceeded,
        Unimplemented,
        Internal,
    )
}
