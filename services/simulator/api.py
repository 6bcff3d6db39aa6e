"""What the HTTP routes of both dialects share: key, quota, refusals, creating, content, faults."""

import abc
import asyncio
import functools
import pathlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import ClassVar

from starlette import requests as http
from starlette import responses, routing

from services.simulator import answers, errors, jobs, provider, render, requests

Handler = Callable[[http.Request, str], Awaitable[responses.Response]]


class DialectApi(abc.ABC):
    """One dialect before one provider: wire to provider and back, nothing else."""

    request_id_header: ClassVar[str]
    dialect: ClassVar[str]
    noun: ClassVar[str]

    def __init__(
        self, service: provider.Provider, quirks: Collection[str] | None = None, prefix: str = ""
    ) -> None:
        """`quirks`: in place of the setting's; `prefix`: of every path."""
        self._service = service
        self._settings = service.settings
        self._quirks = service.settings.quirks if quirks is None else quirks
        self._prefix = prefix
        self._key_names = service.settings.key_names()

    @abc.abstractmethod
    def routes(self) -> list[routing.BaseRoute]:
        """What the application mounts."""

    @abc.abstractmethod
    async def _read(self, request: http.Request) -> dict[str, object]:
        """The fields of a creation."""

    @abc.abstractmethod
    def _check(self, fields: Mapping[str, object]) -> requests.Creation:
        """The creation, checked. Not for the event loop."""

    @abc.abstractmethod
    def _created(self, job: jobs.Job) -> responses.Response:
        """The answer to a creation."""

    @abc.abstractmethod
    def _refusal(self, request: http.Request, error: errors.ApiError) -> responses.Response:
        """The dialect's error envelope."""

    @abc.abstractmethod
    def _key(self, request: http.Request) -> str:
        """The key that the client gave, or an empty string."""

    async def create(self, request: http.Request, key_name: str) -> responses.Response:
        """Makes a job. What can be refused is refused before there is one."""
        fields = await self._read(request)
        prompt = request.state.prompt = requests.prompt_of(fields)
        request.state.model = fields.get("model")
        self._service.refuse(key_name, prompt)
        if self._service.strike("hang_before", key_name, prompt):
            return answers.Hang()
        creation = await asyncio.to_thread(self._check, fields)
        for sha256, content in creation.contents.items():
            # On disk before the log names it.
            await asyncio.to_thread(self._service.films.keep_reference, sha256, content)
        job = self._service.accept(
            key_name, creation, request.headers.get("idempotency-key"), self._quirks
        )
        if hit := self._service.strike("error_after", key_name, prompt):
            raise errors.server_error(int(hit.value))
        if self._service.strike("lost_answer", key_name, prompt):
            return answers.NoAnswer()
        if self._service.strike("hang", key_name, prompt):
            return answers.Hang()
        if self._service.strike("stall", key_name, prompt):
            return answers.Stall()
        if self._service.strike("garbled", key_name, prompt):
            return responses.HTMLResponse("<h1>Upstream connect error</h1>")
        if hit := self._service.strike("flood", key_name, prompt):
            return answers.flood(hit.value)
        response = self._created(job)
        if "create_202" in self._quirks:
            response.status_code = 202
        return response

    def _routes(self, table: Sequence[tuple[str, str, Handler]]) -> list[routing.BaseRoute]:
        """By path, method, handler; what answers GET answers HEAD."""
        return [
            routing.Route(
                self._prefix + path, functools.partial(self._serve, handler), methods=[method]
            )
            for path, method, handler in table
        ]

    def _polled(
        self, job: jobs.Job, key_name: str, shown: Callable[[jobs.Job], responses.Response]
    ) -> responses.Response:
        """The answer to a poll, with what the faults do to it."""
        if self._service.strike("poll_404", key_name, job=job):
            raise errors.no_such(self.noun, job.id)
        if hit := self._service.strike("poll_error", key_name, job=job):
            raise errors.server_error(int(hit.value))
        if hit := self._service.strike("poll_rate_limited", key_name, job=job):
            raise errors.rate_limited(provider.retry_after(self._settings.real(hit.value)))
        if self._service.strike("poll_garbled", key_name, job=job):
            return responses.Response(b'{"id": "', media_type="application/json")
        if hit := self._service.strike("poll_flood", key_name, job=job):
            return answers.flood(hit.value)
        if self._service.strike("poll_word", key_name, job=job):
            return responses.JSONResponse({"id": job.id, "status": "pondering"})
        response = shown(job)
        failed = self._service.state_of(job).status == jobs.FAILED
        if failed and "failed_as_500" in self._quirks:
            response.status_code = 500
        return response

    async def _content(
        self,
        request: http.Request,
        job: jobs.Job,
        variant: int = 0,
        *,
        picture: str | None = None,
        low: bool = False,
    ) -> responses.Response:
        """A film, or its first frame in the format `picture`; the faults are for whole films."""
        self._check_available(job)
        if "redirect_content" in self._quirks and "followed" not in request.query_params:
            return responses.RedirectResponse(
                request.url.include_query_params(followed=1), status_code=302
            )
        film = await asyncio.to_thread(self._service.films.film, job, variant, low=low)
        if request.method == "GET":
            entry = {
                "id": job.id,
                "film": job.film_ids[variant],
                "key_name": job.key_name,
                "variant": "thumbnail" if picture else "video",
                "quality": "low" if low else "high",
                "range": request.headers.get("range"),
            }
            self._service.note("content", entry)
        if picture is not None:
            content = await asyncio.to_thread(render.thumbnail, film, picture)
            kind = {"WEBP": "image/webp", "JPEG": "image/jpg"}[picture]
            return responses.Response(content, media_type=kind)
        name = f"{job.film_ids[variant]}.mp4"
        whole = responses.FileResponse(film, media_type="video/mp4", filename=name)
        return whole if request.method == "HEAD" else await self._spoilt(job, film) or whole

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
        if strike("content_cut_chunks"):
            whole = await asyncio.to_thread(film.read_bytes)
            return answers.CutChunks(whole, media_type="video/mp4")
        if strike("content_type"):
            return responses.FileResponse(film, media_type="text/plain")
        if strike("content_drip"):
            return answers.drip(await asyncio.to_thread(film.read_bytes))
        if strike("content_corrupt"):
            return responses.Response(b"\x55" * film.stat().st_size, media_type="video/mp4")
        return None

    def _check_available(self, job: jobs.Job) -> None:
        state, now = self._service.state_of(job), self._service.now()
        if state.completed_at is None or state.expires_at is None:
            failed = state.status == jobs.FAILED and "failed_as_422" in self._quirks
            if failed or "unready_as_400" in self._quirks:
                message = f"Video '{job.id}' is not ready (status: {state.status})."
                raise errors.ApiError(422 if failed else 400, message)
            raise errors.ApiError(404, f"Video '{job.id}' is not ready ({state.status}).")
        if now >= state.expires_at:
            self._service.films.drop(job)
            raise errors.ApiError(404, f"The content of video '{job.id}' has expired.")
        lag_seconds = max(self._settings.content_lag_seconds, job.faults.get("content_404", 0.0))
        if now < state.completed_at + self._settings.real(lag_seconds):
            raise errors.ApiError(404, f"The content of video '{job.id}' was not found.")

    async def _serve(self, handler: Handler, request: http.Request) -> responses.Response:
        """What all routes share: key, quota, error envelope, headers, the log of refusals."""
        headers = {self.request_id_header: f"req_{secrets.token_hex(16)}"}
        key_name = None
        try:
            key_name = self._authenticate(request)
            self._service.served[key_name, handler.__name__] += 1
            headers |= self._service.spend_request(key_name, self.dialect)
            response = await handler(request, key_name)
        except errors.ApiError as error:
            entry = {
                "dialect": self.dialect,
                "method": request.method,
                "path": request.url.path,
                "status": error.status,
                "message": error.message,
                "key_name": key_name,
                "prompt": getattr(request.state, "prompt", None),
            }
            self._service.note("refused", entry)
            response = self._refusal(request, error)
        for name, value in headers.items():
            response.headers.setdefault(name, value)
        return response

    def _authenticate(self, request: http.Request) -> str:
        key = self._key(request)
        key_name = self._key_names.get(key)
        if "any_key" in self._quirks:
            key_name = key_name or next(iter(self._key_names.values()))
        if key_name is None or self._service.strike("unauthorized", key_name):
            raise errors.wrong_key(key)
        return key_name


def bearer(request: http.Request) -> str:
    """The key of `Authorization: Bearer`, or an empty string."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def limit_of(request: http.Request, default: int, least: int) -> int:
    """The query's `limit`. Raises ApiError."""
    raw = request.query_params.get("limit", str(default))
    if not (raw.isdecimal() and raw.isascii() and len(raw) < 4 and least <= int(raw) <= 100):
        message = f"Invalid 'limit': want an integer from {least} to 100, got '{raw[:20]}'."
        raise errors.ApiError(400, message, param="limit", code="invalid_value")
    return int(raw)


def wrong_cursor(param: str, cursor: str | None) -> errors.ApiError:
    """A cursor that no job ever was."""
    message = f"Invalid '{param}': no job with id '{cursor}'."
    return errors.ApiError(400, message, param=param, code="invalid_value")
