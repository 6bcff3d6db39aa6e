"""How a provider account stands: may it be sent to, and how many jobs it takes at once. Pure: numbers in, a word out.

A closed account is one that nothing is sent to. It opens again by itself: after the provider's own time, or after a
pause that grows with each trouble in a row; then one job is sent to see, and only when that went well all the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from framewire.events.v1 import vocabulary_pb2
from services.generator import catalogue


@dataclass(frozen=True, slots=True)
class Standing:
    """A provider account as its rows have it. Seconds count from now."""

    provider_account: str
    paused: bool
    closed_reason: str
    opens_in_seconds: float
    """When the pause after trouble ends, or the provider's own; at or below 0: over."""
    troubles: int
    jobs_learnt: int | None
    jobs_learnt_seconds_ago: float
    jobs_probe_seconds: float
    jobs_in_flight: int
    preparing: int
    being_sent: int
    """Those in preparation, and those whose answer is waited for."""
    cost_micros_hour: int = 0
    cost_micros_day: int = 0
    jobs_day: int = 0
    """Of the last hour and day, what is in preparation included; 0 where nobody asked."""


def slots(standing: Standing, account: catalogue.ProviderAccount) -> int:
    """Jobs that it takes at once: as configured, or as it turned out, and then one more each time that passes."""
    if standing.jobs_learnt is None:
        return account.max_jobs_in_flight
    probe = max(standing.jobs_probe_seconds, 0.001)
    tried = min(account.max_jobs_in_flight, int(standing.jobs_learnt_seconds_ago / probe))
    return min(account.max_jobs_in_flight, standing.jobs_learnt + tried)


def capped(account: catalogue.ProviderAccount) -> bool:
    """Whether what it was given has to be counted before it is given more."""
    return bool(
        account.max_cost_micros_per_hour or account.max_cost_micros_per_day or account.jobs_per_day
    )


def why_closed(standing: Standing, account: catalogue.ProviderAccount, cost_micros: int = 0) -> str:
    """Why nothing is sent to it now, for an operator; empty: it is open. `cost_micros`: of what is to be sent."""
    if standing.paused:
        return "paused by an operator"
    if standing.opens_in_seconds > 0:
        return standing.closed_reason or "closed"
    for name, spent, cap in (
        ("hour", standing.cost_micros_hour, account.max_cost_micros_per_hour),
        ("day", standing.cost_micros_day, account.max_cost_micros_per_day),
    ):
        if cap and (spent >= cap or spent + cost_micros > cap):
            return f"the cap on money is reached: {spent} of {cap} micros in this {name}"
    if account.jobs_per_day and standing.jobs_day >= account.jobs_per_day:
        return f"the cap on jobs is reached: {standing.jobs_day} of {account.jobs_per_day} a day"
    return ""


def room(standing: Standing, account: catalogue.ProviderAccount, most_preparing: int) -> int:
    """How many more jobs it can be given now, were it open. After trouble one at a time, to see."""
    free = slots(standing, account) - standing.jobs_in_flight
    if standing.troubles > 0:
        free = min(free, 1 - standing.being_sent)
    return max(0, min(free, most_preparing - standing.preparing))


def most_preparing(account: catalogue.ProviderAccount, lease_seconds: float, at_once: int) -> int:
    """Jobs in preparation at once, such that each gets its request well before its lease is over."""
    quota = account.quota
    submits = max(0.1, quota.floors.get(catalogue.SUBMIT, 0.0))
    seconds = quota.requests.interval / submits
    if quota.creates is not None:
        seconds = max(seconds, quota.creates.interval)
    return max(1, min(at_once, int(lease_seconds / 3 / seconds)))


def able(
    standings: Sequence[Standing],
    accounts: Mapping[str, catalogue.ProviderAccount],
    most: Mapping[str, int],
    now: datetime,
) -> list[tuple[str, str]]:
    """Model and account of each that can be given a job now, the account with the least for its weight first."""
    found: list[tuple[float, str]] = []
    for item in standings:
        account = accounts[item.provider_account]
        if not why_closed(item, account) and room(item, account, most[account.name]) > 0:
            found.append(((item.jobs_in_flight + 1) / account.weight, account.name))
    return [
        (model, name)
        for _, name in sorted(found)
        for model in accounts[name].models
        if still_served(accounts[name], model, now)
    ]


def still_served(account: catalogue.ProviderAccount, model: str, now: datetime) -> bool:
    """Whether a job that is sent now can finish there before the model goes."""
    until = catalogue.serves_until(account, model)
    return until is None or now < until


def price(account: catalogue.ProviderAccount, spec: vocabulary_pb2.VideoSpec) -> int:
    """What the account charges for it, in micros."""
    per_second = account.models[spec.model].cost_micros_per_second
    return per_second * spec.seconds * max(1, spec.variants)
