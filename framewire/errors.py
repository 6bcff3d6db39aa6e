"""Errors as callers of Framewire get them: one class, with the gRPC code, the reason and what to do."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "framewire"


class FramewireError(Exception):
    """A call was refused or failed. `reason` is stable and for programs; the message is for people."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        metadata: dict[str, str],
        violations: tuple[tuple[str, str], ...],
        retry_after_seconds: float | None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = metadata
        self.violations = violations
        self.retry_after_seconds = retry_after_seconds


def from_rpc(error: grpc.aio.AioRpcError) -> FramewireError:
    """Reads the rich status that a Framewire service sends; works without one as well."""
    reason, metadata = "", {}
    violations: list[tuple[str, str]] = []
    retry_after: float | None = None
    for detail in _details(error):
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations = [(item.field, item.description) for item in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    code = error.code()
    if not reason:
        unreachable = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        reason = "DEPENDENCY_UNAVAILABLE" if unreachable else code.name
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = (
                "the deadline was over before the answer came; try again with the same request_id"
            )
            return FramewireError(code, reason, message, metadata, (), retry_after)
    message = error.details() or code.name.lower().replace("_", " ")
    return FramewireError(code, reason, message, metadata, tuple(violations), retry_after)


def _details(error: grpc.aio.AioRpcError) -> list[Any]:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return list(status_pb2.Status.FromString(value).details)
    return []
