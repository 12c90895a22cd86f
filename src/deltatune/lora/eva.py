"""`initialize_lora_eva_weights`: EVA's components and ranks into a model that has the adapter already.

https://arxiv.org/abs/2410.07170
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import inject
from deltatune.errors import ConfigError, MismatchError, StateError
from deltatune.lora import prepared
from deltatune.lora.explained import get_eva_state_dict
from deltatune.lora.inputs import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from deltatune.notice import warn
from deltatune.patterns import pattern_value
from deltatune.registry import METHODS
from deltatune.state_dict import ROOT


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give every linear layer of an EVA adapter its components and its rank; a layer of rank 0 loses the adapter.

    The config's `rank_pattern`, `alpha_pattern` and `target_modules` say afterwards what is there. Make the optimizer
    after this. Arguments are those of `get_eva_state_dict`, or what it returned.

    Raises:
        StateError: The model is no `PeftModel`, or has several active adapters.
        ConfigError: The adapter is not EVA's, or there are neither data nor components.
    """
    _check(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError(
                "initialize_lora_eva_weights: dataloader is needed where eva_state_dict is not given",
                field="dataloader",
            )
        how = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, *how, adapter_name, gather_distributed_inputs, show_progress_bar
        )
    bare, config = model.get_base_model(), model.peft_config[adapter_name]
    layers = {path: layer for path, layer in inject.adapted_layers(bare) if adapter_name in layer.adapters}
    found = {path: A for path in layers if (A := _of(eva_state_dict, path)) is not None}
    changed = with_ranks(config, {path: len(A) for path, A in found.items()}, list(layers))
    fresh = {path: _rebuilt(layers[path], A, changed, path) for path, A in found.items() if len(A)}
    _exchange(bare, layers, fresh, [path for path, A in found.items() if not len(A)], adapter_name)
    vars(config).update(vars(changed))
    if missing := [path for path in layers if path not in found]:
        warn(f"initialize_lora_eva_weights: {missing[:5]} keep LoRA's own start, EVA has none for them")


def _check(model: Any, name: str) -> None:
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise StateError(
            "initialize_lora_eva_weights: the model has to be a PeftModel; call get_peft_model first",
            field="model",
            found=type(model).__name__,
            expected="PeftModel",
        )
    if len(model.active_adapters) > 1:
        raise StateError(
            f"initialize_lora_eva_weights: {model.active_adapters} are active; activate one with set_adapter",
            found=model.active_adapters,
        )
    if name not in configs or configs[name].init_lora_weights != "eva":
        raise ConfigError(
            f"initialize_lora_eva_weights: adapter {name!r} is not one of init_lora_weights='eva'",
            field="adapter_name",
            found=name,
        )


def _of(components: dict[str, Tensor], path: str) -> Tensor | None:
    return components.get(ROOT + path, components.get(path))


def with_ranks(config: Any, ranks: dict[str, int], paths: list[str]) -> Any:
    """A copy of the config in which the layers have these ranks, and those of rank 0 are no targets."""
    changed = copy.copy(config)
    changed.rank_pattern, changed.alpha_pattern = {}, {}
    for path in paths:
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        rank = ranks.get(path, r)
        if config.eva_config.adjust_scaling_factors:
            alpha *= rank / r
        changed.rank_pattern |= {} if rank in (0, config.r) else {path: rank}
        changed.alpha_pattern |= {} if rank == 0 or alpha == config.lora_alpha else {path: alpha}
    if 0 in ranks.values():
        changed.target_modules = {path for path in paths if ranks.get(path) != 0}
    return changed


def _rebuilt(layer: Any, A: Tensor, config: Any, path: str) -> nn.Module:
    base, kind = layer.as_map(), METHODS[config.peft_type].adapter
    assert kind is not None
    if A.ndim != 2 or A.shape[1] != base.in_features:
        raise MismatchError(
            f"eva_state_dict: {path} has shape {tuple(A.shape)}, expected (rank, {base.in_features})",
            path=path,
            found=tuple(A.shape),
        )
    prepared.leave(layer.base_layer, "eva", {"A": A})
    try:
        return kind.build(base, config, path)
    finally:
        prepared.forget(layer.base_layer)


def _exchange(bare: nn.Module, layers: dict[str, Any], fresh: dict[str, nn.Module], gone: list[str], name: str) -> None:
    for path, adapter in fresh.items():
        old = next(layers[path].adapters[name].parameters())
        adapter.to(old.device, old.dtype).requires_grad_(old.requires_grad)
        layers[path].add(name, adapter)
    inject.remove_at(bare, gone, name)
