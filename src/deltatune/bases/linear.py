"""`nn.Linear` and its plain subclasses: y = x W^T + b."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bases.parameter import held, like, plainly_called, value


class Linear:
    kind = "linear"
    kernel = groups = 1
    turned: bool = False
    types: tuple[str, ...] = ("Linear",)
    keeps: tuple[str, str] = ("weight", "bias")
    only_weight: bool = False
    parts: tuple[str, ...] = ()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        # A subclass with a forward of its own (a router, say) is not the map its weight describes.
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            return False
        return module.weight.is_floating_point()

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.module, self.args, self.kwargs = cast(nn.Linear, module), args, kwargs or {}
        self.in_features, self.out_features = self.module.in_features, self.module.out_features

    @property
    def dense(self) -> bool:
        return not self.args and plainly_called(self.module)

    @property
    def dtype(self) -> torch.dtype:
        return held(self.module, "weight").dtype

    @property
    def weight(self) -> Tensor:
        return self.matrix(value(self.module, "weight"))

    @property
    def bias(self) -> Tensor | None:
        return value(self.module, "bias")

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x, *self.args, **self.kwargs)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix.to(h.dtype))

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        return y * vector.to(y.dtype)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored

    def store(self, weight: Tensor) -> Tensor:
        return weight

    def hold(self, weight: Tensor) -> nn.Parameter:
        return like(self.store(weight), self.module.weight)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        return (rank, self.in_features)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out_features, rank)
