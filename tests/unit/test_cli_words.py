"""What the command line says to people: a hint for every error, and no command that there is not."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
import typer.core
import typer.main

from framewire import errors
from framewire.cli import app, hints, output
from tests.unit.test_errors_table import REASONS

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "examples").glob("*.md"),
    *(ROOT / "deploy").glob("*/README.md"),
]

# The hint is made of what the error carries: metadata, and when to try again.
BY_FACTS: dict[str, tuple[dict[str, str], float | None, str]] = {
    "INSUFFICIENT_CREDITS": ({"needed": "9", "available": "1"}, None, "9 credits, 1 are available"),
    "INTERNAL": ({"error_id": "e7"}, None, "e7"),
    "MODERATION_LIMIT": ({}, 60.0, "in 60 s"),
    "RATE_LIMITED": ({}, 0.2, "in 1 s"),
    "RECOVERY": ({}, 30.0, "in 30 s"),
    "REQUEST_IN_PROGRESS": ({}, 1.0, "in 1 s"),
}
# Callers of the gateway do not get these.
BETWEEN_SERVICES = {
    "HOLD_CAPTURED": "answers Release, which the gateway offers nobody",
    "HOLD_MISMATCH": "answers Reserve: the gateway makes a hold's id, and its request, once",
    "HOLD_RELEASED": "peers.for_caller: the caller's call was given up, and is answered as that",
    "NOT_IN_RECOVERY": "answers steps of a recovery, which the gateway takes",
    "OVERLOADED": "peers.for_caller makes it DEPENDENCY_UNAVAILABLE, with the time to wait",
    "RESERVE_TOO_LATE": "peers.for_caller: the caller's call was given up, and is answered as that",
    "STORE_CLOCK_SKEWED": "peers.for_caller makes it DEPENDENCY_UNAVAILABLE; storage's log says it",
    "STORE_FULL": "peers.for_caller makes it DEPENDENCY_UNAVAILABLE; storage's log says it",
}


def test_every_reason_has_a_hint_or_says_why_not() -> None:
    known = [*hints.HINTS, *BY_FACTS, *BETWEEN_SERVICES]
    assert sorted(known) == sorted(REASONS)
    assert [reason for reason, text in hints.HINTS.items() if len(text) < 10] == []


@pytest.mark.parametrize("reason", BY_FACTS)
def test_hints_of_facts_are_made(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts, wait_seconds, wanted = BY_FACTS[reason]
    code = grpc.StatusCode.UNAVAILABLE
    output.report(errors.FramewireError(code, reason, "no", facts, (), wait_seconds))
    said, hint = capsys.readouterr().err.splitlines()
    assert said == f"error: no ({reason})"
    assert wanted in hint


def of_pages() -> Iterator[tuple[str, str]]:
    """(where, command line) of code spans and code blocks that begin with the command."""
    for page in PAGES:
        where = page.relative_to(ROOT).as_posix()
        for number, line in enumerate(page.read_text().splitlines(), 1):
            for found in re.findall(r"`(framewire [^`]+)`|^(?:\.venv/bin/)?(framewire .*)", line):
                yield f"{where}:{number}", found[0] or found[1]


def of_hints() -> Iterator[tuple[str, str]]:
    """The same of hints, where a command goes on to the end of the clause."""
    for reason, text in hints.HINTS.items():
        for command in re.findall(r"framewire [a-z][^;,.)`]*", text):
            yield reason, command.replace(" again", "")


@functools.cache
def whole() -> Any:
    """The command with all its sub commands."""
    return typer.main.get_command(app.app)


def wrong(line: str) -> str:
    """What is wrong with a command line: no such command or option, or a word too many. Values may be missing."""
    words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)[1:]
    command = whole()
    while isinstance(command, typer.core.TyperGroup) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in command.commands:
            return f"there is no {name!r}"
        command = command.commands[name]
    try:
        command.make_context(command.name, words)
    except typer.Exit:
        return ""
    except Exception as error:
        text = str(error)
        return text if re.match("No such option|Got unexpected", text) else ""
    return ""


def test_commands_that_are_named_are_there() -> None:
    found = [*of_pages(), *of_hints()]
    assert len(found) > 60, "the search finds nothing"
    assert [f"{where}: {line}: {why}" for where, line in found if (why := wrong(line))] == []


def test_a_command_that_is_not_there_is_found() -> None:
    assert wrong("framewire list --state PROCESSING") == ""
    assert "nonsense" in wrong("framewire nonsense")
    assert "--nonsense" in wrong("framewire attempts list --nonsense")
    assert "extra" in wrong("framewire balance one two")


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("framewire webhook re", {"redeliver", "replay"}),
        ("framewire admission ", {"pause", "resume"}),
        ("framewire create p --la", {"--lane"}),
    ],
)
def test_bash_completes_what_is_there(line: str, completed: set[str]) -> None:
    """As bash does it: with the script that is installed, of the words up to the cursor."""
    words = line.split(" ")
    script = f"""
        eval "$(framewire --show-completion)"
        COMP_WORDS=({" ".join(repr(word) for word in words)}) COMP_CWORD={len(words) - 1}
        "$(complete -p framewire | sed 's/.*-F \\([^ ]*\\) .*/\\1/')" framewire
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    answer = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert set(answer.stdout.split()) == completed, answer.stderr
