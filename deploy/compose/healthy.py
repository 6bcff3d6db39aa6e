"""Ends with 0 when healthy: `healthy.py 127.0.0.1:7700` asks gRPC health, `healthy.py http://...` wants a 200."""

from __future__ import annotations

import sys
import urllib.request

TIMEOUT_SECONDS = 3.0


def http_healthy(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - ours
        return answer.status == 200


def grpc_healthy(address: str) -> bool:
    import grpc  # here, for the simulator has no health-checking package
    from grpc_health.v1 import health_pb2

    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def main() -> None:
    address = sys.argv[1]
    try:
        healthy = http_healthy(address) if "://" in address else grpc_healthy(address)
    except Exception as error:
        sys.exit(f"{address}: {error}")
    sys.exit(0 if healthy else f"{address}: not serving")


if __name__ == "__main__":
    main()
