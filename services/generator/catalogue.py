"""The catalogue of provider accounts: what `providers.yaml` says, checked. Pure: text in, frozen data out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from framewire.events.v1 import vocabulary_pb2
from services.generator import attempts, buckets, variants


class CatalogueError(ValueError):
    """The file does not say what it must."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of an outcome table: which answers of a create it is about."""

    statuses: range
    body: re.Pattern[str] | None
    outcome: str
    cause: str
    limit: str = "requests"
    """Of `not_accepted`: which limit was met."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as one provider account serves it."""

    model: str
    upstream: str
    cost_micros_per_second: int
    render_seconds: float
    """How long a render takes, where none was measured yet."""
    retires_at: datetime | None
    """From then on the account does not serve it."""


@dataclass(frozen=True, slots=True)
class ProviderAccount:
    """One key at one server. Durations are in provider time: divided by the time factor already."""

    name: str
    dialect: str
    base_url: str
    pool: str
    evidence: attempts.Evidence
    cancel: str
    weight: float
    """Its share of the jobs among the accounts that serve a model."""
    max_jobs_in_flight: int
    requests_per_minute: float
    creates_per_minute: float
    """0: no limit of its own. As of the next three."""
    jobs_per_day: int
    max_cost_micros_per_hour: int
    max_cost_micros_per_day: int
    hour_seconds: float
    day_seconds: float
    probe_seconds: float
    """After `too many jobs`: how long until one more is tried."""
    quota: buckets.Quota
    poll_interval_seconds: float
    post_timeout_seconds: float
    settle_seconds: float
    clock_skew_seconds: float
    key_ttl_seconds: float
    max_render_seconds: float
    retention_seconds: float
    resolve_seconds: float
    lost_after_seconds: float
    max_attempts: int
    closed_seconds: float
    max_closed_seconds: float
    """The pause after the first trouble, and the longest after many in a row."""
    models: Mapping[str, Model]
    rules: tuple[Rule, ...]
    poll_interval_with_webhooks_seconds: float = 0.0
    """How often it is polled while its webhooks come; 0: as ever. A webhook that is lost costs that much."""
    variant: variants.Variant = field(default_factory=variants.Variant)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What all servers of a protocol have in common, and the kinds of them."""

    rules: tuple[Rule, ...]
    variants: Mapping[str, tuple[variants.Variant, tuple[Rule, ...]]]
    """By name, each with rules that come before the dialect's."""


LIMITS = ("requests", "jobs", "day")
CANCEL = ("none", "delete_aborts")
OUTCOMES = ("refused_request", "refused_us", "not_accepted")
_SCALED = (
    "poll_interval_seconds",
    "poll_interval_with_webhooks_seconds",
    "settle_seconds",
    "key_ttl_seconds",
    "max_render_seconds",
    "retention_seconds",
    "resolve_seconds",
    "lost_after_seconds",
    "closed_seconds",
    "max_closed_seconds",
    "probe_seconds",
)
SUBMIT = buckets.Use.SUBMIT
_FLOORS = {"download": buckets.Use.DOWNLOAD, "submit": SUBMIT, "poll": buckets.Use.POLL}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DEFAULTS: dict[str, Any] = {
    "weight": 1,
    "creates_per_minute": 0,
    "jobs_per_day": 0,
    "max_cost_micros_per_hour": 0,
    "max_cost_micros_per_day": 0,
    "probe_seconds": 60,
    "max_closed_seconds": 1800,
    "request_floors": {"download": 0.25, "submit": 0.25, "poll": 0.1},
}
_CAPS = ("jobs_per_day", "max_cost_micros_per_hour", "max_cost_micros_per_day")
_POSITIVE = (
    "weight",
    "probe_seconds",
    "max_closed_seconds",
    "max_jobs_in_flight",
    "requests_per_minute",
    "poll_interval_seconds",
    "post_timeout_seconds",
    "max_attempts",
)


def parse(document: Mapping[str, Any], time_factor: float) -> dict[str, ProviderAccount]:
    """The provider accounts by name. Raises CatalogueError with the place of the mistake."""
    if not isinstance(document, Mapping):
        raise CatalogueError("the catalogue is not a mapping")
    dialects = {
        name: _dialect(name, data) for name, data in dict(document.get("dialects") or {}).items()
    }
    accounts: dict[str, ProviderAccount] = {}
    for entry in document.get("provider_accounts") or ():
        if not isinstance(entry, Mapping):
            raise CatalogueError(f"provider account {entry!r} is not a mapping")
        account = _account(entry, dialects, time_factor)
        if account.name in accounts:
            raise CatalogueError(f"provider account {account.name} stands twice")
        accounts[account.name] = account
    if not accounts:
        raise CatalogueError("there is no provider account")
    _check_pools(accounts)
    return accounts


def _check_pools(accounts: Mapping[str, ProviderAccount]) -> None:
    """A model waits in one queue, whoever serves it: accounts that share a model are of one pool."""
    pools: dict[str, str] = {}
    for account in accounts.values():
        for model in account.models:
            if pools.setdefault(model, account.pool) != account.pool:
                raise CatalogueError(
                    f"provider account {account.name}: {model} is in pool {pools[model]} already; accounts that"
                    " share a model are of one pool"
                )


def _dialect(name: str, data: Mapping[str, Any]) -> Dialect:
    found: dict[str, tuple[variants.Variant, tuple[Rule, ...]]] = {}
    for variant, entry in dict(data.get("variants") or {}).items():
        try:
            values = dict(entry or {})
            rules = _rules(name, {"create_outcomes": values.pop("create_outcomes", ())})
            found[variant] = (variants.parse(values), rules)
        except CatalogueError:
            raise
        except (TypeError, ValueError) as error:
            raise CatalogueError(f"dialect {name}: variant {variant}: {error}") from error
    return Dialect(_rules(name, data), found)


