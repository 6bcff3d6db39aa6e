"""The HTTP routes of the `openai_videos` dialect: `/v1/videos`."""

import sys
from collections.abc import Mapping

from starlette import requests as http
from starlette import responses, routing

from services.simulator import api, errors, jobs, quirks, requests, requests_openai

_VARIANTS = ("video", "thumbnail")


class VideosApi(api.DialectApi):
    """`/v1/videos` before one provider."""

    request_id_header = "x-request-id"
    dialect = jobs.OPENAI_VIDEOS
    noun = "Video"

    def routes(self) -> list[routing.BaseRoute]:
        """What the application mounts; ids may hold slashes, so the longest path stands first."""
        return self._routes(
            (
                ("/v1/videos", "POST", self.create),
                ("/v1/videos", "GET", self.list),
                ("/v1/videos/{video_id:path}/content", "GET", self.content),
                ("/v1/videos/{video_id:path}", "GET", self.retrieve),
                ("/v1/videos/{video_id:path}", "DELETE", self.delete),
            )
        )

    async def list(self, request: http.Request, key_name: str) -> responses.Response:
        """One page, newest first unless asked otherwise."""
        if "no_list" in self._quirks:
            raise errors.ApiError(405, "Method Not Allowed")
        limit, order = api.limit_of(request, 20, 0), request.query_params.get("order", "desc")
        if "whole_list" in self._quirks:
            limit = sys.maxsize
        if order not in ("asc", "desc"):
            raise errors.invalid_value("order", order, ("asc", "desc"))
        after = request.query_params.get("after") or None
        try:
            page = self._service.list_page(
                key_name, self.dialect, after=after, limit=limit, descending=order == "desc"
            )
        except KeyError:
            raise api.wrong_cursor("after", after) from None
        body: dict[str, object] = {
            "object": "list",
            "data": [self._object(job) for job in page.jobs],
            "first_id": page.jobs[0].id if page.jobs else None,
            "last_id": page.jobs[-1].id if page.jobs else None,
            "has_more": page.has_more,
        }
        if "whole_list" in self._quirks:
            body = {"object": "list", "data": body["data"]}
        return responses.JSONResponse(body)

    async def retrieve(self, request: http.Request, key_name: str) -> responses.Response:
        """One job as it stands."""
        return self._polled(self._find(request, key_name), key_name, self._created)

    async def delete(self, request: http.Request, key_name: str) -> responses.Response:
        """Deletes a job in any state, and its film."""
        job = self._find(request, key_name)
        shown = self._object(job)
        self._service.delete(job, aborts="delete_aborts" in self._quirks)
        if "delete_shows_object" in self._quirks:
            return responses.JSONResponse({**shown, "status": "deleted"})
        return responses.JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    async def content(self, request: http.Request, key_name: str) -> responses.Response:
        """The film or its first frame, between the lag after completion and the expiry."""
        job = self._find(request, key_name)
        variant = request.query_params.get("variant", "video")
        if variant not in _VARIANTS:
            raise errors.invalid_value("variant", variant, _VARIANTS)
        return await self._content(request, job, picture="WEBP" if variant != "video" else None)

    async def _read(self, request: http.Request) -> dict[str, object]:
        return await requests_openai.read(request, self._settings.max_body_bytes, self._quirks)

    def _check(self, fields: Mapping[str, object]) -> requests.Creation:
        return requests_openai.check(fields, self._settings, self._quirks)

    def _key(self, request: http.Request) -> str:
        if "api_key_header" in self._quirks:
            return request.headers.get("api-key", "").strip()
        return api.bearer(request)

    def _refusal(self, request: http.Request, error: errors.ApiError) -> responses.Response:
        del request
        return error.response(as_detail="detail_errors" in self._quirks)

    def _find(self, request: http.Request, key_name: str) -> jobs.Job:
        video_id = request.path_params["video_id"]
        job = self._service.find(key_name, self.dialect, video_id)
        if job is None:
            raise errors.no_such("Video", video_id)
        return job

    def _created(self, job: jobs.Job) -> responses.Response:
        response = responses.JSONResponse(self._object(job))
        if self._settings.poll_after_seconds:
            hint = self._settings.real(self._settings.poll_after_seconds) * 1000
            response.headers["openai-poll-after-ms"] = str(max(1, round(hint)))
        return response

    def _object(self, job: jobs.Job) -> dict[str, object]:
        """The protocol's Video object."""
        state, error = self._service.state_of(job), None
        if state.error is not None:
            error = {name: state.error[name] for name in ("code", "message")}
        shown: dict[str, object] = {
            "id": job.id,
            "object": "video",
            "model": job.model,
            "status": state.status,
            "progress": state.progress,
            "created_at": int(job.created_at - job.faults.get("clock_skew", 0)),
            "completed_at": None if state.completed_at is None else int(state.completed_at),
            "expires_at": None if state.expires_at is None else int(state.expires_at),
            "size": job.size,
            "seconds": job.seconds,
            "remixed_from_video_id": None,
            "error": error,
        }
        if self._settings.echo_prompt:
            shown["prompt"] = job.prompt
        if self._settings.echo_marker:
            shown["metadata"] = dict(job.metadata)
        return quirks.bend(shown, self._quirks)
