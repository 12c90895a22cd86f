"""A parameter that holds several linear maps, as the experts of a mixture do, read through the module that owns it.

No layer stands there that could be called: the module indexes the parameter, multiplies batches with it or hands it to
a grouped kernel. So an adapter acts through the adapted parameter, with which the module is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.bases.parameter import like


class Experts:
    """E matrices (out, in) in one parameter, stored as (E, out, in), as (E, in, out), or as (out, in) where E is 1.

    Which of the two a three-dimensional one is cannot be told from its shape. As for PEFT it is the module's own word:
    `is_transposed`, that transformers sets, says (E, in, out). For a change of low rank the answer decides the layout
    of its file and nothing else.
    """

    kind = "experts"
    kernel = groups = 1
    only_weight: bool = True
    dense: bool = True
    parts: tuple[str, ...] = ()
    types = ("parameters of experts",)

    @staticmethod
    def fits(parameter: Tensor) -> bool:
        return parameter.ndim in (2, 3) and parameter.is_floating_point()

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.turned: bool = self.stored.ndim == 3 and bool(vars(module).get("is_transposed", False))
        self.keeps: tuple[str, str] = (name, "")
        self.count = len(self.stored) if self.stored.ndim == 3 else 1
        self.out_features, self.in_features = self.matrix(self.stored).shape[1:]

    @property
    def stored(self) -> nn.Parameter:
        return self.module._parameters[self.name]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def weight(self) -> Tensor:
        return self.matrix(self.stored)

    @property
    def bias(self) -> Tensor | None:
        return None

    def matrix(self, stored: Tensor) -> Tensor:
        """The parameter as (E, out, in)."""
        if stored.ndim == 2:
            return stored[None]
        return stored.mT if self.turned else stored

    def store(self, weight: Tensor) -> Tensor:
        if self.stored.ndim == 2:
            return weight[0]
        return weight.mT if self.turned else weight

    def hold(self, weight: Tensor) -> nn.Parameter:
        return like(self.store(weight).contiguous(), self.stored)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        return (self.count * rank, self.in_features)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out_features, rank * self.count)

    def __call__(self, x: Any) -> Tensor:
        raise NotImplementedError("the module that owns the parameter is called, not the parameter")

    def apply(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError("the module that owns the parameter is called, not the parameter")

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        raise NotImplementedError("the module that owns the parameter is called, not the parameter")

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        raise NotImplementedError("the module that owns the parameter is called, not the parameter")
