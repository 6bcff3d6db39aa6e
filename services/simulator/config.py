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

from services.simulator import quirks

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
    price_micros: dict[str, int] = {"sora-2": 100_000, "sora-2-pro": 300_000}
    price_micros_default: int = pydantic.Field(default=100_000, ge=0)

    frames_per_second: int = pydantic.Field(default=24, ge=1, le=60)
    render_workers: int = pydantic.Field(default=1, ge=1, le=16)
    # False lets all text jobs of one size and length share one film: cheap mass tests.
    draw_prompt: bool = True
    max_body_bytes: int = pydantic.Field(default=32 * 1024 * 1024, ge=1024)

    @pydantic.field_validator(
        "api_keys", "quirks", "seconds", "extra_seconds", "extra_sizes", mode="before"
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

    def key_names(self) -> dict[str, str]:
        """API key to the name that stands for it in the log, which never holds a key."""
        names = {}
        for entry in self.api_keys:
            name, colon, key = entry.partition(":")
            if not colon:
                name, key = f"key-{hashlib.sha256(entry.encode()).hexdigest()[:8]}", entry
            names[key] = name
        return names
