"""The HTTP routes of the `azure_jobs` dialect: `/openai/v1/video/generations`."""

from collections.abc import Mapping

from starlette import requests as http
from starlette import responses, routing

from services.simulator import api, config, errors, jobs, quirks, requests, requests_azure

PREFIX = "/openai/"
_ROOT = "/openai/v1/video/generations"
_STATUSES = (
    "preprocessing",
    "queued",
    "running",
    "processing",
    "cancelled",
    "succeeded",
    "failed",
)
_QUALITIES = ("high", "low")


class JobsApi(api.DialectApi):
    """`/openai/v1/video/generations` before one provider."""

    request_id_header = "apim-request-id"
    dialect = jobs.AZURE_JOBS
    noun = "Job"

    def routes(self) -> list[routing.BaseRoute]:
        """What the application mounts; the jobs first, or `jobs` would be a generation."""
        return self._routes(
            (
                (f"{_ROOT}/jobs", "POST", self.create),
                (f"{_ROOT}/jobs", "GET", self.list),
                (f"{_ROOT}/jobs/{{job_id}}", "GET", self.retrieve),
                (f"{_ROOT}/jobs/{{job_id}}", "DELETE", self.delete),
                (f"{_ROOT}/{{generation_id}}", "GET", self.generation),
                (f"{_ROOT}/{{generation_id}}/content/video", "GET", self.video),
                (f"{_ROOT}/{{generation_id}}/content/thumbnail", "GET", self.thumbnail),
            )
        )

    async def list(self, request: http.Request, key_name: str) -> responses.Response:
        """One page, the newest first; `statuses` is one list with commas."""
        limit, query = api.limit_of(request, 10, 1), request.query_params
        statuses = {
            status for part in query.getlist("statuses") for status in part.split(",") if status
        }
        if strange := sorted(statuses - set(_STATUSES)):
            raise errors.invalid_value("statuses", strange[0][:40], _STATUSES)

        def wanted(job: jobs.Job) -> bool:
            return not statuses or self._service.state_of(job).azure_status in statuses

        after, before = query.get("after") or None, query.get("before") or None
        try:
            page = self._service.list_page(
                key_name,
                self.dialect,
                after=after,
                before=before,
                limit=limit,
                descending=True,
                wanted=wanted,
            )
        except KeyError:
            raise api.wrong_cursor("after" if after else "before", after or before) from None
        body: dict[str, object] = {
            "object": "list",
            "data": [self._object(job) for job in page.jobs],
            "has_more": page.has_more,
        }
        if page.jobs:
            body |= {"first_id": page.jobs[0].id, "last_id": page.jobs[-1].id}
        return responses.JSONResponse(body)

    async def retrieve(self, request: http.Request, key_name: str) -> responses.Response:
        """One job as it stands."""
        return self._polled(self._find(request, key_name), key_name, self._created)

    async def delete(self, request: http.Request, key_name: str) -> responses.Response:
        """Deletes a job in any state, and its films."""
        job = self._find(request, key_name)
        shown = self._object(job)
        self._service.delete(job)
        if "delete_shows_object" in self._quirks:
            return responses.JSONResponse(shown)
        return responses.Response(status_code=204)

    async def generation(self, request: http.Request, key_name: str) -> responses.Response:
        """One film's description."""
        job, variant = self._generated(request, key_name)
        return responses.JSONResponse(self._generation(job, variant))

    async def video(self, request: http.Request, key_name: str) -> responses.Response:
        """One film; of `quality` low in fewer bytes."""
        job, variant = self._generated(request, key_name)
        quality = request.query_params.get("quality", "high")
        if quality not in _QUALITIES:
            raise errors.invalid_value("quality", quality, _QUALITIES)
        return await self._content(request, job, variant, low=quality == "low")

    async def thumbnail(self, request: http.Request, key_name: str) -> responses.Response:
        """One film's first frame."""
        job, variant = self._generated(request, key_name)
        return await self._content(request, job, variant, picture="JPEG")

    async def _read(self, request: http.Request) -> dict[str, object]:
        return await requests_azure.read(request, self._settings.max_body_bytes)

    def _check(self, fields: Mapping[str, object]) -> requests.Creation:
        return requests_azure.check(fields, self._settings)

    def _key(self, request: http.Request) -> str:
        if not _right_version(request, self._settings):
            raise errors.no_route()
        return request.headers.get("api-key", "").strip() or api.bearer(request)

    def _refusal(self, request: http.Request, error: errors.ApiError) -> responses.Response:
        if error.code == "model_not_found":
            error = errors.no_deployment(str(request.state.model))
        return error.azure_response(
            flat="flat_errors" in self._quirks,
            as_detail="detail_errors" in self._quirks,
        )

    def _find(self, request: http.Request, key_name: str) -> jobs.Job:
        job_id = request.path_params["job_id"]
        job = self._service.find(key_name, self.dialect, job_id)
        if job is None:
            raise errors.no_such("Job", job_id)
        return job

    def _generated(self, request: http.Request, key_name: str) -> tuple[jobs.Job, int]:
        """The job and which of its variants it is; nobody knows its id before the job succeeded."""
        generation_id = request.path_params["generation_id"]
        job = self._service.find_generation(key_name, generation_id)
        if (
            job is None
            or generation_id not in job.film_ids
            or self._service.state_of(job).status != jobs.COMPLETED
        ):
            raise errors.no_such("Generation", generation_id)
        return job, job.film_ids.index(generation_id)

    def _created(self, job: jobs.Job) -> responses.Response:
        return responses.JSONResponse(self._object(job))

    def _object(self, job: jobs.Job) -> dict[str, object]:
        """The protocol's Job object."""
        state, settings = self._service.state_of(job), self._settings
        listed = 0
        if state.status == jobs.COMPLETED:
            listed = len(job.film_ids)
        elif state.status == jobs.FAILED and "failed_generations" in self._quirks:
            listed = job.n_variants
        echoed = None
        if job.inputs and "no_inpaint_echo" not in self._quirks:
            echoed = [_inpaint_item(item) for item in job.inputs]
        shown: dict[str, object] = {
            "object": "video.generation.job",
            "id": job.id,
            "status": state.azure_status,
            "created_at": int(job.created_at - job.faults.get("clock_skew", 0)),
            "finished_at": None if state.ended_at is None else int(state.ended_at),
            "expires_at": None if state.expires_at is None else int(state.expires_at),
            "generations": [self._generation(job, variant) for variant in range(listed)],
            "prompt": job.prompt if settings.echo_prompt else None,
            "model": job.model,
            "n_variants": job.n_variants,
            "n_seconds": int(job.seconds),
            "height": job.height,
            "width": job.width,
            "inpaint_items": echoed,
            "failure_reason": None if state.error is None else state.error["reason"],
        }
        return quirks.without_nulls(shown, self._quirks)

    def _generation(self, job: jobs.Job, variant: int) -> dict[str, object]:
        """The protocol's Generation object."""
        ended_at = self._service.state_of(job).ended_at or job.created_at
        return {
            "object": "video.generation",
            "id": job.generation_ids[variant],
            "job_id": job.id,
            "created_at": int(ended_at),
            "width": job.width,
            "height": job.height,
            "n_seconds": int(job.seconds),
            "prompt": job.prompt,
        }


def no_route(
    request: http.Request, settings: config.Settings, status: int, detail: str
) -> responses.Response:
    """What an unknown path answers: the gateway knows no other version, the service the rest."""
    if _right_version(request, settings):
        return responses.JSONResponse({"detail": detail}, status)
    return errors.no_route().azure_response(flat=False)


def _right_version(request: http.Request, settings: config.Settings) -> bool:
    version = request.query_params.get("api-version")
    if settings.azure_api_version_required:
        return version == "preview"
    return version in (None, "v1", "preview")


def _inpaint_item(item: jobs.Input) -> dict[str, object]:
    left, top, right, bottom = item.crop
    return {
        "frame_index": item.frame_index,
        "type": item.type,
        "file_name": item.file_name,
        "crop_bounds": {
            "left_fraction": left,
            "top_fraction": top,
            "right_fraction": right,
            "bottom_fraction": bottom,
        },
    }
