"""LoRA+: B learns `ratio` times as fast as A.   https://arxiv.org/abs/2402.12354

With one rate for both, the features of a wide layer hardly move: the step of B has to be larger than that of A by a
factor that grows with the width. A ratio around 16 is the paper's advice.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.optim import Optimizer

from deltatune.checks import finite_positive
from deltatune.inject import adapted_layers
from deltatune.notice import warn
from deltatune.registry import METHODS


def loraplus_groups(
    model: nn.Module,
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:
    """The trained parameters in four groups, for any optimizer of torch.

    Args:
        lr: Rate of the A factors and of all else that is a matrix.
        loraplus_lr_ratio: B factors and vectors (biases, gains) have `lr` times this; at least 1.
        loraplus_weight_decay: Of all groups but that of biases and norms.
        loraplus_lr_embedding: Rate of both factors of embeddings.

    Returns:
        Groups in the order A, embeddings, B, B without decay; some may be empty.

    Raises:
        ConfigError: A rate or the ratio is not a positive number.
    """
    finite_positive("loraplus_groups", "lr", lr)
    finite_positive("loraplus_groups", "loraplus_lr_ratio", loraplus_lr_ratio)
    if loraplus_lr_ratio < 1:
        warn(f"loraplus_lr_ratio={loraplus_lr_ratio:g} lets B learn slower than A; LoRA+ asks for 1 or more")
    a, embedding, b, b_plain = _sorted(model)
    if not b:
        warn("LoRA+ found no trained B factor, so it only splits matrices from vectors; is a LoRA adapter active?")
    fast, decay = lr * loraplus_lr_ratio, loraplus_weight_decay
    return [
        {"params": a, "lr": lr, "weight_decay": decay},
        {"params": embedding, "lr": loraplus_lr_embedding, "weight_decay": decay},
        {"params": b, "lr": fast, "weight_decay": decay},
        {"params": b_plain, "lr": fast, "weight_decay": 0.0},
    ]


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer of the given class over `loraplus_groups`.

    Args:
        kwargs: `loraplus_weight_decay` and `loraplus_lr_embedding` are as in `loraplus_groups`, all others are the
            class's.
    """
    own = {name: kwargs.pop(name) for name in ("loraplus_weight_decay", "loraplus_lr_embedding") if name in kwargs}
    if kwargs.get("weight_decay") and "loraplus_weight_decay" not in own:
        warn("create_loraplus_optimizer: weight_decay has no effect on any group; give it as loraplus_weight_decay")
    groups = loraplus_groups(model, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, **own)
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    _keep_embeddings_precise(model, optimizer)
    return optimizer


def _sorted(model: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """Trained parameters as A and other matrices, those on embeddings, B and vectors, B without weight decay."""
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    writing = {f"{method.pairs}_B" for method in METHODS.values() if method.pairs}
    embeddings = _of_embeddings(model)
    a, embedding, b, b_plain = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            embedding.append(parameter)
        elif parameter.ndim == 1 or writing & set(name.split(".")):
            (b if name in decayed else b_plain).append(parameter)
        else:
            a.append(parameter)
    return a, embedding, b, b_plain


def _of_embeddings(model: nn.Module) -> set[int]:
    layers = [layer for _, layer in adapted_layers(model) if not layer.is_block]
    return {id(p) for layer in layers if layer.as_map().kind == "embedding" for p in layer.adapters.parameters()}


def _keep_embeddings_precise(model: nn.Module, optimizer: Optimizer) -> None:
    """bitsandbytes' 8-bit optimizers are unstable on embeddings, whose states it can keep in 32 bits."""
    library = sys.modules.get("bitsandbytes")
    if library is not None and isinstance(optimizer, library.optim.optimizer.Optimizer8bit):
        manager = library.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
