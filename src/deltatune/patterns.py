"""Names and patterns for module paths: whole endings, regular expressions, values by pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from deltatune.errors import ConfigError

Names = Iterable[str] | str | None


def name_matches(names: Names, path: str) -> bool:
    """Whether a path is named: by a whole ending of the path, or by a regular expression for all of it."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
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
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def check_patterns(config: Any) -> None:
    """Refuse regular expressions that do not compile and layer numbers without a list of names to number."""
    owner = type(config).__name__
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field), str):
            _compile(owner, field, getattr(config, field))
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, {}):
            _compile(owner, field, pattern)
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


def _compile(owner: str, field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{owner}: {field}={pattern!r} is no regular expression: {error.msg} at position {error.pos}",
            field=field,
            found=pattern,
        ) from None
