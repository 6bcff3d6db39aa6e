"""A gRPC server that answers Reserve out of nothing: `python -m bench.echo HOST:PORT [intercepted]`."""

from __future__ import annotations

import sys
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from framewire.credits.v1 import ledger_pb2, ledger_pb2_grpc
from kit import auth, rpc, telemetry
from services.credits import api
from tests import credits_process


class Echo(ledger_pb2_grpc.LedgerServiceServicer):
    """Gives back what it got."""

    async def Reserve(self, request: ledger_pb2.ReserveRequest, context: Any) -> Any:  # noqa: N802
        """The ids."""
        return ledger_pb2.Hold(hold_id=request.hold_id, account_id=request.account_id)


async def main(address: str, *, intercepted: bool) -> None:
    """Serves until it is killed."""
    tokens = auth.ServiceTokens("credits", credits_process.SECRET)
    interceptors = [rpc.ServerInterceptor(api.authenticate(tokens))] if intercepted else []
    server = grpc.aio.server(interceptors=interceptors)
    ledger_pb2_grpc.add_LedgerServiceServicer_to_server(Echo(), server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    telemetry.configure("echo", "info", "")
    uvloop.run(main(sys.argv[1], intercepted="intercepted" in sys.argv))
