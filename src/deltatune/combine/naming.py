"""Modules as a config names them, so that it means exactly these, here and in PEFT."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from deltatune.errors import MergeError
from deltatune.patterns import name_matches, pattern_value
from deltatune.targets import walk


def targets(model: nn.Module, paths: Collection[str]) -> set[str] | str:
    """`target_modules`: last parts of the paths where they mean no other module, else the paths, else a pattern."""
    modules = dict(walk(model))
    wanted = {id(modules[path]) for path in paths}
    for names in ({path.rpartition(".")[2] for path in paths}, set(paths)):
        if {id(module) for path, module in modules.items() if name_matches(names, path)} == wanted:
            return names
    return "|".join(re.escape(path) for path in sorted(paths))


def with_part(model: nn.Module, paths: Collection[str], part: Collection[str]) -> tuple[Any, Any]:
    """Names for the paths, and for a part of them: some of those names."""
    names = targets(model, paths)
    if isinstance(names, str):
        return names, targets(model, part) if part else set()
    for every in (names, set(paths)):
        own = {name for name in every if any(name_matches([name], path) for path in part)}
        if not any(name_matches(own, path) for path in set(paths) - set(part)):
            return every, own
    pattern = "|".join(re.escape(path) for path in sorted(part))
    return "|".join(re.escape(path) for path in sorted(paths)), pattern


def whole(model: nn.Module, paths: Collection[str], usual: Iterable[str]) -> list[str] | None:
    """`modules_to_save`: of the usual names those that are needed, if they mean these modules, else the paths."""
    if not paths:
        return None
    every = [path for path, _ in walk(model)]
    short = [name for name in dict.fromkeys(usual) if any(path.endswith(name) for path in paths)]
    for names in (short, sorted(paths)):
        found = {path for path in every if names and path.endswith(tuple(names))}
        if {path for path in found if not any(path.startswith(f"{outer}.") for outer in found)} == set(paths):
            return names
    raise MergeError(
        f"modules_to_save: no list of endings means {sorted(paths)} and no other module", field="modules_to_save"
    )


def by_layer(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Values by path as a default and a pattern for each path that has another."""
    default = Counter(values.values()).most_common(1)[0][0]
    others = {path: value for path, value in values.items() if value != default}
    if any(pattern_value(others, path, default) != value for path, value in values.items()):
        # a path that is the end of another; files sort the patterns, so that their order cannot help
        others = {f"^{path}": value for path, value in others.items()}
    return default, others
