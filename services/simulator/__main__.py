"""Starts the simulator: `python -m services.simulator`, settings in `SIMULATOR_*`.

The first line on standard output is one JSON object with the address that it listens on.
"""

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator

import pydantic
import uvicorn
from starlette import applications, responses
from starlette import requests as http
from starlette.exceptions import HTTPException

from services.simulator import (
    admin,
    answers,
    api_azure,
    api_openai,
    api_runway,
    config,
    errors,
    provider,
    quirks,
    webhooks,
)


def application(service: provider.Provider) -> applications.Starlette:
    """The HTTP application before `service`."""

    async def no_route(request: http.Request, error: Exception) -> responses.Response:
        assert isinstance(error, HTTPException)
        if request.url.path.startswith(api_azure.PREFIX):
            return api_azure.no_route(request, service.settings, error.status_code, error.detail)
        message = f"Invalid URL ({request.method} {request.url.path})"
        return errors.ApiError(error.status_code, message).response()

    @contextlib.asynccontextmanager
    async def telling(_: applications.Starlette) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(webhooks.Webhooks(service).run())
            yield
            task.cancel()

    servers = [
        api_openai.VideosApi(service, names, f"/servers/{name}")
        for name, names in quirks.PERSONALITIES.items()
    ]
    return applications.Starlette(
        lifespan=telling,
        routes=[
            *api_openai.VideosApi(service).routes(),
            *(route for server in servers for route in server.routes()),
            *api_azure.JobsApi(service).routes(),
            *api_runway.TasksApi(service).routes(),
            *admin.AdminApi(service).routes(),
        ],
        exception_handlers={HTTPException: no_route, Exception: _broken},
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
            lifespan="on",
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


async def _broken(request: http.Request, _error: Exception) -> responses.Response:
    if request.url.path.startswith(api_azure.PREFIX):
        return errors.server_error(500).azure_response(flat=False)
    return errors.server_error(500).response()


if __name__ == "__main__":
    main()
