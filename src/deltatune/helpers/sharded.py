"""Models in shards: which modules FSDP wraps, and whole parameters under DeepSpeed's ZeRO-3."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from deltatune.errors import TargetError
from deltatune.helpers.bare import bare
from deltatune.inject import adapted_layers
from deltatune.model import PeftModel


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """The `auto_wrap_policy` of torch's FullyShardedDataParallel for an adapted model.

    Units are the blocks that transformers does not split (or those that FSDP_TRANSFORMER_CLS_TO_WRAP names), every
    adapter, the encoders of prompts, and trained layers: within a unit all parameters train, or none does.

    Raises:
        TargetError: A class that is to be wrapped is not in the model.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    inner = bare(model)
    kinds = {_class_in(inner, name) for name in block_names(inner)}
    wholes: list[nn.Module] = [adapter for _, layer in adapted_layers(inner) for adapter in layer.adapters.values()]
    wholes += list(model.prompt_encoder.values()) if isinstance(model, PeftModel) else []
    units = {id(whole) for whole in wholes}
    inside = {id(part) for whole in wholes for part in whole.modules()} - units

    def own(module: nn.Module) -> bool:
        if id(module) in units or id(module) in inside:
            return id(module) in units  # its tensors are read without its parts being called
        weight = getattr(module, "weight", None) if not any(True for _ in module.children()) else None
        return isinstance(weight, nn.Parameter) and weight.requires_grad

    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=own),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds),
    ]
    return functools.partial(_or_policy, policies=policies)


def block_names(model: nn.Module) -> list[str]:
    """Classes of the blocks that transformers does not split, or those that FSDP_TRANSFORMER_CLS_TO_WRAP names."""
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if named is not None:
        return [name for name in named.split(",") if name]
    return sorted(getattr(model, "_no_split_modules", None) or ())


def _class_in(model: nn.Module, name: str) -> type[nn.Module]:
    for module in model.modules():
        if type(module).__name__ == name:
            return type(module)
    raise TargetError(
        f"fsdp_auto_wrap_policy: no module of {type(model).__name__} is a {name}; set FSDP_TRANSFORMER_CLS_TO_WRAP to "
        "the class of its blocks",
        field="FSDP_TRANSFORMER_CLS_TO_WRAP",
        found=name,
    )


def check_deepspeed_zero3_enabled() -> bool:
    """Whether parameters are in shards by DeepSpeed's ZeRO-3, as transformers knows it."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Within the block parameters are whole under ZeRO-3; elsewhere nothing happens.

    Args:
        modifier_rank: The process whose changes are kept; None where nothing is changed.
        fwd_module: The module whose forward pass uses them outside of its own.
    """
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    options: dict[str, Any] = {"modifier_rank": modifier_rank, "fwd_module": fwd_module}
    with deepspeed.zero.GatheredParameters(param, **options):
        yield
