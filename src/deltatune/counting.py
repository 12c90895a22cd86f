"""How many numbers a model's parameters stand for: packed ones as the matrix they hold, those in shards as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from torch import nn

from deltatune.bases import as_map
from deltatune.bases.packed import PackedLinear


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters, each counted once."""
    return counts(model.parameters(), packed_sizes(model))


def counts(parameters: Iterable[nn.Parameter], packed: dict[int, int]) -> tuple[int, int]:
    """The same of some parameters, with the sizes of the packed ones."""
    sizes = [(packed.get(id(parameter)) or _size(parameter), parameter.requires_grad) for parameter in parameters]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def packed_sizes(model: nn.Module) -> dict[int, int]:
    """Numbers in the matrix of each quantised layer, by the id of the parameter that holds its codes."""
    found: dict[int, int] = {}
    for module in model.modules():
        codes = [p for p in module._parameters.values() if p is not None and not p.is_floating_point()]
        layer = as_map(module) if codes else None
        if isinstance(layer, PackedLinear):
            found[id(max(codes, key=lambda p: p.numel()))] = layer.in_features * layer.out_features
    return found


def _size(parameter: Any) -> int:
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)  # embeddings in 4 bits
    return int(getattr(parameter, "ds_numel", 0)) or (parameter.numel() if shape is None else prod(shape))
