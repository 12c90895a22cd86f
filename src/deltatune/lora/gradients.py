"""`preprocess_loraga`: what LoRA-GA takes from data, left on the layers for `get_peft_model`.

https://arxiv.org/abs/2407.05000
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError, DataError, TargetError
from deltatune.lora import prepared
from deltatune.lora.cache import read_cache, write_cache
from deltatune.lora.targeted import Targeted, in_mode, targeted

_NAME = "_peft_loraga_grad"  # in cache files
_KINDS = frozenset({"linear", "embedding", "conv"})


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Collect the gradient of the loss for every targeted weight, and keep its 2r leading directions.

    Args:
        model: The bare model; it is left as it was, its gradients and what trains in it too.
        lora_config: A LoraConfig with init_lora_weights="lora_ga".
        train_step: Runs forward and backward, on one batch or on several; their mean is what counts.
        cache_file: Where the gradients are kept; read instead of calling `train_step` when it is there.

    Raises:
        ConfigError: 2r is more than the sides of a layer.
        DataError: A weight got no gradient, or one that is not finite.
    """
    lora_config.validate()
    layers = targeted(model, lora_config, "lora_ga", _KINDS)
    for path, layer in layers.items():
        _check(path, layer)
    gradients = read_cache(cache_file, [f"{path}.{_NAME}" for path in layers])
    if gradients is None:
        gradients = {f"{path}.{_NAME}": g for path, g in gradients_of(model, layers, train_step).items()}
        write_cache(cache_file, gradients)
    for path, layer in layers.items():
        gradient = layer.map.matrix(gradients.pop(f"{path}.{_NAME}").to(layer.map.weight.device)).float()
        prepared.leave(layer.module, "lora_ga", leading(gradient, layer.r))


def _check(path: str, layer: Targeted) -> None:
    weight = layer.module._parameters.get(layer.map.keeps[0])
    if weight is None or not weight.is_floating_point() or tuple(layer.map.matrix(weight).shape) != _sides(layer):
        raise TargetError(
            f"target {path!r} is quantised, and LoRA-GA needs the gradient of its weight; load the base unquantised",
            field="target_modules",
            path=path,
        )
    if 2 * layer.r > min(_sides(layer)):
        raise ConfigError(
            f"LoraConfig: init_lora_weights='lora_ga' takes 2r={2 * layer.r} directions of the gradient of {path}, "
            f"which has {min(_sides(layer))}; use r={min(_sides(layer)) // 2}, or rank_pattern for this layer",
            field="r",
            path=path,
            found=layer.r,
            expected=min(_sides(layer)) // 2,
        )


def _sides(layer: Targeted) -> tuple[int, int]:
    return layer.map.out_features, layer.map.in_features


@torch.no_grad()
def leading(gradient: Tensor, r: int) -> dict[str, Tensor]:
    """U (out, 2r), S (2r) and V (in, 2r) of a gradient (out, in), by the randomised decomposition of the authors."""
    U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    return {"U": U[:, : 2 * r].clone(), "S": S[: 2 * r].clone(), "V": V[:, : 2 * r].clone()}


def gradients_of(model: nn.Module, layers: dict[str, Targeted], step: Callable[[], Any]) -> dict[str, Tensor]:
    """Path -> mean gradient of a weight over the backward passes of `step`, in the weight's own layout."""
    weights = {path: layer.module._parameters[layer.map.keeps[0]] for path, layer in layers.items()}
    passes = dict.fromkeys(weights, 0)

    def count(path: str) -> Callable[[Tensor], None]:
        return lambda _: passes.update({path: passes[path] + 1})

    with in_mode(model, True), _only_these_train(model, list(weights.values())), torch.enable_grad():
        handles = [w.register_post_accumulate_grad_hook(count(path)) for path, w in weights.items()]  # type: ignore
        try:
            step()
        finally:
            for handle in handles:
                handle.remove()
        found = {path: w.grad / passes[path] for path, w in weights.items() if passes[path]}  # type: ignore[operator]
    wrong = [path for path in weights if path not in found or not found[path].isfinite().all()]
    if wrong:
        raise DataError(
            f"preprocess_loraga: the weight of {wrong[0]} got "
            f"{'a gradient that is not finite' if wrong[0] in found else 'no gradient'}; train_step has to run the "
            "model forward and backward",
            path=wrong[0],
            found=wrong,
        )
    return found


@contextmanager
def _only_these_train(model: nn.Module, weights: list[Any]) -> Iterator[None]:
    """Gradients flow to these weights alone; afterwards all parameters train, and have gradients, as before."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        for parameter, _, _ in before:
            parameter.grad = None
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, trains, gradient in before:
            parameter.requires_grad_(trains)
            parameter.grad = gradient
