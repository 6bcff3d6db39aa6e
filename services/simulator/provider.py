"""The pretended service itself: its jobs, quotas and faults, kept in the log and in memory.

No method awaits between a decision and its line in the log, so on the one event loop each
request is decided alone. What a restart needs is read back from the log.
"""

import collections
import dataclasses
import email.utils
import secrets
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

from services.simulator import config, errors, faults, films, jobs, oplog, requests
from services.simulator import quirks as bent_ids

_REFUSALS: Mapping[str, Callable[[], errors.ApiError]] = {
    "unauthorized": lambda: errors.wrong_key("***"),
    "rate_limited_bare": errors.rate_limited,
    "out_of_money": errors.out_of_money,
    "redirected": errors.redirected,
    "too_many_tasks": errors.too_many_tasks,
    "moderated_now": errors.moderated,
    "model_gone": errors.model_gone,
}

# One key's jobs and quotas in one dialect: the key's name and the dialect's.
_Account = tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """One page of the list, as the protocol shows it."""

    jobs: tuple[jobs.Job, ...]
    has_more: bool


class Provider:
    """One simulated provider with all its keys."""

    def __init__(self, settings: config.Settings) -> None:
        """Opens the data directory and takes up every job where it was left."""
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        # First the log: it holds the lock on the directory.
        self.log = oplog.OpLog(settings.data_dir / "oplog.jsonl")
        self.films = films.Films(settings)
        self.plan = faults.Plan(settings.seed)
        self._jobs: dict[str, jobs.Job] = {}
        self._ids: dict[_Account, list[str]] = collections.defaultdict(list)  # deleted ones too
        self._generations: dict[str, str] = {}  # job by generation
        self._running: dict[_Account, set[str]] = collections.defaultdict(set)
        self._keyed: dict[tuple[str, str, str], tuple[str, str, float]] = {}
        self._requests: dict[_Account, collections.deque[float]] = collections.defaultdict(
            collections.deque
        )
        self.untold: dict[
            str, None
        ] = {}  # jobs whose end no webhook has told yet, the oldest first
        self._accepted = 0
        # What each key asked for since the start, refused or not: by its name and the action's.
        self.served: collections.Counter[tuple[str, str]] = collections.Counter()
        self._origin = self.now()
        self._replay()
        self.note("started", {"time_factor": settings.time_factor, "seed": settings.seed})

    def now(self) -> float:
        """Real Unix time; every instant the provider speaks of is one."""
        return time.time()

    def note(self, kind: str, entry: Mapping[str, object], *, durable: bool = False) -> None:
        """Adds a line to the log, with the real and the provider's time."""
        now = self.now()
        virtual = (now - self._origin) * self.settings.time_factor
        times = {"at": round(now, 6), "virtual_at": round(virtual, 3)}
        self.log.append(kind, {**times, **entry}, durable=durable)

    def close(self) -> None:
        """Stops rendering and frees the directory."""
        self.films.close()
        self.log.close()

    # Requests and faults

    def spend_request(self, key_name: str, dialect: str) -> dict[str, str]:
        """Counts one request against the key's minute; the rate headers. Raises 429, uncounted."""
        limit, _ = self.settings.quotas_of(dialect)
        if not limit:
            return {}
        window, now = self._requests[key_name, dialect], self.now()
        span = self.settings.real(60)
        while window and window[0] <= now - span:
            window.popleft()
        reset = window[0] + span - now if window else 0.0
        headers = {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(max(0, limit - len(window) - 1)),
            "x-ratelimit-reset-requests": f"{reset:.3f}s",
        }
        if len(window) >= limit:
            raise errors.rate_limited({**headers, **retry_after(reset)})
        window.append(now)
        return headers

    def strike(
        self, name: str, key_name: str, prompt: str | None = None, job: jobs.Job | None = None
    ) -> faults.Strike | None:
        """Whether the fault strikes this request; if so it is in the log."""
        hit = self.plan.strike(
            name,
            now=self.now(),
            key_name=key_name,
            prompt=prompt if job is None else job.prompt,
            job_id=None if job is None else job.id,
        )
        if hit is not None:
            entry = {
                "name": name,
                "value": hit.value,
                "source": hit.source,
                "key_name": key_name,
                "job": None if job is None else job.id,
                "prompt": prompt if job is None else job.prompt,
            }
            self.note("fault", entry)
        return hit

    def arm(self, body: Mapping[str, object]) -> faults.Rule:
        """Adds a fault rule, which outlives a restart. Raises faults.UnknownFaultError."""
        rule = faults.parse_rule(self.plan.next_id(), body, self.now(), self.settings.time_factor)
        self.plan.arm(rule)
        self.note("armed", {"rule": dataclasses.asdict(rule)})
        return rule

    def disarm(self) -> None:
        """Removes every rule."""
        self.plan.clear()
        self.note("cleared", {})

    def refuse(self, key_name: str, prompt: str) -> None:
        """Raises the refusal that the faults hold for this creation, if any."""
        try:
            names = faults.tokens(prompt)
        except faults.UnknownFaultError as error:
            raise errors.ApiError(400, str(error), param="prompt") from None
        for name, refusal in _REFUSALS.items():
            if self.strike(name, key_name, prompt):
                if name == "unauthorized" and names.get(name) and names[name].value:
                    self.arm({"name": name, "value": names[name].value, "key": key_name})
                raise refusal()
        if hit := self.strike("rate_limited", key_name, prompt):
            raise errors.rate_limited(retry_after(self.settings.real(hit.value)))
        if hit := self.strike("rate_limited_date", key_name, prompt):
            at = time.time() + self.settings.real(hit.value)
            raise errors.rate_limited({"retry-after": email.utils.formatdate(at, usegmt=True)})
        if hit := self.strike("error_before", key_name, prompt):
            raise errors.server_error(int(hit.value))

    # Jobs

    def accept(
        self,
        key_name: str,
        creation: requests.Creation,
        idempotency_key: str | None,
        quirks: Collection[str] = (),
    ) -> jobs.Job:
        """Makes the job, on disk before this returns; with a known idempotency key, finds it."""
        now = self.now()
        if not self.settings.idempotency_keys:
            idempotency_key = None
        if known := self._known(key_name, creation, idempotency_key, now):
            return known
        slot_at = self._slot_at((key_name, creation.dialect), now)
        attached = {name: token.value for name, token in faults.tokens(creation.prompt).items()}
        for name in faults.OF_THE_JOB:
            if hit := self.strike(name, key_name, creation.prompt):
                attached[name] = hit.value
        job = self._new_job(key_name, creation, now, attached, slot_at)
        job = dataclasses.replace(job, id=bent_ids.job_id(job.id, quirks))
        self._record(job, "accepted", idempotency_key, creation.fingerprint())
        for name in ("twin_job", "foreign_jobs"):
            if name in job.faults:
                like = job if name == "twin_job" else None
                self._add_strangers((key_name, job.dialect), like, job.faults[name])
        for name in ("list_short", "list_error"):
            if token := faults.tokens(job.prompt).get(name):
                times = token.times if name == "list_error" else 0
                self.arm({"name": name, "value": token.value, "times": times, "key": key_name})
        return job

    def find(self, key_name: str, dialect: str, job_id: str) -> jobs.Job | None:
        """The key's own job, unless it is deleted or past its time."""
        job = self._alive(job_id)
        mine = job is not None and (job.key_name, job.dialect) == (key_name, dialect)
        return job if mine else None

    def find_generation(self, key_name: str, generation_id: str) -> jobs.Job | None:
        """The key's own job that the generation belongs to."""
        job_id = self._generations.get(generation_id, "")
        return self.find(key_name, jobs.AZURE_JOBS, job_id)

    def find_film(self, film_id: str) -> jobs.Job | None:
        """The job whose film has that id, of whichever key: a signed address has none."""
        return self._alive(film_id)

    def state_of(self, job: jobs.Job) -> jobs.Snapshot:
        """How the job stands now."""
        films_at, failed = None, False
        if job.renders:
            films_at, failed = self.films.ready_at(job), self.films.failed(job)
        return jobs.snapshot(job, self.now(), films_at, failed)

    def delete(self, job: jobs.Job, *, aborts: bool = False) -> None:
        """Forgets the job, whatever its state. A running one stays paid, unless to delete it `aborts` it."""
        state = self.state_of(job)
        saved = 0 if state.ended or not aborts else job.billed_micros
        entry = {"id": job.id, "key_name": job.key_name, "was": state.status}
        self.note("deleted", {**entry, "unbilled_micros": saved}, durable=True)
        self._forget(job.id)
        self.films.drop(job)

    def list_page(
        self,
        key_name: str,
        dialect: str,
        *,
        after: str | None,
        before: str | None = None,
        limit: int,
        descending: bool,
        wanted: Callable[[jobs.Job], bool] = lambda _: True,
    ) -> Page:
        """One page of the key's jobs, with what the faults do to it. Raises KeyError."""
        if hit := self.strike("list_error", key_name):
            raise errors.server_error(int(hit.value))
        if hit := self.strike("foreign_jobs", key_name):
            self._add_strangers((key_name, dialect), None, hit.value)
        if hit := self.strike("list_short", key_name):
            limit = min(limit, max(1, int(hit.value)))
        lag, drop = self.strike("list_lag", key_name), self.strike("list_drop", key_name)
        now = self.now()

        def shown(job_id: str) -> bool:
            job = self._alive(job_id)
            if job is None or not wanted(job):
                return False
            age = now - job.created_at
            if lag and lag.match in job.prompt and age < self.settings.real(lag.value):
                return False
            if drop and drop.match in job.prompt and _every(drop.value, job_id):
                return False
            if age < self.settings.real(job.faults.get("list_lag", 0)):
                return False
            return not ("list_drop" in job.faults and self.strike("list_drop", key_name, job=job))

        ids, has_more = jobs.page(
            self._ids[key_name, dialect],
            shown,
            after=after,
            before=before,
            limit=limit,
            descending=descending,
        )
        return Page(tuple(self._jobs[job_id] for job_id in ids), has_more)

    def all_jobs(self) -> Iterable[jobs.Job]:
        """Every job there is, the oldest first."""
        alive = (self._alive(job_id) for job_id in tuple(self._jobs))
        return [job for job in alive if job is not None]

    def state(self) -> dict[str, object]:
        """Counts for tests and people."""
        by_key: dict[str, dict[str, int]] = {}
        for job in self.all_jobs():
            counts = by_key.setdefault(job.key_name, {})
            status = self.state_of(job).status
            counts[status] = counts.get(status, 0) + 1
        return {
            "notice": "This is a simulator. It runs no model.",
            "now": self.now(),
            "virtual_now": (self.now() - self._origin) * self.settings.time_factor,
            "time_factor": self.settings.time_factor,
            "accepted": self._accepted,
            "jobs": by_key,
            "requests": {" ".join(asked): count for asked, count in self.served.items()},
            "faults": list(self.plan.rules()),
        }

    # Inner works

    def _known(
        self, key_name: str, creation: requests.Creation, idempotency_key: str | None, now: float
    ) -> jobs.Job | None:
        if idempotency_key is None:
            return None
        key = (key_name, creation.dialect, idempotency_key)
        job_id, fingerprint, at = self._keyed.get(key, ("", "", 0.0))
        if not job_id or now - at >= self.settings.real(self.settings.idempotency_seconds):
            return None
        if fingerprint != creation.fingerprint():
            message = "This idempotency key was used with a different request."
            raise errors.ApiError(409, message, code="idempotency_key_reused")
        job = self._alive(job_id)
        if job is None:
            raise errors.ApiError(409, "The video of this idempotency key was deleted.")
        entry = {"id": job_id, "key_name": key_name, "idempotency_key": idempotency_key}
        self.note("replayed", {**entry, "prompt": job.prompt})
        return job

    def _slot_at(self, account: _Account, now: float) -> float:
        """When one of the places at once is free for a new job; 0 for now. Raises ApiError where it may not wait.

        Who throttles counts on its jobs' ends as they stand: that one of them is deleted meanwhile helps nobody.
        """
        _, at_once = self.settings.quotas_of(account[1])
        running = self._still_running(account)
        if account[1] != jobs.RUNWAY:
            if 0 < at_once <= len(running):
                raise errors.too_many_tasks()
            return 0.0
        day_ago = now - self.settings.real(86400)
        ids = self._ids[account]
        today = sum(
            1 for job_id in ids if (job := self._jobs.get(job_id)) and job.created_at > day_ago
        )
        if 0 < self.settings.runway_max_daily_generations <= today:
            raise errors.daily_cap()
        if not 0 < at_once <= len(running):
            return 0.0
        ends = sorted(job.due_at for job in map(self._jobs.__getitem__, running))
        return ends[len(running) - at_once]

    def _still_running(self, account: _Account) -> set[str]:
        running = self._running[account]
        for job_id in tuple(running):
            job = self._alive(job_id)
            if job is None or self.state_of(job).ended:
                running.discard(job_id)
        return running

    def _alive(self, job_id: str) -> jobs.Job | None:
        """The job, unless it is past its time: then it is forgotten, and needs no line in the log."""
        job = self._jobs.get(job_id)
        if job is not None and self.now() >= job.vanishes_at:
            self._forget(job_id)
            self.films.drop(job)
            return None
        return job

    def _new_job(
        self,
        key_name: str,
        creation: requests.Creation,
        now: float,
        attached: Mapping[str, float],
        slot_at: float = 0.0,
    ) -> jobs.Job:
        settings = self.settings
        ending = next((jobs.ENDINGS[name] for name in jobs.ENDINGS if name in attached), None)
        base, per_second = settings.render_times(
            creation.dialect, creation.size, creation.n_variants
        )
        render_seconds = jobs.render_seconds(
            base,
            per_second,
            int(creation.seconds),
            settings.render_jitter_sigma,
            f"{settings.seed}:{self._accepted}",
        )
        if ending is not None:
            render_seconds = min(render_seconds, settings.failure_seconds)
        price = settings.price_micros.get(creation.model, settings.price_micros_default)
        # A render that fails is not billed, as nearly everywhere in this trade.
        free = ending is not None and not jobs.billed_though_failed(creation.dialect, ending)
        billed = 0 if free or "cancelled_later" in attached else int(creation.seconds)
        azure = creation.dialect == jobs.AZURE_JOBS
        retention = settings.azure_retention_seconds if azure else settings.retention_seconds
        starts_at = max(now, slot_at) + settings.real(settings.queue_seconds)
        return jobs.Job(
            id=jobs.new_id(creation.dialect, now, secrets.token_hex(20)),
            key_name=key_name,
            model=creation.model,
            size=creation.size,
            seconds=creation.seconds,
            prompt=creation.prompt,
            metadata=creation.metadata,
            created_at=now,
            starts_at=starts_at,
            due_at=starts_at + settings.real(render_seconds),
            retained_seconds=settings.real(retention),
            error=ending,
            faults=attached,
            billed_micros=price * billed * jobs.surviving(creation.n_variants, attached),
            dialect=creation.dialect,
            n_variants=creation.n_variants,
            generation_ids=tuple(
                jobs.new_generation_id(now, secrets.token_hex(20))
                for _ in range(creation.n_variants if azure else 0)
            ),
            inputs=creation.inputs,
            throttled_until=slot_at,
        )

    def _add_strangers(self, account: _Account, like: jobs.Job | None, count: float) -> None:
        """Jobs that another user of the same key made; the log calls them foreign."""
        key_name, dialect = account
        model, size, seconds = self.settings.example_of(dialect)
        for number in range(min(100, int(count))):
            creation = requests.Creation(
                dialect=dialect,
                prompt=like.prompt if like else f"A stranger's film, number {number + 1}",
                model=like.model if like else model,
                size=like.size if like else size,
                seconds=like.seconds if like else seconds,
                n_variants=like.n_variants if like else 1,
            )
            # No faults attached: a twin's prompt has the tokens, but they are its original's.
            job = self._new_job(key_name, creation, self.now(), {})
            job = dataclasses.replace(job, foreign=True, billed_micros=0)
            self._record(job, "foreign", None, None)

    def _record(
        self, job: jobs.Job, kind: str, idempotency_key: str | None, fingerprint: str | None
    ) -> None:
        entry = {
            **jobs.as_entry(job),
            "idempotency_key": idempotency_key,
            "fingerprint": fingerprint,
        }
        self.note(kind, entry, durable=True)
        self._remember(job, idempotency_key, fingerprint)
        self._start_film(job)

    def _remember(
        self, job: jobs.Job, idempotency_key: str | None, fingerprint: str | None
    ) -> None:
        self._jobs[job.id] = job
        if job.dialect == jobs.OPENAI_VIDEOS:  # no other has webhooks
            self.untold[job.id] = None
        self._ids[job.key_name, job.dialect].append(job.id)
        self._generations |= dict.fromkeys(job.generation_ids, job.id)
        if not job.foreign:
            self._accepted += 1
            self._running[job.key_name, job.dialect].add(job.id)
        if idempotency_key is not None and fingerprint is not None:
            key = (job.key_name, job.dialect, idempotency_key)
            self._keyed[key] = (job.id, fingerprint, job.created_at)

    def _start_film(self, job: jobs.Job) -> None:
        if job.renders:
            self.films.start(job)

    def _forget(self, job_id: str) -> None:
        job = self._jobs.pop(job_id)
        self.untold.pop(job_id, None)
        self._running[job.key_name, job.dialect].discard(job_id)
        for generation_id in job.generation_ids:
            self._generations.pop(generation_id, None)

    def _replay(self) -> None:
        """Takes the state back from the log."""
        for number, untyped in enumerate(self.log.read()):
            entry = cast("dict[str, Any]", untyped)
            if number == 0:
                self._origin = entry["at"]
            match entry["kind"]:
                case "accepted" | "foreign":
                    job = jobs.from_entry(entry)
                    self._remember(job, entry["idempotency_key"], entry["fingerprint"])
                case "deleted":
                    self._forget(entry["id"])
                case "told":
                    self.untold.pop(entry["job"], None)
                case "fault":
                    self.plan.count(entry["source"])
                case "armed":
                    self.plan.arm(faults.Rule(**entry["rule"]))
                case "cleared":
                    self.plan.clear()
        for job in self.all_jobs():
            self._start_film(job)


def _every(value: float, job_id: str) -> bool:
    """Whether the job is one of every `value`."""
    return zlib.crc32(job_id.encode()) % max(1, int(value)) == 0


def retry_after(real_seconds: float) -> dict[str, str]:
    """Both forms: whole seconds, rounded up, and exact milliseconds for short scaled waits."""
    return {
        "retry-after": str(max(1, -int(-real_seconds // 1))),
        "retry-after-ms": str(max(1, round(real_seconds * 1000))),
    }
