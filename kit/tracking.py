"""Errors to Sentry, where a DSN is set: one event for each line that is logged as an error, and nothing else.

What leaves the process is what the log says (an event name and its values, never prompts or secrets) and, where there
was an exception, its type, the first line of its message and the stack: no local variables, no source, no headers, no
breadcrumbs. The rest of an exception's message may be a row that a database refused.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any

MOST_MESSAGE = 300
FLUSH_SECONDS = 2.0


class Tracker:
    """A structlog processor. Without a DSN it passes everything on, and the client is not even imported."""

    def __init__(self) -> None:
        self._client: Any = None

    def configure(self, service: str, dsn: str) -> None:
        """Opens the client. Raises ValueError for a DSN that is none."""
        if not dsn:
            return
        import sentry_sdk
        from sentry_sdk import utils

        try:
            sentry_sdk.init(
                dsn,
                default_integrations=False,
                auto_enabling_integrations=False,
                send_default_pii=False,
                include_local_variables=False,
                include_source_context=False,
                max_breadcrumbs=0,
                server_name=service,
                before_send=_bounded,
            )
        except utils.BadDsn as error:
            raise ValueError(f"sentry_dsn: {error}") from None
        sentry_sdk.set_tag("service", service)
        self._client = sentry_sdk

    def __call__(
        self, _: Any, level: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Takes what is an error; goes before whatever turns `exc_info` into text."""
        if self._client is not None and level in ("error", "critical", "exception"):
            self._take(level, event)
        return event

    def _take(self, level: str, event: MutableMapping[str, Any]) -> None:
        name, failed = str(event.get("event", "")), event.get("exc_info")
        if failed is True:
            failed = sys.exc_info()[1]
        with self._client.new_scope() as scope:
            scope.set_tag("event", name)
            scope.fingerprint = [name, type(failed).__name__] if failed else [name]
            for key in ("trace_id", "method", "error_id"):
                if key in event:
                    scope.set_tag(key, str(event[key]))
            values = {key: str(value)[:MOST_MESSAGE] for key, value in event.items()}
            scope.set_context("log", {k: v for k, v in values.items() if k not in _NOT_SHOWN})
            if isinstance(failed, BaseException):
                self._client.capture_exception(failed)
            else:
                self._client.capture_message(name, level="error" if level != "critical" else level)

    def close(self) -> None:
        """Sends what waits, for a little."""
        if self._client is not None:
            self._client.flush(timeout=FLUSH_SECONDS)


_NOT_SHOWN = {"exc_info", "error", "level", "timestamp"}
"""`error` is an exception's repr: its message goes along with the exception, and only its first line."""


def _bounded(event: Any, _: Any) -> Any:
    for one in event.get("exception", {}).get("values", []):
        lines = str(one.get("value") or "").splitlines()
        one["value"] = lines[0][:MOST_MESSAGE] if lines else ""
    return event
