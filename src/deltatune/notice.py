"""Warnings that point at the user's line, however deep in the package they arise."""

from __future__ import annotations

import sys
import warnings

from deltatune.errors import PeftWarning


def warn(message: str) -> None:
    """A `PeftWarning` attributed to the nearest caller outside of deltatune, and of torch, which calls modules."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("deltatune", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, PeftWarning, stacklevel=level)
