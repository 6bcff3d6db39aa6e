"""What a running system tells of itself: metrics as Prometheus scrapes them, and traces as a collector gets them."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client import parser

SUFFIXES = {
    "counter": ("_total", "_created"),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count", "_created"),
    "info": ("_info",),
    "summary": ("_sum", "_count", "_created"),
}


@dataclass(frozen=True, slots=True)
class Scraped:
    """What one process exposes."""

    series: frozenset[str]
    """Names as queries use them."""
    labels: Mapping[str, frozenset[str]]
    """By name, the labels of those that have a sample."""
    values: Mapping[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        found = self.values.get((name, frozenset(labels.items())))
        assert found is not None, f"{name}{labels} has no sample"
        return found


async def scrape(address: str) -> Scraped:
    """`host:port` of /metrics."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            return answer.read().decode()

    text = await asyncio.to_thread(read)
    series = {
        name + suffix if not (kind == "counter" and name.endswith("_total")) else name
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
        for suffix in SUFFIXES[kind]
    }
    labels: dict[str, set[str]] = {}
    values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
            values[sample.name, frozenset(sample.labels.items())] = sample.value
    return Scraped(
        frozenset(series), {name: frozenset(found) for name, found in labels.items()}, values
    )


@dataclass(frozen=True, slots=True)
class Span:
    """A span as it was exported."""

    service: str
    name: str
    trace_id: str


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Span] = []

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [
                    Span(names["service.name"], span.name, span.trace_id.hex())
                    for span in scope.spans
                ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> set[tuple[str, str]]:
        """Service and name of each span of a trace."""
        return {(one.service, one.name) for one in self.spans if one.trace_id == trace_id}


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector on a free port."""
    server, collector = grpc.aio.server(), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(None)
