"""gRPC, both sides: what every call goes through, so that `api.py` holds nothing but its own work.

Server: trace, authentication, validation by the contract's own rules, errors to google.rpc.Status, metrics.
Client: token, trace, errors back to `kit.errors`, retries of UNAVAILABLE where the method is idempotent.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, Self

import grpc
import protovalidate
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.trace import SpanKind

from framewire import errors as public_errors
from kit import auth, errors, ids, postgres, telemetry

log = telemetry.logger(__name__)

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
Authenticate = Callable[[str, Mapping[str, str]], Awaitable[Any]]
"""(method, metadata) -> the caller; raises Unauthenticated or PermissionDenied."""

_caller: ContextVar[Any] = ContextVar("caller")


def caller() -> Any:
    """Who makes the call that is being served, as `authenticate` told."""
    return _caller.get()


def to_status(error: errors.ServiceError) -> status_pb2.Status:
    """The rich status that a caller gets."""
    code = grpc.StatusCode[error.code].value[0]
    status = status_pb2.Status(code=code, message=error.message)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=public_errors.DOMAIN, metadata=error.metadata
    )
    _pack(status, info)
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for field, description in error.violations:
            bad.field_violations.add(field=field, description=description)
        _pack(status, bad)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _pack(status: status_pb2.Status, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def validate(request: Any) -> None:
    """Checks a message against the rules in its contract; raises InvalidArgument naming each field."""
    try:
        protovalidate.validate(request)
    except protovalidate.ValidationError as error:
        violations = [
            (path_text(item.proto.field), item.proto.message) for item in error.violations
        ]
        sentence = "; ".join(f"{field}: {text}" for field, text in violations)
        raise errors.InvalidArgument("INVALID_FIELD", sentence, violations=violations) from None


def path_text(path: Any) -> str:
    """The field that a violation is about; of a rule of the whole message, which has none: the request."""
    if path is None:
        return "request"
    return ".".join(element.field_name for element in path.elements)


def _known(error: Exception, method: str) -> errors.ServiceError:
    if isinstance(error, errors.ServiceError):
        return error
    translated = postgres.translate(error)
    if translated is not None:
        log.warning("dependency_failed", method=method, error=repr(error))
        return translated
    error_id = ids.new_id()
    log.error("rpc_failed", method=method, error_id=error_id, error=repr(error), exc_info=error)
    return errors.Internal("INTERNAL", "internal error", error_id=error_id)


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """What every served call goes through."""

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wraps the handler of our own methods; health and reflection stay as they are."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/framewire."):
            return handler
        known, wrapped = self._wrapped.get(method, (None, None))
        if known is not handler:
            # Once per method of the contract, not once per call.
            wrapped = self._wrap(method, handler)
            self._wrapped[method] = (handler, wrapped)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        wrap = _wrap_stream if handler.response_streaming else _wrap_unary
        served = wrap(self, method, handler)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(
            served,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def enter(
        self, method: str, request: Any, metadata: Mapping[str, str], left: float | None
    ) -> Any:
        """Authenticates the caller and checks the request, with so many seconds left; answers it to be served."""
        _caller.set(await self._authenticate(method, metadata))
        if left is not None and left <= 0:
            raise errors.DeadlineExceeded(
                "DEADLINE_EXCEEDED", "the deadline was over on arrival; try again with more time"
            )
        if isinstance(request, AsyncIterator):
            return _validated(request)
        validate(request)
        return request


async def _validated(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        validate(request)
        yield request


async def _abort(context: Any, error: errors.ServiceError) -> None:
    details = to_status(error).SerializeToString()
    await context.abort(
        grpc.StatusCode[error.code],
        error.message,
        trailing_metadata=((public_errors.DETAILS_KEY, details),),
    )


def _metadata(context: Any) -> dict[str, str]:
    return {
        key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
    }


class _Serving:
    """What surrounds a call: its trace, its time, and its failure as the caller gets it."""

    __slots__ = ("_code", "_method", "_span", "_started", "metadata")

    def __init__(self, method: str, context: Any) -> None:
        self._method = method
        self._code = "OK"
        self._started = time.monotonic()
        self.metadata = _metadata(context)
        self._span = telemetry.span(method, SpanKind.SERVER, self.metadata)

    def __enter__(self) -> Self:
        telemetry.RPC_IN_FLIGHT.inc()
        self._span.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._code == "OK" and kind is not None:
            self._code = "CANCELLED"  # nothing else gets here without having been refused
        self._span.__exit__()
        telemetry.RPC_IN_FLIGHT.dec()
        seconds = time.monotonic() - self._started
        telemetry.RPC_SECONDS.labels("server", self._method, self._code).observe(seconds)
        # Metrics count what went well; a line for each call would cost more than most calls.
        tell = log.info if self._code not in ("OK", "CANCELLED") else log.debug
        tell("rpc_served", method=self._method, code=self._code, seconds=round(seconds, 6))

    async def refuse(self, context: Any, error: Exception) -> None:
        """Ends the call with what went wrong, as the caller may know it. Raises."""
        known = _known(error, self._method)
        self._code = known.code
        telemetry.RPC_REFUSALS.labels(self._method, known.reason).inc()
        await _abort(context, known)


def _wrap_unary(interceptor: ServerInterceptor, method: str, handler: Any) -> Any:
    behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary

    async def served(request: Any, context: Any) -> Any:
        with _Serving(method, context) as serving:
            try:
                left = context.time_remaining()
                entered = await interceptor.enter(method, request, serving.metadata, left)
                return await behavior(entered, context)
            except Exception as error:
                await serving.refuse(context, error)

    return served


def _wrap_stream(interceptor: ServerInterceptor, method: str, handler: Any) -> Any:
    behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream

    async def served(request: Any, context: Any) -> AsyncIterator[Any]:
        with _Serving(method, context) as serving:
            try:
                left = context.time_remaining()
                entered = await interceptor.enter(method, request, serving.metadata, left)
                async for response in behavior(entered, context):
                    yield response
            except Exception as error:
                await serving.refuse(context, error)

    return served


def from_rpc(error: grpc.aio.AioRpcError) -> errors.ServiceError:
    """A call's failure as the domain knows it."""
    known = public_errors.from_rpc(error)
    code = known.code.name if known.code.name in errors.BY_CODE else "UNAVAILABLE"
    return errors.BY_CODE[code](
        known.reason,
        known.message,
        retry_after_seconds=known.retry_after_seconds,
        violations=known.violations,
        **known.metadata,
    )


