"""The layers of a model that a LoraConfig targets, for helpers that look at them before (or after) grafting."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltatune import targets
from deltatune.adapter import LinearMap
from deltatune.errors import ConfigError, TargetError
from deltatune.layer import AdaptedLayer
from deltatune.patterns import pattern_value
from deltatune.registry import METHODS


@dataclass(frozen=True)
class Targeted:
    """A layer, as a module and as a map, and the rank and alpha that the config gives it."""

    module: nn.Module
    map: LinearMap
    r: int
    alpha: float


def targeted(
    model: nn.Module, config: Any, start: str, kinds: frozenset[str], others: bool = False
) -> dict[str, Targeted]:
    """Path -> layer, each layer once. A bare model or one with adapters; changes nothing.

    Args:
        others: Pass over targets of other kinds.

    Raises:
        ConfigError: The config asks for another start.
        TargetError: A target is of a kind that the start is not for.
    """
    if config.init_lora_weights != start:
        raise ConfigError(
            f"LoraConfig: init_lora_weights={config.init_lora_weights!r}, this helper is for {start!r}",
            field="init_lora_weights",
            found=config.init_lora_weights,
            expected=start,
        )
    method, resolved = METHODS[config.peft_type], copy.copy(config)
    targets.with_defaults(resolved, model, lambda kind: method.usual_targets(kind, resolved), method.find_targets)
    found: dict[str, Targeted] = {}
    seen: set[int] = set()
    for path, module in targets.find(model, resolved, method.adapter).items():
        layer = targets.map_of(module)
        if layer is None or layer.only_weight or layer.kind not in kinds:
            if others:
                continue
            raise TargetError(
                f"target {path!r} is a {type(module).__name__}, for which init_lora_weights={start!r} is not; it is "
                f"for {', '.join(sorted(kinds))} layers",
                field="target_modules",
                path=path,
            )
        inner = module.base_layer if isinstance(module, AdaptedLayer) else module
        if id(inner) not in seen:
            seen.add(id(inner))
            r = pattern_value(config.rank_pattern, path, config.r)
            found[path] = Targeted(inner, layer, r, pattern_value(config.alpha_pattern, path, config.lora_alpha))
    return found


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode; afterwards each module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
