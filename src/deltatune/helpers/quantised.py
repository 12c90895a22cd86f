"""What programs ask about quantised layers and models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune import targets
from deltatune.bases.packed import PackedLinear
from deltatune.errors import TargetError


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The matrix (out, in) of a quantised layer in floating point; the stored weight of any other layer.

    Raises:
        TargetError: The module has no weight.
    """
    layer = targets.map_of(module)
    if isinstance(layer, PackedLinear):
        with torch.no_grad():
            return layer.weight
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TargetError(f"dequantize_module_weight: {type(module).__name__} has no weight", field="module")
    return weight


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The model's quantization config, if it is quantised by this method (as "gptq"); None otherwise."""
    named = getattr(model, "quantization_method", None)
    if named is None or str(getattr(named, "value", named)) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)