class _UnaryUnaryClient(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, tokens: auth.ServiceTokens) -> None:
        self._tokens = tokens

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        call = await continuation(_with_headers(client_call_details, self._tokens), request)
        return await _Translated(call)


class _StreamUnaryClient(grpc.aio.StreamUnaryClientInterceptor):
    # A class of its own: grpc.aio sorts an interceptor into the first kind that it finds it to be.
    def __init__(self, tokens: auth.ServiceTokens) -> None:
        self._tokens = tokens

    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        details = _with_headers(client_call_details, self._tokens)
        return _Translated(await continuation(details, request_iterator))


class _Translated:
    """A call that fails with one of `kit.errors`. For client streams grpc.aio wants a call back, not a response."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            return (yield from self._call.__await__())
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class _UnaryStreamClient(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, tokens: auth.ServiceTokens) -> None:
        self._tokens = tokens

    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        call = await continuation(_with_headers(client_call_details, self._tokens), request)

        async def responses() -> AsyncIterator[Any]:
            try:
                async for response in call:
                    yield response
            except grpc.aio.AioRpcError as error:
                raise from_rpc(error) from error

        return responses()


def _with_headers(details: Any, tokens: auth.ServiceTokens) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    for key, value in {**tokens.headers(), **telemetry.trace_headers()}.items():
        metadata.add(key, value)
    return details._replace(metadata=metadata)


def channel(
    address: str,
    tokens: auth.ServiceTokens,
    retried: Iterable[str] = (),
    credentials: grpc.ChannelCredentials | None = None,
) -> grpc.aio.Channel:
    """A channel to another service, in plain text without credentials. Calls raise `kit.errors`.

    Methods in `retried` ("package.Service/Method"), idempotent by contract, are tried again while UNAVAILABLE, inside
    their deadline.
    """
    names = [dict(zip(("service", "method"), item.split("/"), strict=True)) for item in retried]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [{"name": names, "retryPolicy": policy}] if names else [],
    }
    options = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ]
    interceptors = [
        _UnaryUnaryClient(tokens),
        _StreamUnaryClient(tokens),
        _UnaryStreamClient(tokens),
    ]
    target = f"dns:///{address}"
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)
