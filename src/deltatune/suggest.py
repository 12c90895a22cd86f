"""Nearest names, for error messages that tell the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names most like `name`, best first; empty when none is close."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A half sentence to append to a message: `; did you mean 'r'?`, or nothing."""
    found = nearest(name, known)
    return f"; did you mean {found[0]!r}?" if found else ""
