"""What deltatune notes in a weights file beside the tensors: how it is read, and what it may look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltatune.config import MAX_JSON_DEPTH, nesting
from deltatune.errors import FormatError

# the notes that are looked into, and what stands under them; others are kept as they are
_KINDS: dict[str, type] = {"sha256": str, "base": dict, "config": dict, "own": dict, "derived": dict}
_BASE: dict[str, type] = {"class": str, "parameters": int, "structure": str, "values": str, "dtypes": list}


def read_facts_of(path: Path, text: str) -> dict[str, Any] | None:
    """The notes in a file; None where they are no table.

    Raises:
        FormatError: No JSON, nested too deep, or a note is not of its kind.
    """
    if (depth := nesting(text)) > MAX_JSON_DEPTH:
        raise _unreadable(path, f"nested {depth} deep, up to {MAX_JSON_DEPTH} is read")
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(facts, dict):
        return None
    for name, kind in _KINDS.items():
        _check(path, name, facts.get(name), kind)
    if facts.get("base") is not None:
        for name, kind in _BASE.items():
            _check(path, f"base.{name}", facts["base"].get(name), kind, needed=True)
    return facts


def _check(path: Path, name: str, value: Any, kind: type, needed: bool = False) -> None:
    if not isinstance(value, kind) and (needed or value is not None):
        raise _unreadable(path, f"{name} is {type(value).__name__}, expected {kind.__name__}", name)


def _unreadable(path: Path, why: str, field: str | None = None) -> FormatError:
    return FormatError(
        f"{path}: what deltatune noted in it is not readable ({why}); the file was damaged or edited: fetch or save it "
        "again",
        path=str(path),
        field=field,
    )
