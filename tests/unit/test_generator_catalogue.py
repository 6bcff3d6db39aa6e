"""The catalogue of provider accounts: what it refuses, and what each documented answer of a create means."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.generator import attempts, catalogue, config, pools, variants

FILE = Path(catalogue.__file__).parent / "providers.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(FILE.read_text())


def changed(**fields: Any) -> dict[str, Any]:
    """The catalogue with fields of its first account changed; a field that is None is left out."""
    document = copy.deepcopy(DOCUMENT)
    entry = document["provider_accounts"][0]
    for name, value in fields.items():
        entry[name] = value
        if value is None:
            del entry[name]
    return document


def parsed(document: Any = DOCUMENT, time_factor: float = 1.0) -> catalogue.ProviderAccount:
    return next(iter(catalogue.parse(document, time_factor).values()))


def test_what_a_server_wants_otherwise_is_data() -> None:
    plain, omni = parsed(), parsed(changed(variant="vllm_omni"))
    assert (plain.variant, omni.variant.key_header) == (variants.Variant(), "none")
    mismatch = "The model `x` does not match the served one"
    rule = catalogue.outcome_rule(omni, 400, mismatch)
    assert rule is not None
    assert rule.outcome == "refused_us"
    # Its own rules come first, the dialect's after them.
    assert omni.rules[1:] == plain.rules


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"colour": "red"}, "no difference is called colour"),
        ({"body": "carrier pigeon"}, "body is none of"),
        ({"has_list": "perhaps"}, "has_list"),
        ({"not_ready_statuses": [200]}, "not_ready_statuses"),
        ({"not_ready_statuses": 404}, "variant odd"),
        ({"create_outcomes": [{"status": 400, "outcome": "shrug"}]}, "shrug"),
        (7, "variant odd"),
    ],
)
def test_a_mistake_in_a_variant_is_named_with_its_place(entry: Any, words: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["dialects"]["openai_videos"]["variants"]["odd"] = entry
    with pytest.raises(catalogue.CatalogueError, match="dialect openai_videos") as caught:
        catalogue.parse(document, 1.0)
    assert words in str(caught.value)


def test_which_limit_was_met() -> None:
    def limit(account: str, status: int, body: str) -> str:
        rule = catalogue.outcome_rule(catalogue.parse(DOCUMENT, 1.0)[account], status, body)
        assert rule is not None
        return rule.limit

    assert limit("main", 429, "Too many running tasks") == "jobs"
    assert limit("azure", 400, "Too many running tasks") == "jobs"
    assert limit("runway", 429, "You have reached your daily limit") == "day"
    assert limit("main", 429, "slow down") == "requests"


def test_the_time_factor_scales_what_is_the_providers_only() -> None:
    account, fast = parsed(), parsed(time_factor=10)
    assert (account.quota.recovery_seconds, fast.quota.recovery_seconds) == (300, 30)
    assert fast.settle_seconds == account.settle_seconds / 10
    assert fast.resolve_seconds == account.resolve_seconds / 10
    assert fast.requests_per_minute == account.requests_per_minute * 10
    assert fast.quota.requests.interval < account.quota.requests.interval / 8
    assert fast.day_seconds == 8640
    assert fast.models["sora-2"].render_seconds == account.models["sora-2"].render_seconds / 10
    assert fast.post_timeout_seconds == account.post_timeout_seconds
    assert fast.clock_skew_seconds == account.clock_skew_seconds


@pytest.mark.parametrize(
    "fields",
    [{"shared": True}, {"upstream_may_retry": True}, {"shared": True, "upstream_may_retry": True}],
)
def test_a_key_that_others_use_is_blind(fields: dict[str, bool]) -> None:
    assert parsed(changed(**fields)).evidence is attempts.Evidence.BLIND
    honest = changed(shared=False, upstream_may_retry=False)
    assert parsed(honest).evidence is attempts.Evidence.SEARCHABLE


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dialect": "esperanto"}, "no dialect esperanto"),
        ({"variant": "unheard-of"}, "no variant unheard-of"),
        ({"cancel": "shout"}, "cancel is none of"),
        ({"settle_seconds": None}, "settle_seconds"),
        ({"settle_seconds": "soon"}, "soon"),
        ({"evidence": "sometimes"}, "sometimes"),
        ({"colour": "red"}, "colour"),
        ({"requests_per_minute": 0}, "requests_per_minute is not above 0"),
        ({"post_timeout_seconds": -1}, "post_timeout_seconds is not above 0"),
        ({"max_jobs_in_flight": 0}, "max_jobs_in_flight"),
        ({"weight": 0}, "weight is not above 0"),
        ({"jobs_per_day": -1}, "jobs_per_day is below 0"),
        ({"max_cost_micros_per_hour": -1}, "max_cost_micros_per_hour is below 0"),
        ({"creates_per_minute": -1}, "creates_per_minute is below 0"),
        ({"request_floors": {"poll": 0.6, "submit": 0.6}}, "request_floors are no shares of 1"),
        ({"request_floors": {"upload": 0.6}}, "upload"),
        ({"models": {}}, "no models"),
        ({"models": ["sora-2"]}, "main"),
        ({"models": {"sora-2": {"upstream": "sora-2"}}}, "cost_micros_per_second"),
    ],
)
def test_a_mistake_in_an_account_is_named_with_its_place(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(catalogue.CatalogueError, match=r"^provider account main") as caught:
        catalogue.parse(changed(**fields), 1.0)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "document", [[], {}, {"provider_accounts": []}, {"provider_accounts": [7]}]
)
def test_a_document_without_accounts_is_refused(document: Any) -> None:
    with pytest.raises(catalogue.CatalogueError):
        catalogue.parse(document, 1.0)


@pytest.mark.parametrize(
    "rule",
    [
        {"status": "4xx", "outcome": "refused_us"},
        {"outcome": "refused_us"},
        {"status": 400, "outcome": "accepted"},
        {"status": "400-x", "outcome": "refused_us"},
        {"status": 400, "outcome": "refused_us", "body": "("},
        {"status": 400, "outcome": "refused_request", "cause": "BAD_LUCK"},
    ],
)
def test_a_mistake_in_a_rule_is_named(rule: dict[str, Any]) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["dialects"]["openai_videos"]["create_outcomes"].append(rule)
    with pytest.raises(catalogue.CatalogueError, match="dialect openai_videos: outcome rule"):
        catalogue.parse(document, 1.0)


def test_two_accounts_of_one_name_and_a_model_in_two_pools_are_refused() -> None:
    document = copy.deepcopy(DOCUMENT)
    second = copy.deepcopy(document["provider_accounts"][0])
    document["provider_accounts"].append(second)
    with pytest.raises(catalogue.CatalogueError, match="stands twice"):
        catalogue.parse(document, 1.0)
    second["name"] = "second"
    assert list(catalogue.parse(document, 1.0)) == ["main", "azure", "runway", "second"]
    # In one pool each may serve what it likes, in whichever dialect.
    del second["models"]["sora-2-pro"]
    second["dialect"] = "azure_jobs"
    assert list(catalogue.parse(document, 1.0)) == ["main", "azure", "runway", "second"]
    second["pool"] = "small"
    with pytest.raises(catalogue.CatalogueError, match="second: sora-2 is in pool sora already"):
        catalogue.parse(document, 1.0)
    second["models"]["sora-3"] = second["models"].pop("sora-2")
    assert list(catalogue.parse(document, 1.0)) == ["main", "azure", "runway", "second"]


# Answers of a create, as reference/provider-protocols.md section 1.6 documents them.
MODERATION = "The request is blocked by our moderation system when checking inputs."
ANSWERS = [
    (307, "", "refused_us", ""),
    (400, "Invalid value: '10'. Supported values are: '4'", "refused_request", "REQUEST_INVALID"),
    (400, "Inpaint image must match the requested width", "refused_request", "REQUEST_INVALID"),
    (400, MODERATION, "refused_request", "INPUT_REFUSED"),
    (400, '{"code": "MODERATION_BLOCKED"}', "refused_request", "INPUT_REFUSED"),
    (400, '{"code": "sentinel_block"}', "refused_request", "INPUT_REFUSED"),
    (400, '{"code": "model_not_found"}', "refused_us", ""),
    (401, '{"code": "invalid_api_key"}', "refused_us", ""),
    (402, "", "refused_us", ""),
    (403, "", "refused_us", ""),
    (404, "The requested model does not exist.", "refused_us", ""),
    (413, "", "refused_request", "REQUEST_INVALID"),
    (422, "", "refused_request", "REQUEST_INVALID"),
    (429, "Too many running tasks", "not_accepted", ""),
    (429, '{"code": "rate_limit_exceeded"}', "not_accepted", ""),
    (429, '{"code": "insufficient_quota"}', "refused_us", ""),
    *((status, "", None, "") for status in (408, 409, 425, 500, 502, 503, 504, 520, 599)),
]


@pytest.mark.parametrize(("status", "body", "outcome", "cause"), ANSWERS)
def test_what_an_answer_means(status: int, body: str, outcome: str | None, cause: str) -> None:
    rule = catalogue.outcome_rule(parsed(), status, body)
    assert (rule.outcome if rule else None) == outcome
    if cause:
        assert rule is not None
        assert rule.cause == cause


def settings(path: Path, **fields: Any) -> config.Settings:
    needed = {"database_url": "x", "service_token_secret": "x", "storage_address": "x"}
    return config.Settings(**{**needed, "providers_file": path, **fields})  # pyright: ignore[reportArgumentType]


async def test_opening_the_pools(tmp_path: Path) -> None:
    with pytest.raises(catalogue.CatalogueError, match="has a base_url: set GENERATOR_PROVIDER"):
        pools.open_pools(settings(FILE))
    opened = pools.open_pools(
        settings(FILE, provider_base_url="http://x/v1", post_timeout_seconds=2)
    )
    assert opened.accounts["main"].post_timeout_seconds == 2
    assert opened.pool_of("sora-2") == "sora"
    assert opened.pool_of("unheard-of") is None
    assert opened.names == ["runway", "sora", "sora-1"]
    # No address, nothing to send to: its jobs are accepted and wait.
    assert opened.pool_of("sora-1") == "sora-1"
    assert opened.of_pool("sora-1") == {}
    await opened.aclose()
    opened = pools.open_pools(settings(FILE, azure_base_url="http://x/openai/v1"))
    assert list(opened.of_pool("sora-1")) == ["azure"]
    assert opened.of_pool("sora") == {}
    await opened.aclose()

    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(catalogue.CatalogueError, match="no provider account"):
        pools.open_pools(settings(empty))
    strange = tmp_path / "strange.yaml"
    document = changed(dialect="klingon")
    document["dialects"]["klingon"] = {}
    strange.write_text(yaml.safe_dump(document))
    with pytest.raises(catalogue.CatalogueError, match="no client for dialect klingon"):
        pools.open_pools(settings(strange))
