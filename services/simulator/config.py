"""The simulator's settings, read from `SIMULATOR_*`.

Every duration is in provider seconds, divided by `time_factor` to become real ones. Timestamps on
the wire stay real Unix seconds, so that a client's windows over `created_at` hold at any factor.
"""

import hashlib
import pathlib
import re
from typing import Annotated

import pydantic
import pydantic_settings

from services.simulator import jobs, quirks

_SIZE = re.compile(r"^[1-9]\d{1,3}x[1-9]\d{1,3}$")

# A comma-separated list in the environment, where pydantic would otherwise want JSON.
CommaList = Annotated[tuple[str, ...], pydantic_settings.NoDecode]

DEFAULT_MODELS = {
    "sora-2": ("720x1280", "1280x720"),
    "sora-2-pro": (
        "720x1280",
        "1280x720",
        "1024x1792",
        "1792x1024",
        "1080x1920",
        "1920x1080",
    ),
}


class Settings(pydantic_settings.BaseSettings):
    """Immutable after start; `SIMULATOR_PORT=0` takes a free port, told on the first output line."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix="SIMULATOR_", frozen=True, extra="ignore"
    )

    host: str = "127.0.0.1"
    port: int = pydantic.Field(default=8099, ge=0, le=65535)
    data_dir: pathlib.Path = pathlib.Path(".framewire/simulator")
    time_factor: float = pydantic.Field(default=1.0, gt=0)
    seed: int = 0

    # `key` or `name:key`. Each key is an account of its own: its jobs, its quotas.
    api_keys: CommaList = ("sim-key",)
    requests_per_minute: int = pydantic.Field(default=0, ge=0)
    max_concurrent_jobs: int = pydantic.Field(default=0, ge=0)
    poll_after_seconds: float = pydantic.Field(default=0.0, ge=0)  # 0 sends no poll hint

    queue_seconds: float = pydantic.Field(default=5.0, ge=0)
    render_seconds_base: float = pydantic.Field(default=20.0, ge=0)
    render_seconds_per_second: float = pydantic.Field(default=12.0, ge=0)
    render_jitter_sigma: float = pydantic.Field(default=0.0, ge=0, le=2)  # lognormal
    failure_seconds: float = pydantic.Field(default=15.0, ge=0)  # until a late failure shows
    content_lag_seconds: float = pydantic.Field(default=2.0, ge=0)
    retention_seconds: float = pydantic.Field(default=3600.0, gt=0)

    # Whether `Idempotency-Key` is honoured. The real service never did; keyed gateways do.
    idempotency_keys: bool = False
    idempotency_seconds: float = pydantic.Field(default=86400.0, gt=0)
    # Whether the request's `metadata` object comes back in the job: the marker for adoption.
    echo_marker: bool = False
    # Older servers leave the prompt out of the job object.
    echo_prompt: bool = True
    # Deviations of other servers, named in `quirks.py`.
    quirks: CommaList = ()

    # The azure_jobs dialect; times of queue, failure and content lag are shared with the other.
    azure_deployments: CommaList = ("sora",)  # what a request calls `model`
    azure_api_version_required: bool = True  # `api-version=preview` in every request
    azure_requests_per_minute: int = pydantic.Field(default=0, ge=0)  # documented: 60
    azure_max_concurrent_jobs: int = pydantic.Field(default=2, ge=0)
    # For 480x480 and one variant; it grows with the root of the area, and with the variants.
    azure_render_seconds_per_second: float = pydantic.Field(default=3.0, ge=0)
    # From creation on; then the job itself is gone.
    azure_retention_seconds: float = pydantic.Field(default=86400.0, gt=0)

    # The runway dialect; its queue, failure and retention are those of the first.
    runway_max_concurrent_tasks: int = pydantic.Field(
        default=2, ge=0
    )  # more of them wait, THROTTLED
    runway_max_daily_generations: int = pydantic.Field(default=0, ge=0)  # documented: 50 and more
    runway_url_seconds: float = pydantic.Field(
        default=86400.0, gt=0
    )  # a film's signed address is good

    # Where what became of jobs is told (Standard Webhooks), and with which secret; none: nowhere.
    webhook_url: str = pydantic.Field(default="", pattern=r"^(https?://.+)?$")
    webhook_secret: pydantic.SecretStr = pydantic.SecretStr("")

    models: dict[str, tuple[str, ...]] = DEFAULT_MODELS
    seconds: CommaList = ("4", "8", "12", "16", "20")
    # What the real service never took, and tests and demos want: allowed for every model.
    extra_seconds: CommaList = ("1", "2", "3", "5", "6", "10")
    extra_sizes: CommaList = (
        "1080x1080",
        "720x720",
        "640x360",
        "360x640",
        "320x180",
        "180x320",
        "128x128",
        "64x64",
    )
    # USD micros per second of video; a model not named here costs `price_micros_default`.
    price_micros: dict[str, int] = {
        "sora-2": 100_000,
        "sora-2-pro": 300_000,
        "gen4_turbo": 50_000,
        "gen4.5": 120_000,
    }
    price_micros_default: int = pydantic.Field(default=100_000, ge=0)

    frames_per_second: int = pydantic.Field(default=24, ge=1, le=60)
    # Films shorter than this are padded at their end, with nothing: cheap large downloads. 0 pads none.
    film_bytes: int = pydantic.Field(default=0, ge=0, lt=2**32)
    render_workers: int = pydantic.Field(default=1, ge=1, le=16)
    # False lets all text jobs of one size and length share one film: cheap mass tests.
    draw_prompt: bool = True
    max_body_bytes: int = pydantic.Field(default=32 * 1024 * 1024, ge=1024)

    @pydantic.field_validator(
        "api_keys",
        "quirks",
        "azure_deployments",
        "seconds",
        "extra_seconds",
        "extra_sizes",
        mode="before",
    )
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @pydantic.model_validator(mode="after")
    def _check_catalogue(self) -> "Settings":
        if not self.models:
            raise ValueError("models must name at least one model")
        if not self.azure_deployments:
            raise ValueError("azure_deployments must name at least one")
        if unknown := set(self.quirks) - quirks.NAMES:
            raise ValueError(f"quirks {sorted(unknown)}: want some of {sorted(quirks.NAMES)}")
        for size in {*self.extra_sizes, *(s for sizes in self.models.values() for s in sizes)}:
            # H.264 in yuv420p halves both sides, so odd ones cannot be made.
            if not _SIZE.match(size) or any(int(side) % 2 for side in size.split("x")):
                raise ValueError(f"size {size!r}: want WxH, both even, 10 to 9999")
        for seconds in (*self.seconds, *self.extra_seconds):
            if not seconds.isdecimal() or not 1 <= int(seconds) <= 120:
                raise ValueError(f"seconds {seconds!r}: want a whole number from 1 to 120")
        return self

    def real(self, provider_seconds: float) -> float:
        """The real seconds that `provider_seconds` take here."""
        return provider_seconds / self.time_factor

    def sizes_of(self, model: str) -> tuple[str, ...]:
        """What `model` takes, the simulator's extra sizes last."""
        return tuple(dict.fromkeys((*self.models[model], *self.extra_sizes)))

    def all_seconds(self) -> tuple[str, ...]:
        """Every allowed length, the shortest first."""
        return tuple(sorted({*self.seconds, *self.extra_seconds}, key=int))

    def quotas_of(self, dialect: str) -> tuple[int, int]:
        """Requests per minute and jobs at once, of one key in one dialect; 0 is no limit."""
        if dialect == jobs.AZURE_JOBS:
            return self.azure_requests_per_minute, self.azure_max_concurrent_jobs
        if dialect == jobs.RUNWAY:
            return 0, self.runway_max_concurrent_tasks  # it has no limit per minute
        return self.requests_per_minute, self.max_concurrent_jobs

    def render_times(self, dialect: str, size: str, n_variants: int) -> tuple[float, float]:
        """How long the pretended model takes: at least, and for each second of film."""
        if dialect == jobs.AZURE_JOBS:
            width, height = (int(side) for side in size.split("x"))
            factor = (width * height / 480**2) ** 0.5 * n_variants
            return 0.0, self.azure_render_seconds_per_second * factor
        if dialect == jobs.RUNWAY:
            return 10.0, 4.0
        return self.render_seconds_base, self.render_seconds_per_second

    def example_of(self, dialect: str) -> tuple[str, str, str]:
        """A model, size and length that the dialect takes."""
        if dialect == jobs.AZURE_JOBS:
            return self.azure_deployments[0], (self.extra_sizes or ("480x480",))[-1], "1"
        if dialect == jobs.RUNWAY:
            return "gen4_turbo", "1280x720", "5"
        model = next(iter(self.models))
        return model, self.sizes_of(model)[-1], self.all_seconds()[0]

    def key_names(self) -> dict[str, str]:
        """API key to the name that stands for it in the log, which never holds a key."""
        names = {}
        for entry in self.api_keys:
            name, colon, key = entry.partition(":")
            if not colon:
                name, key = f"key-{hashlib.sha256(entry.encode()).hexdigest()[:8]}", entry
            names[key] = name
        return names
