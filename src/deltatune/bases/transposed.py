"""transformers' `Conv1D` (GPT-2): a linear layer that stores its weight as (in, out)."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bases.parameter import held, like, plainly_called, value


class Transposed:
    kind = "linear"
    kernel = groups = 1
    turned: bool = True
    types = ("Conv1D",)
    keeps: tuple[str, str] = ("weight", "bias")
    only_weight: bool = False
    parts: tuple[str, ...] = ()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        # No instance can exist before its module is loaded, and loading transformers here would be costly.
        library = sys.modules.get("transformers.pytorch_utils")
        return library is not None and isinstance(module, library.Conv1D)

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.module, self.args, self.kwargs = cast(Any, module), args, kwargs or {}
        self.in_features, self.out_features = self.module.weight.shape

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
        return stored.T

    def store(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()

    def hold(self, weight: Tensor) -> nn.Parameter:
        return like(self.store(weight), self.module.weight)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        return (rank, self.in_features)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out_features, rank)
