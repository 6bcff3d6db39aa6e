"""Starts the simulator: `python -m services.simulator`, settings in `SIMULATOR_*`.

The first line on standard output is one JSON object with the address that it listens on.
"""

import contextlib
import json
import socket
import sys

import pydantic
import uvicorn
from starlette import applications, responses
from starlette import requests as http
from starlette.exceptions import HTTPException

from services.simulator import admin, answers, api, config, errors, provider


def application(service: provider.Provider) -> applications.Starlette:
    """The HTTP application before `service`."""
    return applications.Starlette(
        routes=[*api.VideosApi(service).routes(), *admin.AdminApi(service).routes()],
        exception_handlers={HTTPException: _no_route, Exception: _broken},
    )


def main() -> None:
    """Runs until SIGTERM or SIGINT."""
    try:
        settings = config.Settings()
    except pydantic.ValidationError as error:
        sys.exit(f"simulator: bad settings\n{error}")
    try:
        service = provider.Provider(settings)
        listener = socket.create_server((settings.host, settings.port), backlog=2048)
    except (OSError, RuntimeError) as error:
        sys.exit(f"simulator: {error}")
    server = uvicorn.Server(
        uvicorn.Config(
            application(service),
            http=answers.Protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    host, port = listener.getsockname()[:2]
    address = {"event": "simulator_listening", "url": f"http://{host}:{port}", "port": port}
    print(json.dumps(address), flush=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        service.close()


async def _no_route(request: http.Request, error: Exception) -> responses.Response:
    assert isinstance(error, HTTPException)
    message = f"Invalid URL ({request.method} {request.url.path})"
    return errors.ApiError(error.status_code, message).response()


async def _broken(_request: http.Request, _error: Exception) -> responses.Response:
    return errors.server_error(500).response()


if __name__ == "__main__":
    main()
