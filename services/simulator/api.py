"""The HTTP routes of the `openai_videos` dialect: wire to provider and back, nothing else."""

import asyncio
import functools
import pathlib
import secrets
from collections.abc import Awaitable, Callable

from starlette import requests as http
from starlette import responses, routing

from services.simulator import answers, errors, jobs, provider, quirks, render, requests

Handler = Callable[[http.Request, str], Awaitable[responses.Response]]
_VARIANTS = ("video", "thumbnail")


class VideosApi:
    """`/v1/videos` before one provider."""

    def __init__(self, service: provider.Provider) -> None:
        self._service = service
        self._settings = service.settings
        self._key_names = service.settings.key_names()

    def routes(self) -> list[routing.BaseRoute]:
        """What the application mounts."""
        table = (
            ("/v1/videos", "POST", self.create),
            ("/v1/videos", "GET", self.list),
            ("/v1/videos/{video_id}", "GET", self.retrieve),
            ("/v1/videos/{video_id}", "DELETE", self.delete),
            ("/v1/videos/{video_id}/content", "GET", self.content),
        )
        return [
            routing.Route(path, functools.partial(self._serve, handler), methods=[method])
            for path, method, handler in table
        ]

    async def create(self, request: http.Request, key_name: str) -> responses.Response:
        """Makes a job. What can be refused is refused before there is one."""
        fields = await requests.read(request, self._settings.max_body_bytes)
        prompt = request.state.prompt = requests.prompt_of(fields)
        self._service.refuse(key_name, prompt)
        if self._service.strike("hang_before", key_name, prompt):
            return answers.Hang()
        creation = await asyncio.to_thread(requests.check, fields, self._settings)
        if creation.reference is not None and creation.reference_sha256 is not None:
            # On disk before the log names it.
            await asyncio.to_thread(
                self._service.films.keep_reference, creation.reference_sha256, creation.reference
            )
        job = self._service.accept(key_name, creation, request.headers.get("idempotency-key"))
        if hit := self._service.strike("error_after", key_name, prompt):
            raise errors.server_error(int(hit.value))
        if self._service.strike("lost_answer", key_name, prompt):
            return answers.NoAnswer()
        if self._service.strike("hang", key_name, prompt):
            return answers.Hang()
        response = self._video(job)
        if "create_202" in self._settings.quirks:
            response.status_code = 202
        return response

    async def list(self, request: http.Request, key_name: str) -> responses.Response:
        """One page, newest first unless asked otherwise."""
        limit, order = _limit(request), request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise errors.invalid_value("order", order, ("asc", "desc"))
        after = request.query_params.get("after") or None
        try:
            page = self._service.list_page(
                key_name, after=after, limit=limit, descending=order == "desc"
            )
        except KeyError:
            message = f"Invalid 'after': no video with id '{after}'."
            raise errors.ApiError(400, message, param="after", code="invalid_value") from None
        body = {
            "object": "list",
            "data": [self._object(job) for job in page.jobs],
            "first_id": page.jobs[0].id if page.jobs else None,
            "last_id": page.jobs[-1].id if page.jobs else None,
            "has_more": page.has_more,
        }
        return responses.JSONResponse(body)

    async def retrieve(self, request: http.Request, key_name: str) -> responses.Response:
        """One job as it stands."""
        job = self._service.find(key_name, request.path_params["video_id"])
        if self._service.strike("poll_404", key_name, job=job):
            raise errors.no_such_video(job.id)
        if hit := self._service.strike("poll_error", key_name, job=job):
            raise errors.server_error(int(hit.value))
        response = self._video(job)
        failed = self._service.state_of(job).status == jobs.FAILED
        if failed and "failed_as_500" in self._settings.quirks:
            response.status_code = 500
        return response

    async def delete(self, request: http.Request, key_name: str) -> responses.Response:
        """Deletes a job in any state, and its film."""
        job = self._service.find(key_name, request.path_params["video_id"])
        shown = self._object(job)
        self._service.delete(job)
        if "delete_shows_object" in self._settings.quirks:
            return responses.JSONResponse({**shown, "status": "deleted"})
        return responses.JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    async def content(self, request: http.Request, key_name: str) -> responses.Response:
        """The film or its first frame, between the lag after completion and the expiry."""
        job = self._service.find(key_name, request.path_params["video_id"])
        variant = request.query_params.get("variant", "video")
        if variant not in _VARIANTS:
            raise errors.invalid_value("variant", variant, _VARIANTS)
        self._check_available(job)
        if "redirect_content" in self._settings.quirks and "followed" not in request.query_params:
            return responses.RedirectResponse(
                request.url.include_query_params(followed=1), status_code=302
            )
        film = await asyncio.to_thread(self._service.films.film, job)
        entry = {"id": job.id, "key_name": key_name, "variant": variant}
        self._service.note("content", {**entry, "range": request.headers.get("range")})
        if variant == "thumbnail":
            picture = await asyncio.to_thread(render.thumbnail, film)
            return responses.Response(picture, media_type="image/webp")
        whole = responses.FileResponse(film, media_type="video/mp4", filename=f"{job.id}.mp4")
        return await self._spoilt(job, film) or whole

    async def _spoilt(self, job: jobs.Job, film: pathlib.Path) -> responses.Response | None:
        """What the faults put in place of the film, if any does."""
        strike = functools.partial(self._service.strike, key_name=job.key_name, job=job)
        if strike("content_403"):
            raise errors.not_accessible()
        if strike("content_html"):
            return responses.HTMLResponse("<h1>Upstream connect error</h1>")
        if strike("content_empty"):
            return responses.Response(b"", media_type="video/mp4")
        if strike("content_cut"):
            whole = await asyncio.to_thread(film.read_bytes)
            return answers.CutBody(whole, media_type="video/mp4")
        if strike("content_corrupt"):
            return responses.Response(b"\x55" * film.stat().st_size, media_type="video/mp4")
        return None

    def _check_available(self, job: jobs.Job) -> None:
        state, now = self._service.state_of(job), self._service.now()
        if state.completed_at is None or state.expires_at is None:
            raise errors.ApiError(404, f"Video '{job.id}' is not ready ({state.status}).")
        if now >= state.expires_at:
            self._service.films.drop(job)
            raise errors.ApiError(404, f"The content of video '{job.id}' has expired.")
        lag_seconds = max(self._settings.content_lag_seconds, job.faults.get("content_404", 0.0))
        if now < state.completed_at + self._settings.real(lag_seconds):
            raise errors.ApiError(404, f"The content of video '{job.id}' was not found.")

    async def _serve(self, handler: Handler, request: http.Request) -> responses.Response:
        """What all routes share: key, quota, error envelope, headers, the log of refusals."""
        headers = {"x-request-id": f"req_{secrets.token_hex(16)}"}
        key_name = None
        try:
            key_name = self._authenticate(request)
            headers |= self._service.spend_request(key_name)
            response = await handler(request, key_name)
        except errors.ApiError as error:
            entry = {
                "method": request.method,
                "path": request.url.path,
                "status": error.status,
                "message": error.message,
                "key_name": key_name,
                "prompt": getattr(request.state, "prompt", None),
            }
            self._service.note("refused", entry)
            response = error.response(as_detail="detail_errors" in self._settings.quirks)
        for name, value in headers.items():
            response.headers.setdefault(name, value)
        return response

    def _authenticate(self, request: http.Request) -> str:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key_name = self._key_names.get(key.strip()) if scheme.lower() == "bearer" else None
        if key_name is None or self._service.strike("unauthorized", key_name):
            raise errors.wrong_key(key.strip())
        return key_name

    def _object(self, job: jobs.Job) -> dict[str, object]:
        shown = jobs.as_object(
            job,
            self._service.state_of(job),
            echo_prompt=self._settings.echo_prompt,
            echo_marker=self._settings.echo_marker,
        )
        return quirks.bend(shown, self._settings.quirks)

    def _video(self, job: jobs.Job) -> responses.Response:
        response = responses.JSONResponse(self._object(job))
        if self._settings.poll_after_seconds:
            hint = self._settings.real(self._settings.poll_after_seconds) * 1000
            response.headers["openai-poll-after-ms"] = str(max(1, round(hint)))
        return response


def _limit(request: http.Request) -> int:
    raw = request.query_params.get("limit", "20")
    if not (raw.isdecimal() and raw.isascii() and len(raw) < 4 and int(raw) <= 100):
        message = f"Invalid 'limit': want an integer from 0 to 100, got '{raw[:20]}'."
        raise errors.ApiError(400, message, param="limit", code="invalid_value")
    return int(raw)