def _rules(dialect: str, data: Mapping[str, Any]) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for line in data.get("create_outcomes") or ():
        first, _, last = str(line.get("status", "")).partition("-")
        limit = line.get("limit", "requests")
        if not first.isdigit() or line.get("outcome") not in OUTCOMES or limit not in LIMITS:
            raise CatalogueError(f"dialect {dialect}: outcome rule {line} is not usable")
        cause = line.get("cause", "REQUEST_INVALID")
        try:
            statuses = range(int(first), int(last or first) + 1)
            body = re.compile(line["body"], re.IGNORECASE) if line.get("body") else None
            vocabulary_pb2.Cause.Value(f"CAUSE_{cause}")
        except (re.error, TypeError, ValueError) as error:
            raise CatalogueError(f"dialect {dialect}: outcome rule {line}: {error}") from error
        rules.append(Rule(statuses, body, line["outcome"], cause, limit))
    return tuple(rules)


def _account(
    entry: Mapping[str, Any], dialects: Mapping[str, Dialect], time_factor: float
) -> ProviderAccount:
    values = {**_DEFAULTS, **entry}
    name = values.get("name", "?")
    try:
        if not _NAME.fullmatch(str(name)):
            raise CatalogueError(
                f"provider account {name}: the name is not like a file's: {_NAME.pattern}"
            )
        if values["dialect"] not in dialects:
            raise CatalogueError(f"provider account {name}: no dialect {values['dialect']}")
        values.setdefault("poll_interval_with_webhooks_seconds", 0)
        shared, may_retry = values.pop("shared", False), values.pop("upstream_may_retry", False)
        if shared or may_retry:
            # A key that others use, or a server that sends again by itself, can prove nothing.
            values["evidence"] = "blind"
        _check_numbers(name, values)
        for number in _SCALED:
            values[number] = float(values[number]) / time_factor
        values |= {"hour_seconds": 3600 / time_factor, "day_seconds": 86400 / time_factor}
        values["weight"] = float(values["weight"])
        values["quota"] = _quota(name, values, time_factor)
        values["requests_per_minute"] = float(values["requests_per_minute"]) * time_factor
        values["creates_per_minute"] = float(values["creates_per_minute"]) * time_factor
        values["evidence"] = attempts.Evidence(values["evidence"])
        if values["cancel"] not in CANCEL:
            raise CatalogueError(f"provider account {name}: cancel is none of {CANCEL}")
        values["models"] = {
            model: _model(model, data, time_factor) for model, data in values["models"].items()
        }
        if not values["models"]:
            raise CatalogueError(f"provider account {name}: no models")
        dialect, rules = dialects[values["dialect"]], ()
        if (variant := values.pop("variant", None)) is not None:
            if variant not in dialect.variants:
                raise CatalogueError(f"provider account {name}: no variant {variant}")
            values["variant"], rules = dialect.variants[variant]
        return ProviderAccount(rules=(*rules, *dialect.rules), **values)
    except CatalogueError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CatalogueError(f"provider account {name}: {error!r}") from error


def _check_numbers(name: str, values: dict[str, Any]) -> None:
    for number in _POSITIVE:
        if not float(values[number]) > 0:
            raise CatalogueError(f"provider account {name}: {number} is not above 0")
    for number in _CAPS:
        values[number] = int(values[number])
        if values[number] < 0:
            raise CatalogueError(f"provider account {name}: {number} is below 0")


def _model(model: str, data: Mapping[str, Any], time_factor: float) -> Model:
    retires_at = data.get("retires_at")
    if retires_at is not None:
        if not isinstance(retires_at, datetime):
            retires_at = datetime.fromisoformat(str(retires_at))
        retires_at = retires_at if retires_at.tzinfo else retires_at.replace(tzinfo=UTC)
    return Model(
        model=model,
        upstream=data["upstream"],
        cost_micros_per_second=int(data["cost_micros_per_second"]),
        render_seconds=float(data.get("render_seconds", 120)) / time_factor,
        retires_at=retires_at,
    )


def _quota(name: str, values: dict[str, Any], time_factor: float) -> buckets.Quota:
    floors = {_FLOORS[use]: float(share) for use, share in values.pop("request_floors").items()}
    if sum(floors.values()) > 1 or min(floors.values(), default=0) < 0:
        raise CatalogueError(f"provider account {name}: request_floors are no shares of 1")
    creates = float(values["creates_per_minute"])
    if creates < 0:
        raise CatalogueError(f"provider account {name}: creates_per_minute is below 0")
    minute = 60 / time_factor
    return buckets.Quota(
        requests=buckets.pace(float(values["requests_per_minute"]), minute),
        creates=buckets.pace(creates, minute) if creates else None,
        floors=floors,
        recovery_seconds=5 * minute,
    )


def serves_until(account: ProviderAccount, model: str) -> datetime | None:
    """The last moment at which a job can be sent that still is to finish there; None: no end is known."""
    entry = account.models[model]
    if entry.retires_at is None:
        return None
    return entry.retires_at - timedelta(seconds=entry.render_seconds)


def outcome_rule(account: ProviderAccount, status: int, body: str) -> Rule | None:
    """The first rule that an answer meets; None: ambiguous."""
    for rule in account.rules:
        if status in rule.statuses and (rule.body is None or rule.body.search(body)):
            return rule
    return None
