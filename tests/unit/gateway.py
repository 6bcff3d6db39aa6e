"""A scripted stand-in for the gateway, so that a test says exactly when it breaks and what it answers."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from framewire import errors, transport
from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import (
    account_pb2,
    operator_pb2,
    template_pb2,
    upload_pb2,
    video_pb2,
    webhook_pb2,
)

VIDEO = "v" * 26
ACCOUNT = "a" * 26


@dataclass(frozen=True)
class Refusal:
    """An error to answer; without a reason it is one of grpc's own, without details."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "no"
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_seconds: float | None = None

    def abort(self, context: grpc.ServicerContext) -> None:
        if not self.reason:
            context.abort(self.code, self.message)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        details: list[Any] = [
            error_details_pb2.ErrorInfo(
                reason=self.reason, domain=errors.DOMAIN, metadata=self.metadata
            )
        ]
        if self.retry_after_seconds is not None:
            delay = duration_pb2.Duration(nanos=int(self.retry_after_seconds * 1e9 % 1e9))
            delay.seconds = int(self.retry_after_seconds)
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        trailing = ((errors.DETAILS_KEY, status.SerializeToString()),)
        context.set_trailing_metadata(trailing)
        context.abort(self.code, self.message)


UNAVAILABLE = Refusal(grpc.StatusCode.UNAVAILABLE)
HANG = object()
"""In a stream: stays open until the caller leaves."""


class Gateway:
    """Answers each method with what was scripted for it, in turn; the last answer is repeated."""

    def __init__(self) -> None:
        self.address = ""
        self.calls: dict[str, list[Any]] = defaultdict(list)
        self.metadata: dict[str, str] = {}
        self.left = threading.Event()
        self._script: dict[str, deque[Any]] = {}

    def on(self, method: str, *answers: Any) -> None:
        """What to answer: a message, a Refusal, or a list of both for a stream."""
        self._script[method] = deque(answers)

    def requests(self, method: str) -> list[Any]:
        """What was sent, call by call; client streams as lists."""
        return self.calls[method]

    def keep_time(self, monkeypatch: pytest.MonkeyPatch, method: str, seconds: float) -> None:
        """By the client's clock so much time goes by with each call of a method, and none else."""
        clock = SimpleNamespace(monotonic=lambda: seconds * len(self.calls[method]))
        monkeypatch.setattr(transport, "time", clock)

    def _next(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.calls[method].append(request)
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}
        if not (script := self._script.get(method)):
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not scripted")
        return script.popleft() if len(script) > 1 else script[0]

    def unary(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        request = request if not isinstance(request, Iterator) else list(request)
        answer = self._next(method, request, context)
        if isinstance(answer, Refusal):
            answer.abort(context)
        return answer

    def stream(self, method: str, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        answers = self._next(method, request, context)
        for answer in answers if isinstance(answers, list) else [answers]:
            if answer is HANG:
                # Asked, not told: grpc's threaded server now and then forgets a callback that is added late.
                while context.is_active() and not self.left.wait(0.02):
                    pass
                self.left.set()
                return
            if isinstance(answer, Refusal):
                answer.abort(context)
            yield answer


@contextmanager
def running() -> Iterator[Gateway]:
    """A gateway on loopback."""
    gateway = Gateway()
    with futures.ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        for service in services():
            server.add_generic_rpc_handlers((_handlers(gateway, service),))
        gateway.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield gateway
        finally:
            gateway.left.set()
            server.stop(0).wait(5)


def services() -> list[Any]:
    """The descriptors of all services of the gateway."""
    modules = (video_pb2, upload_pb2, account_pb2, operator_pb2, template_pb2, webhook_pb2)
    return [each for module in modules for each in module.DESCRIPTOR.services_by_name.values()]


@contextmanager
def for_the_cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """A gateway that the command line calls, whatever this shell has set."""
    for name in list(os.environ):
        if name.startswith("FRAMEWIRE_"):
            monkeypatch.delenv(name)
    with running() as gateway:
        monkeypatch.setenv("FRAMEWIRE_ADDRESS", gateway.address)
        monkeypatch.setenv("FRAMEWIRE_API_KEY", "fw_key")
        yield gateway


def _handlers(gateway: Gateway, service: Any) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
        service.full_name, {method.name: _handler(gateway, method) for method in service.methods}
    )


def _handler(gateway: Gateway, method: Any) -> grpc.RpcMethodHandler:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    serve = gateway.stream if method.server_streaming else gateway.unary

    def served(request: Any, context: grpc.ServicerContext) -> Any:
        return serve(method.name, request, context)

    return make(
        served,
        request_deserializer=method.input_type._concrete_class.FromString,
        response_serializer=method.output_type._concrete_class.SerializeToString,
    )


def video(
    revision: int = 1, state: str = "PROCESSING", *, settled: bool = False, progress: int = 0
) -> video_pb2.Video:
    """A video in some state; COMPLETED ones have an output."""
    made = video_pb2.Video(
        video_id=VIDEO,
        account_id=ACCOUNT,
        revision=revision,
        state=vocabulary_pb2.VideoState.Value(f"VIDEO_STATE_{state}"),
        stage=vocabulary_pb2.VIDEO_STAGE_RENDERING,
        lane=vocabulary_pb2.LANE_STANDARD,
        progress_percent=progress,
        spec=vocabulary_pb2.VideoSpec(
            prompt="p", model="sora-2", width=1280, height=720, seconds=4
        ),
        credits=video_pb2.VideoCredits(
            quoted=8,
            reserved=8,
            captured=8 if settled and state == "COMPLETED" else 0,
            settlement=vocabulary_pb2.SETTLEMENT_DONE
            if settled
            else vocabulary_pb2.SETTLEMENT_PENDING,
        ),
    )
    made.created_at.FromJsonString("2026-11-20T10:00:00Z")
    if state == "FAILED":
        made.failure.cause = vocabulary_pb2.CAUSE_INPUT_REFUSED
        made.failure.message = "the prompt [bold] was refused"
    return made


def output(body: bytes, sha256: str) -> event_pb2.Output:
    """What storage measured."""
    return event_pb2.Output(
        asset_id="o" * 26,
        sha256=sha256,
        size_bytes=len(body),
        media_type="video/mp4",
        width=1280,
        height=720,
        duration_ms=4000,
        fps=24,
        codec="h264",
    )


def told(*videos: Any) -> list[Any]:
    """A watch stream of these."""
    return [
        video_pb2.WatchVideoResponse(video=one) if isinstance(one, video_pb2.Video) else one
        for one in videos
    ]
