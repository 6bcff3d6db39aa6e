"""The catalogue of provider accounts: what `providers.yaml` says, checked. Pure: text in, frozen data out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from framewire.events.v1 import vocabulary_pb2
from services.generator import attempts, variants


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


@dataclass(frozen=True, slots=True)
class ProviderAccount:
    """One key at one server. Durations are in provider time: divided by the time factor already."""

    name: str
    dialect: str
    base_url: str
    pool: str
    evidence: attempts.Evidence
    cancel: str
    max_jobs_in_flight: int
    requests_per_minute: float
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
)
_POSITIVE = (
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
    """A turn is given in a pool before its account is chosen: each of its accounts must serve all of its models."""
    models: dict[str, set[str]] = {}
    for account in accounts.values():
        if models.setdefault(account.pool, set(account.models)) != set(account.models):
            raise CatalogueError(
                f"provider account {account.name}: serves other models than others of pool {account.pool}"
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
    values = dict(entry)
    name = values.get("name", "?")
    try:
        if values["dialect"] not in dialects:
            raise CatalogueError(f"provider account {name}: no dialect {values['dialect']}")
        values.setdefault("poll_interval_with_webhooks_seconds", 0)
        shared, may_retry = values.pop("shared", False), values.pop("upstream_may_retry", False)
        if shared or may_retry:
            # A key that others use, or a server that sends again by itself, can prove nothing.
            values["evidence"] = "blind"
        for field in _POSITIVE:
            if not float(values[field]) > 0:
                raise CatalogueError(f"provider account {name}: {field} is not above 0")
        for field in _SCALED:
            values[field] = float(values[field]) / time_factor
        values["requests_per_minute"] = float(values["requests_per_minute"]) * time_factor
        values["evidence"] = attempts.Evidence(values["evidence"])
        if values["cancel"] not in CANCEL:
            raise CatalogueError(f"provider account {name}: cancel is none of {CANCEL}")
        values["models"] = {
            model: Model(model, data["upstream"], int(data["cost_micros_per_second"]))
            for model, data in values["models"].items()
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


def outcome_rule(account: ProviderAccount, status: int, body: str) -> Rule | None:
    """The first rule that an answer meets; None: ambiguous."""
    for rule in account.rules:
        if status in rule.statuses and (rule.body is None or rule.body.search(body)):
            return rule
    return None
