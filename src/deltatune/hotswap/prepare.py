"""`prepare_model_for_compiled_hotswap`: room for other ranks and scalings, so that a swap compiles nothing again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from deltatune import checks
from deltatune.adapter import Adapter
from deltatune.errors import StateError
from deltatune.inject import adapted_layers
from deltatune.lora.config import LoraConfig
from deltatune.methods.lora import LoRA
from deltatune.notice import warn


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """To be called after the first adapter is loaded and before the model is compiled.

    Scalings become tensors, and with `target_rank` the factors get rows and columns of zeros up to that rank. Outputs
    stay the same, and so do the adapter's files, which hold its own rank, unless its config is given too.

    Args:
        model: A `PeftModel`, or a model with adapters in it.
        target_rank: The highest rank of all adapters that will be swapped in.
        config: Configs that say from now on that the rank is `target_rank`; their `lora_alpha` is raised as the rank
            is, so that they mean the same scaling.
        check_compiled: What to do with a model that is compiled already: "error", "warn" or "ignore".

    Raises:
        StateError: The model is compiled, or has no adapter with ranks.
        ConfigError: `target_rank` is below the rank of an adapter; nothing has changed.
    """
    checks.one_of("prepare_model_for_compiled_hotswap", "check_compiled", check_compiled, ("error", "warn", "ignore"))
    _check_compiled(model, check_compiled)
    model = getattr(model, "_orig_mod", model)
    every: list[tuple[str, Any]] = [pair for _, layer in adapted_layers(model) for pair in layer.adapters.items()]
    found = [(name, adapter) for name, adapter in every if type(adapter).make_room is not Adapter.make_room]
    if not found:
        raise StateError(
            "prepare_model_for_compiled_hotswap: no adapter of this model has ranks or scalings that could be swapped; "
            "call it after the first adapter has been loaded",
            field="model",
            found=[name for name, _ in every],
            expected="an adapter with ranks or scalings",
        )
    if target_rank is not None:
        checks.positive_int("prepare_model_for_compiled_hotswap", "target_rank", target_rank)
        for _, adapter in found:
            copy.deepcopy(adapter).make_room(target_rank)
    for _, adapter in found:
        adapter.make_room(target_rank)
    if config is not None and target_rank is not None:
        configs = list(config.values()) if isinstance(config, Mapping) else [config]
        _declare(model, found, configs, target_rank)


def _check_compiled(model: Any, reaction: str) -> None:
    if not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)) or reaction == "ignore":
        return
    message = "prepare_model_for_compiled_hotswap: call it before the model is compiled, or it is compiled again"
    if reaction == "error":
        raise StateError(message, field="model", found="compiled", expected="not compiled yet")
    warn(message)


def _declare(model: Any, found: list[tuple[str, Any]], configs: list[Any], rank: int) -> None:
    """The rank is the adapters' own from now on, their scaling what it was."""
    owners = getattr(model, "peft_config", {})
    owners = owners if isinstance(owners, Mapping) else {}
    for name, adapter in found:
        own = adapter.core
        if isinstance(own, LoRA) and any(owners.get(name) is config for config in configs):
            own.lora_alpha *= _ratio(rank, own.r, own.use_rslora)
            own.r = rank
    for config in configs:
        ratio = _ratio(rank, config.r, config.use_rslora)
        alphas = {key: alpha * ratio for key, alpha in config.alpha_pattern.items()}
        for key, own in config.rank_pattern.items():
            alpha = config.alpha_pattern.get(key, config.lora_alpha)
            alphas[key] = alpha * _ratio(rank, own, config.use_rslora)
            config.rank_pattern[key] = rank
        config.lora_alpha, config.r, config.alpha_pattern = config.lora_alpha * ratio, rank, alphas


def _ratio(rank: int, own: int, rslora: bool) -> float:
    return (rank / own) ** 0.5 if rslora else rank / own
