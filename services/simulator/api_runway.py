"""The HTTP routes of the `runway` dialect: tasks, and films under signed addresses of their own."""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime

from starlette import requests as http
from starlette import responses, routing

from services.simulator import api, errors, jobs, requests, requests_runway

VERSION = "2024-11-06"
_FILMS = "/_runway/films"
_WORDS = {
    jobs.QUEUED: "PENDING",
    jobs.IN_PROGRESS: "RUNNING",
    jobs.COMPLETED: "SUCCEEDED",
    jobs.FAILED: "FAILED",
    jobs.CANCELLED: "CANCELLED",
}


class TasksApi(api.DialectApi):
    """`/v1/tasks` and what makes tasks, before one provider."""

    request_id_header = "x-request-id"
    dialect = jobs.RUNWAY
    noun = "Task"

    def routes(self) -> list[routing.BaseRoute]:
        """What the application mounts."""
        return [
            *self._routes(
                (
                    ("/v1/image_to_video", "POST", self.create),
                    ("/v1/text_to_video", "POST", self.create),
                    ("/v1/tasks/{task_id}", "GET", self.retrieve),
                    ("/v1/tasks/{task_id}", "DELETE", self.delete),
                    ("/v1/organization", "GET", self.organization),
                )
            ),
            routing.Route(f"{_FILMS}/{{task_id}}.mp4", self.film),
        ]

    async def retrieve(self, request: http.Request, key_name: str) -> responses.Response:
        """One task as it stands, a finished one with fresh addresses."""
        job = self._find(request, key_name)
        over = self._service.strike("url_expired", key_name, job=job) is not None
        base_url = str(request.base_url).rstrip("/")
        return self._polled(job, key_name, lambda job: self._task(job, base_url, over))

    async def delete(self, request: http.Request, key_name: str) -> responses.Response:
        """Cancels a task that is not over; of one that is, its films are gone."""
        self._service.delete(self._find(request, key_name), aborts=True)
        return responses.Response(status_code=204)

    async def organization(self, _request: http.Request, key_name: str) -> responses.Response:
        """What is left, and what may run at once."""
        at_once = self._settings.runway_max_concurrent_tasks
        daily = self._settings.runway_max_daily_generations
        limits = {"maxConcurrentGenerations": at_once, "maxDailyGenerations": daily}
        used = [
            job
            for job in self._service.all_jobs()
            if (job.key_name, job.dialect) == (key_name, jobs.RUNWAY)
        ]
        by_model = dict.fromkeys(("gen4_turbo", "gen4.5"), limits)
        usage = {m: {"dailyGenerations": sum(job.model == m for job in used)} for m in by_model}
        body = {
            "creditBalance": 1_000_000,
            "tier": {"maxMonthlyCreditSpend": 1_000_000, "models": by_model},
            "usage": {"models": usage},
        }
        return responses.JSONResponse(body)

    async def film(self, request: http.Request) -> responses.Response:
        """A film under its signed address: no key is asked for, and as with other stores none is allowed."""
        try:
            return await self._content(request, self._signed(request))
        except errors.ApiError as error:
            return self._refusal(request, error)

    async def _read(self, request: http.Request) -> dict[str, object]:
        fields = await requests.read_json(request, self._settings.max_body_bytes)
        request.state.text = request.url.path.endswith("text_to_video")
        given = {name: value for name, value in fields.items() if value is not None}
        # The one name that the routes of all dialects look at.
        return {**given, "prompt": given.get("promptText", "(none)"), "text": request.state.text}

    def _check(self, fields: Mapping[str, object]) -> requests.Creation:
        return requests_runway.check(fields, self._settings, bool(fields["text"]))

    def _key(self, request: http.Request) -> str:
        if request.headers.get("x-runway-version") != VERSION:
            message = f"The header X-Runway-Version is missing or not known: want {VERSION}."
            raise errors.ApiError(400, message)
        return api.bearer(request)

    def _refusal(self, request: http.Request, error: errors.ApiError) -> responses.Response:
        del request
        return responses.JSONResponse({"error": error.message}, error.status, error.headers)

    def _find(self, request: http.Request, key_name: str) -> jobs.Job:
        task_id = request.path_params["task_id"]
        job = self._service.find(key_name, self.dialect, task_id)
        if job is None:
            raise errors.no_such("Task", task_id)
        return job

    def _created(self, job: jobs.Job) -> responses.Response:
        return responses.JSONResponse({"id": job.id})

    def _task(self, job: jobs.Job, base_url: str, over: bool) -> responses.Response:
        """The protocol's Task object: each state with the fields of its own."""
        state, now = self._service.state_of(job), self._service.now()
        word = _WORDS[state.status]
        if now < job.throttled_until and word == "PENDING":
            word = "THROTTLED"
        created = datetime.fromtimestamp(job.created_at - job.faults.get("clock_skew", 0), UTC)
        shown: dict[str, object] = {
            "id": job.id,
            "status": word,
            "createdAt": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        }
        if word == "RUNNING":
            shown["progress"] = state.progress / 100
        elif word == "SUCCEEDED":
            shown["output"] = [base_url + self._address(job, now, over)]
        elif state.error is not None:
            shown["failure"] = state.error["message"]
            if "failure" in state.error:
                shown["failureCode"] = state.error["failure"]
        return responses.JSONResponse(shown)

    def _address(self, job: jobs.Job, now: float, over: bool) -> str:
        good_for = -1 if over else self._settings.real(self._settings.runway_url_seconds)
        expires = str(int((now + good_for) * 1000))
        query = f"expires={expires}&signature={self._signature(job.id, expires)}"
        return f"{_FILMS}/{job.id}.mp4?{query}"

    def _signature(self, job_id: str, expires: str) -> str:
        secret = f"runway:{self._settings.seed}".encode()
        return hmac.new(secret, f"{job_id}:{expires}".encode(), hashlib.sha256).hexdigest()

    def _signed(self, request: http.Request) -> jobs.Job:
        task_id, query = request.path_params["task_id"], request.query_params
        if "authorization" in request.headers:
            raise errors.ApiError(400, "Only one auth mechanism allowed")
        expires = query.get("expires", "")
        right = self._signature(task_id, expires)
        if not hmac.compare_digest(right, query.get("signature", "")) or not expires.isdecimal():
            raise errors.ApiError(403, "The signature does not match.")
        if self._service.now() * 1000 >= int(expires):
            raise errors.ApiError(403, "Request has expired")
        job = self._service.find_film(task_id)
        if job is None:
            raise errors.no_such("Task", task_id)
        return job
