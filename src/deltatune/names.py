"""Adapter names: they become folder names and module names, so only plain ones are taken."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from deltatune.errors import AdapterNameError

_RULE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
BASE = "__base__"  # in a list of names per row: the base model without any adapter


def check_name(name: str) -> str:
    """The name itself, or AdapterNameError."""
    if not isinstance(name, str) or not _RULE.fullmatch(name) or name.lower() in _WINDOWS or name == BASE:
        raise AdapterNameError(
            f"adapter name {name!r} is not allowed: use 1 to 64 letters, digits, '_' or '-', "
            "and no reserved name of a system",
            field="adapter_name",
            found=name,
        )
    if hasattr(nn.ModuleDict(), name):  # adapters are kept in module dicts, whose attributes cannot be keys
        raise AdapterNameError(
            f"adapter name {name!r} is reserved (an attribute of torch modules); choose another",
            field="adapter_name",
            found=name,
        )
    return name


def listed(names: str | Iterable[str], field: str = "adapter_names") -> tuple[str, ...]:
    """Names of adapters in order. A string is one name: letter by letter it could be the names of others.

    Raises:
        AdapterNameError: Neither a name nor a list of names.
    """
    if isinstance(names, str):
        return (names,)
    found = tuple(names) if isinstance(names, Iterable) else (names,)
    if not all(isinstance(name, str) for name in found):
        shown = list(found) if isinstance(names, Iterable) else names
        raise AdapterNameError(
            f"{field}={shown!r} is not allowed, expected the name of an adapter or a list of names",
            field=field,
            found=names,
            expected="a name or a list of names",
        )
    return found


def check_rows(names: Any) -> None:
    """Refuse what is no list of one name (None: the base) per row.

    Raises:
        AdapterNameError: It is one name, whose letters could be the names of others, or holds something else.
    """
    if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
        raise AdapterNameError(
            f"adapter_names={names!r} is not allowed, expected a list with the name of an adapter for each row "
            f"({BASE!r}: the base)",
            field="adapter_names",
            found=names,
            expected="a list with one name per row",
        )
