"""Norms, and any other module that computes with one `weight` and perhaps a `bias`, in whatever way.

Its output need not be linear in its input. Seen as a map it is a matrix of one column (a norm's gains), or of the
weight's first axis by all others, and it is run with another weight by being called with it.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.bases.parameter import like


class OneWeight:
    kind = "module"
    kernel = groups = 1
    turned: bool = False
    dense: bool = True
    types = ("norms and other modules with one weight",)
    keeps: tuple[str, str] = ("weight", "bias")
    only_weight: bool = False
    parts: tuple[str, ...] = ()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or weight.ndim == 0:
            return False
        renormed = getattr(module, "max_norm", None) is not None  # an embedding that rewrites its table
        inside = any(True for _ in module.children()) or any(True for _ in module.buffers())
        return not inside and not renormed and module._parameters.keys() <= {"weight", "bias"}

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs or {}
        self.shape = self.stored.shape
        self.out_features, self.in_features = self.shape[0], prod(self.shape[1:])

    @property
    def stored(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def weight(self) -> Tensor:
        return self.matrix(self.stored)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)  # type: ignore[return-value]

    def __call__(self, x: Tensor) -> Any:
        return self.module(x, *self.args, **self.kwargs)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        values = {"weight": self.store(weight).to(self.dtype)}
        if bias is not None:
            values["bias"] = bias.to(self.dtype)
        return call_with(self.module, values, (x, *self.args), self.kwargs)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        raise NotImplementedError("no method of matrices adapts a module that is no linear map")

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        raise NotImplementedError("no method of matrices adapts a module that is no linear map")

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.reshape(len(stored), -1)

    def store(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.shape)

    def hold(self, weight: Tensor) -> nn.Parameter:
        return like(self.store(weight), self.stored)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        return (rank, self.in_features)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out_features, rank)


def call_with(module: nn.Module, values: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the module answers with other parameters of its own."""
    if torch.compiler.is_compiling() or "forward" in vars(module):  # a forward of the instance's own is bound to it
        return torch.func.functional_call(module, values, args, kwargs)
    return _with(module, values)(*args, **kwargs)


def _with(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """The module with other parameters; the module itself, which other threads may be calling, stays as it is."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _parameters={**module._parameters, **values})
    return twin
