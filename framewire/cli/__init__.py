"""The command `framewire`: videos, credits and the event feed from a terminal or a script."""

from __future__ import annotations

from framewire.cli import app


def main() -> None:
    """The entry point."""
    app.app(prog_name="framewire")
