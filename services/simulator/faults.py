"""The fault plan: which misbehaviour strikes which request.

Every fault works in every dialect that has what it is about, by the same name. It is chosen by a token in the prompt,
`[fault:NAME]`, `[fault:NAME=VALUE]` or `[fault:NAME=VALUE*TIMES]`, or by a rule:
`POST /_sim/faults` with `{"name", "times", "probability", "match", "value", "seconds", "key"}`.
`times` is 1 unless told (0: until cleared), `seconds` ends the rule after that long, `key` narrows
it to one key's name. `match` is a substring of the prompt; on lists it picks the jobs, by
`unauthorized` it is not looked at. Tokens count per key and prompt before there is a job, per job
afterwards. Where VALUE means times, `=3` and `*3` are the same. Durations are provider seconds.

| name                  | VALUE          | what happens                                                    |
|-----------------------|----------------|-----------------------------------------------------------------|
| unauthorized          | seconds (none) | 401; with a value, for every request of the key that long       |
| rate_limited          | seconds (20)   | 429 with Retry-After of VALUE, no job                           |
| rate_limited_date     | seconds (20)   | the same, the Retry-After an HTTP date                          |
| rate_limited_bare     | times (1)      | 429 without Retry-After, no job                                 |
| out_of_money          | times (1)      | 429 `insufficient_quota`, no job                                |
| redirected            | times (1)      | 307 to another path, no job                                     |
| too_many_tasks        | times (1)      | 429 `Too many running tasks`, no job                            |
| moderated_now         | times (all)    | 400 from moderation, no job                                     |
| model_gone            | times (1)      | 404 `model_not_found`, no job                                   |
| error_before          | status (500)   | that status, no job                                             |
| hang_before           | times (1)      | no job, and never an answer                                     |
| error_after           | status (500)   | the job is made, then that status                               |
| lost_answer           | times (1)      | the job is made, the connection closes without an answer        |
| hang                  | times (1)      | the job is made, and never an answer                            |
| stall                 | times (1)      | the job is made; the answer's headers, and nothing more         |
| garbled               | times (1)      | the job is made; 200 and an HTML page                           |
| flood                 | megabytes (64) | the job is made; 200 and that much JSON                         |
| moderated_later       | -              | the job ends failed, `moderation_blocked` (`output_moderation`) |
| input_moderated_later | -              | the same, about the inputs (`input_moderation`)                 |
| fails_later           | -              | the job ends failed, `internal_error`                           |
| fails_unknown         | -              | the job ends failed, with a code of no list                     |
| prompt_moderated_later | -             | the job ends failed, as `jobs.ENDINGS` has it                   |
| input_breaks_later    | -              | the same                                                        |
| input_invalid_later   | -              | the same                                                        |
| third_party_later     | -              | the same                                                        |
| cancelled_later       | -              | the job ends cancelled                                          |
| fewer_generations     | films (1)      | only VALUE of the variants come out, 0 too (azure_jobs only)    |
| stuck                 | -              | the job never ends: 99 % for ever                               |
| stuck_queued          | -              | the job never begins                                            |
| regresses             | -              | the job is queued again for a while, in the middle              |
| clock_skew            | seconds (600)  | its times are shown that much too early                         |
| twin_job              | jobs (1)       | strangers' jobs appear with the same prompt, model, size        |
| foreign_jobs          | jobs (3)       | strangers' jobs appear, at a creation or (rule) a list          |
| poll_404              | times (1)      | GET of the job answers 404                                      |
| poll_error            | status (500)   | GET of the job answers that status                              |
| poll_rate_limited     | seconds (20)   | GET of the job answers 429 with Retry-After                     |
| poll_garbled          | times (1)      | GET of the job answers half a JSON object                       |
| poll_word             | times (1)      | GET of the job answers a status of no list                      |
| poll_flood            | megabytes (64) | GET of the job answers that much JSON                           |
| content_404           | seconds (5)    | content answers 404 that long after completion                  |
| content_403           | times (1)      | content answers 403 `not accessible`                            |
| content_html          | times (1)      | an HTML page with status 200 in place of the film               |
| content_empty         | times (1)      | status 200 and no bytes                                         |
| content_cut           | times (1)      | the body ends short of its Content-Length                       |
| content_cut_chunks    | times (1)      | a chunked body ends without its last chunk                      |
| content_type          | times (1)      | the film, called `text/plain`                                   |
| content_drip          | times (1)      | one byte of the film, and then one a second                     |
| content_corrupt       | times (1)      | right length, wrong bytes                                       |
| url_expired           | times (1)      | the address that GET shows is over already (runway only)        |
| list_lag              | seconds (30)   | lists do not show the job (rule: any job) for that long         |
| list_drop             | times (1)      | the job (rule: every VALUE-th job, 2) is missing from a page    |
| list_short            | items (2)      | list pages hold at most VALUE items                             |
| list_error            | status (500)   | list answers that status                                        |
| webhook_lost          | -              | nothing is told of the job                                      |
| webhook_late          | seconds (60)   | it is told that much later                                      |
| webhook_twice         | -              | it is told twice, under one id                                  |
| webhook_forged        | -              | it is told with a wrong signature                               |
| webhook_foreign       | -              | a job that nobody made is told too                              |

`list_short` and `list_error` are about no single job: as a token they arm a rule for the key when
the job is made, `list_short` until cleared, `list_error` for TIMES lists.
"""

