"""What a process tells of itself: structured logs with trace ids, Prometheus metrics, OpenTelemetry traces."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from kit import tracking

RPC_SECONDS = Histogram(
    "framewire_rpc_seconds",
    "Time of a gRPC call, by method and code.",
    ["side", "method", "code"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
RPC_IN_FLIGHT = Gauge("framewire_rpc_in_flight", "gRPC calls that are being served.")
RPC_REFUSALS = Counter(
    "framewire_rpc_refusals", "gRPC calls that were answered with an error.", ["method", "reason"]
)
LOOP_SECONDS = Histogram("framewire_loop_seconds", "Time of a pass of a loop.", ["loop"])
LOOP_FAILURES = Counter("framewire_loop_failures", "Passes of a loop that failed.", ["loop"])
LOOP_SUCCEEDED_AT = Gauge(
    "framewire_loop_succeeded_timestamp_seconds",
    "When a pass of a loop last went well.",
    ["loop"],
)
LOOP_LAG = Gauge(
    "framewire_event_loop_lag_seconds",
    "How much later than asked the event loop woke up, the most of the last 15 seconds.",
)
DEPENDENCY_SECONDS = Histogram(
    "framewire_dependency_seconds",
    "Time of a call to what is not ours (a provider account, S3, a media worker), by outcome: ok or failed.",
    ["dependency", "operation", "outcome"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
MESSAGES = Counter("framewire_messages", "Messages handled, by outcome.", ["consumer", "outcome"])
CONSUMER_PENDING = Gauge(
    "framewire_consumer_pending", "Messages that a consumer was not given yet.", ["consumer"]
)
CONSUMER_UNACKNOWLEDGED = Gauge(
    "framewire_consumer_unacknowledged", "Messages given and not acknowledged.", ["consumer"]
)
BUS_CONNECTED = Gauge("framewire_bus_connected", "1 while there is a connection to NATS, else 0.")
BUS_SYNC_ALWAYS = Gauge(
    "framewire_bus_sync_always",
    "1 when NATS runs with `sync_interval: always`, 0 when not or when it cannot be asked.",
    ["server"],
)
BUS_STORED = Gauge(
    "framewire_bus_stored_bytes", "What NATS keeps of all streams on its disk.", ["server"]
)
BUS_MAY_STORE = Gauge(
    "framewire_bus_may_store_bytes", "How much of that it takes: its max_file_store.", ["server"]
)
POOL_CONNECTIONS = Gauge(
    "framewire_database_connections", "Connections of the pool, by use.", ["use"]
)
OUTBOX_WAITING = Gauge("framewire_outbox_waiting", "Outbox rows not published yet.")
OUTBOX_OLDEST = Gauge("framewire_outbox_oldest_seconds", "Age of the oldest of them.")

TRACKER = tracking.Tracker()
_tracer = trace.get_tracer("framewire")
_PROPAGATOR = TraceContextTextMapPropagator()
"""`traceparent` only: nobody here reads baggage."""


def _add_trace(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if current := trace_id():
        event["trace_id"] = current
    return event


def configure(service: str, log_level: str, otlp_endpoint: str, sentry_dsn: str = "") -> None:
    """Sets up logs (one JSON object a line on stderr), traces and error tracking for this process. Call once, first.

    Raises ValueError for a DSN that is none.
    """
    TRACKER.configure(service, sentry_dsn)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            TRACKER,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[log_level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    # Where spans go nowhere they are not recorded either; traces keep their ids, which logs and rows carry.
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"framewire-{service}"}),
        sampler=None if otlp_endpoint else ALWAYS_OFF,
    )
    if otlp_endpoint:
        # Imported only where traces go somewhere: it is a tenth of every start.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=otlp_endpoint)))
    trace.set_tracer_provider(provider)


def logger(name: str) -> Any:
    """A structured logger: `log.info("event_name", key=value)`. Never give it prompts or secrets."""
    return structlog.get_logger(module=name)


def serve_metrics(host: str, port: int) -> None:
    """Serves /metrics from a thread of its own."""
    start_http_server(port, addr=host)


@dataclass
class Outcome:
    """How a pass or a call went; who does it sets `failed`."""

    failed: bool = False


@contextmanager
def loop_pass(loop: str) -> Iterator[Outcome]:
    """Times one pass of a loop."""
    started = time.monotonic()
    outcome = Outcome()
    yield outcome
    LOOP_SECONDS.labels(loop).observe(time.monotonic() - started)
    if outcome.failed:
        LOOP_FAILURES.labels(loop).inc()
    else:
        LOOP_SUCCEEDED_AT.labels(loop).set_to_current_time()


@contextmanager
def dependency(name: str, operation: str) -> Iterator[Outcome]:
    """Times a call to what is not ours, as a metric and on the trace. An exception is a failure, or `failed` set."""
    started = time.monotonic()
    outcome = Outcome()
    with span(f"{name} {operation}", SpanKind.CLIENT):
        try:
            yield outcome
        except BaseException:
            outcome.failed = True
            raise
        finally:
            word = "failed" if outcome.failed else "ok"
            seconds = time.monotonic() - started
            DEPENDENCY_SECONDS.labels(name, operation, word).observe(seconds)


class span:  # noqa: N801 - used as a function
    """A span that goes on the trace which `carrier` (metadata or headers) brought, where it brought one.

    By hand, for every call opens one: the library's own context manager costs several times as much.
    """

    __slots__ = ("_span", "_token")

    def __init__(self, name: str, kind: SpanKind, carrier: Mapping[str, str] | None = None) -> None:
        parent = _PROPAGATOR.extract(carrier) if carrier else None
        self._span = _tracer.start_span(
            *(name, parent, kind), record_exception=False, set_status_on_exception=False
        )

    def __enter__(self) -> Span:
        self._token = context.attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(self, *_: object) -> None:
        context.detach(self._token)
        self._span.end()


def joined(name: str, traceparent: str) -> AbstractContextManager[Span]:
    """A span on the trace that a row was made in; where it knows none, on one of its own."""
    return span(name, SpanKind.INTERNAL, {"traceparent": traceparent} if traceparent else None)


def trace_id() -> str:
    """The id of the current trace, as in `traceparent`; empty outside of one."""
    current = trace.get_current_span().get_span_context()
    return format(current.trace_id, "032x") if current.is_valid else ""


def trace_headers() -> dict[str, str]:
    """The headers that carry the current trace on."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier
