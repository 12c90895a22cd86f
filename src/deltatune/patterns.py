"""Names and patterns for module paths: whole endings, regular expressions, values by pattern."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from deltatune import bounded, checks
from deltatune.errors import ConfigError

Names = Iterable[str] | str | None
# Fields that map the name of a layer, or a pattern for names, to a value of its own, and the check of that value.
PATTERNED = {
    "rank_pattern": checks.positive_int,
    "alpha_pattern": checks.finite_positive,
    "lambda_pattern": checks.finite_positive,
    "block_size_pattern": checks.positive_int,
    "n_frequency_pattern": checks.positive_int,
}


def name_matches(names: Names, path: str) -> bool:
    """Whether a path is named: by a whole ending of the path, or by a regular expression for all of it."""
    if not names:
        return False
    if isinstance(names, str):
        return bounded.fullmatch(names, path)
    parts = path.split(".")
    endings = {".".join(parts[start:]) for start in range(len(parts))}
    return not endings.isdisjoint(names)


def bare_name(name: str) -> str:
    """The name that a module had before the blocks around it were wrapped."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model under the names they had before it was adapted; a wrapped one itself, not its wrapper."""
    return {bare_name(name): module for name, module in model.named_modules()}


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value whose pattern matches the end of a path (`rank_pattern`, `alpha_pattern`), or the default."""
    for pattern, value in patterns.items():
        if bounded.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def by_layer(config: Any) -> dict[str, dict[str, Any]]:
    """The fields of a config that hold other values for some layers: `rank_pattern` and all that are called so."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields = {name: value for name, value in fields.items() if name not in getattr(config, "not_by_layer", ())}
    return {name: value for name, value in fields.items() if name.endswith("_pattern") and isinstance(value, dict)}


def check_patterns(config: Any) -> None:
    """Refuse patterns that do not compile or give impossible values, and layer numbers without names to number."""
    owner = type(config).__name__
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field), str):
            bounded.check(owner, field, getattr(config, field))
    for pattern in [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ():
        bounded.check(owner, "layers_pattern", pattern)
    for field, values in by_layer(config).items():
        check = PATTERNED.get(field)
        for pattern, value in values.items():
            bounded.check(owner, field, pattern)
            if check is not None:
                check(owner, f"{field}[{pattern!r}]", value)
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ConfigError(
            f"{owner}: layers_to_transform={config.layers_to_transform!r} needs target_modules as a list of names, "
            f"not the pattern {config.target_modules!r}",
            field="layers_to_transform",
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            f"{owner}: layers_pattern={config.layers_pattern!r} needs layers_to_transform", field="layers_pattern"
        )
