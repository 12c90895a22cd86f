"""A quantised model made ready for training adapters on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune import targets
from deltatune.bases import as_map
from deltatune.bases.packed import PackedLinear
from deltatune.helpers.bare import bare
from deltatune.inject import adapter_parameters
from deltatune.model import PeftModel
from deltatune.notice import warn

# Whose kernels take their inputs in the precision that the model came in, as its norms and embeddings hand them on
_KEPT = ("gptq", "aqlm", "eetq", "torchao", "hqq")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a transformers model, widen its small tensors, and let its layers be recomputed; returns the model.

    Norms, biases, embeddings and the output layer become float32 where they are in half precision, except under kernels
    that need them as they are (GPTQ, AQLM, EETQ, HQQ, torchao). Quantised weights stay. Adapters that are there already
    go on training.

    Args:
        use_gradient_checkpointing: Recompute the layers of a quantised model in the backward pass.
        gradient_checkpointing_kwargs: For `torch.utils.checkpoint`. The reentrant engine is used where it is asked for,
            and the output of the embeddings gets a gradient then.
        auto_clear_cache: Hand the memory of the narrow copies back to the device.
    """
    base: Any = bare(model)
    adapters = {id(parameter) for parameter in adapter_parameters(base)}
    method = _method(base)
    for parameter in base.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    if method is None:
        warn("prepare_model_for_kbit_training: the model is not quantised; all of it is kept in float32 from here on")
    _tell_of_dead_ends(base)
    if method not in _KEPT:
        _widen(base)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if use_gradient_checkpointing and method is not None:
        _recompute(model, {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
    return model


def _method(model: nn.Module) -> str | None:
    """How a model is quantised, in transformers' words or as its layers are; None where it is not."""
    named = getattr(model, "quantization_method", None)
    if named is not None:
        return str(getattr(named, "value", named)).lower()
    if getattr(model, "hqq_quantized", False):
        return "hqq"
    layers = (as_map(module) for module in model.modules())
    return next((type(layer).__name__.lower() for layer in layers if isinstance(layer, PackedLinear)), None)


def _tell_of_dead_ends(model: nn.Module) -> None:
    """Layers whose kernels pass no gradient on, so that adapters below them learn nothing through them."""
    layers = ((path, targets.map_of(module)) for path, module in targets.walk(model))
    dead = [path for path, layer in layers if isinstance(layer, PackedLinear) and not layer.differentiable]
    if dead:
        warn(
            f"prepare_model_for_kbit_training: {len(dead)} layers ({dead[0]}, ...) have a kernel without a gradient "
            "for its input; where they carry an adapter the unpacked weight gives it, so target them all"
        )


def _widen(model: nn.Module) -> None:
    packed = [module for module in model.modules() if isinstance(as_map(module), PackedLinear)]
    codes = {id(parameter) for module in packed for name, parameter in module.named_parameters() if name != "bias"}
    for parameter in model.parameters():
        plain = type(parameter) in (nn.Parameter, Tensor) and id(parameter) not in codes
        if plain and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _recompute(model: Any, options: dict[str, Any]) -> None:
    if options["use_reentrant"] and not isinstance(model, PeftModel):
        model.enable_input_require_grads()
    renamed = getattr(model, "activation_checkpointing_enable", None)  # its name in newer transformers
    (model.gradient_checkpointing_enable if renamed is None else renamed)(options)
