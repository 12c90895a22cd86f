"""What adapters change, layer by layer: the weight, as factors where they are at hand, and the bias."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import inject
from deltatune.adapter import Adapter, LinearMap
from deltatune.combine.product import Matrix, Product
from deltatune.errors import ConversionError, StateError
from deltatune.layer import AdaptedLayer
from deltatune.methods.lora import LoRA


@dataclass(frozen=True)
class Change:
    """W' - W (out, in) and b' - b (out,) of one adapter on one layer; None: the bias stays.

    Attributes:
        groups: Of a grouped convolution, each of which has factors of its own.
        dtype: Of the adapter's parameters.
    """

    weight: Matrix
    bias: Tensor | None
    groups: int
    dtype: torch.dtype


def layers_of(model: nn.Module, name: str) -> Iterator[tuple[str, AdaptedLayer]]:
    """Paths and layers on which an adapter of that name is; a tied layer is one of them, a shared one comes once."""
    return ((path, layer) for path, layer in inject.adapted_layers(model) if name in layer.adapters)


def obstacle(layer: AdaptedLayer, name: str) -> str | None:
    """Why LoRA cannot hold what an adapter does on a layer; None if it can."""
    adapter: Any = layer.adapters[name]
    if adapter.mergeable is not True:
        return f"no weight can hold {type(adapter).__name__}, because {adapter.mergeable}"
    base = layer.as_map()
    return None if LoRA.fits(base) is True else f"it is a {type(layer.base_layer).__name__}, which LoRA cannot adapt"


def check(model: nn.Module, name: str) -> None:
    """
    Raises:
        ConversionError: LoRA cannot hold what the adapter does, or it is on no layer.
        StateError: Adapters are merged, so that the layers no longer have the weights that it changes.
    """
    found = list(layers_of(model, name))
    if not found:
        raise ConversionError(f"adapter {name!r} is on no layer of this model", field="adapter_name", found=name)
    for path, layer in found:
        if layer.merged:
            raise StateError(f"{path} has merged adapters; call unmerge_adapter() first", path=path)
        if reason := obstacle(layer, name):
            raise ConversionError(f"adapter {name!r} at {path}: {reason}", path=path, found=name)


@torch.no_grad()
def read(layer: AdaptedLayer, name: str) -> Change:
    """What one adapter changes on a layer, taken by itself, without the layer's other adapters."""
    adapter: Any = layer.adapters[name]
    base = layer.as_map()
    dtype = next((p.dtype for p in adapter.everything() if p.is_floating_point()), base.dtype)
    with _evaluating(layer):
        bias, new = base.bias, adapter.adapted_bias(base)
        changed = None if new is None or new is bias else new if bias is None else new - bias
        return Change(
            _weight(adapter, base), changed if changed is not None and changed.any() else None, base.groups, dtype
        )


def _weight(adapter: Adapter, base: LinearMap) -> Matrix:
    factors = adapter.low_rank(base) if _says(type(adapter)) else None
    if factors is not None:
        return Product(*factors).to(torch.promote_types(factors[0].dtype, torch.float32))
    weight = base.weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # a small change of a half would be rounded
    adapted = adapter.adapt(weight)
    if adapted is weight:
        return Product(weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1]))
    return adapted - weight


def _says(kind: type[Adapter]) -> bool:
    """Whether the factors are those of its own `adapt`, not of one that it has replaced."""
    order = kind.__mro__
    owner = {name: next(i for i, cls in enumerate(order) if name in vars(cls)) for name in ("adapt", "low_rank")}
    return owner["low_rank"] <= owner["adapt"]


@contextmanager
def _evaluating(layer: AdaptedLayer) -> Iterator[None]:
    training = layer.training
    try:
        layer.eval()
        yield
    finally:
        layer.train(training)
