"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_BLOB_BYTES = 1_000_000
PRODUCT = ("framewire", "kit", "services")
# Who may read the environment: settings, the failpoints' switch, the CLI, and what runs on one machine.
READS_ENVIRONMENT = ("kit/config.py", "kit/failpoints.py", "framewire/cli/", "services/local/")
PRINTS = (
    "framewire/cli/",
    "services/local/",
    "services/simulator/",
    "services/storage/media/worker.py",
)


def _tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def _ours() -> list[Path]:
    return [
        path
        for path in _tracked()
        if path.suffix == ".py" and "_pb2" not in path.name and path.stat().st_size
    ]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.fixture(scope="module")
def sources() -> dict[str, tuple[str, ast.Module]]:
    return {_name(path): (text := path.read_text(), ast.parse(text)) for path in _ours()}


def test_files_and_functions_are_short(sources: dict[str, tuple[str, ast.Module]]) -> None:
    long = [
        f"{name}: {count} lines"
        for name, (text, _) in sources.items()
        if (count := text.count("\n")) > MAX_FILE_LINES
    ]
    long += [
        f"{name}: {function.name} has {length} lines"
        for name, (_, tree) in sources.items()
        for function in _functions(tree)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_every_module_says_what_it_is(sources: dict[str, tuple[str, ast.Module]]) -> None:
    assert [name for name, (_, tree) in sources.items() if not ast.get_docstring(tree)] == []


def test_banned_calls(sources: dict[str, tuple[str, ast.Module]]) -> None:
    found: list[str] = []
    for name, (_, tree) in sources.items():
        if not name.startswith(PRODUCT):
            continue
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
            if text == "os.environ" and not name.startswith(READS_ENVIRONMENT):
                found.append(f"{name}:{node.lineno} reads the environment")
            if text.startswith("time.sleep("):
                found.append(f"{name}:{node.lineno} blocks the loop")
            if text.startswith("print(") and not name.startswith(PRINTS):
                found.append(f"{name}:{node.lineno} prints")
    assert found == []


def test_tests_wait_for_conditions(sources: dict[str, tuple[str, ast.Module]]) -> None:
    """A sleep of a fixed time is either too long or too short; only the helper that polls may sleep."""
    sleeping = [
        f"{name}:{node.lineno}"
        for name, (_, tree) in sources.items()
        if name.startswith("tests/") and name != "tests/waiting.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and re.match(r"(asyncio|time)\.sleep\((?!0\))", ast.unparse(node))
    ]
    assert sleeping == []


def test_nothing_is_left_lying_about() -> None:
    left = [
        f"{_name(path)}:{number}"
        for path in _tracked()
        if path.suffix in {".py", ".sql", ".proto", ".md", ".sh", ".yaml", ".yml"}
        and "validate.proto" not in path.name
        and path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\b(TODO|FIXME|XXX)\b", line)
    ]
    assert left == []


def test_no_blobs_and_no_addresses_in_requirements() -> None:
    blobs = [_name(path) for path in _tracked() if path.stat().st_size > MAX_BLOB_BYTES]
    assert blobs == []
    for path in (ROOT / "requirements").glob("*.txt"):
        assert "://" not in path.read_text(), path.name


def test_migrations_are_named_and_each_has_a_number_of_its_own() -> None:
    for directory in ROOT.glob("services/*/migrations"):
        names = sorted(path.name for path in directory.glob("*.sql"))
        assert names, directory
        assert all(re.fullmatch(r"\d{4}_[a-z]+_[a-z0-9_]+\.sql", name) for name in names), names
        assert len({name[:4] for name in names}) == len(names), names


def test_logs_carry_no_prompts(sources: dict[str, tuple[str, ast.Module]]) -> None:
    """What people ask for is theirs: a log call never gets a prompt."""
    found = [
        f"{name}:{node.lineno}"
        for name, (_, tree) in sources.items()
        if name.startswith(("kit/", "services/"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and re.match(r"log\.\w+\(", text := ast.unparse(node))
        and ".prompt" in text
    ]
    assert found == []
