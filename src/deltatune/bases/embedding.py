"""`nn.Embedding`: a linear map on one-hot rows, y = E[i] = onehot(i) W^T with W = E^T of shape (width, rows)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bases.parameter import like


class Embedding:
    kind = "embedding"
    kernel = groups = 1
    turned: bool = True
    dense: bool = True
    types = ("Embedding",)
    keeps: tuple[str, str] = ("weight", "bias")
    only_weight: bool = False
    parts: tuple[str, ...] = ()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        # max_norm rewrites the table while reading it; a forward of its own is understood when it only scales.
        own = type(module).forward is not nn.Embedding.forward
        return isinstance(module, nn.Embedding) and module.max_norm is None and (not own or _scale(module) is not None)

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.module, self.args, self.kwargs = cast(nn.Embedding, module), args, kwargs or {}
        self.in_features, self.out_features = self.module.num_embeddings, self.module.embedding_dim
        self.embed_scale = _scale(module)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    @property
    def weight(self) -> Tensor:
        return self.matrix(self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x, *self.args, **self.kwargs)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        module = self.module
        found = F.embedding(x, weight.T, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
        if self.embed_scale is not None:
            found = found * _like(self.embed_scale, found)
        return found.to(module.weight.dtype)

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


def _scale(module: nn.Module) -> float | Tensor | None:
    """The factor that scaled word embeddings (BART, Gemma) apply to their rows."""
    scale = getattr(module, "embed_scale", None)
    return scale if isinstance(scale, (float, int, Tensor)) else None


def _like(scale: float | Tensor, found: Tensor) -> float | Tensor:
    return scale.to(found.dtype) if isinstance(scale, Tensor) else scale
