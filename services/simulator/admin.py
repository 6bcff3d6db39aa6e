"""What tests and people use beside the dialect: the log, the state, the fault plan, a page."""

import asyncio
import html
import json
from typing import Any, cast

from starlette import requests as http
from starlette import responses, routing

from services.simulator import billing, faults, oplog, provider

_PAGE = """<!doctype html><meta charset="utf-8"><title>Framewire simulator</title>
<style>body{{font:15px system-ui;margin:2em auto;max-width:70em;padding:0 1em}}
table{{border-collapse:collapse;width:100%}}td,th{{padding:.3em .6em;text-align:left;
border-bottom:1px solid #ccc}}code{{font-size:90%}}</style>
<h1>Framewire simulator</h1>
<p><strong>This is a simulator. It runs no model:</strong> its films are camera moves over the
given image, or drawn scenes. It speaks the OpenAI Videos protocol at <code>/v1/videos</code>
(<code>openai_videos</code>; as other servers speak it at <code>/servers/NAME/v1/videos</code>), the
Azure OpenAI jobs protocol at <code>/openai/v1/video/generations/jobs</code> (<code>azure_jobs</code>)
and Runway's at <code>/v1/tasks</code> (<code>runway</code>), {factor:g} times as fast as the real
thing.</p>
<p>{total} jobs; the newest first. <a href="/_sim/state">state</a>, <a href="/_sim/log">log</a>,
<a href="/_sim/faults">faults</a></p>
<table><tr><th>id<th>dialect<th>status<th>progress<th>model<th>size<th>seconds<th>films<th>prompt</tr>
{rows}</table>
"""
_ROW = "<tr><td><code>{}</code><td>{}<td>{}<td>{} %<td>{}<td>{}<td>{}<td>{}<td>{}</tr>"
_SHOWN_JOBS = 50


class AdminApi:
    """`/` and `/_sim/`; no key is asked for, since the simulator listens on loopback."""

    def __init__(self, service: provider.Provider) -> None:
        self._service = service

    def routes(self) -> list[routing.BaseRoute]:
        """What the application mounts."""
        return [
            routing.Route("/", self.page),
            routing.Route("/_sim/log", self.log),
            routing.Route("/_sim/state", self.state),
            routing.Route("/_sim/billing", self.billing),
            routing.Route("/_sim/faults", self.faults),
            routing.Route("/_sim/faults", self.arm, methods=["POST"]),
            routing.Route("/_sim/faults", self.clear, methods=["DELETE"]),
        ]

    async def page(self, _request: http.Request) -> responses.Response:
        """The newest jobs, for people."""
        newest = list(self._service.all_jobs())[::-1]
        rows = []
        for job in newest[:_SHOWN_JOBS]:
            state = self._service.state_of(job)
            cells = (
                job.id,
                job.dialect,
                state.status,
                state.progress,
                job.model,
                job.size,
                job.seconds,
                len(job.film_ids),
                job.prompt[:120],
            )
            rows.append(_ROW.format(*(html.escape(str(cell)) for cell in cells)))
        factor = self._service.settings.time_factor
        return responses.HTMLResponse(
            _PAGE.format(factor=factor, total=len(newest), rows="\n".join(rows))
        )

    async def log(self, request: http.Request) -> responses.Response:
        """The entries, oldest first; `kind`, `prompt` (substring), `id` (of a job or a generation) and
        `after` narrow them.
        """
        query = request.query_params
        kinds = set(query.getlist("kind"))
        after = int(query["after"]) if query.get("after", "").isdecimal() else 0

        def wanted(untyped: oplog.Entry) -> bool:
            entry = cast("dict[str, Any]", untyped)
            return (
                entry["n"] > after
                and (not kinds or entry["kind"] in kinds)
                and query.get("prompt", "") in (entry.get("prompt") or "")
                and ("id" not in query or query["id"] in _ids(entry))
            )

        entries = await asyncio.to_thread(lambda: list(self._service.log.read(wanted)))
        return responses.JSONResponse({"entries": entries})

    async def state(self, _request: http.Request) -> responses.Response:
        """Counts, the clock, the fault plan."""
        return responses.JSONResponse(self._service.state())

    async def billing(self, _request: http.Request) -> responses.Response:
        """What each accepted job costs, the oldest first."""
        log = self._service.log
        lines = await asyncio.to_thread(
            lambda: billing.account(log.read(lambda entry: entry["kind"] in billing.KINDS))
        )
        return responses.JSONResponse({"billing": lines})

    async def faults(self, _request: http.Request) -> responses.Response:
        """The armed rules."""
        return responses.JSONResponse({"faults": list(self._service.plan.rules())})

    async def arm(self, request: http.Request) -> responses.Response:
        """Arms one rule."""
        try:
            body = json.loads(await request.body())
            if not isinstance(body, dict):
                raise faults.UnknownFaultError("want a JSON object")
            rule = self._service.arm(body)
        except (ValueError, RecursionError) as error:
            return responses.JSONResponse({"error": {"message": str(error)}}, 400)
        return responses.JSONResponse({"id": rule.id, "name": rule.name}, 201)

    async def clear(self, _request: http.Request) -> responses.Response:
        """Removes every rule."""
        self._service.disarm()
        return responses.JSONResponse({"cleared": True})


def _ids(entry: oplog.Entry) -> set[object]:
    films = cast("list[str]", entry.get("generation_ids", []))
    return {entry.get("id"), entry.get("job"), entry.get("film"), *films}
