"""The one error of this package."""

from __future__ import annotations


class LocalError(Exception):
    """Something on this machine prevents the start; the text is one line that says what to do."""
