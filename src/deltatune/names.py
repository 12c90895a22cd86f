"""Adapter names: they become folder names and module names, so only plain ones are taken."""

from __future__ import annotations

import re

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