import dataclasses
import hashlib
import random
import re
from collections.abc import Iterable, Mapping

# What VALUE is when none is given. Those in `_COUNTED` have no value but a number of times.
DEFAULT_VALUES: Mapping[str, float] = {
    "unauthorized": 0,
    "rate_limited": 20,
    "rate_limited_date": 20,
    "rate_limited_bare": 0,
    "out_of_money": 0,
    "redirected": 0,
    "too_many_tasks": 0,
    "moderated_now": 0,
    "model_gone": 0,
    "error_before": 500,
    "hang_before": 0,
    "error_after": 500,
    "lost_answer": 0,
    "hang": 0,
    "stall": 0,
    "garbled": 0,
    "flood": 64,
    "moderated_later": 0,
    "input_moderated_later": 0,
    "fails_later": 0,
    "fails_unknown": 0,
    "prompt_moderated_later": 0,
    "input_breaks_later": 0,
    "input_invalid_later": 0,
    "third_party_later": 0,
    "cancelled_later": 0,
    "fewer_generations": 1,
    "stuck": 0,
    "stuck_queued": 0,
    "regresses": 0,
    "clock_skew": 600,
    "twin_job": 1,
    "foreign_jobs": 3,
    "poll_404": 0,
    "poll_error": 500,
    "poll_rate_limited": 20,
    "poll_garbled": 0,
    "poll_word": 0,
    "poll_flood": 64,
    "content_404": 5,
    "content_403": 0,
    "content_html": 0,
    "content_empty": 0,
    "content_cut": 0,
    "content_cut_chunks": 0,
    "content_type": 0,
    "content_drip": 0,
    "content_corrupt": 0,
    "url_expired": 0,
    "list_lag": 30,
    "list_drop": 2,
    "list_short": 2,
    "list_error": 500,
    "webhook_lost": 0,
    "webhook_late": 60,
    "webhook_twice": 0,
    "webhook_forged": 0,
    "webhook_foreign": 0,
}
_COUNTED = frozenset(
    (
        "rate_limited_bare",
        "out_of_money",
        "redirected",
        "too_many_tasks",
        "moderated_now",
        "model_gone",
        "hang_before",
        "lost_answer",
        "hang",
        "stall",
        "garbled",
        "poll_404",
        "poll_garbled",
        "poll_word",
        "content_403",
        "content_html",
        "content_empty",
        "content_cut",
        "content_cut_chunks",
        "content_type",
        "content_drip",
        "content_corrupt",
        "url_expired",
        "list_drop",
    )
)
# Decided once, when the job is made, and kept with it.
OF_THE_JOB = (
    "moderated_later",
    "input_moderated_later",
    "fails_later",
    "fails_unknown",
    "prompt_moderated_later",
    "input_breaks_later",
    "input_invalid_later",
    "third_party_later",
    "cancelled_later",
    "fewer_generations",
    "stuck",
    "stuck_queued",
    "regresses",
    "clock_skew",
    "twin_job",
    "foreign_jobs",
    "content_404",
    "webhook_lost",
    "webhook_late",
    "webhook_twice",
    "webhook_forged",
    "webhook_foreign",
)
# As tokens these strike every time: a job made twice with one prompt behaves the same twice, and
# moderation is deterministic for a prompt.
_ENDLESS = frozenset(("moderated_now", *OF_THE_JOB))

_TOKEN = re.compile(r"\[fault:([a-z0-9_]+)(?:=(\d{1,6}(?:\.\d{1,3})?))?(?:\*(\d{1,4}))?\]")


class UnknownFaultError(ValueError):
    """A name that is not in the table, or a field out of range; the message tells which."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """One armed fault. `times` 0 and `until` None never end it."""

    id: int
    name: str
    times: int = 1
    probability: float = 1.0
    match: str = ""
    value: float | None = None
    until: float | None = None
    key: str | None = None

    @property
    def effective_value(self) -> float:
        """The value, or the table's."""
        return DEFAULT_VALUES[self.name] if self.value is None else self.value


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One `[fault:...]` of a prompt. `times` 0 never ends it."""

    name: str
    value: float
    times: int


@dataclasses.dataclass(frozen=True, slots=True)
class Strike:
    """A fault that happens now; `source` says by which rule or token, so a replay can count it."""

    name: str
    value: float
    source: str
    match: str = ""


def tokens(prompt: str) -> dict[str, Token]:
    """The prompt's fault tokens by name. Raises UnknownFaultError, so that no typo passes for health."""
    found: dict[str, Token] = {}
    if prompt.count("[fault:") != len(_TOKEN.findall(prompt)):
        raise UnknownFaultError("a fault token is [fault:NAME], [fault:NAME=VALUE] or NAME*TIMES")
    for name, raw_value, raw_times in _TOKEN.findall(prompt):
        if name not in DEFAULT_VALUES:
            raise UnknownFaultError(f"no fault is named {name!r}")
        times = int(raw_times) if raw_times else (0 if name in _ENDLESS else 1)
        value = float(raw_value) if raw_value else DEFAULT_VALUES[name]
        if raw_value and name in _COUNTED:
            times, value = int(float(raw_value)), DEFAULT_VALUES[name]
        found[name] = Token(name, value, times)
    return found


