"""The options of a method with what its config says of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Any, get_type_hints

from deltatune.registry import METHODS
from deltatune.train.defaults import peft_type
from deltatune.train.method import method_fields

_ENTRY = re.compile(r"^((?:\w+)(?:, \w+)*): (.*)$")  # of the part `Attributes:` of a docstring


@dataclass(frozen=True)
class Option:
    """`told` is what the config's docstring says, in one line; empty where it says nothing."""

    name: str
    kind: Any
    default: Any
    told: str
    own: bool  # the method's, not one that many methods share


def options(method: str) -> list[Option]:
    """Those of the method's config, its own ones first; none for `full`."""
    member = peft_type(method)
    if member is None:
        return []
    config = METHODS[member].config
    taken, told, kinds = method_fields(method), _told(config), get_type_hints(config)
    own = set(vars(config).get("__annotations__", {}))
    found = [
        Option(field.name, kinds[field.name], _default(field), told.get(field.name, ""), field.name in own)
        for field in dataclasses.fields(config)
        if field.name in taken
    ]
    return sorted(found, key=lambda option: not option.own)


def summary(method: str) -> str:
    """The method's name and equation: the first line of the file that has it."""
    member = peft_type(method)
    if member is None:
        return "Every weight of the model trains; there is no adapter."
    found = METHODS[member]
    text = sys.modules[(found.adapter or found.config).__module__].__doc__ or ""
    return text.strip().partition("\n")[0].strip()


def _default(field: Any) -> Any:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return value.value if isinstance(value, Enum) else value


def _told(config: type) -> dict[str, str]:
    """Field -> its text, of this config and those it is built on."""
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        text = inspect.cleandoc(kind.__doc__ or "")
        _, marked, rest = text.partition("Attributes:\n")
        if not marked:
            continue
        names: list[str] = []
        for line in inspect.cleandoc(rest).splitlines():
            entry = _ENTRY.match(line)
            if entry is not None:
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2].strip())
            elif line.startswith(" "):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return found