def parse_rule(number: int, body: Mapping[str, object], now: float, time_factor: float) -> Rule:
    """A rule from an admin's JSON. Raises UnknownFaultError on anything not understood."""
    known = {"name", "times", "probability", "match", "value", "seconds", "key"}
    if strange := sorted(set(body) - known):
        raise UnknownFaultError(f"unknown fields {strange}; want some of {sorted(known)}")
    name, match, key = body.get("name"), body.get("match", ""), body.get("key")
    if not isinstance(name, str) or name not in DEFAULT_VALUES:
        raise UnknownFaultError(f"no fault is named {name!r}; want one of {sorted(DEFAULT_VALUES)}")
    if not isinstance(match, str) or not (key is None or isinstance(key, str)):
        raise UnknownFaultError("match and key are strings")
    value, seconds = _number(body, "value"), _number(body, "seconds")
    times = _number(body, "times")
    probability = _number(body, "probability")
    if value is not None and name in _COUNTED - {"list_drop"} and times is None:
        value, times = None, value
    if name == "unauthorized" and value:
        seconds, times = value, 0.0
    if times is None:
        times = 0.0 if seconds is not None else 1.0
    return Rule(
        id=number,
        name=name,
        times=int(times),
        probability=1.0 if probability is None else probability,
        match=match,
        value=value,
        until=None if seconds is None else now + seconds / time_factor,
        key=key,
    )


def _number(body: Mapping[str, object], field: str) -> float | None:
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
        raise UnknownFaultError(f"{field} is a number from 0 to 1000000")
    return float(value)


class Plan:
    """The armed rules, and how often each rule and token has struck. No I/O, no clock."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rules: dict[int, Rule] = {}
        self._strikes: dict[str, int] = {}
        self._draws: dict[int, int] = {}
        self._last_id = 0

    def next_id(self) -> int:
        """The number of the rule to be armed next; never used again, not even after a clear."""
        return self._last_id + 1

    def arm(self, rule: Rule) -> None:
        """Adds a rule."""
        self._rules[rule.id] = rule
        self._last_id = max(self._last_id, rule.id)

    def clear(self) -> None:
        """Removes every rule; tokens in prompts stay."""
        self._rules.clear()

    def rules(self) -> Iterable[Mapping[str, object]]:
        """Every rule with the number of its strikes."""
        for rule in self._rules.values():
            yield {**dataclasses.asdict(rule), "strikes": self._strikes.get(f"rule:{rule.id}", 0)}

    def count(self, source: str) -> None:
        """Counts one strike: a new one, or one read back from the log."""
        self._strikes[source] = self._strikes.get(source, 0) + 1

    def strike(
        self, name: str, *, now: float, key_name: str, prompt: str | None, job_id: str | None = None
    ) -> Strike | None:
        """Whether `name` strikes now, counting it if so. Without a prompt only rules can, and their
        `match` is left to the caller.
        """
        hit = self._from_prompt(name, key_name, prompt, job_id) or self._from_rules(
            name, now, key_name, prompt
        )
        if hit is not None:
            self.count(hit.source)
        return hit

    def _from_prompt(
        self, name: str, key_name: str, prompt: str | None, job_id: str | None
    ) -> Strike | None:
        token = tokens(prompt).get(name) if prompt and "[fault:" in prompt else None
        if token is None:
            return None
        assert prompt is not None
        scope = job_id or hashlib.sha256(f"{key_name}\n{prompt}".encode()).hexdigest()[:24]
        source = f"token:{name}:{scope}"
        if token.times and self._strikes.get(source, 0) >= token.times:
            return None
        return Strike(name, token.value, source)

    def _from_rules(
        self, name: str, now: float, key_name: str, prompt: str | None
    ) -> Strike | None:
        for rule in self._rules.values():
            source = f"rule:{rule.id}"
            if (
                rule.name == name
                and (prompt is None or rule.match in prompt)
                and rule.key in (None, key_name)
                and (rule.until is None or now < rule.until)
                and (not rule.times or self._strikes.get(source, 0) < rule.times)
                and self._draw(rule)
            ):
                return Strike(name, rule.effective_value, source, rule.match)
        return None

    def _draw(self, rule: Rule) -> bool:
        if rule.probability >= 1.0:
            return True
        # One generator per draw: what a rule decides depends on no other rule's traffic.
        draw = self._draws.get(rule.id, 0)
        self._draws[rule.id] = draw + 1
        return random.Random(f"{self._seed}:{rule.id}:{draw}").random() < rule.probability
